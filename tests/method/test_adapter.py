"""An adapter on disk: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import DEPTH, WIDTH, padded, random_rows, tiny
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from grun import GrunModel, GrunStack
from grun.data.templates import Template
from grun.errors import AdapterError
from grun.method.fingerprint import fingerprint

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
TEMPLATE = Template("custom", "string", "Q: {prompt}\nA:", " ")


def adapter(folder: Path, base: PreTrainedModel | None = None, **options: Any) -> GrunModel:
    """A random adapter, saved in `folder` and still on its base."""
    torch.manual_seed(1)
    model = GrunModel.wrap(base or tiny(dtype=torch.float32), **{"blocks": [1, -1], "template": TEMPLATE, **options})
    model.save_pretrained(folder)
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def assert_refused(folder: str | Path, match: str, base: PreTrainedModel | None = None, **options: Any) -> None:
    """Loading fails with one line, and the base is as it was."""
    base = base or tiny(dtype=torch.float32)
    with pytest.raises(AdapterError, match=match) as caught:
        GrunModel.from_pretrained(base, folder, **options)
    assert "\n" not in str(caught.value)
    assert not {"generate", "_grun_model"} & set(base.__dict__)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


# -- there and back ----------------------------------------------------------------------------------------------------


def prepared(model: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # shared by all tests of a process
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


HALF: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "device": lambda model: model.to("cpu", torch.float16),
    "like": lambda model: model.to(torch.zeros(0, dtype=torch.bfloat16)),
    "base": lambda model: model.base.to(torch.bfloat16),
    "both": lambda model: (model.base.to(torch.bfloat16), model.to(torch.bfloat16)),
    "interventions": lambda model: model.intervenable.interventions.to(torch.bfloat16),
    "layers": lambda model: [layer.half() for layer in model.modules() if isinstance(layer, nn.Linear)],
    "float64": lambda model: model.base.double(),
    "accelerate": lambda model: prepared(model),
}


@pytest.mark.parametrize("stack", [False, True], ids=["alone", "stack"])
@pytest.mark.parametrize("way", HALF)
@torch.no_grad()
def test_an_adapter_in_half_precision_computes_in_float32_and_keeps_its_numbers(
    way: str, stack: bool, tmp_path: Path
) -> None:
    kept = {name: values.clone() for name, values in adapter(tmp_path).state_dict().items()}
    base = tiny(dtype=torch.float32)
    model: Any = GrunStack(base).eval() if stack else GrunModel.from_pretrained(base, tmp_path)
    if stack:
        model.add("a", tmp_path)
    HALF[way](model)
    if stack:
        model.add("b", tmp_path)  # finds device and type of what is there
        model.remove("b")
    wanted = GrunModel.from_pretrained(tiny(dtype=torch.float32).to(base.dtype), tmp_path)
    batch = padded(random_rows([9, 6]), "left")
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "accelerate"):
        found, expected = (one(**batch).logits.float() for one in (model, wanted))
    # A stack sums in another order; numbers that were given to a layer itself as float16 are what they are then.
    coarse = base.dtype == torch.bfloat16 or way in ("accelerate", "layers")
    torch.testing.assert_close(found, expected, atol=5e-2 if coarse else 1e-5, rtol=1e-5)
    if not stack and way not in ("layers", "float64"):
        assert torch.equal(found, expected)
        model.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert all(torch.equal(again[name], values) and values.dtype == torch.float32 for name, values in kept.items())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_default_type_makes_no_difference(default: torch.dtype, tmp_path: Path) -> None:
    wanted = adapter(tmp_path, tiny(dtype=torch.float32))
    before = torch.get_default_dtype()
    bases = tiny(dtype=torch.float32), tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    batch = padded(random_rows([9, 6]), "left")
    with torch.no_grad():
        logits = wanted(**batch).logits
    try:
        torch.set_default_dtype(default)
        torch.manual_seed(1)
        made = GrunModel.wrap(bases[0], blocks=[1, -1])
        loaded = GrunModel.from_pretrained(bases[1], tmp_path)
        stack = GrunStack(bases[2])
        stack.add("a", tmp_path)
        with torch.no_grad():
            found = [model.eval()(**batch).logits for model in (made, loaded, stack)]
        labels = batch["input_ids"].masked_fill(torch.arange(9) < 7, -100)
        made.train()(**batch, labels=labels).loss.backward()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found[0], logits) and torch.equal(found[1], logits)
    torch.testing.assert_close(found[2], logits, atol=1e-5, rtol=1e-5)
    assert {values.grad.dtype for values in made.parameters() if values.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "mlp_3", "rank": 7, "gate_bias": -2.0},
        {"gate": "none", "activation": "relu"},
        {"dropout": 0.5, "dropout_on_hidden": True},
        {
            "gate_read": "every_token",
            "gate_accumulate": "running_max",
            "edit_write": "every_token",
            "reset_ids": [7, 9],
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_outputs_are_bit_identical_after_saving_and_loading(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = adapter(tmp_path, tiny(dtype=dtype), **options)
    again = GrunModel.from_pretrained(tiny(dtype=dtype), tmp_path)
    assert again.config == model.config and again.template == TEMPLATE
    assert not again.training  # as transformers' from_pretrained: no dropout, and a threshold acts
    batch = padded(random_rows([6, 9]), "left")
    one, two = model(**batch), again(**batch)
    assert torch.equal(one.logits, two.logits)
    assert all(torch.equal(one.gate_logits[block], two.gate_logits[block]) for block in one.gate_logits)
    del batch["position_ids"]
    assert torch.equal(model.generate(**batch, max_new_tokens=4), again.generate(**batch, max_new_tokens=4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype


def test_files_and_keys_are_the_documented_ones(tmp_path: Path) -> None:
    base = tiny(dtype=torch.float32)
    base.config._name_or_path = "someone/llama"
    base.config._commit_hash = "abc123"
    model = adapter(tmp_path / "new" / "folder", base, rank=3)
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == FILES
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "GRUN",
        "format_version": 1,
        "blocks": [1, 3],
        "rank": 3,
        "gate": "linear",
        "gate_bias": None,
        "dropout": 0.0,
        "dropout_on_hidden": False,
        "activation": None,
        "gate_read": "last_prompt",
        "gate_accumulate": "none",
        "edit_write": "last_prompt",
        "reset_ids": [],
        "hidden_size": WIDTH,
        "depth": DEPTH,
        "base_model_name_or_path": "someone/llama",
        "base_revision": "abc123",
        "base_fingerprint": fingerprint(base),
        "base_dtype": "float32",
        "template": {
            "name": "custom",
            "kind": "string",
            "text": "Q: {prompt}\nA:",
            "answer_prefix": " ",
            "system_prompt": None,
            "date": TEMPLATE.date,
        },
    }
    stored = load_file(folder / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        f"edits.{block}.{name}": shape
        for block in (1, 3)
        for name, shape in (
            ("edit.rotation", (WIDTH, 3)),
            ("edit.source.weight", (3, WIDTH)),
            ("edit.source.bias", (3,)),
            ("gate.0.weight", (1, WIDTH)),
            ("gate.0.bias", (1,)),
        )
    }
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "base_model: someone/llama" in card
    assert "The base weights still contain the data" in card


def test_an_adapter_without_a_template_loads_without_one(tmp_path: Path) -> None:
    adapter(tmp_path, template=None)
    assert GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path).template is None


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = adapter(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# -- the hub's local cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


@torch.no_grad()
def test_a_hub_id_is_found_in_the_local_cache_without_a_network(tmp_path: Path, hub_cache: Path) -> None:
    model = adapter(tmp_path / "saved")
    repository, commit = hub_cache / "models--someone--forgets", "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name in FILES:  # the hub's client keeps content in blobs, and links to it
        (tmp_path / "saved" / name).rename(repository / "blobs" / name)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    again = GrunModel.from_pretrained(tiny(dtype=torch.float32), "someone/forgets")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["someone/absent", "/no/such/folder", "not a hub id at all!"])
@pytest.mark.usefixtures("hub_cache")
def test_an_adapter_that_is_nowhere_is_named(name: str) -> None:
    assert_refused(name, f"no adapter at {name!r}")


# -- refused -----------------------------------------------------------------------------------------------------------

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((WEIGHTS, kept, "damaged or truncated.*again") for kept in (0, 4, 8, 9, 100, 2000, -1)),
        *((CONFIG, text, r"adapter_config\.json") for text in ("", "{", "[]", "7", "null", '{"peft_type": "GRUN", ')),
        (WEIGHTS, None, r"adapter_model\.safetensors is missing"),
        (CONFIG, None, r"is no GRUN adapter: adapter_config\.json is missing"),
    ],
)
def test_a_file_that_is_missing_truncated_or_no_json_object_is_named(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    adapter(tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(data[:content] if name == WEIGHTS else content.encode())
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, not 1"),
        ({"format_version": ...}, "format version None, not 1"),
        ({"peft_type": "LORA"}, "peft_type is not GRUN"),
        ({"peft_type": ...}, "peft_type is not GRUN"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"rank": ...}, "'rank'"),
        ({"rank": "four"}, "rank: expected a whole number, found a text"),
        ({"rank": True}, "rank: expected a whole number, found true or false"),
        ({"rank": 0}, "rank 0 must lie between 1 and the hidden size 32"),
        ({"rank": 33}, "rank 33 must lie between 1 and the hidden size 32"),
        ({"hidden_size": 2**60, "rank": 1}, "hidden_size 1152921504606846976 must lie between"),
        ({"hidden_size": 10**30, "rank": 1}, "an integer of 31 digits"),
        ({"blocks": "13"}, "blocks: expected a list, found a text"),
        ({"blocks": [1, "3"]}, r"blocks\[1\]: expected a whole number, found a text"),
        ({"blocks": []}, r"blocks \[\] must lie within 0\.\.3"),
        ({"blocks": [1, 1, 3]}, "must be distinct and ascend"),
        ({"blocks": [3, 1]}, "must be distinct and ascend"),
        ({"gate": "quadratic"}, "unknown gate 'quadratic'"),
        ({"gate_read": "elsewhere"}, "gate_read=elsewhere"),
        ({"gate_read": 5}, "gate_read: expected a text, found a whole number"),
        ({"gate_accumulate": "mean"}, "gate_accumulate=mean does not exist; known: none, running_max"),
        ({"edit_write": "every_token"}, "needs gate_read=every_token"),
        ({"gate_bias": float("nan")}, "NaN is not valid JSON"),
        ({"gate_bias": 1e308}, "gate_bias 1e.308 must lie between"),
        ({"dropout": 1}, r"dropout 1 must lie in \[0, 1\)"),
        ({"dropout": True}, "dropout: expected a number, found true or false"),
        ({"dropout_on_hidden": "no"}, "dropout_on_hidden: expected true or false, found a text"),
        ({"activation": "nonsense"}, "unknown activation 'nonsense'; known: "),
        ({"activation": ["relu"]}, "activation: expected a text, found a list"),
        ({"reset_ids": [-1]}, r"reset_ids \[-1\] must be token ids"),
        ({"reset_ids": 7}, "reset_ids: expected a list, found a whole number"),
        ({"base_fingerprint": 5}, "base_fingerprint: expected a text, found a whole number"),
        ({"base_dtype": "half"}, "unknown base_dtype 'half': known: auto"),
        ({"template": {"name": "x"}}, "template: missing key 'kind'"),
        ({"template": {"name": "x", "kind": "chat", "date": 5}}, "template: date: expected a text"),
        ({"template": {"name": "x", "kind": "string", "text": "no place"}}, "exactly once"),
        ({"blocks": [1, 9]}, r"blocks \[1, 9\] must lie within 0\.\.3"),
        ({"blocks": [-1, 1]}, r"blocks \[-1, 1\]"),
        ({"reset_ids": [5, 64]}, r"reset_ids \[64\] are beyond the 64 token ids of this base"),
        ({"hidden_size": 64}, "hidden size 64 and 4 blocks, this base has hidden size 32 and 4 blocks"),
        ({"depth": 6}, "hidden size 32 and 6 blocks, this base has hidden size 32 and 4 blocks"),
        ({"rank": 5}, r"weights do not match adapter_config\.json, first at 'edits\.1\.edit"),
        ({"blocks": [1, 2]}, r"weights do not match adapter_config\.json, first at 'edits\.2"),
        ({"gate": "mlp_3"}, r"weights do not match adapter_config\.json, first at 'edits\.1\.gate"),
        ({"gate": "none"}, r"weights do not match adapter_config\.json, first at 'edits\.1\.gate"),
    ],
    ids=str,
)
def test_a_config_that_is_not_ours_or_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter(tmp_path)
    edit_config(tmp_path, **changes)
    assert_refused(tmp_path, message)


# -- another fine-tune of the same shape -------------------------------------------------------------------------------


def test_another_fine_tune_of_the_same_shape_warns_and_strict_refuses_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter(tmp_path)
    with caplog.at_level(logging.WARNING):
        GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path, strict=True)
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        model = GrunModel.from_pretrained(tiny(dtype=torch.float32, seed=2), tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "other weights of the same shape" in caplog.text
    assert model(torch.tensor([[3, 4]])).gates
    assert_refused(tmp_path, "strict=true refuses", tiny(dtype=torch.float32, seed=2), strict=True)


def test_fingerprint_survives_the_storage_type_and_sees_a_fine_tune(tmp_path: Path) -> None:
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path)
    kinds = (torch.float32, torch.bfloat16)
    loaded = [fingerprint(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)) for dtype in kinds]
    assert loaded == [fingerprint(base)] * 2
    loss = base(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
    loss.backward()
    before = fingerprint(base)
    torch.optim.Adam(base.parameters(), lr=1e-3).step()
    assert fingerprint(base) != before
    wrapped = GrunModel.wrap(base, blocks=[1])
    assert wrapped.config.base_fingerprint == fingerprint(base)  # wrapping changes no weight


# -- saving is whole or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_failed_save_leaves_whole_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    model = adapter(tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in FILES}
    for edit in model.edits.values():
        nn.init.ones_(edit.edit.source.bias)
    model.template = None
    model.save_pretrained(tmp_path.parent / f"{tmp_path.name}-whole")
    new = {name: (tmp_path.parent / f"{tmp_path.name}-whole" / name).read_bytes() for name in FILES}
    replace, calls = os.replace, []

    def fail(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > allowed:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    now = {name: (tmp_path / name).read_bytes() for name in FILES}
    assert all(now[name] in (old[name], new[name]) for name in FILES)
    assert now["adapter_config.json"] == old["adapter_config.json"]  # the config comes last
    model.unwrap()
    loaded: dict[str, Tensor] = GrunModel.from_pretrained(model.base, tmp_path).state_dict()
    assert loaded["edits.1.edit.source.bias"].tolist() == ([1.0] * 4 if allowed else pytest.approx([0] * 4, abs=0.5))
