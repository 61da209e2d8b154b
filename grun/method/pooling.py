"""What a pooled gate reads: states of the tokens so far, normalized and pooled, and what of them stays with a cache.

States are divided by their root mean square. A summary is what is kept of tokens to go on with: of `max` their maximum,
of `maxmin` that of the states and of their negatives, of `mean` sum and number, of `last` the last one. `windows` has
none: it is made of all states when a gate is asked, once in a turn (`windows_at`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm

from grun.method.rules import WINDOWS

EPS = 1e-6
"""Added to the mean square that states are divided by the root of."""
SEGMENT, SEGMENTS = 4, 3
"""Tokens of a segment, and segments of a window."""
OWN, EARLIER = 1, 2
"""What a window is of; see `windows_at`."""
UNSEEN = 2**31
"""More than any turn's number."""
TOGETHER = 64
"""Tokens of one row that are asked at once along it."""


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
    if asked is not None:
        at = asked.clamp(0, turns.shape[1] - 1)
        current = current.gather(1, at)  # [rows, 1]
        summary = _summary(each, (turns == current) & (column <= at), pool)
    else:
        summary = _summary(each, turns == 0, pool, along=True)
        for number in range(1, int(current.max()) + 1):
            of_turn = _summary(each, turns == number, pool, along=True)
            summary = torch.where((current == number).unsqueeze(2), of_turn, summary)
    if before is not None:
        summary = torch.where((current == 0).unsqueeze(2), joined(before.to(summary), summary, pool), summary)
    return features(summary, pool), summary[:, -1:]


def windows_at(states: Tensor, turns: Tensor, asked: Tensor) -> Tensor:
    """Both ends of each feature over every window of each row up to one column.

    A turn is cut into segments of `SEGMENT` tokens from its end on, of which the first one may have fewer; a window is
    `SEGMENTS` of them in a row, and a turn of fewer is one window.

    Args:
        states: of one block, [rows, columns, hidden size].
        turns: number of each token's turn, 0 for what stands before the first user's turn, -1 for tokens that do not
            count, int64 [rows, columns].
        asked: a column for each row, [rows, 1].

    Returns:
        [rows, 1, windows, 1 + 2 * hidden size], of each window first what it is of: the turn of the token asked
        (`OWN`), a user's turn before it (`EARLIER`), or nothing that counts (0, as all of its other numbers).
    """
    at = asked.clamp(0, turns.shape[1] - 1)
    turn = turns.cummax(dim=1).values.clamp(min=0).gather(1, at)  # [rows, 1]
    column = torch.arange(turns.shape[1], device=turns.device)
    counts = (turns >= 0) & (column <= at)
    back, inside = turns.flip(1), counts.flip(1)  # the last token first
    seen = torch.where(inside, back, UNSEEN).cummin(dim=1).values
    begins = inside & (seen < pad(seen, (1, 0), value=UNSEEN)[:, :-1])
    place = inside.cumsum(dim=1)
    place = place - torch.where(begins, place, 0).cummax(dim=1).values  # within its turn
    segment = ((inside & (place % SEGMENT == 0)).cumsum(dim=1) - 1).clamp(min=0)
    count = int(segment.max()) + 1
    slot = torch.where(inside, segment * SEGMENT + place % SEGMENT, count * SEGMENT)  # the last one is of no use
    empty = turns.new_full((len(turns), count * SEGMENT + 1), -1)
    held = empty.scatter(1, slot, column.flip(0).expand_as(slot))[:, :-1]  # the column in each slot of the segments
    row = torch.arange(len(turns), device=turns.device).unsqueeze(1)
    each = parts(states, "maxmin")[row, held].masked_fill((held < 0).unsqueeze(2), -torch.inf)
    ends = each.unflatten(1, (count, SEGMENT)).amax(dim=2)
    of = turns.gather(1, held[:, ::SEGMENT].clamp(min=0)).masked_fill(held[:, ::SEGMENT] < 0, -1)
    counted = of != pad(of, (1, 0), value=-1)[:, :-1]  # the window at a turn's end, which may be short
    window = ends
    for shift in range(1, SEGMENTS):
        same = of == pad(of, (0, shift), value=-1)[:, shift:]
        further = pad(ends, (0, 0, 0, shift), value=-torch.inf)[:, shift:]
        window = torch.where(same.unsqueeze(2), torch.maximum(window, further), window)
    counted |= same
    kind = torch.where(of == turn, OWN, torch.where((of > 0) & (of < turn), EARLIER, 0)) * (counted & (of >= 0))
    kind = kind.unsqueeze(2)
    return torch.cat((kind.to(window), window.masked_fill(kind == 0, 0.0)), dim=2).unsqueeze(1)


def parts(states: Tensor, pool: str) -> Tensor:
    """Summary of each token alone: [rows, columns, hidden size] -> [rows, columns, any], in at least float32."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    values = rms_norm(wide, wide.shape[-1:], eps=EPS)
    if pool == "maxmin":
        return torch.cat((values, -values), dim=-1)
    return torch.cat((values, torch.ones_like(values[..., :1])), dim=-1) if pool == "mean" else values


def _summary(parts: Tensor, inside: Tensor, pool: str, *, along: bool = False) -> Tensor:
    """Summary of the tokens `inside`, bool [rows, columns]: [rows, 1, any]; `along`: up to each column, as `parts`."""
    if pool == "last":
        column = torch.where(inside, torch.arange(inside.shape[1], device=inside.device), -1)
        latest = (column.cummax(dim=1).values if along else column.amax(dim=1, keepdim=True)).unsqueeze(2)
        found = parts.gather(1, latest.clamp(min=0).expand(-1, -1, parts.shape[2]))
        return found.masked_fill(latest < 0, -torch.inf)
    if pool == "mean":
        counted = parts * inside.unsqueeze(2)
        return counted.cumsum(dim=1) if along else counted.sum(dim=1, keepdim=True)
    counted = parts.masked_fill(~inside.unsqueeze(2), -torch.inf)
    return counted.cummax(dim=1).values if along else counted.amax(dim=1, keepdim=True)


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
    return known


def of_blocks(each: Sequence[Tensor], pool: str) -> Tensor:
    """Features of several blocks one after another, on the device of the last one's; of windows what they are of once:
    [..., any] each -> [..., feature size].
    """
    home = each[-1].device
    parts = [values.to(home) for values in each]
    if pool == WINDOWS:
        parts[1:] = [values[..., 1:] for values in parts[1:]]
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
                states, turns = self.whole(block)[row : row + 1], self.turns[row : row + 1]
                turns = turns.to(states.device)
                if pool == WINDOWS:
                    rows = len(asked), -1
                    at_each = windows_at(states.expand(*rows, -1), turns.expand(rows), asked.to(turns).unsqueeze(1))
                    at_each = at_each.transpose(0, 1)
                else:
                    at_each = pooled_at(states, turns, None, None, pool)[0]
                found.append(at_each)
            yield of_blocks(found, pool)

    def extend(
        self,
        turns: Tensor,
        read: Mapping[int, Tensor],
        summaries: Mapping[tuple[int, str], Tensor],
    ) -> None:
        """Add a pass: turns as in `pooled_at`; by block its states, where it was read, and summaries if known."""
        rows, columns = self.turns.shape
        for block in {*self.states, *read}:
            new = read.get(block)
            like = self.states[block][0] if new is None else new
            earlier = self.states.setdefault(block, [like.new_zeros(rows, columns, like.shape[2])] if columns else [])
            earlier.append(like.new_zeros(rows, turns.shape[1], like.shape[2]) if new is None else new.detach())
        self.turns = self.with_turns(turns)
        self._summaries = {key: values.detach() for key, values in summaries.items()}

    def with_turns(self, turns: Tensor) -> Tensor:
        """Numbers of the turns of all tokens and of those of a pass, `turns` as in `pooled_at`: [rows, columns]."""
        offset = self.turns.amax(dim=1, keepdim=True).clamp(min=0) if self.turns.shape[1] else 0
        return torch.cat((self.turns, torch.where(turns < 0, -1, turns + offset)), dim=1)

    def cut(self, columns: int) -> None:
        """Keep the first `columns`."""
        self.turns, self._summaries = self.turns[:, :columns], {}
        self.states = {block: [self.whole(block)[:, :columns]] for block in self.states}

    def select(self, rows: Tensor) -> None:
        """Keep the rows numbered in `rows`, in that order."""
        self.turns = self.turns[rows.to(self.turns.device)]
        self.states = {block: [(states := self.whole(block))[rows.to(states.device)]] for block in self.states}
        self._summaries = {key: values[rows.to(values.device)] for key, values in self._summaries.items()}

    @classmethod
    def joined(cls, parts: Sequence[PoolMemory], columns: int) -> PoolMemory:
        """The rows of all parts one after another, of each its last `columns`; shorter ones count as padded in front.

        What is cut off must be padding in every row.
        """
        new = cls(0, 0, parts[0].turns.device)
        new.turns = torch.cat([aligned(part.turns, columns, -1) for part in parts])
        for block in parts[0].states:
            new.states[block] = [torch.cat([aligned(part.whole(block), columns, 0.0) for part in parts])]
        for key in parts[0]._summaries:
            if all(key in part._summaries for part in parts):  # else it is made of the states
                new._summaries[key] = torch.cat([part._summaries[key] for part in parts])
        return new

    def whole(self, block: int) -> Tensor:
        """States of all tokens, [rows, columns, hidden size]."""
        parts = self.states[block]
        if len(parts) > 1:
            self.states[block] = parts = [torch.cat(parts, dim=1)]
        return parts[0]
