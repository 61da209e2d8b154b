"""The cached engine: a training step that runs only what an edit can change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grun.cache.attention import Pack
from grun.cache.packed import PackedModel
from grun.cache.shard import FrozenRow
from grun.cache.store import FrozenRows
from grun.cache.suffix import SuffixRunner, SuffixStates, sites_of_rows
from grun.data.encoding import Batch, EncodedRow
from grun.errors import ModelError
from grun.method.intervention import GatedIntervention
from grun.method.model import GrunModel
from grun.method.parametrization import StepOutput, at_answers
from grun.training.gate_fit import prompt_features
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
        features_of: Callable[[Sequence[EncodedRow]], Tensor] | None = None,
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
        self._runner = SuffixRunner(packed, first, whole_rows=self._whole_rows)
        self._reference: dict[EncodedRow, Tensor] = {}
        self._untouched: dict[EncodedRow, dict[int, Tensor]] = {}
        self._features_of = features_of or partial(prompt_features, model, pad_id=0)
        self._features: dict[tuple[int, ...], Tensor] = {}
        """By prompt, what a gate for all edits reads, [size]: no edit changes it."""

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """One pass over all batches, edits included; `hidden` names blocks whose outputs are wanted."""
        step = _Step(batches, self._packed.device, self._whole_rows)
        frozen = [self._frozen[row] for row in step.rows]
        with self._model.drawing(step.seeds):
            locate = None if self._rule.changes == "last_prompt" else partial(self._located, step)
            states = self._runner.states(frozen, self._model.edit_at(), hidden, locate, self._pooled(step.rows))
        logprobs = states.final.new_zeros(int(step.answer.sum()))
        if self._reads_head:
            logprobs = self._runner.logprobs(step.rows, frozen, states)
        outputs = self._outputs(step, logprobs, lambda: states)
        for name, output in outputs.items():
            where = step.where[name]
            if states.gates:
                output.gate_logits = {block: logits[where] for block, logits in states.gates.items()}
                output.gate_mask = torch.ones(len(where), 1, dtype=torch.bool, device=where.device)
                if self._whole_rows:
                    output.gate_mask, output.gate_prompt = output.attended, output.attended & ~output.answer
            if states.hidden:
                columns = _places(states.pack, step)[where].clamp(min=0)
                output.hidden_states = {block: values[columns] for block, values in states.hidden.items()}
        return outputs

    def read_prompts(self, rows: Sequence[EncodedRow]) -> None:
        """Keep what a gate for all edits reads of the prompts of `rows`, if there is such a gate; on its device."""
        pooled = self._model.pooled
        missing = dict.fromkeys(row.prompt_ids for row in rows if row.prompt_ids not in self._features)
        if pooled is None or not missing:
            return
        like = next(pooled.parameters())
        found = self._features_of([EncodedRow(prompt, ()) for prompt in missing])
        self._features.update(zip(missing, found.to(like), strict=True))

    def _pooled(self, rows: Sequence[EncodedRow]) -> dict[int, Tensor]:
        """Logits of a gate for all edits by the block that it goes by, [rows, 1]; empty where there is none."""
        pooled = self._model.pooled
        if pooled is None:
            return {}
        self.read_prompts(rows)
        features = torch.stack([self._features[row.prompt_ids] for row in rows]).unsqueeze(1)  # [rows, 1, size]
        return {pooled.block: pooled(features).to(self._packed.device)}

    @torch.no_grad()
    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """The same under the untouched model: log-probabilities from the cache, logits only when asked for.

        Hidden states are computed when a row first comes, and kept on the device.
        """
        if not batches:
            return {}
        step = _Step(batches, self._packed.device, self._whole_rows)
        frozen = [self._frozen[row] for row in step.rows]

        @cache
        def states() -> SuffixStates:
            with torch.no_grad():
                return self._runner.states(frozen, {})

        known = [self._reference.get(row, one.reference) for row, one in zip(step.rows, frozen, strict=True)]
        unknown = self._reads_head and any(bool(values.isnan().any()) for values in known)
        if unknown:  # frozen for a run that did not ask for them
            logprobs = self._runner.logprobs(step.rows, frozen, states())
            known = list(logprobs.split([len(row.answer_ids) for row in step.rows]))
            self._reference.update(zip(step.rows, known, strict=True))
        outputs = self._outputs(step, torch.cat(known).to(self._packed.device), states)
        if hidden:
            self._keep_untouched(step, frozen, hidden)
            for name, batch in batches.items():
                kept = [self._untouched[row] for row in batch.encoded]
                outputs[name].hidden_states = {
                    block: torch.stack([_filled_up(row[block], step.answer.shape[1]) for row in kept])
                    for block in hidden
                }
        return outputs

    def _keep_untouched(self, step: _Step, frozen: Sequence[FrozenRow], hidden: Collection[int]) -> None:
        """Run the untouched model on the rows for which an output of the blocks `hidden` is not kept yet; keep it."""
        by_row = zip(step.rows, frozen, strict=True)
        missing = {row: one for row, one in by_row if not {*hidden} <= self._untouched.get(row, {}).keys()}
        if not missing:
            return
        states = self._runner.states(list(missing.values()), {}, hidden)
        for block, values in states.hidden.items():
            for row, part in zip(missing, values.split(states.pack.lengths.tolist()), strict=True):
                self._untouched.setdefault(row, {})[block] = part

    def _located(self, step: _Step, pack: Pack) -> Sites:
        """Where the rule reads and writes, in columns of what is run of each row."""
        inside = pack.layout.inside
        return sites_of_rows(self._rule, inside, step.prompt_lengths, step.ids[:, : inside.shape[1]])

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

    def _outputs(self, step: _Step, logprobs: Tensor, states: Callable[[], SuffixStates]) -> dict[str, StepOutput]:
        token_logprobs = at_answers(step.answer, logprobs)

        def logits_at(where: Tensor, positions: Tensor) -> Tensor:
            places = _places(states().pack, step)[where][positions]
            if bool((places < 0).any()):
                raise ModelError(
                    "the cached engine has no logits there: it runs no more of a row than an edit can change"
                )
            return self._packed.logits(states().final[places])

        return {
            name: StepOutput(
                input_ids=step.ids[where],
                attended=step.attended[where],
                answer=step.answer[where],
                token_logprobs=token_logprobs[where],
                logits_at=partial(logits_at, where),
            )
            for name, where in step.where.items()
        }


class _Step:
    """Rows of all batches of a step, in order of length so that attention has little padding."""

    def __init__(self, batches: Mapping[str, Batch], device: torch.device, whole_rows: bool) -> None:
        prompts = slice(None) if whole_rows else slice(-1, None)  # what is run of them
        tokens = {
            (name, index): row.prompt_ids[prompts] + row.answer_ids
            for name, batch in batches.items()
            for index, row in enumerate(batch.encoded)
        }
        pairs = sorted(tokens, key=lambda pair: len(tokens[pair]))
        self.rows = [batches[name].encoded[index] for name, index in pairs]
        self.seeds: list[int] | None = None
        if all(batch.seeds is not None for batch in batches.values()):
            self.seeds = [(batches[name].seeds or ())[index] for name, index in pairs]
        place = {pair: number for number, pair in enumerate(pairs)}
        self.where = {
            name: torch.tensor([place[name, index] for index in range(batch.rows)], device=device)
            for name, batch in batches.items()
        }
        """By batch, where its rows stand here, [rows of the batch]."""
        self.prompt_lengths = torch.tensor([len(row.prompt_ids[prompts]) for row in self.rows])
        self.ids = pad_sequence([torch.tensor(tokens[pair]) for pair in pairs], batch_first=True).to(device)
        column = torch.arange(self.ids.shape[1])
        attended = column < torch.tensor([len(tokens[pair]) for pair in pairs]).unsqueeze(1)  # [rows, longest]
        self.attended = attended.to(device)
        self.answer = (attended & (column >= self.prompt_lengths.unsqueeze(1))).to(device)


def _filled_up(states: Tensor, columns: int) -> Tensor:
    """States [columns of a row, width] followed by zeros: [columns, width]."""
    return torch.nn.functional.pad(states, (0, 0, 0, columns - len(states)))


def _places(pack: Pack, step: _Step) -> Tensor:
    """Index in the pack of each column of the step, -1 where the pack has none: [rows, columns]."""
    column = torch.arange(step.answer.shape[1], device=pack.device)
    return torch.where(column < pack.lengths.unsqueeze(1), pack.starts.unsqueeze(1) + column, -1)
