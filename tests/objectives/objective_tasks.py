"""Unlearning tasks on a small float64 Llama, for the tests of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import ragged_rows, tiny
from torch import Tensor

from baselines.full import Full
from grun.config.options import LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import Batch, EncodedRow
from grun.method.gated import Grun
from grun.objectives.objective import build_objective
from grun.objectives.terms import OBJECTIVES, TERMS
from grun.training.teacher import Counterfactual
from grun.training.unlearning import UnlearnRows, UnlearnTask

BLOCKS = [1, 3]


MUST_BE_SET: dict[str, Any] = {"epsilon": 0.3, "rmu_block": 3, "steering": 6.5}
"""Options without a default; 3 is the last block."""


def loss_of(preset: str, **options: Any) -> LossConfig:
    """Options of a preset, those that must be set among them."""
    found = OBJECTIVES.get(preset)
    terms = [TERMS.get(name) for name in (found.forget, found.retain) if name != "none"]
    unset = {option for term in terms for option, default in term.options.items() if default is None}
    return LossConfig(**{option: MUST_BE_SET[option] for option in unset}, **options)


def make_task(
    objective: str = "gd",
    loss: LossConfig | None = None,
    *,
    kind: Any = Grun,
    train_config: TrainConfig | None = None,
    quirks: Sequence[str] = (),
    **method: Any,
) -> UnlearnTask:
    """A task over a float64 Llama of four blocks and rows of random tokens."""
    config = UnlearnConfig(
        objective=objective,
        method=MethodConfig(blocks=BLOCKS, **method),
        loss=loss or loss_of(objective),
        train=train_config or TrainConfig(epochs=3, batch_size=4),
        seed=3,
    )
    base = tiny("llama", dtype=torch.float64)
    torch.manual_seed(5)
    parametrization = kind(config.method)
    parametrization.prepare(base, None)
    if kind is Full:
        parametrization.keep_reference()
    gated = kind is Grun and config.method.gate != "none"
    made = build_objective(objective, config.loss, gated=gated, quirks=quirks)
    answers = ragged_rows(8, seed=1)
    others = {row: of_others(row) for row in answers} if made.teacher else {}
    alternates = [*zip(*(ragged_rows(8, seed=seed) for seed in (6, 7)), strict=True)]
    rows = (answers, ragged_rows(8, seed=2), ragged_rows(11, seed=3))
    data = UnlearnRows(*rows, alternates=alternates, counterfactuals=others)
    return UnlearnTask(parametrization, made, data, config, pad_id=0, device=base.device, depth=4)


def of_others(row: EncodedRow) -> Counterfactual:
    """The row after two other prompts."""
    prompts, number = (row.prompt_ids[::-1], row.prompt_ids[:1]), len(row.answer_ids)
    places = torch.arange(2 * number).view(2, number)
    rows = tuple(EncodedRow(prompt, row.answer_ids) for prompt in prompts)
    return Counterfactual(rows, places, torch.full_like(places, -1), torch.empty(0, 3, dtype=torch.long))


def step_loss(task: UnlearnTask, step: int = 0) -> tuple[Tensor, dict[str, float], dict[str, Batch]]:
    """Loss and terms of a step that is one micro-batch."""
    data = task.data(step)
    (batch,) = data.micro_batches
    loss, parts = task.loss(batch, data.counts, step)
    return loss, {name: float(part) for name, part in parts.items()}, batch
