"""A training step laid out: what is known of its rows before anything is computed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grun.cache.attention import Pack, Parts, move, parts_of
from grun.cache.resident import Resident
from grun.cache.store import FrozenRows
from grun.cache.suffix import Asked
from grun.data.encoding import Batch, EncodedRow
from grun.method.position import PositionRule


class AtAnswers(torch.autograd.Function):
    """A value for each answer token of a step, [answer tokens], in its place in each batch, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        """Values of each batch, of the given shapes; `places` as `Step.places`."""
        ctx.save_for_backward(places)
        sizes = [shape.numel() for shape in shapes]
        flat = values.new_zeros(sum(sizes)).index_copy_(0, places, values)
        return tuple(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the values alone."""
        (places,) = ctx.saved_tensors
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        return flat.index_select(0, places), None, *(None for _ in gradients)


def key_of(batches: Mapping[str, Batch]) -> Hashable:
    """By what a step that was laid out is known again; it holds the rows, so that no other ones get their place."""
    return tuple((name, id(batch.encoded)) for name, batch in batches.items())


class Step:
    """What is known of a step's rows but their states; on the CPU until `parts` are moved.

    On the CPU rows stand in order of length, so that attention has little padding; elsewhere batch by batch.
    """

    def __init__(
        self, batches: Mapping[str, Batch], frozen: FrozenRows, device: torch.device, rule: PositionRule, moved: bool
    ) -> None:
        whole_rows = rule.changes == "every_token"
        prompts = slice(None) if whole_rows else slice(-1, None)  # what is run of them
        self.key, self._held = key_of(batches), [batch.encoded for batch in batches.values()]
        tokens = {
            (name, index): row.prompt_ids[prompts] + row.answer_ids
            for name, batch in batches.items()
            for index, row in enumerate(batch.encoded)
        }
        self._sizes = None if device.type == "cpu" else [batch.rows for batch in batches.values()]
        pairs = sorted(tokens, key=lambda pair: len(tokens[pair])) if self._sizes is None else list(tokens)
        self.rows = [batches[name].encoded[index] for name, index in pairs]
        self.seeds: list[int] | None = None
        if all(batch.seeds is not None for batch in batches.values()):
            self.seeds = [(batches[name].seeds or ())[index] for name, index in pairs]
        place = {pair: number for number, pair in enumerate(pairs)}
        self.where = {
            name: torch.tensor([place[name, index] for index in range(batch.rows)]) for name, batch in batches.items()
        }
        """By batch, where its rows stand here, [rows of the batch]."""
        self.prompt_lengths = torch.tensor([len(row.prompt_ids[prompts]) for row in self.rows])
        """On the CPU."""
        self.all_ids = pad_sequence([torch.tensor(tokens[pair]) for pair in pairs], batch_first=True)
        column = torch.arange(self.all_ids.shape[1])
        attended = column < torch.tensor([len(tokens[pair]) for pair in pairs]).unsqueeze(1)  # [rows, longest]
        answer = attended & (column >= self.prompt_lengths.unsqueeze(1))
        self.ids = {name: self.all_ids[where] for name, where in self.where.items()}
        """Tokens that are run, by batch, [rows, longest], as the masks after it."""
        self.attended = {name: attended[where] for name, where in self.where.items()}
        self.answer = {name: answer[where] for name, where in self.where.items()}
        self.everything = {name: torch.ones(len(where), 1, dtype=torch.bool) for name, where in self.where.items()}
        self.answer_count = int(answer.sum())
        flat = torch.arange(self.all_ids.numel()).view(self.all_ids.shape)
        turned = torch.empty_like(flat)  # where each place of a row here stands in the batches one after another
        for where, of_batch in zip(self.where.values(), flat.split([*map(len, self.where.values())]), strict=True):
            turned[where] = of_batch
        self.places = turned[answer]
        """Of each answer token its place in the batches, one after another and flat, [answer tokens]."""
        one_each = [frozen[row] for row in self.rows]
        columns = [len(one.states) for one in one_each]
        self.taking = frozen.of(self.rows) if isinstance(frozen, Resident) else None
        self.pack = Pack(columns, [len(one.prompt) for one in one_each], {}, device, moved=False)
        self.asked = Asked(self.rows, columns, whole_rows=whole_rows)
        self.row_of_token: Tensor | None = None
        """Row of each token that is run, [tokens], where all of them are written by one gate."""
        if rule.pooled and rule.changes == "from_last_prompt" and rule.write == "sticky" and not rule.counts:
            self.row_of_token = torch.arange(len(columns)).repeat_interleave(torch.tensor(columns))
        if moved:
            move(self.parts, device)

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        own = parts_of(self, "all_ids", "places", "row_of_token")
        by_batch = (self.where, self.ids, self.attended, self.answer, self.everything)
        own += [(values, name) for values in by_batch for name in values]
        return [*own, *self.pack.parts, *self.asked.parts, *(self.taking.parts if self.taking else ())]

    def by_batch(self, values: Mapping[int, Tensor]) -> dict[str, dict[int, Tensor]]:
        """By batch, the rows of `values` [rows, ...] that are its own; empty of no values."""
        found: dict[str, dict[int, Tensor]] = {}
        for key, value in values.items():
            if self._sizes is not None:
                parts = list(value.split(self._sizes))
            else:
                parts = [value[where] for where in self.where.values()]
            for name, part in zip(self.where, parts, strict=True):
                found.setdefault(name, {})[key] = part
        return found

    def unknown(self, frozen: FrozenRows) -> list[EncodedRow]:
        """Rows whose references are not in the cache."""
        if isinstance(frozen, Resident):
            return [row for row in self.rows if row in frozen.without_reference]
        return [row for row in self.rows if bool(frozen[row].reference.isnan().any())]
