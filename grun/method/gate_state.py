"""What gates remember of the tokens before a pass, kept with the keys and values of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from grun.errors import ModelError
from grun.method.pooling import of_blocks, pooled_at, windows_at
from grun.method.rules import WINDOWS

TOGETHER = 64
"""Tokens of one row that are asked at once along it."""
Read = tuple[Tensor, dict[int, Tensor], dict[tuple[int, str], Tensor]]
"""What a pooled gate has read of a pass: turns as in `pooled_at`, by block its states, and summaries where known."""


class GateState:
    """Tokens of the sequences of one key/value cache, and what gates have read of them.

    It lives on the cache and follows it: `follow` makes what reorders, repeats or selects rows of the cache do the same
    here. A cache that was cut back is noticed by its length. For it the states that a pooled gate reads are kept of
    each token, in the model's type; a summary is made of them when it is asked for.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, edition: int = 0) -> None:
        """Of sequences whose first `columns` tokens were never seen; padding counts as such."""
        self.rows = rows
        self.edition = edition
        """Number of the edits whose gates these are."""
        self.openings: dict[str, Tensor] = {}
        """By intervention, the logit in force at each column, -inf where none was read yet: [rows, columns], of several
        requests [rows, columns, requests]."""
        self.ids = torch.full((rows, columns), -1, dtype=torch.long, device=device)
        """Tokens, -1 where never seen or padding."""
        self.turns = self.ids.clone()
        """Number of each token's turn, -1 for those that a pooled gate does not count: [rows, columns]."""
        self.states: dict[int, list[Tensor]] = {}
        """By block that it reads, states of tokens one after another, each [rows, columns of a pass, hidden size]."""
        self._summaries: dict[tuple[int, str], Tensor] = {}

    def last(self) -> dict[str, Tensor]:
        """By intervention, the logit in force at the last column, [rows, 1] or [rows, 1, requests]."""
        return {key: values[:, -1:] for key, values in self.openings.items() if values.shape[1]}

    @property
    def columns(self) -> int:
        """Tokens of each sequence so far, padding included."""
        return self.ids.shape[1]

    def fit(self, columns: int) -> None:
        """Forget what comes after the first `columns`; what is missing there was cached while no edit acted."""
        missing = columns - self.columns
        if missing > 0:
            self.extend(self.ids.new_full((self.rows, missing), -1), self.last())
        elif missing < 0:
            self.ids = self.ids[:, :columns]
            self.openings = {key: values[:, :columns] for key, values in self.openings.items()}
            self.turns, self._summaries = self.turns[:, :columns], {}
            self.states = {block: [self.whole(block)[:, :columns]] for block in self.states}

    def extend(self, ids: Tensor, openings: dict[str, Tensor], read: Sequence[Read] = ()) -> None:
        """Add one pass: tokens [rows, columns] and, by intervention, the logits in force at each or at all of them.

        `read`: of rules that may differ in where gates are asked, and read the same states.
        """
        states = {block: values for _, found, _ in read for block, values in found.items()}
        for block in {*self.states, *states}:
            new = states.get(block)
            like = self.states[block][0] if new is None else new
            of_pass = like.new_zeros(self.rows, ids.shape[1], like.shape[2]) if new is None else new.detach()
            unknown = [like.new_zeros(self.rows, self.columns, like.shape[2])] if self.columns else []
            self.states.setdefault(block, unknown).append(of_pass)
        self.turns = self.with_turns(read[0][0]) if read else torch.cat((self.turns, torch.full_like(ids, -1)), dim=1)
        self._summaries = {key: values.detach() for *_, found in read for key, values in found.items()}
        for key, values in openings.items():
            before = self.openings.get(key)
            if before is None:
                before = values.new_full((self.rows, self.columns, *values.shape[2:]), -torch.inf)
            at_each = values.detach().expand(-1, ids.shape[1], *values.shape[2:])
            self.openings[key] = torch.cat((before, at_each), dim=1)
        self.ids = torch.cat((self.ids, ids), dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered in `rows`, in that order; one may come several times."""
        self.ids = self.ids[rows.to(self.ids.device)]
        self.openings = {key: values[rows.to(values.device)] for key, values in self.openings.items()}
        self.turns = self.turns[rows.to(self.turns.device)]
        self.states = {block: [(states := self.whole(block))[rows.to(states.device)]] for block in self.states}
        self._summaries = {key: values[rows.to(values.device)] for key, values in self._summaries.items()}
        self.rows = len(rows)

    def with_turns(self, turns: Tensor) -> Tensor:
        """Numbers of the turns of all tokens and of those of a pass, `turns` as in `pooled_at`: [rows, columns]."""
        offset = self.turns.amax(dim=1, keepdim=True).clamp(min=0) if self.turns.shape[1] else 0
        return torch.cat((self.turns, torch.where(turns < 0, -1, turns + offset)), dim=1)

    def whole(self, block: int) -> Tensor:
        """States of all tokens, [rows, columns, hidden size]."""
        parts = self.states[block]
        if len(parts) > 1:
            self.states[block] = parts = [torch.cat(parts, dim=1)]
        return parts[0]

    def summary(self, block: int, pool: str) -> Tensor | None:
        """Of the turn at the last column, [rows, 1, any]; None where no token is known."""
        if block not in self.states or not self.turns.shape[1]:
            return None
        if (block, pool) not in self._summaries:
            states = self.whole(block)
            turns = self.turns.to(states.device)
            last = turns.new_full((len(turns), 1), turns.shape[1] - 1)
            self._summaries[block, pool] = pooled_at(states, turns, None, last, pool)[1]
        return self._summaries[block, pool]

    def along(self, row: int, blocks: Sequence[int], pool: str) -> Iterator[Tensor]:
        """By parts, what a gate of `blocks` would read at each token of a row, asked there: [1, columns, ...]."""
        columns = torch.arange(self.turns.shape[1], device=self.turns.device)
        for asked in columns.split(TOGETHER) if pool == WINDOWS else (columns,):
            found: list[Tensor] = []
            for block in blocks:
                states = self.whole(block)[row : row + 1]
                turns = self.turns[row : row + 1].to(states.device)
                if pool == WINDOWS:
                    rows = len(asked), -1
                    at_each = windows_at(states.expand(*rows, -1), turns.expand(rows), asked.to(turns).unsqueeze(1))
                    found.append(at_each.transpose(0, 1))
                else:
                    found.append(pooled_at(states, turns, None, None, pool)[0])
            yield of_blocks(found, pool)

    @classmethod
    def joined(cls, parts: Sequence[GateState], columns: int) -> GateState:
        """The sequences of all parts in one batch, of each its last `columns`; shorter ones are padded in front.

        The parts are of one set of edits. What is cut off must be padding in every row.
        """
        new = cls(sum(part.rows for part in parts), 0, parts[0].ids.device, parts[0].edition)
        new.ids = torch.cat([_aligned(part.ids, columns, -1) for part in parts])
        new.turns = torch.cat([_aligned(part.turns, columns, -1) for part in parts])
        for key, like in {key: values for part in parts for key, values in part.openings.items()}.items():
            known = [
                part.openings.get(key, like.new_full((part.rows, columns, *like.shape[2:]), -torch.inf))
                for part in parts
            ]
            new.openings[key] = torch.cat([_aligned(values, columns, -torch.inf) for values in known])
        for block in parts[0].states:
            new.states[block] = [torch.cat([_aligned(part.whole(block), columns, 0.0) for part in parts])]
        for of in parts[0]._summaries:
            if all(of in part._summaries for part in parts):  # else it is made of the states
                new._summaries[of] = torch.cat([part._summaries[of] for part in parts])
        return new


def _aligned(values: Tensor, columns: int, fill: float) -> Tensor:
    """The last `columns`; what has fewer is filled up in front."""
    missing = columns - values.shape[1]
    if missing <= 0:
        return values[:, -missing:]
    return torch.cat((values.new_full((len(values), missing, *values.shape[2:]), fill), values), dim=1)


class _Followed:
    """Mixed into the class of a cache that gates follow."""

    gate_state: GateState

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.gate_state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.gate_state.select(torch.arange(self.gate_state.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.gate_state.select(indices)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (type(self).__mro__[2],), self.__dict__


def _rebuilt(own: type) -> Any:
    """A cache of the class `own`, followed, without its contents."""
    return object.__new__(_following(own))


@cached
def _following(own: Any) -> type:
    return type(own.__name__, (_Followed, own), {"__module__": own.__module__})


def follow(cache: Any, state: GateState) -> None:
    """Keep `state` on `cache`, whose class gets methods that keep both in step; ModelError for a cache without a class.

    The class of this one object changes, so that a deep copy of it has a state of its own.
    """
    if isinstance(cache, tuple):
        raise ModelError(
            "gates that remember earlier tokens need a transformers Cache, not a tuple; pass DynamicCache()"
        )
    if not isinstance(cache, _Followed):
        own: Any = type(cache)
        cache.__class__ = _following(own)
    cache.gate_state = state
