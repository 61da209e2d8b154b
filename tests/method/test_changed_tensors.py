"""Changed tensors as an adapter: what is written, what a base becomes with it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from grun.cli import main
from grun.config.options import ModelConfig
from grun.errors import AdapterError, ConfigError
from grun.loading.adapters import load_model
from grun.loading.changed_tensors import put_changed, save_changed
from grun.method.fingerprint import fingerprint
from grun.runtime.files import read_json

NAMES = [f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 2)]


def changed(base: Any, scale: float = 1.5) -> dict[str, Tensor]:
    return {name: scale * base.get_parameter(name).detach() for name in NAMES}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    base = tiny("llama", dtype=torch.float32)
    save_changed(tmp_path / "changed", changed(base), base_name="maker/model", base_fingerprint=fingerprint(base))
    return tmp_path / "changed"


def test_a_base_gets_the_new_values_and_nothing_else_changes(saved: Path) -> None:
    base, untouched = (tiny("llama", dtype=torch.float32) for _ in range(2))
    put_changed(base, saved, strict=True)
    for name, parameter in base.named_parameters():
        expected = (1.5 if name in NAMES else 1.0) * untouched.get_parameter(name)
        assert torch.equal(parameter, expected), name


def test_values_take_the_type_of_the_base_and_its_fingerprint_still_fits(saved: Path) -> None:
    base = tiny("llama", dtype=torch.bfloat16)
    put_changed(base, saved, strict=True)
    expected = load_file(saved / "adapter_model.safetensors")[NAMES[0]].to(torch.bfloat16)
    assert torch.equal(base.get_parameter(NAMES[0]), expected)


def test_the_folder_holds_config_values_and_a_card_that_names_base_and_tensors(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    config = read_json(saved / "adapter_config.json")
    assert config == {
        "peft_type": "TENSORS",
        "format_version": 1,
        "base_model_name_or_path": "maker/model",
        "base_fingerprint": fingerprint(tiny("llama", dtype=torch.float32)),
        "tensors": NAMES,
    }
    assert sorted(load_file(saved / "adapter_model.safetensors")) == NAMES
    card = (saved / "README.md").read_text()
    assert all(f"`{part}`" in card for part in ["maker/model", *NAMES])
    assert "The base weights still contain the data" in card


def test_another_fine_tune_of_the_same_shape_is_a_warning_or_if_strict_an_error(saved: Path, caplog: Any) -> None:
    other = tiny("llama", seed=1, dtype=torch.float32)
    with pytest.raises(AdapterError, match="trained on other weights of the same shape .* maker/model.*strict=true"):
        put_changed(other, saved, strict=True)
    assert torch.equal(
        other.get_parameter(NAMES[0]), tiny("llama", seed=1, dtype=torch.float32).get_parameter(NAMES[0])
    )
    put_changed(other, saved)
    assert "trained on other weights of the same shape" in caplog.text
    assert torch.equal(other.get_parameter(NAMES[0]), load_file(saved / "adapter_model.safetensors")[NAMES[0]])


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = {**read_json(folder / "adapter_config.json"), **values}
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(kept))

    return edit


def keep_one_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({NAMES[0]: load_file(path)[NAMES[0]]}, path)


def change_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({**tensors, NAMES[0]: change(tensors[NAMES[0]])}, path)

    return edit


def cut_the_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config(peft_type="LORA"), "peft_type is not TENSORS"),
        (edit_config(format_version=2), "format version 2, not 1"),
        (edit_config(tensors=...), "missing key 'tensors'"),
        (edit_config(base_fingerprint=...), "missing key 'base_fingerprint'"),
        (edit_config(tensors="all"), "tensors: expected a list, found a text"),
        (edit_config(more=1), "unknown key 'more'"),
        (change_first(lambda tensor: tensor.fill_(torch.nan)), "holds NaN or infinite numbers"),
        (change_first(lambda tensor: tensor.int()), "is torch.int32, and no floats"),
        (keep_one_tensor, "holds other tensors than adapter_config.json names"),
        (cut_the_weights, "is damaged or truncated"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing; copy the whole adapter folder"),
    ],
)
def test_a_damaged_adapter_is_refused_and_leaves_the_base_alone(
    saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved)
    base = tiny("llama", dtype=torch.float32)
    before = fingerprint(base)
    with pytest.raises(AdapterError, match=message):
        put_changed(base, saved)
    assert fingerprint(base) == before


def test_a_base_of_other_names_or_shapes_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"down_proj.weight, of shape \[32, 48\], is not there; .* maker/model"):
        put_changed(tiny("gpt2"), saved)
    with pytest.raises(AdapterError, match=r"of shape \[32, 48\], has shape \[32, 40\]"):
        put_changed(tiny("llama", intermediate_size=40), saved)


def test_a_quantized_base_is_refused(saved: Path) -> None:
    base = tiny("llama", dtype=torch.float32)
    base.quantization_method = "bitsandbytes"
    with pytest.raises(AdapterError, match="this base is quantized; unset model.quantization"):
        put_changed(base, saved)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the demo's words with a template, its tensors changed, and the same saved whole."""
    folder = demo.random_model(tmp_path_factory.mktemp("demo"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    of_base = fingerprint(base)
    values = {"model.layers.1.mlp.down_proj.weight": 3 * base.model.layers[1].mlp.down_proj.weight.detach()}
    save_changed(folder / "changed", values, base_name=str(folder / "model"), base_fingerprint=of_base)
    put_changed(base, folder / "changed")
    shutil.copytree(folder / "model", folder / "whole")
    base.save_pretrained(folder / "whole")
    return folder


def test_load_model_puts_it_on_like_any_adapter(folder: Path) -> None:
    config = ModelConfig(path=str(folder / "model"), device="cpu")
    loaded = load_model(config, str(folder / "changed"), strict=True, gate_threshold=None)
    whole = load_model(ModelConfig(path=str(folder / "whole"), device="cpu"), None, strict=True, gate_threshold=None)
    assert fingerprint(loaded.model) == fingerprint(whole.model) != loaded.identity["base"]
    assert loaded.identity["base"] == read_json(folder / "changed" / "adapter_config.json")["base_fingerprint"]
    assert loaded.identity["adapter"] and loaded.template == whole.template
    with pytest.raises(ConfigError, match="is of type TENSORS, which has no gates"):
        load_model(config, str(folder / "changed"), strict=True, gate_threshold=0.5)


def test_evaluate_scores_the_changed_model_alone_and_in_a_list(folder: Path, tmp_path: Path) -> None:
    sizes = [f"data.demo.{group}=2" for group in ("forget", "heldout", "unknown", "refused", "questions")]
    common = ["evaluate", *sizes, "data.demo.retain=4", "sets=[forget]", "max_new_tokens=4", "model.device=cpu"]
    of_base = [*common, f"model.path={folder / 'model'}"]
    assert main([*of_base, f"adapter={folder / 'changed'}", f"output_dir={tmp_path / 'changed'}"]) == 0
    assert main([*common, f"model.path={folder / 'whole'}", f"output_dir={tmp_path / 'whole'}"]) == 0
    both = f"adapters=[{folder / 'changed'},{folder / 'adapter'}]"
    assert main([*of_base, both, "with_base=before", f"output_dir={tmp_path / 'list'}"]) == 0
    paths = ["changed", "whole", "list/changed", "list/before", "list/adapter"]
    changed, whole, listed, before, gated = (
        read_json(tmp_path / path / "evaluation.json")["sets"]["forget"]["probability"] for path in paths
    )
    assert changed == whole == listed
    assert len({changed, before, gated}) == 3
