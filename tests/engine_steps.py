"""Whole steps of unlearning on tiny models, on the plain engine and on the cached one, to compare."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import WINDOW, random_rows, tiny
from transformers import PreTrainedModel
from watched import Step, whole_step

from grun.cache.cached import CachedEngine
from grun.cache.engine import freezer_for
from grun.cache.packed import PackedModel
from grun.config.options import CacheConfig, LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import Batch, EncodedRow, collate
from grun.method.gated import Grun
from grun.method.model import GrunModel
from grun.method.parametrization import Engine, StepOutput
from grun.method.plain import run_plain
from grun.objectives.objective import Objective, build_objective
from grun.training.unlearning import UnlearnRows, UnlearnTask

ONE_STEP = TrainConfig(epochs=2, batch_size=16)


def rows(lengths: Iterable[tuple[int, int]], seed: int) -> list[EncodedRow]:
    """Rows of random tokens, (prompt, answer) tokens each."""
    made = [
        (prompt, random_rows([prompt + answer], seed=1000 * seed + n)[0]) for n, (prompt, answer) in enumerate(lengths)
    ]
    return [EncodedRow(tuple(ids[:prompt]), tuple(ids[prompt:])) for prompt, ids in made]


def unlearn_rows(answers: list[EncodedRow], refusals: Sequence[int], retain: list[EncodedRow]) -> UnlearnRows:
    """With refusals of so many tokens after the prompts of `answers`."""
    texts = random_rows(list(refusals), seed=77)
    refused = [EncodedRow(row.prompt_ids, tuple(text)) for row, text in zip(answers, texts, strict=True)]
    return UnlearnRows(answers, refused, retain)


DATA = unlearn_rows(
    rows([(1, 5), (6, 1), (WINDOW + 5, 9), (1, 1), (4, 3), (9, 2), (4, 8)], seed=1),
    [3, 1, 5, 2, 1, 7, 4],
    rows([(5, 4), (1, 1), (WINDOW + 3, 12), (2, 6), (7, 1), (3, 3), (12, 2), (1, 7), (6, 5)], seed=2),
)
"""Ragged: prompts and answers of one token, prompts beyond the sliding window."""


def objective_of(name: str, loss: LossConfig | None = None, gated: bool = True) -> Objective:
    return build_objective(name, loss or LossConfig(), gated=gated)


def config_of(train_config: TrainConfig = ONE_STEP, folder: Path | None = None, **changes: Any) -> UnlearnConfig:
    cache = CacheConfig(dir=None if folder is None else str(folder))
    return UnlearnConfig(train=train_config, cache=cache, seed=3, **changes)


def task_of(
    objective: str | Objective = "gd",
    base: PreTrainedModel | str = "llama",
    train_config: TrainConfig = ONE_STEP,
    *,
    data: UnlearnRows = DATA,
    kind: Any = Grun,
    quirk: bool = False,
    seed: int = 5,
    **method: Any,
) -> UnlearnTask:
    """A task with the plain engine; its module is the GrunModel, with the same edits for the same seed."""
    base = tiny(base) if isinstance(base, str) else base
    options = MethodConfig(**{"blocks": [1, 3], **method})
    torch.manual_seed(seed)
    parametrization = kind(options, dropout_on_hidden=True) if quirk else kind(options)
    parametrization.prepare(base, None)
    gated = kind is Grun and options.gate != "none"
    made = objective_of(objective, gated=gated) if isinstance(objective, str) else objective
    return UnlearnTask(parametrization, made, data, config_of(train_config), pad_id=0, device=base.device)


def frozen_rows(task: UnlearnTask, model: PackedModel) -> dict[EncodedRow, Any]:
    freezer = freezer_for(edited(task), model, last_answer_token=bool(task.hidden))
    every = dict.fromkeys(row for name in task.objective.continuations for row in task.rows(name))
    shards = freezer.shards(list(every), set(task.reference_rows))
    return {row: shard.row(index) for shard in shards for index, row in enumerate(shard.rows)}


def edited(task: UnlearnTask) -> GrunModel:
    assert isinstance(task.module, GrunModel)
    return task.module


def cached(task: UnlearnTask) -> CachedEngine:
    """The cached engine of a task, its cache a dict."""
    model = PackedModel(edited(task).base)
    return CachedEngine(edited(task), model, frozen_rows(task, model))


class PaddedLeft:
    """The plain engine on batches padded on the left, with explicit positions for models that count them."""

    name = "plain"

    def __init__(self, model: GrunModel) -> None:
        self._model = model

    def lay_out(self, batches: Sequence[Mapping[str, Batch]]) -> None:
        pass

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        return {name: self._one(batch) for name, batch in batches.items()}

    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        with self._model.disabled(), torch.no_grad():
            return self.run(batches)

    def _one(self, given: Batch) -> StepOutput:
        batch = collate(given.encoded, 0, side="left")
        positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        lengths = {"prompt_lengths": batch.prompt_lengths} if self._model.active else {}
        output = run_plain(self._model.base, batch, position_ids=positions, **lengths)
        output.gate_logits = dict(self._model.intervenable.gates) or None
        output.gate_mask = self._model.intervenable.gate_mask
        return output


def step_of(task: UnlearnTask, engine: Engine | None = None, step: int = 0) -> Step:
    """Loss, terms and gradients of one whole step, on another engine than the task's if one is given."""
    before, task.engine = task.engine, engine or task.engine
    task.module.train()
    found = whole_step(task, step)
    assert found.gradients.keys() == dict(task.module.named_parameters()).keys()
    task.engine = before
    return found


def difference(found: Step, expected: Step) -> float:
    """Largest relative difference of the loss, a term or a parameter's gradient."""
    assert found.parts.keys() == expected.parts.keys() and found.gradients.keys() == expected.gradients.keys()
    numbers = [(found.loss, expected.loss), *((found.parts[name], value) for name, value in expected.parts.items())]
    relative = [abs(ours - theirs) / abs(theirs) for ours, theirs in numbers]
    for name, wanted in expected.gradients.items():
        assert float(wanted.norm()) > 0, name
        relative.append(float((found.gradients[name] - wanted).norm() / wanted.norm()))
    return max(relative)
