"""What the untouched model gives for every row, computed once before training on the plain engine.

An objective that compares with the untouched model reads the same values in every epoch. Log-probabilities are kept as
they are. Logits are not, being as wide as the vocabulary: what is kept is the state that the LM head reads, at each
position that predicts an answer token, and the head gives the logits when they are asked for. The cached engine has
references of its own (`grun.cache.prefix`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grun.cache.folder import Use
from grun.cache.packed import HandOn, shared_copy
from grun.cache.shard import Shard, grouped
from grun.cache.store import Completed, FrozenRows, Share, fill, store_of
from grun.cache.trial import CHECKED_ROWS, tried
from grun.config.checks import bytes_of
from grun.config.options import UnlearnConfig
from grun.data.encoding import Batch, EncodedRow, collate
from grun.errors import ModelError
from grun.method.parametrization import Engine, StepOutput, at_answers
from grun.objectives.terms import Reference
from grun.training.task import split
from grun.training.unlearning import UnlearnTask
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)

CODE = ("reference.py", "shard.py")
"""Sources that decide what is in the cache."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of logits given by the head alone, by their type."""
ROUNDED = 2e-2
"""The same for narrower types."""


class ReferencedEngine:
    """Runs the model as another engine does, and looks references up."""

    def __init__(self, engine: Engine, rows: FrozenRows, head: Head | None) -> None:
        """`rows` gives frozen rows: `reference`, and with a head the `states` that it reads."""
        self.name = engine.name
        self._engine = engine
        self._rows = rows
        self._head = head

    def lay_out(self, batches: Sequence[Mapping[str, Batch]]) -> None:
        """As the other engine does."""
        self._engine.lay_out(batches)

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """As the other engine does."""
        return self._engine.run(batches, hidden)

    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """Log-probabilities from the store; logits from it too, at the positions that predict an answer token."""
        return {name: self._look_up(batch) for name, batch in batches.items()}

    def _look_up(self, batch: Batch) -> StepOutput:
        answer = batch.labels != -100
        known = torch.cat([self._rows[row].reference for row in batch.encoded]).to(answer.device)
        return StepOutput(
            input_ids=batch.input_ids,
            attended=batch.attention_mask != 0,
            answer=answer,
            token_logprobs=at_answers(answer, known),
            logits_at=lambda positions: self._logits(batch, answer, positions),
        )

    @torch.no_grad()
    def _logits(self, batch: Batch, answer: Tensor, positions: Tensor) -> Tensor:
        before = predicting(answer)
        if self._head is None or bool((positions & ~before).any()):
            raise ModelError(
                "reference logits are kept only for objectives that declare them (reference='logits'), and only where "
                "they predict an answer token; declare 'all_logits' to read others"
            )
        states = torch.cat([self._rows[row].states for row in batch.encoded])  # [answer tokens, width]
        return self._head(states[positions[before].to(states.device)].to(answer.device))


class Head:
    """The part of a model above its decoder: states [count, width] -> logits [count, vocabulary].

    It is the model's own where it is frozen, and a copy where it is trained.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Of the untouched `base`, which stays as it is; the caller tries whether the head computes the same."""
        name = find_blocks(base)[0].partition(".")[0]
        self._decoder = base.get_submodule(name)
        self._device = base.device.type
        self.computed_in: torch.dtype | None = None
        """Type of autocast, once a recorded pass has shown one."""
        parts = {
            child: copy.deepcopy(part) if any(p.requires_grad for p in part.parameters()) else part
            for child, part in base.named_children()
            if child != name
        }
        self._alone: Any = shared_copy(base, {}, {**parts, name: HandOn()})

    def record(self, run: Callable[[], StepOutput]) -> tuple[StepOutput, Tensor]:
        """What `run`, a pass of the model, gives, and the states that its head read at `predicting` positions."""
        seen: list[Tensor] = []
        handle = self._decoder.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        try:
            output = run()
        finally:
            handle.remove()
        states = seen[0][predicting(output.answer)]
        logits_type = output.logits_at(torch.zeros_like(output.answer)).dtype
        if logits_type.itemsize < states.dtype.itemsize:  # autocast rounds what the head reads
            self.computed_in, states = logits_type, states.to(logits_type)
        return output, states

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """The model's own forward pass, its decoder left out."""
        with torch.autocast(self._device, self.computed_in, enabled=self.computed_in is not None):
            logits: Tensor = self._alone(inputs_embeds=states.unsqueeze(0), use_cache=False).logits[0]
        return logits


def predicting(answer: Tensor) -> Tensor:
    """Positions that predict the answer tokens, each one column before: both bool [batch, length]."""
    return answer.roll(-1, dims=1)


def use_reference(
    task: UnlearnTask,
    base: PreTrainedModel,
    needs: Reference,
    config: UnlearnConfig,
    *,
    pad_id: int,
    use: Use | None = None,
) -> Completed | None:
    """Compute what `task` needs of the untouched model, and have its engine look it up from now on.

    None where nothing is needed, or too much: then one line is logged, and the untouched model is run in every step.

    Args:
        task: with the plain engine, before its first step.
        base: the model, with what is trained on it.
        needs: what the objective reads of the untouched model.
        config: how much may be kept where, and how many rows a pass may have.
        pad_id, use: any token id, to fill up short rows, and the run that is noted with the data.
    """
    if needs == "none":
        return None
    engine, completed = _kept(task, task.engine, task.reference_rows, base, needs, config, pad_id, use)
    task.engine = engine
    return completed


def use_teacher(
    task: UnlearnTask, base: PreTrainedModel, config: UnlearnConfig, *, pad_id: int, use: Use | None = None
) -> Completed | None:
    """The same for the teacher of `task`, before any other engine is chosen: it sees other rows than those trained on.

    None where the objective has none.
    """
    if not task.objective.teacher:
        return None
    teacher = task.teacher
    rows = teacher.rows(task.rows("answer"))
    budget = bytes_of("cache.memory_budget", config.cache.memory_budget)
    engine, completed = _kept(task, teacher.engine, rows, base, "logits", config, pad_id, use)
    task.teacher = teacher.kept(engine, budget)
    return completed


def _kept(
    task: UnlearnTask,
    engine: Engine,
    rows: Sequence[EncodedRow],
    base: PreTrainedModel,
    needs: Reference,
    config: UnlearnConfig,
    pad_id: int,
    use: Use | None,
) -> tuple[Engine, Completed | None]:
    """An engine that looks `rows` up and runs others as `engine`, and what was computed for it; see `use_reference`."""
    passes = _Passes(task, rows, config, pad_id)
    head, problem, on_disk = None, None, False
    if needs in ("all_logits", "hidden"):
        problem = f"the objective reads {'hidden states' if needs == 'hidden' else 'logits at all positions'}"
    elif needs == "logits":
        trial = tried(lambda: Head(base), passes.compared, lambda logits: TOLERANCE.get(logits.dtype, ROUNDED))
        head = trial.fast
        problem = None if head else f"the model's head cannot be run alone: {trial.problem}"
        on_disk = head is not None and passes.size > bytes_of("cache.memory_budget", config.cache.memory_budget)
        lacks_folder = config.cache.dir is None
        if on_disk and (lacks_folder or passes.size > bytes_of("cache.disk_budget", config.cache.disk_budget)):
            limit = "and cache.dir=null" if lacks_folder else "and than cache.disk_budget"
            problem = f"they take {passes.size / 1e9:.2f} GB, more than cache.memory_budget {limit}"
    if problem is not None:
        log.info("reference values are not kept (%s): %s", problem, task.parametrization.keep_reference())
        return engine, None
    about = {"what": "states below the head", "computed_in": str(head and head.computed_in)}
    store = store_of(base, config, CODE, use, on_disk=on_disk, **about)
    completed = fill(store, "reference values", passes.rows, lambda missing, share: passes.shards(missing, head, share))
    return ReferencedEngine(engine, store, head), completed


class _Passes:
    """Passes of the untouched model over the rows of a task, as large as those of training."""

    def __init__(self, task: UnlearnTask, rows: Sequence[EncodedRow], config: UnlearnConfig, pad_id: int) -> None:
        self.rows = sorted(dict.fromkeys(rows), key=len, reverse=True)
        self._parametrization = task.parametrization
        self._size = config.train.micro_batch_size or config.train.batch_size
        self._pad_id = pad_id
        self._device = task.device
        self.size = 0
        """Bytes of the states of all rows, once a head was tried."""

    def compared(self, head: Head) -> dict[str, tuple[Tensor, Tensor]]:
        """Logits of `head`, and those of the model, on the two longest rows; sets `size`."""
        with self._parametrization.reference():
            output, states = head.record(lambda: self._run(self.rows[: min(CHECKED_ROWS, self._size)]))
            found = head(states), output.answer_logits()
        self.size = sum(len(row.answer_ids) for row in self.rows) * states.shape[1] * states.element_size()
        return {"logits": found}

    def shards(self, rows: Sequence[EncodedRow], head: Head | None, share: Share) -> Iterator[Shard]:
        """References of `rows`, and with a head the states that it reads instead of those below an edit."""
        return grouped(self._shard(piece, head) for piece in share(split(rows, self._size)))

    def _shard(self, rows: Sequence[EncodedRow], head: Head | None) -> Shard:
        with self._parametrization.reference():
            output, states = (self._run(rows), None) if head is None else head.record(lambda: self._run(rows))
        reference = output.token_logprobs[output.answer].cpu()
        if states is None:
            return Shard.without_prompts(list(rows), reference.new_zeros(0, 0), reference, [0] * len(rows))
        return Shard.without_prompts(list(rows), states.cpu(), reference, [len(row.answer_ids) for row in rows])

    def _run(self, rows: Sequence[EncodedRow]) -> StepOutput:
        return self._parametrization.run(collate(rows, self._pad_id).to(self._device))
