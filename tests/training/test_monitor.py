"""Looks at the model while it unlearns: what they show, and that they change nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import demo
import pytest

from grun.cli import main


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "options", [[], ["method.parametrization=full", "train.lr=0.001", "train.gradient_checkpointing=true"]]
)
def test_looking_changes_nothing_and_is_no_other_run(
    taught: Path, tmp_path: Path, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Dropout is on, so a look that draws a random number would show."""
    options = [*options, "method.dropout=0.2"]
    assert demo.unlearn(taught, tmp_path / "blind", *options) == 0
    assert demo.unlearn(taught, tmp_path / "watched", *options, "train.monitor_epochs=1", "train.monitor_rows=3") == 0
    assert (tmp_path / "blind" / "log.jsonl").read_bytes() == (tmp_path / "watched" / "log.jsonl").read_bytes()
    (weights,) = (path.name for path in (tmp_path / "blind").glob("*.safetensors"))
    assert (tmp_path / "blind" / weights).read_bytes() == (tmp_path / "watched" / weights).read_bytes()
    assert not (tmp_path / "blind" / "monitor.jsonl").exists()
    with caplog.at_level(logging.INFO, logger="grun"):
        assert demo.unlearn(taught, tmp_path / "blind", *options, "train.monitor_epochs=2") == 0
    assert "finished: nothing to do" in caplog.text


def test_looks_come_every_so_many_epochs_and_at_the_end_and_agree_with_an_evaluation(
    taught: Path, tmp_path: Path
) -> None:
    """3 steps an epoch, 4 epochs."""
    assert demo.unlearn(taught, tmp_path / "gd", "train.monitor_epochs=3", "train.monitor_rows=5") == 0
    looks = lines(tmp_path / "gd" / "monitor.jsonl")
    assert [look["step"] for look in looks] == [9, 12]
    for look in looks:
        assert list(look["sets"]) == ["forget", "forget_paraphrase", "retain"]  # neither held-out nor unknown
        assert set(look["sets"]["forget"]) == {"rouge_l", "fact_recall", "probability", "gate_mean"}
    folders = [f"adapter={tmp_path / 'gd'}", f"output_dir={tmp_path / 'evaluation'}"]
    assert main(["evaluate", *demo.DATA, f"model.path={taught}", *folders, "data.limit=5", "max_new_tokens=32"]) == 0
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    seen = looks[-1]["sets"]["forget"]
    for metric in ("rouge_l", "fact_recall", "probability"):
        assert seen[metric] == pytest.approx(found["sets"]["forget"][metric], abs=2e-6)  # rounded to six places
    assert seen["gate_mean"] == pytest.approx(found["gate"]["mean"]["forget"], abs=2e-6)
