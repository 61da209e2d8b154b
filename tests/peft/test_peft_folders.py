"""One format on disk: what a GrunModel or PEFT saves, either loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from peft_models import DESIGNS, PROMPTS, logits, made
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoModelForCausalLM

from grun import GrunModel
from grun.data.templates import TEMPLATES
from grun.errors import AdapterError
from grun.loading.adapters import edited
from grun.method.adapter import AdapterConfig, peft_type
from grun.peft import GrunPeftConfig

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("design", DESIGNS)
def test_both_ways_write_the_same_bytes(design: str, tmp_path: Path) -> None:
    model = made(design, template=TEMPLATES.get("question_answer"))
    model.keep_threshold(0.25, bound=0.1, calibration=9, recall=0.5)
    model.save_pretrained(tmp_path / "grun")
    by_peft = PeftModel.from_pretrained(tiny(), tmp_path / "grun", adapter_name="pooled")
    by_peft.load_adapter(tmp_path / "grun", "default")
    by_peft.save_pretrained(tmp_path / "peft")
    assert contents(tmp_path / "grun") == contents(tmp_path / "peft") == contents(tmp_path / "peft" / "pooled")
    back = GrunModel.from_pretrained(tiny(), tmp_path / "peft" / "pooled")
    assert torch.equal(logits(back), logits(model.eval())) and back.gate_threshold == 0.25
    assert back.template == model.template
    folder = tmp_path / "peft"
    of_commands = edited(tiny(), folder, peft_type(folder), strict=True, gate_threshold=None)
    assert torch.equal(logits(of_commands), logits(model))


def test_what_was_changed_by_peft_and_by_grun_is_saved(tmp_path: Path) -> None:
    made("pooled").save_pretrained(tmp_path / "before")
    model = PeftModel.from_pretrained(tiny(), tmp_path / "before")
    GrunModel.of(model).keep_threshold(1.0)  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "after")), logits(tiny()))


@pytest.mark.parametrize("design", ["published", "robust"])
def test_a_folder_of_the_first_version_loads_by_both(design: str, tmp_path: Path) -> None:
    model = made(design, reset_ids=(), gate="linear")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    rule = ("gate_read", "gate_accumulate", "edit_write") if design == "robust" else ()
    later = [one.name for one in fields(AdapterConfig) if one.default is not MISSING and one.name not in rule]
    kept = {name: value for name, value in values.items() if name not in [*later, "reset_ids", "template"]}
    path.write_text(json.dumps(kept), encoding="utf-8")
    wanted = logits(model)
    assert torch.equal(logits(GrunModel.from_pretrained(tiny(), tmp_path)), wanted)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), wanted)


def test_a_fresh_process_needs_the_import_alone(tmp_path: Path) -> None:
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    wanted = {}
    for design in DESIGNS:
        model = made(design, base=tiny(dtype=torch.float32))
        model.save_pretrained(tmp_path / design)
        wanted[design] = logits(model)
    save_file(wanted, tmp_path / "wanted.safetensors")
    torch.save(PROMPTS, tmp_path / "prompts.pt")
    code = f"""
import torch, grun.peft
torch.set_num_threads(1)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

wanted, prompts = load_file("wanted.safetensors"), torch.load("prompts.pt")
base = AutoModelForCausalLM.from_pretrained("base").eval()
for design in {[*DESIGNS]}:
    model = PeftModel.from_pretrained(base, design)
    with torch.no_grad():
        assert torch.equal(model(**prompts).logits, wanted[design]), design
    model.unload()
print("equal")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "equal"), done.stderr


def test_a_config_and_a_model_are_found_by_a_folder_alone(tmp_path: Path) -> None:
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = made("pooled", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(config, GrunPeftConfig) and config.to_dict() == model.config.to_dict()
    assert config.base_model_name_or_path == str(tmp_path / "base")
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(found), logits(model))


def test_an_adapter_is_found_on_the_hub(tmp_path: Path) -> None:
    """In its local cache, which a download leaves."""
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / ("0" * 40)
    model = made("pooled")
    model.save_pretrained(snapshot)
    (tmp_path / "models--me--adapter" / "refs").mkdir()
    (tmp_path / "models--me--adapter" / "refs" / "main").write_text("0" * 40)
    found = PeftModel.from_pretrained(tiny(), "me/adapter", cache_dir=str(tmp_path))
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": "4"}, "adapter_config.json: rank: expected a whole number, found a text"),
        ({"gate": "other"}, "adapter_config.json: unknown gate 'other'"),
        ({"blocks": [1, 9]}, r"blocks \[1, 9\] must lie within 0..3"),
        ({"format_version": 2}, "format version 2, not 1"),
        ({"template": {"name": "x"}}, "template: missing key 'kind'"),
        ({"depth": None}, "depth: expected a whole number, found null"),
        ({"rank": 2}, r"weights of adapter 'default': weights do not match.*'edits.1.edit.rotation'"),
    ],
)
def test_a_damaged_config_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made("published").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(AdapterError, match=f"^[^\n]*{message}[^\n]*$"):
        PeftModel.from_pretrained(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("edits.3.gate.0.bias"), "first at 'edits.3.gate.0.bias': found nothing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "first at 'more'.*expected no such tensor"),
        (lambda tensors: tensors["edits.1.edit.rotation"].fill_(torch.nan), "'edits.1.edit.rotation' holds NaN"),
    ],
)
def test_damaged_tensors_are_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    made("published").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"^[^\n]*{message}[^\n]*$"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_embeddings_are_not_saved_with_an_adapter(tmp_path: Path) -> None:
    made("published").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(), tmp_path)
    with pytest.raises(Exception, match="GRUN adapters hold no embeddings"):
        model.save_pretrained(str(tmp_path / "other"), save_embedding_layers=True)
