"""Attention over packed rows, which stand one after another: each sees itself and its prefix."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grun.cache.places import Collected, Places, Spread
from grun.runtime.devices import launches

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block."""
Parts = list[tuple[dict[str, Any], str]]
"""Tensors as entries: of which mapping (of an object its `vars`), by which key."""
CPU = torch.device("cpu")
ALIGNED = 16
"""Kernels of a GPU copy a mask first whose rows do not begin at a multiple of so many numbers."""


def parts_of(owner: object, *names: str) -> Parts:
    """The attributes of these names that are tensors, and not None."""
    return [(vars(owner), name) for name in names if getattr(owner, name) is not None]


def move(parts: Parts, device: torch.device) -> None:
    """Bring tensors of the CPU to `device` by one copy, as what they are entries of keeps them from now on."""
    if device.type == "cpu" or not parts:
        return
    tensors = [owner[name] for owner, name in parts]
    pieces, starts, end = [], [], 0
    for tensor in tensors:
        piece = tensor.contiguous().flatten().view(torch.uint8)
        pieces += [piece, piece.new_zeros(-len(piece) % 8)]  # so that each begins where numbers of any type may
        starts.append(end)
        end += len(piece) + len(pieces[-1])
    whole = torch.cat(pieces)
    there = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
    for (owner, name), tensor, start in zip(parts, tensors, starts, strict=True):
        owner[name] = there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class How(NamedTuple):
    """How a block attends."""

    scale: float | None
    """What products of queries and keys are multiplied by; None: 1 / sqrt(size)."""
    window: int | None
    """How many tokens each sees, itself and those before it; None: all."""
    softcap: float | None
    """Largest absolute score, approached by tanh; None: any."""


class Layout:
    """Rows that stand one after another, [tokens, ...], and the same rows padded on the right, [rows, longest, ...]."""

    inside: Tensor
    """Which padded places are tokens, bool [rows, longest]."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        """`lengths`: tokens of each row, each >= 1, on the CPU."""
        column = torch.arange(int(lengths.max()))
        self.inside = column < lengths.unsqueeze(1)
        starts = lengths.cumsum(0) - lengths
        self.is_even = bool(self.inside.all())
        """Whether there is no padding."""
        self.token = torch.where(self.inside, starts.unsqueeze(1) + column, 0).flatten()
        """By padded place its token, 0 in padding, [rows * longest]."""
        self.place = self.inside.flatten().nonzero().squeeze(1)
        """By token its padded place, [tokens]."""
        self.row = self.place // self.inside.shape[1]
        """By token its row, [tokens]."""
        move(self.parts, device)

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        return parts_of(self, "inside", "token", "place", "row")

    def padded(self, packed: Tensor) -> Tensor:
        """What stands in padding is arbitrary."""
        found: Tensor = packed if self.is_even else _Gather.apply(packed, self.token, self.place, False)
        return found.unflatten(0, self.inside.shape)

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse of `padded`."""
        flat = padded.flatten(0, 1)
        return flat if self.is_even else _Gather.apply(flat, self.place, self.token, True)


class _Gather(torch.autograd.Function):
    """Between the packed and the padded layout, whose gradients need no sum: nothing comes from a padded place."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, back: Tensor, unpads: bool) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.unpads, ctx.length = unpads, len(source)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        index, back = ctx.saved_tensors
        if not ctx.unpads:  # padded -> packed: the padded places have no gradient
            return gradients[0].index_select(0, back), None, None, None
        gradient = gradients[0].new_zeros(ctx.length, *gradients[0].shape[1:])
        return gradient.index_copy_(0, index, gradients[0]), None, None, None


class Pack:
    """Rows of one packed pass, and attention within each of them.

    Neighbors of one length are attended together, on a GPU all rows; put rows in order of length where that costs
    nothing.
    """

    prefix: Mapping[int, KeysValues | Tensor]
    """By block, keys and values of earlier tokens [rows, heads, longest prefix, head size], padded on the left."""

    positions: Tensor
    """Position of each token in its row, int64 [tokens]."""
    starts: Tensor
    """Index of each row's first token in the pack, int64 [rows]."""
    lengths: Tensor
    """Tokens of each row, int64 [rows]."""
    starts_alone: bool
    """Whether gradients go back to the first token of each row alone: up to the attention of the first block run."""

    def __init__(
        self,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int],
        prefix: Mapping[int, KeysValues | Tensor],
        device: torch.device,
        record: dict[int, KeysValues] | None = None,
        *,
        moved: bool = True,
    ) -> None:
        """Lay out rows one after another.

        Args:
            lengths: tokens of each row in this pass, each >= 1.
            prefix_lengths: earlier tokens of each row, whose keys and values come from outside.
            prefix: see `prefix`.
            device: of all tensors.
            record: where given, this pass's own keys and values are put here by block, [heads, tokens, head size].
            moved: False: what lies on the device is left on the CPU, and its owner moves `parts`.
        """
        self.device = device
        self.record = record
        self.starts_alone = False
        self.prefix = prefix
        self._count, before = torch.tensor(lengths), torch.tensor(prefix_lengths)
        self.starts, self.lengths = self._count.cumsum(0) - self._count, self._count
        within = torch.arange(int(self._count.sum())) - self.starts.repeat_interleave(self._count)
        self.positions = within + before.repeat_interleave(self._count)
        groups = _groups(lengths, together=launches(device))
        self._groups = [_Group(rows, self._count[rows], before[rows]) for rows in groups]
        self._sizes = [group.tokens for group in self._groups]
        self._is_even = all(group.layout.is_even for group in self._groups)
        if moved:
            move(self.parts, device)

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        own = parts_of(self, "starts", "lengths", "positions")
        return own + [part for group in self._groups for part in group.parts]

    @functools.cached_property
    def layout(self) -> Layout:
        """Of all rows."""
        return self._groups[0].layout if len(self._groups) == 1 else Layout(self._count, self.device)

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """Attention of each row to its prefix and to itself: query [heads, tokens, size] -> [tokens, heads, size]."""
        if not self._is_even:
            joined = torch.cat((query, key, value)).transpose(0, 1)
            return self.attend_joined(block, joined, len(query), how)
        if self.record is not None:
            self.record[block] = (key, value)
        prefix = self.prefix.get(block)
        pieces = zip(*(part.transpose(0, 1).split(self._sizes) for part in (query, key, value)), strict=True)
        parts = [
            group.attend(of_query, of_key, of_value, prefix, how)
            for group, (of_query, of_key, of_value) in zip(self._groups, pieces, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def attend_joined(self, block: int, joined: Tensor, heads: int, how: How) -> Tensor:
        """The same of `heads` queries, then all keys, then all values of each token: [tokens, their sum, size]."""
        if self.record is not None:
            turned = joined[:, heads:].transpose(0, 1)
            self.record[block] = (turned[: len(turned) // 2], turned[len(turned) // 2 :])
        prefix = self.prefix.get(block)
        if len(self._groups) == 1:
            return self._groups[0].attend_joined(joined, heads, prefix, how)
        pieces = zip(self._groups, joined.split(self._sizes), strict=True)
        return torch.cat([group.attend_joined(piece, heads, prefix, how) for group, piece in pieces])


def _groups(lengths: Sequence[int], together: bool) -> Iterator[slice]:
    """Rows that are attended together: padding costs little on a GPU, where more launches cost much."""
    start = 0
    for _, run in groupby(lengths, key=lambda length: together or length):
        end = start + len(list(run))
        yield slice(start, end)
        start = end


class _Group:
    """Consecutive rows of a pack that are attended together."""

    def __init__(self, rows: slice, count: Tensor, before: Tensor) -> None:
        """On the CPU; `parts` are to be moved."""
        self.tokens = int(count.sum())
        self.layout = Layout(count, CPU)
        self._rows, self._before, self._longest = rows, int(before.max()), int(count.max())
        self._reach = torch.where(self.layout.inside, torch.arange(self._longest) + before.unsqueeze(1), 0)
        """How many tokens back each place sees, [rows, longest]: no gradient of a token comes from padding."""
        self._masks: dict[tuple[int | None, torch.dtype, int], Tensor] = {}
        self._places: dict[tuple[int, int, int], Places] = {}

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        return [*parts_of(self, "_reach"), *self.layout.parts]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prefix: KeysValues | Tensor | None, how: How) -> Tensor:
        """Rows of one length, from and to [tokens, heads, size]; `prefix` of the whole pack."""
        query = self.layout.padded(query)
        key, value = (self.layout.padded(part).transpose(1, 2) for part in (key, value))
        if prefix is not None and self._before:
            key, value = (
                torch.cat((earlier[self._rows, :, -self._before :], part), dim=2)
                for earlier, part in zip(prefix, (key, value), strict=True)
            )
        # Heads that share keys are longer rows of one: keys and values are not repeated.
        sharing = query.shape[2] // key.shape[1]
        query = query.unflatten(2, (-1, sharing)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = self._attended(query, key, value, sharing, how)
        out = out.unflatten(2, (sharing, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [rows, longest, heads, size]
        return self.layout.packed(out)

    def attend_joined(self, joined: Tensor, heads: int, prefix: KeysValues | Tensor | None, how: How) -> Tensor:
        """Rows of any length, [tokens, heads + all keys and values, size] -> [tokens, heads, size]."""
        earlier = None
        if prefix is not None and self._before:
            pair = prefix if isinstance(prefix, Tensor) else torch.stack(prefix)
            earlier = pair[:, self._rows, :, -self._before :].transpose(2, 3)
        places = self._places_of(joined.shape[1], heads, 0 if earlier is None else self._before)
        query, key, value = Spread.apply(joined, places, earlier)
        out = self._attended(query, key, value, places.sharing, how)
        found: Tensor = Collected.apply(out, places)
        return found

    def _places_of(self, every: int, heads: int, before: int) -> Places:
        if (every, heads, before) not in self._places:
            layout = self.layout
            self._places[every, heads, before] = Places(
                layout.inside.shape, layout.token, layout.place, layout.row, every=every, heads=heads, before=before
            )
        return self._places[every, heads, before]

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, sharing: int, how: How) -> Tensor:
        """Query [rows, key heads, sharing * longest, size] -> the same shape."""
        mask = self._mask(how.window, query.dtype, sharing)
        if how.softcap is None:
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scale)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if how.scale is None else how.scale)
        scores = torch.tanh(scores / how.softcap) * how.softcap + mask
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value

    def _mask(self, window: int | None, dtype: torch.dtype, times: int) -> Tensor:
        """What is added to scores: 0 where a key is seen, else -inf: [rows, 1, times * longest, before + longest]."""
        if (window, dtype, times) not in self._masks:
            device = self._reach.device
            other = torch.arange(-self._before, self._longest, device=device)
            back = other[self._before :].unsqueeze(1) - other  # [longest, before + longest]: how far back a key lies
            reach = self._reach if window is None else self._reach.clamp(max=window - 1)
            seen = (back >= 0) & (back <= reach.unsqueeze(2))
            shape = (len(seen), times, self._longest, -(-len(other) // ALIGNED) * ALIGNED)
            mask = torch.full(shape, -torch.inf, dtype=dtype, device=device)[..., : len(other)]
            mask.masked_fill_(seen.unsqueeze(1), 0)
            self._masks[window, dtype, times] = mask.flatten(1, 2).unsqueeze(1)
        return self._masks[window, dtype, times]
