"""Heads of packed tokens brought to where attention over padded rows wants them, and back, by one gather each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Places:
    """Where each head of each token stands in tensors of padded rows, and back: indices, int64.

    Heads that share keys are longer rows of one: queries stand as [rows, sharing, longest, key heads], keys and values
    as [rows, before + longest, key heads], so that what attention is given and gives lies in memory token by token,
    as its kernels have it.
    """

    def __init__(
        self, shape: Sequence[int], token: Tensor, place: Tensor, row: Tensor, *, every: int, heads: int, before: int
    ) -> None:
        """Of rows padded to one length.

        Args:
            shape: rows, and tokens of the longest one.
            token: by padded place its packed token, any in padding, [rows * longest].
            place, row: by packed token its padded place and its row, [tokens].
            every: heads of a token's queries, keys and values together.
            heads: those of its queries.
            before: places of a prefix.
        """
        rows, longest = shape
        keys = (every - heads) // 2
        self.sharing = sharing = heads // keys
        self.queries = (rows, sharing * longest, keys)
        self.keys = (2, rows, longest, keys)
        self.count = rows * longest * heads
        """Of places of queries."""
        step, in_keys = longest * keys, rows * (before + longest) * keys  # places of a sharing head, and of all keys
        empty, arange = place.new_empty, partial(torch.arange, device=place.device)
        head = arange(every)
        turned = head[:heads].view(keys, sharing).T.unsqueeze(1)  # [sharing, 1, key heads]
        each = token.view(rows, 1, longest, 1)
        self.into = empty(self.count + 2 * rows * step)
        """Heads of packed tokens, as they stand in queries and then in keys and values; any in padding."""
        of_queries, of_keys = self.into.split((self.count, 2 * rows * step))
        torch.add(turned, each, alpha=every, out=of_queries.view(rows, sharing, longest, keys))
        torch.add(head[heads:].view(2, 1, 1, keys), each.squeeze(1), alpha=every, out=of_keys.view(self.keys))
        self.out = empty(self.count)
        """The same of queries alone, whose heads stand by themselves."""
        torch.add(turned, each, alpha=heads, out=self.out.view(rows, sharing, longest, keys))
        begins = torch.add(place, row, alpha=(sharing - 1) * longest).unsqueeze(1)
        within = head[:keys].unsqueeze(1) + arange(0, sharing * step, step)
        query = torch.add(within.flatten(), begins, alpha=keys)  # [tokens, heads]
        self.back_of_queries = query.flatten()
        """Places in queries, as the heads of packed tokens stand."""
        starts = arange(self.count + before * keys, self.count + before * keys + 2 * in_keys, in_keys)
        begins = torch.add(place, row, alpha=before).unsqueeze(1)
        key = torch.add((starts.unsqueeze(1) + head[:keys]).flatten(), begins, alpha=keys)
        self.back = torch.cat((query, key), dim=1).flatten()
        """Places in queries, keys and values, prefix included, one after another."""


class Spread(torch.autograd.Function):
    """Heads of packed tokens [tokens, every, size] -> queries, keys and values [rows, key heads, length, size]."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, places: Places, prefix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`prefix`: keys and values that stand before them, [2, rows, before, key heads, size]."""
        ctx.back, ctx.shape = places.back, joined.shape
        found = joined.flatten(0, 1).index_select(0, places.into)
        query = found[: places.count].unflatten(0, places.queries)
        pair = found[places.count :].unflatten(0, places.keys)
        if prefix is not None:
            pair = torch.cat((prefix, pair), dim=2)
        return query.transpose(1, 2), pair[0].transpose(1, 2), pair[1].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Nothing comes from padding: no token sees it."""
        flat = torch.cat([_flat(gradient) for gradient in gradients])
        return flat.index_select(0, ctx.back).view(ctx.shape), None, None


class Collected(torch.autograd.Function):
    """What attention gives, [rows, key heads, length, size] -> heads of packed tokens [tokens, heads, size]."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, places: Places) -> Tensor:
        """The inverse of `Spread` on queries."""
        ctx.out, ctx.shape = places.out, places.queries
        heads = places.sharing * attended.shape[1]
        return _flat(attended).index_select(0, places.back_of_queries).unflatten(0, (-1, heads))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """In padding any gradient stands: what attends there sees padding alone."""
        found = gradients[0].flatten(0, 1).index_select(0, ctx.out)
        return found.unflatten(0, ctx.shape).transpose(1, 2), None


def _flat(heads: Tensor) -> Tensor:
    """[rows, key heads, length, size] -> [rows * length * key heads, size]."""
    return heads.transpose(1, 2).reshape(-1, heads.shape[-1])
