"""Every file that docs/formats.md describes is written, loads, and has the keys described, no more and no fewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest
from safetensors.torch import load_file

from grun.cli import main

FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
RUN = "files command profile config template in_force data parameters steps resumed_from seconds peak_memory_bytes "
RUN += "device versions"
UNLEARN = "objective terms parametrization quirks base_fingerprint saved_bytes engine cache"
KEYS = {
    "adapter_config.json": "peft_type format_version blocks rank gate gate_bias dropout dropout_on_hidden activation "
    "gate_read gate_accumulate edit_write reset_ids hidden_size depth base_model_name_or_path base_revision "
    "base_fingerprint base_dtype template",
    "grun_template.json": "name kind text answer_prefix system_prompt date prompt_hash",
    "run.json": f"{RUN} {UNLEARN}",
    "taught run.json": f"{RUN} rows fingerprint engine",
    "log.jsonl": "step epoch loss forget retain gate lr grad_norm",
    "taught log.jsonl": "step epoch loss answer question lr grad_norm",
    "evaluation.json": "files key model adapter identity template data settings in_force metrics_format counts sets "
    "overall "
    "gate seconds",
    "identity": "base dtype quantization adapter version format code",
    "scores.jsonl": "set index kind variant prompt_tokens answer_tokens ended compressed_bytes logp hit "
    "vocabulary_mean vocabulary_variance",
    "generations.jsonl": "set index question reference fact text",
    "gates.jsonl": "set index gates",
    "gate": "auc_heldout auc_retain auc_unknown false_positive_rate mean open blocks",
    "summary.json": "profile suite rows gate seconds",
    "rows": "name label objective parametrization stage numbers intervals metrics overall reference unread",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    taught = folder / "taught"
    assert demo.finetune(taught, "train.question_weight=0.3") == 0
    assert demo.unlearn(taught, folder / "gd", "train.save_steps=5", "train.keep_all_checkpoints=true") == 0
    for name, more in (("before", []), ("gd", [f"adapter={folder / 'gd'}"])):
        arguments = [*demo.DATA, f"model.path={taught}", f"output_dir={folder / 'evaluation' / name}", *more]
        assert main(["evaluate", *arguments, "max_new_tokens=4"]) == 0
    assert main(["report", f"results_dir={folder}"]) == 0
    return folder


def read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.splitlines()[0]) if path.suffix == ".jsonl" else json.loads(text)


@pytest.mark.parametrize(
    ("path", "described"),
    [
        ("taught/grun_template.json", "grun_template.json"),
        ("taught/run.json", "taught run.json"),
        ("taught/log.jsonl", "taught log.jsonl"),
        ("gd/adapter_config.json", "adapter_config.json"),
        ("gd/run.json", "run.json"),
        ("gd/log.jsonl", "log.jsonl"),
        ("evaluation/gd/evaluation.json", "evaluation.json"),
        ("evaluation/gd/scores.jsonl", "scores.jsonl"),
        ("evaluation/gd/generations.jsonl", "generations.jsonl"),
        ("evaluation/gd/gates.jsonl", "gates.jsonl"),
        ("summary.json", "summary.json"),
    ],
)
def test_a_file_has_the_keys_that_are_documented(results: Path, path: str, described: str) -> None:
    keys = KEYS[described].split()
    assert set(read(results / path)) == set(keys)
    assert not [key for key in keys if f"`{key}`" not in FORMATS]


def test_nested_tables_have_the_keys_that_are_documented(results: Path) -> None:
    summary = read(results / "summary.json")
    assert all(set(row) - {"verdict"} == set(KEYS["rows"].split()) for row in summary["rows"])
    assert {row["stage"] for row in summary["rows"]} == {"before", "after"}
    gate = read(results / "evaluation/gd/evaluation.json")["gate"]
    assert set(gate) == set(KEYS["gate"].split())
    assert set(gate["blocks"]) == {"1", "2", "3"}
    numbers = [value for row in summary["rows"] for metrics in row["metrics"].values() for value in metrics.values()]
    assert numbers and all(isinstance(number, int | float) for number in numbers)


def test_folders_hold_the_files_that_are_documented(results: Path) -> None:
    for path in ("taught/config.json", "taught/model.safetensors", "taught/run_identity.json", "gd/run_identity.json"):
        assert read(results / path) if path.endswith(".json") else load_file(results / path)
    checkpoint = {file.name for file in (results / "gd/checkpoints/checkpoint-5").iterdir()}
    assert checkpoint == {
        *("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "task.json"),
        *("log.jsonl", "checkpoint.json"),
    }
    assert not [name for name in checkpoint if f"`{name}`" not in FORMATS]
    written = {path.name for path in results.iterdir() if path.is_file()}
    assert {"report.html", "summary.json", "table.csv", "table.md", "table.tex", "gate_histograms.png"} < written
    assert not [name for name in written if f"`{name}`" not in FORMATS]
    for picture in results.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_adapter_tensors_are_named_as_documented(results: Path) -> None:
    tensors = load_file(results / "gd/adapter_model.safetensors")
    for name in ("edit.rotation", "edit.source.weight", "edit.source.bias"):
        assert f"edits.1.{name}" in tensors and f"edits.B.{name}" in FORMATS
    assert any(name.startswith("edits.1.gate.") for name in tensors)
    assert tensors["edits.1.edit.rotation"].shape == (32, 4)
