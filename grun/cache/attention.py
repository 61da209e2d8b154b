"""Attention over packed rows, which stand one after another: each sees itself and its prefix."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block."""
Parts = list[tuple[Any, str]]
"""Tensors as attributes: of which object, by which name."""
CPU = torch.device("cpu")
ALIGNED = 16
"""Kernels of a GPU copy a mask first whose rows do not begin at a multiple of so many numbers."""


def move(parts: Parts, device: torch.device) -> None:
    """Bring tensors of the CPU to `device` by one copy, as what they are attributes of keeps them from now on."""
    if device.type == "cpu" or not parts:
        return
    tensors = [getattr(owner, name) for owner, name in parts]
    pieces, starts, end = [], [], 0
    for tensor in tensors:
        piece = tensor.contiguous().flatten().view(torch.uint8)
        pieces += [piece, piece.new_zeros(-len(piece) % 8)]  # so that each begins where numbers of any type may
        starts.append(end)
        end += len(piece) + len(pieces[-1])
    whole = torch.cat(pieces)
    there = (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)
    for (owner, name), tensor, start in zip(parts, tensors, starts, strict=True):
        setattr(owner, name, there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))


class Layout:
    """Rows that stand one after another, [tokens, ...], and the same rows padded on the right, [rows, longest, ...]."""

    inside: Tensor
    """Which padded places are tokens, bool [rows, longest]."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        """`lengths`: tokens of each row, each >= 1, on the CPU."""
        column = torch.arange(int(lengths.max()))
        self.inside = column < lengths.unsqueeze(1)
        starts = lengths.cumsum(0) - lengths
        self._is_even = bool(self.inside.all())
        self._token = torch.where(self.inside, starts.unsqueeze(1) + column, 0).flatten()  # 0 in padding
        self._place = self.inside.flatten().nonzero().squeeze(1)
        move(self.parts, device)

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        return [(self, "inside"), (self, "_token"), (self, "_place")]

    def padded(self, packed: Tensor) -> Tensor:
        """What stands in padding is arbitrary."""
        found: Tensor = packed if self._is_even else _Gather.apply(packed, self._token, self._place, False)
        return found.unflatten(0, self.inside.shape)

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse of `padded`."""
        flat = padded.flatten(0, 1)
        return flat if self._is_even else _Gather.apply(flat, self._place, self._token, True)


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

    prefix: Mapping[int, KeysValues]
    """By block, keys and values of earlier tokens [rows, heads, longest prefix, head size], padded on the left."""

    positions: Tensor
    """Position of each token in its row, int64 [tokens]."""
    starts: Tensor
    """Index of each row's first token in the pack, int64 [rows]."""
    lengths: Tensor
    """Tokens of each row, int64 [rows]."""
    before_attention: bool
    """Whether the first block that is run has not come to its attention yet."""

    def __init__(
        self,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int],
        prefix: Mapping[int, KeysValues],
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
        self.before_attention = False
        self.prefix = prefix
        self._count, before = torch.tensor(lengths), torch.tensor(prefix_lengths)
        self.starts, self.lengths = self._count.cumsum(0) - self._count, self._count
        within = torch.arange(int(self._count.sum())) - self.starts.repeat_interleave(self._count)
        self.positions = within + before.repeat_interleave(self._count)
        groups = _groups(lengths, together=device.type != "cpu")
        self._groups = [_Group(rows, self._count[rows], before[rows]) for rows in groups]
        if moved:
            move(self.parts, device)

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        own: Parts = [(self, "starts"), (self, "lengths"), (self, "positions")]
        return own + [part for group in self._groups for part in group.parts]

    @functools.cached_property
    def layout(self) -> Layout:
        """Of all rows."""
        return self._groups[0].layout if len(self._groups) == 1 else Layout(self._count, self.device)

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attention of each row to its prefix and to itself: query [heads, tokens, size] -> [tokens, heads, size]."""
        if self.record is not None:
            self.record[block] = (key, value)
        prefix = self.prefix.get(block)
        turned = [part.transpose(0, 1) for part in (query, key, value)]
        if len(self._groups) == 1:
            return self._groups[0].attend(turned[0], turned[1], turned[2], prefix, scale, window, softcap)
        sizes = [group.tokens for group in self._groups]
        pieces = zip(*(part.split(sizes) for part in turned), strict=True)
        parts = [
            group.attend(of_query, of_key, of_value, prefix, scale, window, softcap)
            for group, (of_query, of_key, of_value) in zip(self._groups, pieces, strict=True)
        ]
        return torch.cat(parts)


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
        self._rows, self._before, self._before_each = rows, int(before.max()), before
        self._longest = int(count.max())
        self._masks: dict[tuple[int | None, torch.dtype, int], Tensor] = {}

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        return [(self, "_before_each"), *self.layout.parts]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: KeysValues | None, scale: float | None,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """From and to [tokens, heads, size]; `prefix` of the whole pack."""
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
        mask = self._mask(window, query.dtype, sharing)
        if softcap is None:
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        else:
            scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
            scores = torch.tanh(scores / softcap) * softcap + mask
            wide = torch.promote_types(scores.dtype, torch.float32)
            out = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value
        out = out.unflatten(2, (sharing, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [rows, longest, heads, size]
        return self.layout.packed(out)

    def _mask(self, window: int | None, dtype: torch.dtype, times: int) -> Tensor:
        """What is added to scores: 0 where a key is seen, else -inf: [rows, 1, times * longest, before + longest]."""
        if (window, dtype, times) not in self._masks:
            device = self._before_each.device
            column = torch.arange(self._longest, device=device)
            other = torch.arange(-self._before, self._longest, device=device)
            back = column.unsqueeze(1) - other  # [longest, before + longest]: how far back a key lies
            seen = (back >= 0) & (other >= -self._before_each.view(-1, 1, 1))
            if window is not None:
                seen = seen & (back < window)
            shape = (len(seen), times, self._longest, -(-len(other) // ALIGNED) * ALIGNED)
            mask = torch.zeros(shape, dtype=dtype, device=device)[..., : len(other)]
            mask.masked_fill_(~seen.unsqueeze(1), -torch.inf)
            self._masks[window, dtype, times] = mask.flatten(1, 2).unsqueeze(1)
        return self._masks[window, dtype, times]
