"""GRUN by PEFT's calls: bit for bit what GrunModel gives, adapters by name, and what is refused."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft_models import BARE, DESIGNS, PROMPTS, answers, logits, made
from tiny import padded, random_rows, tiny
from torch import Tensor
from transformers import LogitsProcessorList, Trainer, TrainingArguments

from grun import GrunModel, GrunStack
from grun.errors import AdapterError, ConfigError, ModelError
from grun.peft import GrunPeftConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {design: tmp_path_factory.mktemp(design) for design in DESIGNS}
    for design, folder in found.items():
        made(design).save_pretrained(folder)
    return found


def of_options(design: str, **changes: Any) -> GrunPeftConfig:
    options = {**DESIGNS[design], **changes}
    names = ("gate_read", "gate_accumulate", "edit_write")
    return GrunPeftConfig(**dict(zip(names, options.pop("rule"), strict=True)), **options)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_folder_gives_the_bits_and_tokens_of_a_grun_model(design: str, folders: dict[str, Path]) -> None:
    model, peft_model = made(design), PeftModel.from_pretrained(tiny(), folders[design])
    wanted, of_base = logits(model), answers(tiny())
    assert torch.equal(logits(peft_model), wanted) and not torch.equal(wanted, BARE)
    assert torch.equal(logits(peft_model.get_base_model()), wanted)  # the base carries the edits
    assert answers(peft_model) == answers(model) != of_base
    assert GrunModel.of(peft_model).last_gates.keys() == model.last_gates.keys() != set()  # type: ignore[union-attr]
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), BARE) and answers(peft_model) == of_base
    assert torch.equal(logits(peft_model), wanted) and answers(peft_model) == answers(model)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_new_adapter_is_that_of_wrap(design: str) -> None:
    base = tiny()
    torch.manual_seed(3)
    peft_model = get_peft_model(base, of_options(design, blocks=[-3, -1]))
    model = made(design, blocks=[-3, -1])
    config = peft_model.peft_config["default"]
    assert {**config.to_dict(), "gate_threshold": None} == {**model.config.to_dict(), "gate_threshold": None}
    own = get_peft_model_state_dict(peft_model)
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(own[name], values) for name, values in model.state_dict().items() if "source" not in name)
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.grun_layer.grun_adapters.default.{name}" for name, _ in model.named_parameters()}


def test_a_config_may_be_used_again() -> None:
    config = of_options("pooled", blocks=None, gate_blocks=[0.3])
    deep, shallow = (get_peft_model(tiny(num_hidden_layers=depth), config).peft_config["default"] for depth in (8, 4))
    assert (deep.blocks, deep.gate_blocks, shallow.blocks, shallow.gate_blocks) == ([5, 6, 7], [2], [1, 2, 3], [1])
    assert config.blocks is None and config.depth == 0


# -- adapters by name --------------------------------------------------------------------------------------------------


def test_adapters_are_switched_added_and_deleted(folders: dict[str, Path]) -> None:
    wanted = {design: logits(made(design)) for design in DESIGNS}
    model = PeftModel.from_pretrained(tiny(), folders["published"], adapter_name="published")
    for design in ("robust", "pooled", "refusing"):
        model.load_adapter(folders[design], design)
        assert torch.equal(logits(model), wanted["published"])  # what was active stays so
    for design in ("pooled", "refusing", "published", "robust", "robust"):
        model.set_adapter(design)
        assert model.active_adapters == [design] and torch.equal(logits(model), wanted[design])
        assert answers(model) == answers(made(design))
        with model.disable_adapter():
            model.set_adapter("published")
            assert torch.equal(logits(model), BARE)
            model.set_adapter(design)
    status = model.get_model_status()
    assert status.active_adapters == ["robust"] and status.available_adapters == sorted(DESIGNS)
    assert status.requires_grad == {**dict.fromkeys(DESIGNS, False), "robust": True} and status.enabled is True
    model.delete_adapter("pooled")
    assert torch.equal(logits(model), wanted["robust"])
    with pytest.warns(UserWarning, match="'robust' was active; 'published' is now"):
        model.delete_adapter("robust")
    assert model.active_adapter == "published" and torch.equal(logits(model), wanted["published"])
    model.base_model.set_adapter([])
    assert torch.equal(logits(model.get_base_model()), BARE)
    model.set_adapter("published")
    model.add_adapter("new", of_options("robust"))
    assert torch.equal(logits(model), wanted["published"])
    model.set_adapter("new")
    assert not torch.equal(logits(model), wanted["published"])


@pytest.mark.parametrize("ask", [logits, answers])
def test_calls_wait_while_adapters_are_switched(
    ask: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PeftModel.from_pretrained(tiny(), folders["published"])
    model.load_adapter(folders["robust"], "other")
    bare, go_on = Event(), Event()
    take_hold = GrunModel._take_hold

    def slowly(adapter: GrunModel) -> None:
        bare.set()
        assert go_on.wait(60)
        take_hold(adapter)

    monkeypatch.setattr(GrunModel, "_take_hold", slowly)
    with ThreadPoolExecutor() as threads:
        switched = threads.submit(model.set_adapter, "other")
        assert bare.wait(60)
        asked = threads.submit(ask, model)
        waiting = wait([asked], timeout=0.3).not_done
        go_on.set()
        switched.result(60)
        found, wanted = asked.result(60), ask(made("robust"))
    assert waiting and torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


def test_adapters_stay_as_they_are_within_a_call(folders: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(tiny(), folders["published"])
    model.load_adapter(folders["robust"], "other")

    def switch(ids: Tensor, scores: Tensor) -> Tensor:
        model.set_adapter("other")
        return scores

    with refused("cannot be put on or taken off within a call", ModelError):
        model.generate(**PROMPTS, max_new_tokens=2, logits_processor=LogitsProcessorList([switch]))
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(made("published")))


def test_unload_gives_the_bare_base_back_as_it_was(folders: dict[str, Path]) -> None:
    base = tiny()
    frozen = base.get_input_embeddings().requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    own = {*base.__dict__}
    model = PeftModel.from_pretrained(base, folders["refusing"])
    model.load_adapter(folders["published"], "other")
    model.set_adapter("other")
    assert model.unload() is base and {*base.__dict__} == own and not base.lm_head._forward_hooks
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(logits(base), BARE) and answers(base) == answers(tiny())
    assert torch.equal(logits(get_peft_model(base, LoraConfig(target_modules=["q_proj"]))), BARE)


def test_a_copy_is_a_model_of_its_own(folders: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(tiny(), folders["pooled"])
    other = copy.deepcopy(model)
    other.load_adapter(folders["published"], "other")
    other.set_adapter("other")
    assert torch.equal(logits(model), logits(made("pooled")))
    assert torch.equal(logits(other), logits(made("published")))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["published", "robust", "pooled"])
def test_trainer_changes_the_adapter_alone_and_goes_on_from_its_checkpoint(design: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny(dtype=torch.float32, attention_dropout=0.5)
    model = get_peft_model(base, of_options(design, dropout=0.1))
    model.add_adapter("idle", of_options("published"))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    batch = padded(random_rows([9] * 8), "left")
    columns = torch.arange(9)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(columns < 5, -100)}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    values: dict[str, Any] = {"learning_rate": 0.02, "report_to": "none", "save_steps": 2, "use_cpu": True}
    values |= {"lr_scheduler_type": "constant", "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, **values)
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, values in model.state_dict().items() if not torch.equal(values, before[name])}
    assert changed == {name for name in before if ".grun_adapters.default." in name}
    assert not base.training and GrunModel.of(model).training  # type: ignore[union-attr]
    saved = GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "checkpoint-2")
    model.eval()
    assert torch.equal(logits(saved), logits(model))
    further = TrainingArguments(str(tmp_path), max_steps=3, **values)
    Trainer(model, further, train_dataset=rows).train(resume_from_checkpoint=True)
    assert not torch.equal(logits(model.eval()), logits(saved))


def test_a_loaded_adapter_is_trained_where_that_is_asked(folders: dict[str, Path]) -> None:
    frozen = PeftModel.from_pretrained(tiny(), folders["robust"])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    model = PeftModel.from_pretrained(tiny(), folders["robust"], is_trainable=True)
    model(**PROMPTS, labels=PROMPTS["input_ids"]).loss.backward()
    grown = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grown and all(".grun_adapters.default." in name for name in grown)


# -- refused -----------------------------------------------------------------------------------------------------------


def refused(message: str, *kinds: type[Exception]) -> Any:
    """One line that says so."""
    return pytest.raises(kinds or (ConfigError, AdapterError), match=f"^[^\n]*{message}[^\n]*$")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.merge_and_unload(), r"cannot be merged.*unload\(\) gives the bare base"),
        (lambda model: model.merge_adapter(), "cannot be merged"),
        (lambda model: model.unmerge_adapter(), "cannot be merged"),
        (lambda model: model.add_weighted_adapter(["default"], [1.0], "sum"), "no weighted sum.*GrunStack"),
        (lambda model: model.base_model.set_adapter(["default", "other"]), "one GRUN adapter active.*GrunStack"),
        (lambda model: model.base_model.set_adapter("none"), "no adapter 'none'; there are: default, other"),
        (lambda model: model(**PROMPTS, adapter_names=["default"] * 3), "all rows of a GRUN model have one adapter"),
        (lambda model: model.generate(**PROMPTS, adapter_names=["other"] * 3), "all rows of a GRUN model"),
        (lambda model: model.add_adapter("keys", GrunPeftConfig()), "'keys' cannot be a module's"),
        (lambda model: model.add_adapter("a.b", GrunPeftConfig()), "'a.b' cannot be a module's"),
        (lambda model: model.add_adapter("third", GrunPeftConfig(blocks=[9])), r"blocks \[9\]: name at least one"),
        (lambda model: get_peft_model(model, GrunPeftConfig()), "has an adapter of PEFT's already.*add_adapter"),
        (lambda model: get_peft_model(model.get_base_model(), GrunPeftConfig()), "carries GRUN edits already"),
        (lambda model: GrunModel.wrap(model), "carries GRUN edits already"),
        (lambda model: GrunStack(model), "carries GRUN edits already"),
    ],
)  # fmt: skip
def test_calls_that_make_no_sense_are_refused(call: Any, message: str, folders: dict[str, Path]) -> None:
    model = PeftModel.from_pretrained(tiny(), folders["published"])
    model.load_adapter(folders["pooled"], "other")
    with refused(message):
        call(model)
    assert [*model.peft_config] == ["default", "other"] and torch.equal(logits(model), logits(made("published")))
    model.delete_adapter("other")
    with refused(r"'default' is the only adapter; unload\(\)"):
        model.delete_adapter("default")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "linaer"}, "unknown gate 'linaer': did you mean 'linear'"),
        ({"rank": 99}, "rank 99 must lie between 1 and the hidden size 32"),
        ({"blocks": [1, 1]}, "block 1 is named twice"),
        ({"blocks": []}, "name at least one"),
        ({"gate_blocks": [3], "blocks": [1]}, "gate_blocks"),
        ({"edit_write": "sometimes"}, "sometimes"),
        ({"action": "refuse"}, "action=refuse needs one gate"),
        ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS: GRUN edits language models"),
        ({"template": "{prompt}"}, "expected a grun.data.templates.Template, not a str"),
    ],
)
def test_bad_configs_leave_the_base_as_it_was(options: dict[str, Any], message: str) -> None:
    base = tiny()
    own = {*base.__dict__}
    with refused(message):
        PeftModel(base, GrunPeftConfig(**options))
    assert {*base.__dict__} == own and all(parameter.requires_grad for parameter in base.parameters())


def test_other_methods_of_peft_are_not_mixed_in(folders: dict[str, Path], tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with refused("has an adapter of PEFT's already.*merge_and_unload"):
        get_peft_model(get_peft_model(tiny(), lora), GrunPeftConfig())
    model = PeftModel.from_pretrained(tiny(), folders["published"])
    with refused("Cannot combine adapters with different peft types", ValueError):
        model.add_adapter("lora", lora)
    with refused("'GRUN' is not compatible with the `PeftMixedModel`", ValueError):
        get_peft_model(tiny(), GrunPeftConfig(), mixed=True)
    with refused("a LoraConfig on a model with GRUN adapters: PEFT keeps one method on a model"):
        get_peft_model(PeftModel.from_pretrained(tiny(), folders["pooled"]), lora)
    get_peft_model(tiny(), lora).save_pretrained(tmp_path)
    with refused("Cannot combine adapters", ValueError):
        model.load_adapter(tmp_path, "lora")
    with refused("low_cpu_mem_usage: a GRUN adapter is small"):
        PeftModel.from_pretrained(tiny(), folders["published"], low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(made("published")))


def test_a_config_without_a_base_is_not_saved(tmp_path: Path) -> None:
    with refused("lacks what it has of a base"):
        GrunPeftConfig().save_pretrained(str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_another_model_is_told_apart(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with refused("made for hidden size 32 and 4 blocks, this base has hidden size 32 and 5 blocks"):
        PeftModel.from_pretrained(tiny(num_hidden_layers=5), folders["published"])
    PeftModel.from_pretrained(tiny(seed=1), folders["published"])
    assert "trained on other weights of the same shape" in caplog.text
