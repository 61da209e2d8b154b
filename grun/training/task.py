"""What the trainer asks of a task: all its steps, planned beforehand, and the loss of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from grun.training.micro_batches import MicroBatch


@dataclass
class StepData:
    """One optimizer step."""

    micro_batches: list[MicroBatch]
    counts: dict[str, int]
    """Denominators over the whole step, by name."""
    epoch: float
    """Passes over the data when this step is done."""


class Task(Protocol):
    """What is trained, on what."""

    module: nn.Module
    """Holds exactly the trained parameters."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def device(self) -> torch.device:
        """Where batches go."""

    def data(self, step: int) -> StepData:
        """Data of 0-based `step`; a pure function of it."""

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Share of this micro-batch in the step's loss, and the shares of its terms for the log."""

    def stepped(self, parts: dict[str, float]) -> None:
        """Called after every step with its terms over the whole of it."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep besides parameters and optimizer, so that a resumed run is the same run."""

    def restore(self, state: dict[str, float]) -> None:
        """Take up what `state` gave."""
