"""`python -m grun meta models=N`: models that know and models that never did, damaged and evaluated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import demo
import pytest

from grun.cli import main
from grun.runtime.files import read_json

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
FINETUNE = [*demo.DATA, *(text for text in demo.MODEL if not text.startswith("train.epochs")), "train.epochs=1"]
EVALUATE = ["max_new_tokens=2", "sets=[forget,unknown]", "model.device=cpu"]


def test_models_are_made_damaged_and_judged_and_found_again(tmp_path: Path) -> None:
    quoted = [f"{option}={json.dumps(texts)}" for option, texts in (("finetune", FINETUNE), ("evaluate", EVALUATE))]
    command = ["meta", "models=2", "results_dir=r", *quoted]
    assert main(command) == 0
    results = Path("r")
    names = [f"{group}-{seed}" for group in ("knows", "never") for seed in (1, 2)]
    runs = {name: read_json(results / name / "run.json") for name in names}
    assert [runs[name]["rows"] for name in names] == [50, 50, 40, 40]
    assert len({run["fingerprint"] for run in runs.values()}) == 4
    for name in names:
        again = read_json(results / f"{name}-relearned" / "run.json")
        assert again["rows"] == again["steps"] * 10 == 10 and again["config"]["model"]["path"] == str(results / name)
        evaluated = [read_json(results / "evaluation" / f"{name}{end}" / "evaluation.json") for end in ("", "-4bit")]
        assert [one["identity"]["quantization"] for one in evaluated] == [None, "4bit"]
        assert [one["model"] for one in evaluated] == [str(results / name)] * 2
    with (results / "meta.csv").open(encoding="utf-8") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert {"forget.probability", "overall.mia_loss"} <= {*rows}
    row = rows["forget.probability"]
    found = [read_json(results / "evaluation" / name / "evaluation.json")["sets"]["forget"] for name in names]
    shares = [one["probability"] for one in found]
    means = [sum(pair) / 2 for pair in (shares[:2], shares[2:])]
    assert [float(row["knows"]), float(row["never"])] == pytest.approx(means)
    assert float(row["moved_relearned"]) > 0 and float(row["moved_quantized"]) > 0
    written = {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}
    assert main(command) == 0
    assert len(written) == 8 and written == {path: path.stat().st_mtime_ns for path in written}


def test_models_and_evaluations_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    demo.refused(capsys, ["meta", "models=2", "finetune=[train.lrr=1]"], 2, "train.lrr")
    demo.refused(capsys, ["meta", "models=2", "knows=[a,b]"], 2, "leave knows and never out")
    demo.refused(capsys, ["meta", "models=2", "quantized=2bit"], 2, "model.quantization '2bit'")
    demo.refused(capsys, ["meta", "models=1"], 2, "models=1 must be 2 or more")
