"""Training that is watched: a task cut off at a step, and what a forward pass keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grun.task import StepData


class CutOff:
    """A task that is interrupted at one step."""

    def __init__(self, task: Any, at: int) -> None:
        self._task, self._at = task, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def data(self, step: int) -> StepData:
        if step == self._at:
            raise KeyboardInterrupt
        data: StepData = self._task.data(step)
        return data


def saved_bytes(run: Any) -> int:
    """Bytes of different tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        held = run()
    del held
    return sum(kept.values())
