"""A checkpoint is used only whole; resuming never gives other weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tasks import SHORT, unlearn_task

from grun.runtime.files import write_json
from grun.runtime.runs import IDENTITY_FILE
from grun.training.checkpoints import MANIFEST_FILE, checkpoints_in, newest_whole
from grun.training.step_log import Look
from grun.training.train import train

CONFIG = dataclasses.replace(SHORT, save_steps=2, keep_all_checkpoints=True)
"""8 steps, checkpoints after 2, 4, 6 and 8."""
PARTS = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "task.json", "trainer_state.json")


def trained(folder: Path) -> tuple[list[Any], Any]:
    """Train with dropout and looks; the weights, and the result."""
    task = unlearn_task(CONFIG, "npo", dropout=0.2)
    result = train(task, CONFIG, folder, 0, Look(lambda: {"seen": 1}, every=3))
    return [value.detach().clone() for value in task.module.parameters()], result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("whole")
    write_json(folder / IDENTITY_FILE, {"seed": 0})
    return folder, trained(folder)[0]


@pytest.fixture
def run(whole: tuple[Path, list[Any]], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def renamed(newest: Path) -> None:
    """An older one under the newest one's name."""
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name("checkpoint-4"), newest)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    **{f"{name} is missing": lambda newest, name=name: (newest / name).unlink() for name in (*PARTS, MANIFEST_FILE)},
    "optimizer.pt has 100 bytes in place of": lambda newest: _write(newest / "optimizer.pt", b"x" * 100),
    "trained.safetensors has 0 bytes": lambda newest: _write(newest / "trained.safetensors", b""),
    "trained.safetensors has other bytes": lambda newest: changed(newest / "trained.safetensors"),
    "log.jsonl has other bytes": lambda newest: changed(newest / "log.jsonl"),
    **{
        f"{MANIFEST_FILE} is damaged{' ' * number}": lambda newest, data=data: _write(newest / MANIFEST_FILE, data)
        for number, data in enumerate(
            (b"", b"5", b"[]", b"{}", b"\xff\0", b'{"files": {}, "sha256": "0"}', b"[" * 9999)
        )
    },
    "it was written as checkpoint-4": renamed,
    "it is of another run": lambda newest: write_json(newest.parent.parent / IDENTITY_FILE, {"seed": 1}),
}


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


@pytest.mark.parametrize("wrong", list(DAMAGE))
def test_a_damaged_checkpoint_is_passed_over_said_and_removed(
    wrong: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run / "checkpoints" / "checkpoint-8"
    DAMAGE[wrong](newest)
    found = newest_whole(newest.parent, run)
    assert not newest.exists()
    lines = [record.getMessage() for record in caplog.records]
    if wrong == "it is of another run":  # and so are the others
        assert found is None and len(lines) == 5
        assert "training starts from the beginning" in lines[-1]
    else:
        assert found == newest.with_name("checkpoint-6") and len(lines) == 1
    assert str(newest) in lines[0] and wrong.strip() in lines[0]


def test_what_has_no_checkpoints_name_is_none_and_stays(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert checkpoints_in(tmp_path) == []
    assert newest_whole(tmp_path, tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 2


LOGS = {"log.jsonl": b'{"step": 1}\n5\n\xff\xfe[]\n', "monitor.jsonl": b"5"}


@pytest.mark.parametrize(("kept", "resumed_from"), [(("checkpoint-6", "checkpoint-4"), 4), (("checkpoint-6",), 0)])
def test_a_run_whose_newest_checkpoints_and_logs_are_damaged_ends_as_one_that_was_not_disturbed(
    kept: tuple[str, ...], resumed_from: int, run: Path, whole: tuple[Path, list[Any]]
) -> None:
    for checkpoint in checkpoints_in(run / "checkpoints"):
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint)
    (run / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()  # resuming without it gave other weights
    for name, data in LOGS.items():
        (run / name).write_bytes(data)
    weights, result = trained(run)
    assert result.resumed_from == resumed_from
    assert all(map(torch.equal, weights, whole[1]))
    for name in LOGS:
        assert (run / name).read_bytes() == (whole[0] / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (run / "monitor.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 8]
