"""What a pooled gate reads: states of the tokens so far, normalized and pooled, and what of them stays with a cache.

States are divided by their root mean square. A summary is what is kept of tokens to go on with: of `max` their maximum,
of `maxmin` that of the states and of their negatives, of `mean` sum and number, of `last` the last one. Of
`maxmin_turns` it is that of `maxmin` of the turn, the same of the user's turns before it, and 1 where the turn is a
user's: what stands before the first of them, such as a system prompt, is no earlier turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from grun.method.rules import TURNS

EPS = 1e-6
"""Added to the mean square that states are divided by the root of."""


def pooled_at(
    states: Tensor, turns: Tensor, before: Tensor | None, asked: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """Features at the columns asked, each pooled over the tokens of its turn up to it, and the summary at the last.

    Args:
        states: of one block, [rows, columns, hidden size].
        turns: number of each token's turn within this pass, 0 for the one that went on from earlier passes, -1 for
            tokens that do not count, int64 [rows, columns].
        before: summary of that turn in earlier passes, [rows, 1, any]; None: there is none.
        asked: one column for each row, [rows, 1]; None: all.
        pool: a name in `grun.method.rules.POOLS`.

    Returns:
        Features [rows, columns asked, feature size], 0 where no token counts, and summary [rows, 1, any].
    """
    each = parts(states, pool)
    current = turns.cummax(dim=1).values.clamp(min=0)  # [rows, columns]
    column = torch.arange(turns.shape[1], device=turns.device)
    history = None
    if pool == TURNS:
        history = _History.before(each, before)
        before = None if before is None else before[..., : each.shape[2]]
    if asked is not None:
        at = asked.clamp(0, turns.shape[1] - 1)
        turn = current.gather(1, at)  # [rows, 1]
        found = _until_last(each, (turns == turn) & (column <= at), pool)
        if before is not None:
            found = torch.where((turn == 0).unsqueeze(2), joined(before.to(found), found, pool), found)
        if history is None:
            return features(found, pool), found
        first = _until_last(each, turns == 0, pool)  # of the turn that went on, over where another one is asked in
        history = history.after(first if before is None else joined(before.to(first), first, pool), turn > 0)
        between = (turns > 0) & (turns < turn)
        more = _until_last(each, between, pool) if bool(between.any()) else None
        found = history.with_turn(found, more)
        return features(found, pool), found
    summary = torch.empty(0)
    for number in range(int(current.max()) + 1):
        running = _at_each(each, turns == number, pool)
        if not number and before is not None:
            running = joined(before.to(running), running, pool)
        whole = running if history is None else history.with_turn(running)
        summary = torch.where((current == number).unsqueeze(2), whole, summary) if number else whole
        if history is not None:
            history = history.after(running[:, -1:])
    return features(summary, pool), summary[:, -1:]


@dataclass(frozen=True)
class _History:
    """The user's turns before one."""

    pooled: Tensor
    """[rows, 1, any], -inf where there is none."""
    is_user: Tensor
    """Whether the turn itself is a user's, and so will be one of them: bool [rows, 1, 1]."""

    @classmethod
    def before(cls, each: Tensor, summary: Tensor | None) -> Self:
        """Of the turn that goes on from earlier passes; `each` is `parts` of this one."""
        size = each.shape[2]
        if summary is None:
            return cls(each.new_full((len(each), 1, size), -torch.inf), each.new_zeros(len(each), 1, 1) > 0)
        return cls(summary[..., size:-1].to(each), summary[..., -1:].to(each) > 0)

    def after(self, turn: Tensor, over: Tensor | None = None) -> _History:
        """Of the turn after one whose summary is `turn`, [rows, 1, any]; as before in rows not `over`, [rows, 1]."""
        over = torch.ones_like(self.is_user) if over is None else over.unsqueeze(2)
        pooled = torch.where(over & self.is_user, torch.maximum(self.pooled, turn), self.pooled)
        return _History(pooled, over | self.is_user)

    def with_turn(self, turn: Tensor, more: Tensor | None = None) -> Tensor:
        """Summary of a turn [rows, columns, any], and of those before it, of which `more` are some."""
        pooled = self.pooled if more is None else torch.maximum(self.pooled, more)
        shape = (-1, turn.shape[1], -1)
        return torch.cat((turn, pooled.expand(shape), self.is_user.to(turn).expand(shape)), dim=-1)


def parts(states: Tensor, pool: str) -> Tensor:
    """Summary of each token alone: [rows, columns, hidden size] -> [rows, columns, any], in at least float32."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    values = rms_norm(wide, wide.shape[-1:], eps=EPS)
    if pool in ("maxmin", TURNS):
        return torch.cat((values, -values), dim=-1)
    return torch.cat((values, torch.ones_like(values[..., :1])), dim=-1) if pool == "mean" else values


def _until_last(parts: Tensor, inside: Tensor, pool: str) -> Tensor:
    """Summary of the tokens `inside`, bool [rows, columns]: [rows, 1, any]."""
    if pool == "mean":
        return (parts * inside.unsqueeze(2)).sum(dim=1, keepdim=True)
    if pool == "last":
        return _at_each(parts, inside, pool)[:, -1:]
    return parts.masked_fill(~inside.unsqueeze(2), -torch.inf).amax(dim=1, keepdim=True)


def _at_each(parts: Tensor, inside: Tensor, pool: str) -> Tensor:
    """The same up to each column: as `parts`."""
    if pool == "mean":
        return (parts * inside.unsqueeze(2)).cumsum(dim=1)
    if pool == "last":
        column = torch.arange(inside.shape[1], device=inside.device)
        latest = torch.where(inside, column, -1).cummax(dim=1).values.unsqueeze(2)
        found = parts.gather(1, latest.clamp(min=0).expand(-1, -1, parts.shape[2]))
        return found.masked_fill(latest < 0, -torch.inf)
    return parts.masked_fill(~inside.unsqueeze(2), -torch.inf).cummax(dim=1).values


def joined(before: Tensor, summary: Tensor, pool: str) -> Tensor:
    """Summary of earlier tokens and these."""
    if pool == "mean":
        return before + summary
    return torch.where(summary.isneginf(), before, summary) if pool == "last" else torch.maximum(before, summary)


def features(summary: Tensor, pool: str) -> Tensor:
    """What a gate reads of a summary, 0 where no token counts: [..., any] -> [..., feature size of the block]."""
    if pool == "mean":
        return summary[..., :-1] / summary[..., -1:].clamp(min=1)
    known = summary.masked_fill(summary.isneginf(), 0.0)
    if pool == "maxmin":
        highest, lowest = known.chunk(2, dim=-1)
        return torch.cat((highest, -lowest), dim=-1)
    if pool == TURNS:
        return torch.cat([features(half, "maxmin") for half in known[..., :-1].chunk(2, dim=-1)], dim=-1)
    return known


def of_blocks(each: Sequence[Tensor], pool: str) -> Tensor:
    """Features of several blocks one after another, on the device of the last one's; of `maxmin_turns` those of the
    turn of all blocks, then those of the turns before: [..., any] each -> [..., feature size].
    """
    home = each[-1].device
    parts = [values.to(home) for values in each]
    if pool == TURNS:
        parts = [half for halves in zip(*(values.chunk(2, dim=-1) for values in parts), strict=True) for half in halves]
    return torch.cat(parts, dim=-1)


def aligned(values: Tensor, columns: int, fill: float, dim: int = 1) -> Tensor:
    """The last `columns` along `dim`; what has fewer is filled up in front."""
    missing = columns - values.shape[dim]
    if missing <= 0:
        return values.narrow(dim, -missing, columns)
    shape = [*values.shape[:dim], missing, *values.shape[dim + 1 :]]
    return torch.cat((values.new_full(shape, fill), values), dim=dim)


class PoolMemory:
    """States that a pooled gate has read of the tokens of one key/value cache.

    They are kept for each token, in the model's type, so that a cache may be cut back to any length. A summary is made
    of them when it is asked for.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        """Of sequences whose first `columns` tokens were never seen."""
        self.turns = torch.full((rows, columns), -1, dtype=torch.long, device=device)
        """Number of each token's turn, -1 for those that do not count."""
        self.states: dict[int, list[Tensor]] = {}
        """By block, states of tokens one after another, each [rows, columns of a pass, hidden size]."""
        self._summaries: dict[tuple[int, str], Tensor] = {}

    def summary(self, block: int, pool: str) -> Tensor | None:
        """Of the turn at the last column, [rows, 1, any]; None where no token is known."""
        if block not in self.states or not self.turns.shape[1]:
            return None
        if (block, pool) not in self._summaries:
            states = self._whole(block)
            turns = self.turns.to(states.device)
            last = turns.new_full((len(turns), 1), turns.shape[1] - 1)
            self._summaries[block, pool] = pooled_at(states, turns, None, last, pool)[1]
        return self._summaries[block, pool]

    def along(self, row: int, blocks: Sequence[int], pool: str) -> Tensor:
        """What a gate of `blocks` would read at each token of a row, were it asked there: [1, columns, any]."""
        found: list[Tensor] = []
        for block in blocks:
            states = self._whole(block)[row : row + 1]
            turns = self.turns[row : row + 1].to(states.device)
            found.append(pooled_at(states, turns, None, None, pool)[0])
        return of_blocks(found, pool)

    def extend(
        self,
        turns: Tensor,
        read: Mapping[int, Tensor] | None = None,
        summaries: Mapping[tuple[int, str], Tensor] | None = None,
    ) -> None:
        """Add a pass: turns as in `pooled_at`; by block its states, where it was read, and summaries if known."""
        rows, columns = self.turns.shape
        for block in {*self.states, *(read or {})}:
            new = (read or {}).get(block)
            like = self.states[block][0] if new is None else new
            earlier = self.states.setdefault(block, [like.new_zeros(rows, columns, like.shape[2])] if columns else [])
            earlier.append(like.new_zeros(rows, turns.shape[1], like.shape[2]) if new is None else new.detach())
        offset = self.turns.amax(dim=1, keepdim=True).clamp(min=0) if columns else 0
        self.turns = torch.cat((self.turns, torch.where(turns < 0, -1, turns + offset)), dim=1)
        self._summaries = {key: values.detach() for key, values in (summaries or {}).items()}

    def cut(self, columns: int) -> None:
        """Keep the first `columns`."""
        self.turns, self._summaries = self.turns[:, :columns], {}
        self.states = {block: [self._whole(block)[:, :columns]] for block in self.states}

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered in `rows`, in that order."""
        self.turns = self.turns[rows.to(self.turns.device)]
        self.states = {block: [(states := self._whole(block))[rows.to(states.device)]] for block in self.states}
        self._summaries = {key: values[rows.to(values.device)] for key, values in self._summaries.items()}

    @classmethod
    def joined(cls, parts: Sequence[PoolMemory], columns: int) -> PoolMemory:
        """The rows of all parts one after another, of each its last `columns`; shorter ones count as padded in front.

        What is cut off must be padding in every row.
        """
        new = cls(0, 0, parts[0].turns.device)
        new.turns = torch.cat([aligned(part.turns, columns, -1) for part in parts])
        for block in parts[0].states:
            new.states[block] = [torch.cat([aligned(part._whole(block), columns, 0.0) for part in parts])]
        for key in parts[0]._summaries:
            if all(key in part._summaries for part in parts):  # else it is made of the states
                new._summaries[key] = torch.cat([part._summaries[key] for part in parts])
        return new

    def _whole(self, block: int) -> Tensor:
        """States of all tokens, [rows, columns, hidden size]."""
        parts = self.states[block]
        if len(parts) > 1:
            self.states[block] = parts = [torch.cat(parts, dim=1)]
        return parts[0]
