"""Which engine runs a training: the cached one wherever it is shown to give what the plain one gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from grun.cache.cached import CachedEngine
from grun.cache.features import kept_features
from grun.cache.folder import Use
from grun.cache.packed import PackedModel
from grun.cache.prefix import MEMORY_BUDGET, Freezer
from grun.cache.resident import resident
from grun.cache.shard import Shard
from grun.cache.store import Completed, FrozenRows, Share, fill, store_of
from grun.cache.trial import CHECKED_ROWS, tolerance, tried
from grun.config.checks import bytes_of
from grun.config.options import UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.loading.streaming import load_blocks
from grun.method.gated import Grun
from grun.method.model import GrunModel
from grun.runtime.memory import enough_memory
from grun.training.unlearning import UnlearnTask

log = logging.getLogger(__name__)

CODE = ("attention.py", "fused.py", "packed.py", "passage.py", "places.py", "prefix.py", "suffix.py", "shard.py")
"""Sources that decide what is in the cache."""


def use_cached(task: UnlearnTask, config: UnlearnConfig, use: Use | None = None) -> Completed | None:
    """Give `task`, which has the plain engine, the cached one and fill its cache.

    None, and a line in the log, where the plain one stays: the two are compared on the longest rows. Only edits leave a
    part of the model constant: without them it stays without a line. `use` is the run that is noted with the data.
    """
    parametrization = task.parametrization
    if not isinstance(parametrization, Grun):
        return None
    model = parametrization.model
    with enough_memory("loading the blocks that are trained", ["edits at later blocks (method.blocks)"]):
        load_blocks(model.base, min(model.edit_at()) + 1)
    if model.pooled is not None and model.rule.read == "every_token":
        log.info("the plain engine is used: the cached one knows no pooled gate that is asked at every token")
        return None
    budget = bytes_of("cache.memory_budget", config.cache.memory_budget)

    def make() -> tuple[PackedModel, Freezer, CachedEngine]:
        packed = PackedModel(model.base, recompute=config.train.gradient_checkpointing)
        freezer = freezer_for(model, packed, last_answer_token=bool(task.hidden), budget=budget)
        frozen = _frozen(freezer, task)
        return packed, freezer, CachedEngine(model, packed, frozen, reads_head=task.objective.reads_head)

    quantized = getattr(model.base, "quantization_method", None) is not None
    close = tolerance(model.base.dtype, rounded=quantized)
    trial = tried(make, lambda made: _compared_steps(task, made[2]), close)
    if trial.fast is None:
        log.warning("the plain engine is used, since the cached one does not fit this model: %s", trial.problem)
        return None
    packed, freezer, _ = trial.fast
    store = store_of(
        model.base,
        config,
        CODE,
        use,
        first_block=min(model.edit_at()),
        last_answer_token=bool(task.hidden),
        position=model.rule.changes,
    )
    rows = list(dict.fromkeys(row for name in task.objective.continuations for row in task.rows(name)))
    reference = _compared(task)

    def build(missing: list[EncodedRow], share: Share) -> Iterator[Shard]:
        return freezer.shards(rows, reference, set(missing), share)

    completed = fill(store, "frozen prefix", rows, build)
    frozen = resident(store, rows, packed.device)
    features_of = None if model.pooled is None else kept_features(model, config, use)
    engine = CachedEngine(model, packed, frozen, reads_head=task.objective.reads_head, features_of=features_of)
    engine.read_prompts(rows)
    task.engine = engine
    return completed


def freezer_for(
    model: GrunModel, packed: PackedModel, *, last_answer_token: bool, budget: int = MEMORY_BUDGET
) -> Freezer:
    """What freezes rows for the edits of `model`; for the others see `Freezer`."""
    at, changes = min(model.edit_at()), model.rule.changes
    return Freezer(packed, at, last_answer_token=last_answer_token, changes=changes, budget=budget)


def _compared(task: UnlearnTask) -> set[EncodedRow]:
    """Rows whose log-probabilities under the untouched model are read."""
    return set(task.reference_rows if task.objective.reads_head else ())


def _frozen(freezer: Freezer, task: UnlearnTask) -> FrozenRows:
    rows = {row for batch in task.longest(CHECKED_ROWS).values() for row in batch.encoded}
    shards = freezer.shards(sorted(rows, key=len), _compared(task))
    return {row: shard.row(index) for shard in shards for index, row in enumerate(shard.rows)}


def _compared_steps(task: UnlearnTask, engine: CachedEngine) -> dict[str, tuple[Tensor, Tensor]]:
    """What `engine` and the task's own give on the longest rows."""
    plain, training = task.engine, task.module.training
    task.module.train()
    try:
        wanted = _loss_and_gradient(task)
        task.engine = engine
        found = _loss_and_gradient(task)
    finally:
        task.engine = plain
        task.module.zero_grad()
        task.module.train(training)
    return {name: (found[name], wanted[name]) for name in wanted}


def _loss_and_gradient(task: UnlearnTask) -> Mapping[str, Tensor]:
    task.module.zero_grad()
    batch = {name: part.to(task.device) for name, part in task.longest(CHECKED_ROWS).items()}
    loss, _ = task.loss(batch, task.objective.counts([batch]), task.steps)
    loss.backward()
    gradients = [p.grad.flatten().double().cpu() for p in task.module.parameters() if p.grad is not None]
    return {"loss": loss.detach().double().reshape(1), "gradient": torch.cat(gradients)}  # edits may lie apart
