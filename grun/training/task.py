"""What the trainer asks of a task: all its steps, cut into micro-batches beforehand, and the loss of one of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grun.data.encoding import Batch
from grun.runtime import processes

MicroBatch = dict[str, Batch]
"""What one forward pass per key reads."""
Terms = dict[str, Any]
"""Shares of a loss, by name: numbers, or tensors without dimensions or gradient, left where they were computed."""


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

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, Terms]:
        """Share of this micro-batch in the step's loss, and the shares of its terms for the log."""

    def stepped(self, parts: Terms) -> None:
        """Called after every step with its terms over the whole of it; numbers where `state` gives anything."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep besides parameters and optimizer, so that a resumed run is the same run."""

    def restore(self, state: dict[str, float]) -> None:
        """Take up what `state` gave."""


class Stateless:
    """A task that keeps nothing from step to step but parameters and optimizer."""

    def stepped(self, parts: Terms) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, float]:
        """Nothing to keep."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing was kept."""


def split(items: Sequence[Any], size: int | None) -> list[Sequence[Any]]:
    """Cut `items` into consecutive pieces of at most `size`."""
    size = size or len(items)
    return [items[start : start + size] for start in range(0, len(items), size)]


def cut(rows: Sequence[Any], size: int | None) -> list[Sequence[Any]]:
    """Cut a step's rows into micro-batches of at most `size`; None: one for each process.

    Of several processes each gets as many micro-batches, of as many rows but for one; where there are fewer rows than
    that takes, empty pieces are left out.
    """
    workers = processes.count()
    if workers == 1:
        return split(rows, size)
    share = -(-len(rows) // workers)
    pieces = workers * -(-share // (size or share))
    bounds = [number * len(rows) // pieces for number in range(pieces + 1)]
    return [rows[start:end] for start, end in zip(bounds, bounds[1:], strict=False) if end > start]


def deal(micro_batches: Sequence[MicroBatch], workers: int, worker: int) -> list[tuple[MicroBatch, bool]]:
    """What process `worker` of `workers` runs of a step, in order, and whether it counts.

    Every process runs as many passes, since sharded weights are gathered by all in every one: a process for which
    nothing is left runs the smallest micro-batch of the step, and that pass counts nothing. Micro-batches of like size
    run at the same time.
    """
    if workers == 1:
        return [(batch, True) for batch in micro_batches]
    by_size = sorted(micro_batches, key=_tokens, reverse=True)
    mine = []
    for turn, group in enumerate(split(by_size, workers)):
        place = worker if turn % 2 == 0 else workers - 1 - worker
        mine.append((group[place], True) if place < len(group) else (by_size[-1], False))
    return mine


def _tokens(batch: MicroBatch) -> int:
    return sum(part.tokens for part in batch.values())
