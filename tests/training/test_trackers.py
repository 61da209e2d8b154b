"""Trackers get the numbers of each step, and change nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import demo
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

from grun.cli import main


def test_tensorboard_holds_what_the_log_holds_and_the_run_is_the_same(
    taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert demo.unlearn(taught, tmp_path / "blind") == 0
    assert demo.unlearn(taught, tmp_path / "tracked", "train.report_to=[tensorboard]") == 0
    for name in ("log.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / "blind" / name).read_bytes() == (tmp_path / "tracked" / name).read_bytes()
    assert not (tmp_path / "blind" / "logs").exists()
    events = EventAccumulator(str(tmp_path / "tracked" / "logs")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "tracked" / "log.jsonl").read_text().splitlines()]
    assert {f"train/{key}" for key in lines[0] if key != "step"} == set(events.Tags()["scalars"])
    for key in ("loss", "forget", "retain", "gate", "lr", "grad_norm"):
        seen = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert seen == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]  # kept as float32
    (tmp_path / "tracked" / "logs" / "notes.txt").write_text("a user's own")
    assert demo.unlearn(taught, tmp_path / "tracked", "seed=7", "overwrite=true") == 0
    assert [path.name for path in (tmp_path / "tracked" / "logs").iterdir()] == ["notes.txt"]
    with caplog.at_level(logging.INFO, logger="grun"):
        assert demo.unlearn(taught, tmp_path / "blind", "train.report_to=[tensorboard]") == 0
    assert "finished: nothing to do" in caplog.text  # no other run


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "train.report_to=wandb needs the package of that name, which is not installed: pip install wandb"),
        ("tensorbord", "unknown train.report_to 'tensorbord': did you mean 'tensorboard'?"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, message: str
) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    options = [*demo.DATA, "model.path=absent", f"output_dir={tmp_path / 'run'}", f"train.report_to=[{name}]"]
    assert main(["unlearn", *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
