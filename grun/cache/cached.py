"""The cached engine: a training step that runs only what an edit can change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from grun.cache.packed import Pack, PackedModel
from grun.cache.shard import FrozenRow
from grun.cache.suffix import SuffixRunner, SuffixStates
from grun.data.encoding import Batch, EncodedRow
from grun.errors import ModelError
from grun.method.intervention import GatedIntervention
from grun.method.parametrization import StepOutput
from grun.method.position import Call
from pyvene_custom import Sites

if TYPE_CHECKING:
    from grun.method.model import GrunModel


class FrozenRows(Protocol):
    """Where frozen rows are looked up: a `PrefixStore`, or a dict."""

    def __getitem__(self, row: EncodedRow, /) -> FrozenRow:
        """What is frozen of `row`."""
        ...


class CachedEngine:
    """Gives the plain engine's losses and gradients, from frozen rows; see `grun.cache.prefix` and `suffix`.

    Its StepOutputs hold of each row the last prompt token and the answer alone: column 0 is the last prompt token,
    answer token i stands in column i + 1. Where gates read every token they hold whole rows. All batches of a step run
    as one pack, without padding.
    """

    name = "cached"

    def __init__(self, model: GrunModel, packed: PackedModel, frozen: FrozenRows, *, reads_head: bool = True) -> None:
        """Run the edits of `model` on what `frozen` holds, which was frozen at the model's first edited block.

        Without `reads_head` the LM head is left out, and log-probabilities are 0.
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

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """One pass over all batches, edits included; `hidden` names blocks whose outputs are wanted."""
        layout = _Layout(batches, self._packed.device, self._whole_rows)
        frozen = [self._frozen[row] for row in layout.rows]
        with self._model.drawing(layout.seeds):
            locate = None if self._rule.changes == "last_prompt" else partial(self._located, layout)
            states = self._runner.states(frozen, self._model.edit_at(), hidden, locate)
        logprobs = states.final.new_zeros(int(layout.answer.sum()))
        if self._reads_head:
            logprobs = self._runner.logprobs(layout.rows, frozen, states)
        outputs = self._outputs(layout, logprobs, lambda: states)
        for name, output in outputs.items():
            where = layout.where[name]
            if states.gates:
                output.gate_logits = {block: logits[where] for block, logits in states.gates.items()}
                output.gate_mask = torch.ones(len(where), 1, dtype=torch.bool, device=where.device)
                if self._whole_rows:
                    output.gate_mask, output.gate_prompt = output.attended, output.attended & ~output.answer
            if states.hidden:
                columns = _places(states.pack, layout)[where].clamp(min=0)
                output.hidden_states = {block: values[columns] for block, values in states.hidden.items()}
        return outputs

    @torch.no_grad()
    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """The same under the untouched model: log-probabilities from the cache, logits only when asked for.

        Hidden states are computed when a row first comes, and kept on the device.
        """
        if not batches:
            return {}
        layout = _Layout(batches, self._packed.device, self._whole_rows)
        frozen = [self._frozen[row] for row in layout.rows]

        @cache
        def states() -> SuffixStates:
            with torch.no_grad():
                return self._runner.states(frozen, {})

        known = [self._reference.get(row, one.reference) for row, one in zip(layout.rows, frozen, strict=True)]
        if self._reads_head and any(
            bool(values.isnan().any()) for values in known
        ):  # frozen for a run that did not ask for them
            logprobs = self._runner.logprobs(layout.rows, frozen, states())
            known = list(logprobs.split([len(row.answer_ids) for row in layout.rows]))
            self._reference.update(zip(layout.rows, known, strict=True))
        outputs = self._outputs(layout, torch.cat(known).to(self._packed.device), states)
        if hidden:
            self._keep_untouched(layout, frozen, hidden)
            for name, batch in batches.items():
                kept = [self._untouched[row] for row in batch.encoded]
                columns = layout.answer.shape[1]
                outputs[name].hidden_states = {
                    block: torch.stack([_filled_up(row[block], columns) for row in kept]) for block in hidden
                }
        return outputs

    def _keep_untouched(self, layout: _Layout, frozen: Sequence[FrozenRow], hidden: Collection[int]) -> None:
        """Outputs of the blocks `hidden` under the untouched model, of the rows whose are not known yet."""
        missing = {
            row: one
            for row, one in zip(layout.rows, frozen, strict=True)
            if not set(hidden) <= self._untouched.get(row, {}).keys()
        }
        if not missing:
            return
        states = self._runner.states(list(missing.values()), {}, hidden)
        lengths = states.pack.lengths.tolist()
        for block, values in states.hidden.items():
            for row, part in zip(missing, values.split(lengths), strict=True):
                self._untouched.setdefault(row, {})[block] = part

    def _located(self, layout: _Layout, pack: Pack) -> Sites:
        """Where the rule reads and writes, in columns of what is run of each row."""
        columns = pack.inside.shape[1]
        sites = self._rule.locate(
            Call(
                rows=len(layout.rows),
                columns=columns,
                past=0,
                device=pack.device,
                attention_mask=pack.inside,
                labels=None,
                prompt_lengths=layout.prompt_lengths,
                prompt=None,
                ids=layout.ids[:, :columns],
            )
        )
        assert sites is not None  # the prompt's end is in every row
        return sites

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

    def _outputs(self, layout: _Layout, logprobs: Tensor, states: Callable[[], SuffixStates]) -> dict[str, StepOutput]:
        zeros = torch.zeros(layout.answer.shape, dtype=logprobs.dtype, device=logprobs.device)
        token_logprobs = zeros.masked_scatter(layout.answer, logprobs)
        return {
            name: StepOutput(
                input_ids=layout.ids[where],
                attended=layout.attended[where],
                answer=layout.answer[where],
                token_logprobs=token_logprobs[where],
                gate_logits=None,
                gate_mask=None,
                logits_at=self._logits_at(layout, where, states),
            )
            for name, where in layout.where.items()
        }

    def _logits_at(
        self, layout: _Layout, where: Tensor, states: Callable[[], SuffixStates]
    ) -> Callable[[Tensor], Tensor]:
        def logits_at(positions: Tensor) -> Tensor:
            places = _places(states().pack, layout)[where][positions]
            if bool((places < 0).any()):
                raise ModelError(
                    "the cached engine has no logits there: it runs no more of a row than an edit can change"
                )
            return self._packed.logits(states().final[places])

        return logits_at


class _Layout:
    """Rows of all batches of a step, in order of length so that attention has little padding."""

    def __init__(self, batches: Mapping[str, Batch], device: torch.device, whole_rows: bool) -> None:
        pairs = [(name, index) for name, batch in batches.items() for index in range(batch.rows)]
        prompts = slice(None) if whole_rows else slice(-1, None)  # what is run of them

        def columns(row: EncodedRow) -> int:
            return len(row.prompt_ids[prompts]) + len(row.answer_ids)

        pairs.sort(key=lambda pair: columns(batches[pair[0]].encoded[pair[1]]))
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
        counts = torch.tensor([columns(row) for row in self.rows])
        column = torch.arange(int(counts.max()))
        attended = column < counts.unsqueeze(1)  # [rows, longest]
        ids = [token for row in self.rows for token in row.prompt_ids[prompts] + row.answer_ids]
        self.ids = torch.zeros(attended.shape, dtype=torch.long).masked_scatter(attended, torch.tensor(ids)).to(device)
        self.attended = attended.to(device)
        self.answer = (attended & (column >= self.prompt_lengths.unsqueeze(1))).to(device)


def _filled_up(states: Tensor, columns: int) -> Tensor:
    """States [columns of a row, width] with zeros behind them: [columns, width]."""
    return torch.nn.functional.pad(states, (0, 0, 0, columns - len(states)))


def _places(pack: Pack, layout: _Layout) -> Tensor:
    """Index in the pack of each column of the layout, -1 where the pack has none: [rows, columns]."""
    column = torch.arange(layout.answer.shape[1], device=pack.device)
    return torch.where(column < pack.lengths.unsqueeze(1), pack.starts.unsqueeze(1) + column, -1)
