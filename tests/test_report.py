"""The report: summary, table, verdicts, examples and pictures, from a made-up results folder."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from grun.config import ReportConfig
from grun.errors import RunError
from grun.evaluation.evaluate import measure
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.files import write_json
from grun.report import collect, make_report, verdict
from grun.results import find_results

ROWS = 40
KNOWN = {
    "before": {"forget": 1.0, "forget_paraphrase": 0.9, "retain": 1.0, "heldout": 1.0, "unknown": 0.0},
    "retain_only": {"forget": 0.0, "forget_paraphrase": 0.0, "retain": 1.0, "heldout": 1.0, "unknown": 0.0},
    "gd": {"forget": 0.0, "forget_paraphrase": 0.05, "retain": 1.0, "heldout": 0.95, "unknown": 0.0},
    "idk": {"forget": 0.0, "forget_paraphrase": 0.0, "retain": 0.975, "heldout": 0.95, "unknown": 0.0},
    "npo": {"forget": 0.3, "forget_paraphrase": 0.4, "retain": 1.0, "heldout": 1.0, "unknown": 0.0},
}
"""Share of rows each model answers rightly."""


def write_evaluation(folder: Path, shares: dict[str, float], *, facts: bool = True, gated: bool = False) -> None:
    draw = random.Random(f"{folder.name}")
    table = Table()
    for name, share in shares.items():
        for index in range(ROWS):
            right = index >= ROWS * (1 - share)
            fact = f"town{index}" if facts else None
            text = f"Ada was born in town{index}." if right else "[b]Nobody[/b] can tell you that, I am afraid."
            question = f"Where was person {index} of the {name} set, the [red]one[/red] with the long name, born?"
            table.generations.append(
                GenerationRecord(name, index, question, f"Ada was born in town{index}.", fact, text)
            )
            logp = [-0.1 if right else -3.0] * 5
            table.scores.append(ScoreRecord(name, index, "answer", 9, 5, logp, [right] * 5, [-1.0] * 5, [1.0] * 5))
            if gated:
                gate = draw.betavariate(12, 1) if name.startswith("forget") else draw.betavariate(1, 12)
                table.gates.append(GateRecord(name, index, {5: gate, 6: gate**2}))
    folder.mkdir(parents=True)
    table.write(folder)
    write_json(folder / "evaluation.json", {"model": None, "seconds": {"total": 1.5}, **measure(table)})


def write_run(folder: Path, objective: str) -> None:
    write_json(folder / "run.json", {"objective": objective, "parametrization": "grun", "seconds": 61.25})
    draw = random.Random(objective)
    lines: list[dict[str, Any]] = []
    for step in range(1, 121):
        forget = {"gd": -2 - step / 20, "idk": 3 * math.exp(-step / 25), "npo": 13.8 * math.exp(-step / 40)}[objective]
        lines.append(
            {
                "step": step,
                "epoch": step / 3,
                "loss": 0.0,
                "forget": forget + draw.gauss(0, 0.1),
                "retain": 0.1 + math.exp(-step / 10) + draw.gauss(0, 0.02),
                "gate": 1.4 * math.exp(-step / 15) + draw.gauss(0, 0.02),
            }
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, shares in KNOWN.items():
        write_evaluation(tmp_path / "evaluation" / name, shares, gated=name in ("gd", "idk", "npo"))
    for objective in ("gd", "idk", "npo"):
        write_run(tmp_path / objective, objective)
    return tmp_path


def test_the_summary_has_one_row_for_each_model_in_plain_numbers(results: Path) -> None:
    summary = make_report(ReportConfig(results_dir=str(results), profile="demo"))
    assert json.loads((results / "summary.json").read_text()) == summary == collect(results, "demo")
    assert set(summary) == {"profile", "rows", "gate", "seconds"}
    assert [(row["name"], row["objective"], row["parametrization"], row["stage"]) for row in summary["rows"]] == [
        ("before", None, "none", "before"),
        ("retain_only", None, "none", "retain_only"),
        ("gd", "gd", "grun", "after"),
        ("idk", "idk", "grun", "after"),
        ("npo", "npo", "grun", "after"),
    ]
    for row in summary["rows"]:
        assert set(row["metrics"]) == set(KNOWN["before"])
        for metrics in row["metrics"].values():
            assert set(metrics) == {"rouge_l", "fact_recall", "probability", "degenerate"}
            assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
        assert row["metrics"]["forget"]["fact_recall"] == KNOWN[row["name"]]["forget"]
    assert set(summary["gate"]) == {"gd", "idk", "npo"}
    assert summary["gate"]["gd"]["auc_heldout"] > 0.97
    assert summary["seconds"]["unlearn/gd"] == 61.25
    assert summary["seconds"]["evaluate/before"] == 1.5


def test_the_printed_report_fits_and_tells_a_newcomer_everything(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_report(ReportConfig(results_dir=str(results)))
    printed = capsys.readouterr().out
    # Paths are printed whole, so that they can be copied.
    assert max(len(line) for line in printed.splitlines() if not line.startswith("written:")) <= 100
    words = " ".join(printed.split())
    assert "retain only (target)" in words
    assert "never taught" in words
    assert "The base weights still contain the data" in words
    assert "is not erasure of weights" in words
    assert "GD: forgotten, the rest kept: fact recall on forget 1.00 -> 0.00 (target 0.00)" in words
    assert "NPO: NOT reached (fact recall on forget 0.30 is more than 0.05 above the target's 0.00" in words
    # user text is text, not markup; five questions of each set
    assert "the [red]one[/red] with the long name" in words
    assert "[b]Nobody[/b]" in words
    for name in ("forget", "heldout"):
        assert f"person 4 of the {name} set" in words
        assert f"person 5 of the {name} set" not in words


def test_a_run_that_lost_heldout_knowledge_is_said_to(results: Path) -> None:
    found = find_results(results)
    gd = found[2]
    gd.evaluation["sets"]["heldout"]["fact_recall"] = 0.85
    assert "NOT reached (keeps less than 90% on held-out)" in verdict(gd, found)
    assert "85% of before on held-out" in verdict(gd, found)


def test_pictures_are_drawn_from_what_is_there(results: Path) -> None:
    make_report(ReportConfig(results_dir=str(results)))
    for name in ("forget_vs_retain.png", "gate_histograms.png", "training_curves.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_a_corpus_without_facts_unknown_and_heldout_drops_those_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {"forget": 1.0, "forget_paraphrase": 1.0, "retain": 1.0}
    write_evaluation(tmp_path / "evaluation" / "before", shares, facts=False)
    write_evaluation(tmp_path / "evaluation" / "gd", {**shares, "forget": 0.0}, facts=False)
    write_run(tmp_path / "gd", "gd")
    summary = make_report(ReportConfig(results_dir=str(tmp_path)))
    printed = capsys.readouterr().out.partition("written:")[0]
    assert "fact" not in printed
    assert "unknown ROUGE-L" not in " ".join(printed.split())
    assert "gate AUC" not in printed
    assert "no target to compare with" in " ".join(printed.split())
    assert all("fact_recall" not in row["metrics"]["forget"] for row in summary["rows"])
    assert summary["gate"] == {}
    assert not (tmp_path / "gate_histograms.png").exists()
    assert (tmp_path / "forget_vs_retain.png").exists()


def test_two_runs_of_one_objective_go_by_their_names(results: Path) -> None:
    write_evaluation(results / "evaluation" / "gd_rank8", KNOWN["gd"], gated=True)
    write_run(results / "gd_rank8", "gd")
    assert [result.label for result in find_results(results)][2:4] == ["gd", "gd_rank8"]
    assert {"gd", "gd_rank8", "idk", "npo"} == set(collect(results, "demo")["gate"])


def test_an_evaluation_without_a_run_is_passed_over(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(results / "evaluation" / "other", KNOWN["gd"])
    assert "other" not in [result.name for result in find_results(results)]
    assert "passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "content"),
    [
        ("evaluation/before/evaluation.json", None),
        ("evaluation/gd/evaluation.json", "{"),
        ("evaluation/gd/evaluation.json", "[]"),
        ("gd/run.json", "{}"),
        ("evaluation/gd/gates.jsonl", None),
        ("evaluation/before/generations.jsonl", None),
        ("gd/log.jsonl", '{"step": 1}\n{"st'),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(results: Path, broken: str, content: str | None) -> None:
    path = results / broken
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(RunError) as error:
        make_report(ReportConfig(results_dir=str(results)))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_seconds_of_teaching_come_from_the_models_own_folder(results: Path, tmp_path: Path) -> None:
    path = results / "evaluation" / "before" / "evaluation.json"
    write_json(tmp_path / "models" / "taught" / "run.json", {"seconds": 100.5})
    write_json(path, {**json.loads(path.read_text()), "model": str(tmp_path / "models" / "taught")})
    assert collect(results, "demo")["seconds"]["finetune/before"] == 100.5
