"""What gates remember of the tokens before a pass, kept with the keys and values of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from grun.errors import ModelError
from grun.method.pooling import PoolMemory, aligned


class GateState:
    """Accumulated gate logits and last tokens of the sequences of one key/value cache.

    It lives on the cache and follows it: `follow` makes what reorders, repeats or selects rows of the cache do the same
    here. A cache that was cut back is noticed by its length.
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
        self.pool = PoolMemory(rows, columns, device)
        """What a pooled gate has read of them."""

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
            unknown = self.ids.new_full((self.rows, missing), -1)
            self.extend(unknown, self.last())
            self.pool.extend(unknown, {}, {})
        elif missing < 0:
            self.ids = self.ids[:, :columns]
            self.openings = {key: values[:, :columns] for key, values in self.openings.items()}
            self.pool.cut(columns)

    def extend(self, ids: Tensor, openings: dict[str, Tensor]) -> None:
        """Add one pass: tokens [rows, columns] and, by intervention, the logits in force at each or at all of them."""
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
        self.pool.select(rows)
        self.rows = len(rows)

    @classmethod
    def joined(cls, parts: Sequence[GateState], columns: int) -> GateState:
        """The sequences of all parts in one batch, of each its last `columns`; shorter ones are padded in front.

        The parts are of one set of edits. What is cut off must be padding in every row.
        """
        new = cls(sum(part.rows for part in parts), 0, parts[0].ids.device, parts[0].edition)
        new.ids = torch.cat([aligned(part.ids, columns, -1) for part in parts])
        for key, like in {key: values for part in parts for key, values in part.openings.items()}.items():
            known = [
                part.openings.get(key, like.new_full((part.rows, columns, *like.shape[2:]), -torch.inf))
                for part in parts
            ]
            new.openings[key] = torch.cat([aligned(values, columns, -torch.inf) for values in known])
        new.pool = PoolMemory.joined([part.pool for part in parts], columns)
        return new


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
