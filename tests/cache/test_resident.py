"""Rows kept on the device, steps laid out before they come, and what a step then tells the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_steps import ONE_STEP, config_of, difference, step_of, task_of

from grun.cache import resident
from grun.cache.attention import move
from grun.cache.cached import CachedEngine
from grun.cache.engine import use_cached
from grun.cache.resident import Resident

CLOSE = 1e-9
"""Relative, in float64: the order of sums leaves 1e-13 or so."""


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has room for all rows."""
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2**40)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("objective", "method"),
    [
        ("gd", {}),
        ("npo", {"blocks": [3]}),
        ("idk", {"blocks": [0, 2], "gate": "mlp_3"}),
        ("npo", {"gate_read": "every_token", "gate_accumulate": "running_max", "edit_write": "sticky"}),
        ("gd", {"gate_blocks": [0, 1], "gate_pool": "maxmin", "edit_write": "sticky"}),
    ],
    ids=["gd", "last block", "first block", "every token", "pooled"],
)
def test_rows_on_the_device_give_the_plain_step(objective: str, method: dict[str, Any]) -> None:
    task = task_of(objective, train_config=dataclasses.replace(ONE_STEP, micro_batch_size=3), **method)
    plain = task.engine
    assert use_cached(task, config_of()) is not None
    engine = task.engine
    assert isinstance(engine, CachedEngine) and isinstance(engine._frozen, Resident)
    for step in (0, 1):
        batches = task.data(step).micro_batches
        compared = [{"answer": batch["answer"]} for batch in batches if task.reference_rows]
        assert all(engine._step(batch) is engine._step(batch) for batch in (*batches, *compared))  # laid out
        assert difference(step_of(task, step=step), step_of(task, plain, step)) < CLOSE


def test_rows_stay_where_they_are_if_the_device_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of()
    assert use_cached(task, config_of()) is not None
    assert isinstance(task.engine, CachedEngine)
    rows = task.rows("answer")
    frozen = task.engine._frozen
    size = sum(frozen[row].states.nbytes + frozen[row].reference.nbytes for row in rows)
    size += sum({row.prompt_ids: frozen[row].prompt.nbytes for row in rows}.values())
    for free, fits in ((size / resident.SHARE - 1, False), (size / resident.SHARE + 1, True)):
        monkeypatch.setattr(resident, "free_bytes", lambda device, free=free: free)
        found = resident.resident(frozen, rows, torch.device("cpu"))
        assert isinstance(found, Resident) is fits and (fits or found is frozen)
    for row in rows:
        for name in ("states", "prompt", "reference"):
            assert torch.equal(getattr(found[row], name).nan_to_num(), getattr(frozen[row], name).nan_to_num())


def test_many_tensors_of_any_type_are_moved_as_they_are() -> None:
    owner = {
        "values": torch.tensor([1.5, -2.0]),
        "mask": torch.tensor([[True, False, True]]),
        "numbers": torch.arange(6).view(2, 3).T,
        "none": torch.empty(0, 3),
    }
    parts = [(owner, name) for name in ("mask", "values", "numbers", "none")]
    before = [(owner[name].shape, owner[name].dtype) for _, name in parts]
    move(parts, torch.device("meta"))
    assert [owner[name].device.type for _, name in parts] == ["meta"] * 4
    assert [(owner[name].shape, owner[name].dtype) for _, name in parts] == before
