"""The cached engine: a training step that runs only what an edit can change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grun.cache.ahead import Ahead, Gathered
from grun.cache.attention import Pack, move
from grun.cache.packed import PackedModel
from grun.cache.shard import FrozenRow
from grun.cache.step import AtAnswers, Step, key_of
from grun.cache.store import FrozenRows
from grun.cache.suffix import SuffixRunner, SuffixStates, Written, gathered, sites_of_rows
from grun.data.encoding import Batch, EncodedRow
from grun.errors import ModelError
from grun.method.edit import bases_at_once
from grun.method.intervention import GatedIntervention
from grun.method.model import GrunModel
from grun.method.parametrization import StepOutput
from grun.training.gate_fit import FeaturesOf, padded, prompt_features
from pyvene_custom import Sites


class CachedEngine:
    """Gives the plain engine's losses and gradients, from frozen rows; see `grun.cache.prefix` and `suffix`.

    Its StepOutputs hold of each row the last prompt token and the answer alone: column 0 is the last prompt token,
    answer token i stands in column i + 1. Where gates read every token they hold whole rows. All batches of a step run
    as one pack, without padding.
    """

    name = "cached"

    def __init__(
        self,
        model: GrunModel,
        packed: PackedModel,
        frozen: FrozenRows,
        *,
        reads_head: bool = True,
        features_of: FeaturesOf | None = None,
    ) -> None:
        """Run the edits of `model` on what `frozen` holds, which was frozen at the model's first edited block.

        Without `reads_head` the LM head is left out, and log-probabilities are 0. `features_of` keeps what a gate for
        all edits reads; None: it is computed here.
        """
        self._model = model
        self._reads_head = reads_head
        self._packed = packed
        self._frozen = frozen
        first = min(model.edit_at())
        self._rule = model.rule
        self._whole_rows = self._rule.changes == "every_token"
        if self._rule.changes == "last_prompt":
            packed.backpropagate_starts(first + 1)
        self._runner = SuffixRunner(packed, first)
        self._reference: dict[EncodedRow, Tensor] = {}
        self._untouched: dict[EncodedRow, dict[int, Tensor]] = {}
        self._features_of = features_of or partial(prompt_features, model, pad_id=0)
        self._features: dict[tuple[int, ...], Tensor] = {}
        """By prompt, what a gate for all edits reads, [size]: no edit changes it."""
        self._steps: dict[Hashable, Step] = {}
        self._coming: dict[Hashable, Step] = {}
        """By the key of a step that was laid out, the one after it."""
        self._ahead = Ahead(packed.device)

    def lay_out(self, batches: Sequence[Mapping[str, Batch]]) -> None:
        """Bring to the device, in one copy, what is known of coming steps but their states; `run` finds it there."""
        steps = [self._step(each, moved=False) for each in batches]
        move([part for step in steps for part in step.parts], self._packed.device)
        self._steps = {step.key: step for step in steps}
        self._coming = {step.key: coming for step, coming in itertools.pairwise(steps)}

    def _step(self, batches: Mapping[str, Batch], *, moved: bool = True) -> Step:
        return self._steps.get(key_of(batches)) or Step(batches, self._frozen, self._packed.device, self._rule, moved)

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """One pass over all batches, edits included; `hidden` names blocks whose outputs are wanted."""
        step = self._step(batches)
        edits = self._model.edit_at()
        with self._model.drawing(step.seeds), bases_at_once(edit.edit for edit in self.edits.values()):
            locate = None if self._rule.changes == "last_prompt" else partial(self._located, step)
            states = self._states(step, edits, hidden, locate, self._pooled(step.rows))
        coming = self._coming.get(step.key)
        if coming is not None and coming.taking is None and self._packed.device.type != "cpu":
            self._ahead.start(coming.key, self._gathering(coming))
        if self._reads_head:
            logprobs = self._runner.logprobs(step.asked, states, lambda: self._known(step))
        else:
            logprobs = states.final.new_zeros(step.answer_count)
        outputs = self._outputs(step, logprobs, lambda: states)
        for name, logits in step.by_batch(states.gates).items():
            output = outputs[name]
            output.gate_logits = logits
            output.gate_mask = step.everything[name]
            if self._whole_rows:
                output.gate_mask, output.gate_prompt = output.attended, output.attended & ~output.answer
        if states.hidden:
            for name, output in outputs.items():
                columns = _places(states.pack, step)[step.where[name]].clamp(min=0)
                output.hidden_states = {block: values[columns] for block, values in states.hidden.items()}
        return outputs

    def _states(
        self, step: Step, edits: Mapping[int, GatedIntervention], hidden: Collection[int] = (), locate: Any = None,
        pooled: Mapping[int, Tensor] | None = None,
    ) -> SuffixStates:  # fmt: skip
        """One pass over the rows of a step."""
        if step.taking is None:
            states, prompts = self._ahead.take(step.key, self._gathering(step))
        else:
            states, prompts = step.taking.states(), step.taking.prompts()
        step.pack.prefix = {} if prompts is None else self._runner.prefix_of(prompts)
        return self._runner.run(step.pack, states, edits, hidden, locate, pooled)

    def _gathering(self, step: Step) -> Callable[[bool], Gathered]:
        return lambda pinned: gathered([self._frozen[row] for row in step.rows], pinned)

    def _known(self, step: Step) -> Tensor:
        """References of a step's rows that are in the cache, [answer tokens]."""
        if step.taking is not None:
            return step.taking.reference()
        return torch.cat([self._frozen[row].reference for row in step.rows]).to(self._packed.device)

    def read_prompts(self, rows: Sequence[EncodedRow]) -> None:
        """Keep what a gate for all edits reads of the prompts of `rows`, if there is such a gate; on its device."""
        pooled = self._model.pooled
        missing = dict.fromkeys(row.prompt_ids for row in rows if row.prompt_ids not in self._features)
        if pooled is None or not missing:
            return
        like = next(pooled.parameters())
        found = self._features_of([EncodedRow(prompt, ()) for prompt in missing])
        self._features.update((prompt, values.to(like)) for prompt, values in zip(missing, found, strict=True))

    def _pooled(self, rows: Sequence[EncodedRow]) -> dict[int, Tensor]:
        """Logits of a gate for all edits by the block that it goes by, [rows, 1]; empty where there is none."""
        pooled = self._model.pooled
        if pooled is None:
            return {}
        self.read_prompts(rows)
        features = padded([self._features[row.prompt_ids] for row in rows])
        return {pooled.block: pooled(features).to(self._packed.device)}

    @torch.no_grad()
    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """The same under the untouched model: log-probabilities from the cache, logits only when asked for.

        Hidden states are computed when a row first comes, and kept on the device.
        """
        if not batches:
            return {}
        step = self._step(batches)

        @cache
        def states() -> SuffixStates:
            with torch.no_grad():
                return self._states(step, {})

        known = self._known(step)
        if self._reads_head and (missing := step.unknown(self._frozen)):  # frozen for a run that did not ask for them
            missing = [row for row in missing if row not in self._reference]
            counts = [len(row.answer_ids) for row in step.rows]
            if missing:
                logprobs = self._runner.logprobs(step.asked, states(), lambda: known)
                self._reference.update(zip(step.rows, logprobs.split(counts), strict=True))
            parts = zip(step.rows, known.split(counts), strict=True)
            known = torch.cat([self._reference.get(row, part) for row, part in parts])
        outputs = self._outputs(step, known, states)
        frozen = [self._frozen[row] for row in step.rows] if hidden else []
        if hidden:
            self._keep_untouched(step, frozen, hidden)
            for name, batch in batches.items():
                kept, columns = [self._untouched[row] for row in batch.encoded], step.ids[name].shape[1]
                outputs[name].hidden_states = {
                    block: torch.stack([pad(row[block], (0, 0, 0, columns - len(row[block]))) for row in kept])
                    for block in hidden
                }
        return outputs

    def _keep_untouched(self, step: Step, frozen: Sequence[FrozenRow], hidden: Collection[int]) -> None:
        """Run the untouched model on the rows for which an output of the blocks `hidden` is not kept yet; keep it."""
        by_row = zip(step.rows, frozen, strict=True)
        missing = {row: one for row, one in by_row if not {*hidden} <= self._untouched.get(row, {}).keys()}
        if not missing:
            return
        states = self._runner.states(list(missing.values()), {}, hidden)
        for block, values in states.hidden.items():
            for row, part in zip(missing, values.split(states.pack.lengths.tolist()), strict=True):
                self._untouched.setdefault(row, {})[block] = part

    def _located(self, step: Step, pack: Pack) -> Sites | Written:
        """Where the rule reads and writes, in columns of what is run of each row."""
        if step.row_of_token is not None and not any(edit.dropout for edit in self.edits.values()):
            return Written(step.row_of_token)
        inside = pack.layout.inside
        return sites_of_rows(self._rule, inside, step.prompt_lengths, step.all_ids[:, : inside.shape[1]])

    @property
    def edits(self) -> dict[int, GatedIntervention]:
        """What is trained, by block."""
        return self._model.own_edits()

    @torch.no_grad()
    def prompt_states(self, rows: Sequence[EncodedRow]) -> dict[int, Tensor]:
        """Output of each edited block at the last prompt token under the untouched model: [rows, hidden size]."""
        frozen = [self._frozen[row] for row in rows]
        cut = [FrozenRow(row.states[:1], row.prompt, row.reference) for row in frozen]
        return self._runner.states(cut, {}, hidden=self.edits).hidden

    def _outputs(self, step: Step, logprobs: Tensor, states: Callable[[], SuffixStates]) -> dict[str, StepOutput]:
        def logits_at(where: Tensor, positions: Tensor) -> Tensor:
            places = _places(states().pack, step)[where][positions]
            if bool((places < 0).any()):
                raise ModelError(
                    "the cached engine has no logits there: it runs no more of a row than an edit can change"
                )
            return self._packed.logits(states().final[places])

        values = AtAnswers.apply(logprobs, step.places, *(ids.shape for ids in step.ids.values()))
        return {
            name: StepOutput(
                input_ids=step.ids[name],
                attended=step.attended[name],
                answer=step.answer[name],
                token_logprobs=of_batch,
                logits_at=partial(logits_at, step.where[name]),
            )
            for name, of_batch in zip(step.ids, values, strict=True)
        }


def _places(pack: Pack, step: Step) -> Tensor:
    """Index in the pack of each column of the step, -1 where the pack has none: [rows, columns]."""
    column = torch.arange(step.all_ids.shape[1], device=pack.device)
    return torch.where(column < pack.lengths.unsqueeze(1), pack.starts.unsqueeze(1) + column, -1)
