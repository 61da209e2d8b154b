"""Sides that are timed against each other: one task with one engine, its own edits and optimizer, shared weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.model import MultiplyAdds, Text, synchronize
from grun.cache.engine import use_cached
from grun.cache.store import Completed
from grun.commands.unlearn import make_parametrization
from grun.method.edit import LoReftEdit
from grun.method.gated import Grun
from grun.method.parametrization import traits_of
from grun.objectives.objective import build_objective
from grun.training.unlearning import UnlearnRows, UnlearnTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grun.config.options import UnlearnConfig


class PublishedEdit(nn.Module):
    """The low-rank edit as published: torch's orthogonal parametrization, evaluated anew at each of its two uses."""

    def __init__(self, edit: LoReftEdit) -> None:
        """With the parameters of `edit`."""
        super().__init__()
        self.rotate = nn.Module()
        self.rotate.weight = nn.Parameter(edit.rotation.detach().clone())
        orthogonal(self.rotate, "weight")
        self.source = edit.source

    def forward(self, hidden: Tensor) -> Tensor:
        """Change of `hidden`, same shape."""
        rotate: Any = self.rotate
        target = self.source(hidden)
        return (target - hidden @ rotate.weight) @ rotate.weight.mT


class Side:
    """A task and the loop around it; the plain engine runs it until `use_cache`.

    One step is the task's data, moved to the device, loss, backward, clipping, AdamW and the schedule: what
    `grun.training.train.StepTrainer` does, without its log and checkpoints (about a millisecond a step).
    """

    def __init__(
        self, base: PreTrainedModel, text: Text, rows: UnlearnRows, config: UnlearnConfig, *, published: bool = False
    ) -> None:
        """`base` stays as it is; `published`: edits are PublishedEdits."""
        self.config = config
        parametrization = make_parametrization(config, [])
        model = _sharing_weights(base) if isinstance(parametrization, Grun) else copy.deepcopy(base)
        self.model: PreTrainedModel = model
        torch.manual_seed(config.seed)
        parametrization.prepare(model, text.template)
        if published:
            for intervention in parametrization.model.edit_at().values():
                intervention.edit = PublishedEdit(intervention.edit)
        self.objective = build_objective(config.objective, config.loss, gated=traits_of(config.method).gated)
        self.task = UnlearnTask(
            parametrization, self.objective, rows, config, pad_id=text.pad_id, device=base.device
        )  # fmt: skip
        self.steps_per_epoch = self.task.steps // config.train.epochs
        self._loop: Iterator[float] | None = None
        self._number = 0

    def use_cache(self) -> Use:
        """Fill a cache and go on with the cached engine, as `unlearn` does."""
        synchronize(self.task.device)
        started = time.perf_counter()
        completed = use_cached(self.task, self.config)
        synchronize(self.task.device)
        if completed is None:
            raise SystemExit("the cached engine was refused (see the warning above): there is nothing to measure")
        return Use(completed, time.perf_counter() - started)

    def step(self, number: int) -> float:
        """Take a step on the data of step `number`, and return its seconds."""
        if self._loop is None:
            self._loop = self._steps()
        self._number = number
        return next(self._loop)

    def multiply_adds(self, base: PreTrainedModel, steps: range) -> Operations:
        """Counted for the data of `steps`, and for filling a cache with every row of the run."""
        count = MultiplyAdds(base, min(self.config.method.blocks or [0]))
        names = self.objective.reference_continuations
        plain = cached = 0
        for number in steps:
            for batches in self.task.data(number).micro_batches:
                plain += count.plain(batches, names)
                cached += count.cached(batches)
        rows = [row for name in self.task.objective.continuations for row in self.task.rows(name)]
        return Operations(plain, cached, count.build(rows, self.task.reference_rows))

    def _steps(self) -> Iterator[float]:
        from transformers import get_scheduler

        task, train = self.task, self.config.train
        parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
        schedule = get_scheduler(train.schedule, optimizer, num_warmup_steps=0, num_training_steps=task.steps)
        task.module.train()
        while True:
            synchronize(task.device)
            started = time.perf_counter()
            data = task.data(self._number)
            for batch in data.micro_batches:
                on_device = {name: part.to(task.device) for name, part in batch.items()}
                loss, _ = task.loss(on_device, data.counts, self._number)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            synchronize(task.device)
            yield time.perf_counter() - started


@dataclass
class Use:
    """A filled cache."""

    completed: Completed
    seconds: float
    """Of the whole: the comparison with the plain engine, the identity of the weights, and the build."""

    def describe(self) -> dict[str, float]:
        """Figures of the cache."""
        done = self.completed
        return {
            "seconds": round(self.seconds, 3),
            "build_seconds": round(done.seconds, 3),
            "rows": done.rows,
            "rows_per_second": round(done.built / done.seconds, 1),
            "bytes": done.bytes,
            "bytes_per_row": round(done.bytes / done.rows),
        }


@dataclass
class Operations:
    """Multiply-adds of some steps."""

    plain: int
    cached: int
    build: int
    """Of filling the cache once."""


def _sharing_weights(base: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same tensors, to be hooked on its own."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
