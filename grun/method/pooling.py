"""What a pooled gate reads: states of the tokens so far, normalized and pooled.

States are divided by their root mean square. A summary is what is kept of tokens to go on with: of `max` their maximum,
of `maxmin` that of the states and of their negatives, of `mean` sum and number, of `last` the last one. `windows` has
none: it is made of all states when a gate is asked, once in a turn (`windows_at`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
