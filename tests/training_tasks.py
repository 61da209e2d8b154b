"""Tasks of the trainer on a tiny float64 Llama, whole and broken."""

from __future__ import annotations

from typing import Any

import torch
from tiny import ragged_rows, tiny
from torch import Tensor

from grun.commands.finetune import FinetuneTask
from grun.config.options import FinetuneConfig, LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import Batch
from grun.method.gated import Grun
from grun.objectives.objective import build_objective
from grun.training.task import StepData
from grun.training.unlearning import UnlearnRows, UnlearnTask

SHORT = TrainConfig(epochs=2, batch_size=4)
"""8 steps."""


def unlearn_task(
    train_config: TrainConfig, objective: str = "gd", *, seed: int = 3, dropout: float = 0.0, **options: Any
) -> UnlearnTask:
    """13 forget and 29 retain rows on a float64 Llama; always the same weights at the start."""
    config = UnlearnConfig(
        objective=objective,
        method=MethodConfig(blocks=[1, 3], dropout=dropout),
        loss=LossConfig(),
        train=train_config,
        seed=seed,
    )
    base = tiny("llama", dtype=torch.float64)
    torch.manual_seed(5)
    parametrization = Grun(config.method)
    parametrization.prepare(base, None)
    made = build_objective(objective, config.loss, gated=True)
    data = UnlearnRows(ragged_rows(13, seed=1), ragged_rows(13, seed=2), ragged_rows(29, seed=3))
    return UnlearnTask(parametrization, made, data, config, pad_id=0, device=base.device, **options)


def finetune_task(train_config: TrainConfig) -> FinetuneTask:
    model = tiny("llama", dtype=torch.float64)
    return FinetuneTask(model, ragged_rows(13, seed=1), FinetuneConfig(train=train_config, seed=3), pad_id=0)


class Broken:
    """A task that does something else at one step."""

    def __init__(self, task: UnlearnTask, at: int, loss: Any = None, data: Any = None) -> None:
        self._task, self._at, self._loss, self._data = task, at, loss, data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def data(self, step: int) -> StepData:
        if self._data is not None and step == self._at:
            self._data()
        return self._task.data(step)

    def loss(self, batch: dict[str, Batch], counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        total, parts = self._task.loss(batch, counts, step)
        return (self._loss(total) if self._loss is not None and step == self._at else total), parts
