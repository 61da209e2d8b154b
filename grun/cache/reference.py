"""What the untouched model says of every row, computed once before training on the plain engine.

An objective that compares with the untouched model reads the same values in every epoch. Log-probabilities are kept as
they are. Logits are not, being as wide as the vocabulary: what is kept is the state that the LM head reads, at each
position that predicts an answer token, and the head gives the logits when they are asked for. The cached engine has
references of its own (`grun.cache.prefix`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grun.cache.shard import Shard
from grun.cache.store import Completed, PrefixStore, Use
from grun.cache.weights import weights_hash
from grun.config.checks import bytes_of
from grun.config.options import UnlearnConfig
from grun.data.encoding import Batch, EncodedRow, collate
from grun.errors import ModelError
from grun.method.parametrization import Engine, StepOutput
from grun.objectives.terms import Reference
from grun.runtime.files import file_hash, target
from grun.runtime.progress import progress
from grun.training.micro_batches import split
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grun.training.unlearning import UnlearnTask

log = logging.getLogger(__name__)

SHARD_BYTES = 2**26
"""Size at which a shard is closed."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of logits given by the head alone; other types are narrower."""
ROUNDED = 2e-2
"""The same for those."""


class ReferencedEngine:
    """Runs the model as another engine does, and looks references up."""

    def __init__(self, engine: Engine, rows: Mapping[EncodedRow, Any] | PrefixStore, head: Head | None) -> None:
        """`rows` gives frozen rows: `reference`, and with a head the `states` that it reads."""
        self.name = engine.name
        self._engine = engine
        self._rows = rows
        self._head = head

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """As the other engine does."""
        return self._engine.run(batches, hidden)

    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """Log-probabilities from the store; logits from it too, at the positions that predict an answer token."""
        return {name: self._look_up(batch) for name, batch in batches.items()}

    def _look_up(self, batch: Batch) -> StepOutput:
        answer = batch.labels != -100
        known = torch.cat([self._rows[row].reference for row in batch.encoded]).to(answer.device)
        zeros = torch.zeros(answer.shape, dtype=known.dtype, device=known.device)
        return StepOutput(
            input_ids=batch.input_ids,
            attended=batch.attention_mask != 0,
            answer=answer,
            token_logprobs=zeros.masked_scatter(answer, known),
            gate_logits=None,
            gate_mask=None,
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
        """Of the untouched `base`; nothing of it is changed. Whether it computes the same is for others to try."""
        name = find_blocks(base)[0].partition(".")[0]
        self._decoder = base.get_submodule(name)
        self._device = base.device.type
        self.computed_in: torch.dtype | None = None
        """Type of autocast, once a recorded pass has shown one."""
        alone = copy.copy(base)
        children: dict[str, nn.Module | None] = dict(base._modules)
        for child_name, child in children.items():
            if child is not None and child_name != name and any(p.requires_grad for p in child.parameters()):
                children[child_name] = copy.deepcopy(child)
        for attribute in [key for key in alone.__dict__ if key.endswith(("_hooks", "_hooks_with_kwargs"))]:
            alone.__dict__[attribute] = OrderedDict()
        alone.__dict__.pop("forward", None)  # of the whole model, where something was put on the instance
        alone.__dict__["_modules"] = {**children, name: _HandOn()}
        self._alone: Any = alone

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


class _HandOn(nn.Module):
    """Stands for the decoder."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


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

    None where nothing is needed, or too much: then one line says so, and the untouched model is run in every step.

    Args:
        task: with the plain engine, before its first step.
        base: the model, with what is trained on it.
        needs: what the objective reads of the untouched model.
        config: says how much may be kept where, and how many rows a pass may have.
        pad_id: any token id, to fill up short rows.
        use: the run, as it is noted beside what is written of its data.
    """
    if needs == "none":
        return None
    passes = _Passes(task, config, pad_id)
    head = problem = folder = None
    identity: dict[str, Any] = {}
    budget = bytes_of("cache.memory_budget", config.cache.memory_budget)
    if needs in ("all_logits", "hidden"):
        problem = f"the objective reads {'hidden states' if needs == 'hidden' else 'logits at all positions'}"
    elif needs == "logits":
        try:
            head = Head(base)
            size, problem = passes.try_head(head)
        except Exception as error:  # whatever a model's own code raises when it is called another way
            text = str(error).splitlines()[0] if str(error) else "no message"
            problem = f"the model's head cannot be run alone: {type(error).__name__}: {text}"
        else:
            if problem is None and size > budget:
                folder, problem = _folder(config, size)
    if problem is not None:
        log.info("reference values are not kept (%s): %s", problem, task.parametrization.keep_reference())
        return None
    if folder is not None:
        identity = {**_identity(base, config.model.path, folder), "computed_in": str(head and head.computed_in)}
    store = PrefixStore(folder, identity, memory_budget=budget, use=use)
    with progress("reference values", len(passes.rows)) as advance:
        completed = store.complete(passes.rows, lambda missing: passes.shards(missing, head), advance)
    log.info(
        "reference values of %d rows: %d found, %d computed, %.1f s, %.3f GB in %s",
        completed.rows, completed.found, completed.built, completed.seconds, completed.bytes / 1e9, completed.where,
    )  # fmt: skip
    task.engine = ReferencedEngine(task.engine, store, head)
    return completed


class _Passes:
    """Passes of the untouched model over the rows of a task, as large as those of training."""

    def __init__(self, task: UnlearnTask, config: UnlearnConfig, pad_id: int) -> None:
        self.rows = sorted(dict.fromkeys(task.reference_rows), key=len, reverse=True)
        self._parametrization = task.parametrization
        self._size = config.train.micro_batch_size or config.train.batch_size
        self._pad_id = pad_id
        self._device = task.device

    def try_head(self, head: Head) -> tuple[int, str | None]:
        """Bytes of the states of all rows, and what is wrong with `head` on the two longest, None if nothing is."""
        with self._untouched():
            output, states = head.record(lambda: self._run(self.rows[: min(2, self._size)]))
            logits = output.answer_logits().double()
            difference = float((head(states).double() - logits).norm() / logits.norm())
        size = sum(len(row.answer_ids) for row in self.rows) * states.shape[1] * states.element_size()
        if not difference <= TOLERANCE.get(states.dtype, ROUNDED):
            return size, f"logits of the model's head alone differ by {difference:.2g} relative"
        return size, None

    def shards(self, rows: Sequence[EncodedRow], head: Head | None) -> Iterator[Shard]:
        """References of `rows`, and with a head the states that it reads, in shards of about SHARD_BYTES."""
        done: list[EncodedRow] = []
        references: list[Tensor] = []
        states: list[Tensor] = []
        size = 0
        for piece in split(rows, self._size):
            with self._untouched():
                run = functools.partial(self._run, piece)
                output, seen = (run(), None) if head is None else head.record(run)
            reference = output.token_logprobs[output.answer]
            done += piece
            references.append(reference.cpu())
            states.append(reference.new_zeros(0, 0).cpu() if seen is None else seen.cpu())
            size += states[-1].nbytes
            if size >= SHARD_BYTES:
                yield _shard(done, references, states)
                done, references, states, size = [], [], [], 0
        if done:
            yield _shard(done, references, states)

    def _run(self, rows: Sequence[EncodedRow]) -> StepOutput:
        return self._parametrization.run(collate(rows, self._pad_id).to(self._device))

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        with self._parametrization.reference(), torch.no_grad():
            yield


def _shard(rows: list[EncodedRow], references: Sequence[Tensor], states: Sequence[Tensor]) -> Shard:
    """Rows as the store keeps them: states of answer tokens instead of those below an edit, and nothing of prompts."""
    kept = torch.cat(list(states))
    return Shard(
        rows=rows,
        states=kept,
        prompts=kept.new_zeros(0),
        reference=torch.cat(list(references)),
        columns=[len(row.answer_ids) if len(kept) else 0 for row in rows],
        prompt_of=[0] * len(rows),
        prompt_tokens=[0],
    )


def _folder(config: UnlearnConfig, size: int) -> tuple[Path | None, str | None]:
    """Where states of `size` bytes, too many for memory, are written, or why they are not."""
    if config.cache.dir is None:
        limit = "and cache.dir=null"
    elif size > bytes_of("cache.disk_budget", config.cache.disk_budget):
        limit = "and than cache.disk_budget"
    else:
        return target(config.cache.dir, "cache.dir"), None
    return None, f"they take {size / 1e9:.2f} GB, more than cache.memory_budget {limit}"


def _identity(base: PreTrainedModel, source: str | None, folder: Path) -> dict[str, Any]:
    """What decides the values in a file. Rows are told apart in it by their tokens."""
    import transformers

    return {
        "what": "states below the head",
        "weights": weights_hash(base, source, folder),
        "dtype": str(base.dtype),
        "transformers": transformers.__version__,
        "code": file_hash(Path(__file__)),
    }
