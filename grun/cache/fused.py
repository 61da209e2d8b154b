"""Norms and rotary positions in few launches: on a GPU each of their many small operators costs one.

The forward of a module is replaced on a copy of a model alone, and only where both give the same on numbers tried here.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

ROTATE = "apply_rotary_pos_emb"
"""What transformers calls the function that rotates queries and keys, in every file of a model that has one."""
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference of numbers about 1 that are the same but for rounding, by type."""
ROUNDED = 0.05
"""The same for narrower types."""


@torch.no_grad()
def fuse(model: nn.Module) -> int:
    """Let norms and attentions in `model`, a copy that nothing else uses, launch less; how many do."""
    done = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            found = _norm_like(module)
        elif ROTATE in getattr(type(module).forward, "__globals__", {}):
            found = _rotating_like(module)
        else:
            continue
        if found is not None:
            module.__dict__["forward"] = found
            done += 1
    return done


def _norm_like(module: Any) -> Callable[[Tensor], Tensor] | None:
    """torch's own norm with the module's weight, or with 1 + it; None where neither gives the same."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta or eps is None:
        return None  # on meta it is read from a file when the block runs
    tried = _tried(4, len(weight)).to(weight)
    wanted = module(tried)
    for of_weight in (_as_it_is, _one_more):
        found = partial(_normed, module, of_weight, float(eps))
        if _same(found(tried), wanted):
            return found
    return None


def _normed(module: Any, of_weight: Callable[[Tensor], Tensor], eps: float, hidden: Tensor) -> Tensor:
    weight: Tensor = module.weight
    if hidden.dtype != weight.dtype:  # as within autocast
        own: Tensor = type(module).forward(module, hidden)
        return own
    return rms_norm(hidden, weight.shape, of_weight(weight), eps)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _one_more(weight: Tensor) -> Tensor:
    return weight + 1


def _rotating_like(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own forward with another function in the place of its file's; None where that one does otherwise."""
    forward: Any = type(module).forward
    own = forward.__globals__[ROTATE]
    query, key, angles = _tried(1, 2, 3, 8), _tried(1, 1, 3, 8), _tried(1, 3, 4)
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    try:
        wanted = own(query, key, cos, sin)
    except Exception:  # it wants something else
        return None
    if not all(map(_same, _rotated(own, query, key, cos, sin), wanted)):
        return None
    replaced = {**forward.__globals__, ROTATE: partial(_rotated, own)}
    new = types.FunctionType(
        forward.__code__, replaced, forward.__name__, forward.__defaults__, forward.__closure__
    )  # fmt: skip
    new.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(new, module)


def _rotated(own: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
    """`own(query, key, cos, sin)` of [batch, heads, tokens, size] each, cos and sin [batch, tokens, size]."""
    if more or named or cos.dim() != 3 or not query.shape[-1] == key.shape[-1] == cos.shape[-1]:
        return own(query, key, cos, sin, *more, **named)
    both: Tensor = _Rotate.apply(torch.cat((query, key), dim=1), cos.unsqueeze(1), sin.unsqueeze(1))
    return both.split((query.shape[1], key.shape[1]), dim=1)


class _Rotate(torch.autograd.Function):
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of x; backwards the transpose of that."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(states, cos, first, second, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(gradients[0], cos, second, first, -1), None, None


def _turned(states: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    out = states * cos
    ends, of = out.chunk(2, dim=-1), states.chunk(2, dim=-1)
    ends[0].addcmul_(of[1], first, value=-sign)
    ends[1].addcmul_(of[0], second, value=sign)
    return out


def _tried(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _same(found: Tensor, wanted: Tensor) -> bool:
    close = CLOSE.get(found.dtype, ROUNDED)
    return found.dtype == wanted.dtype and float((found - wanted).abs().max()) <= close * float(wanted.abs().max())
