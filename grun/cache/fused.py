"""Norms, MLPs and what stands before attention in few launches: on a GPU each of many small operators costs one.

The forward of a module is replaced on a copy of a model alone, and only where both give the same on numbers tried here.
Frozen weights are read where they lie: products are written side by side instead of joined afterwards, and summed as
they are computed. Where weights are trained, or within autocast, the module's own forward runs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from grun.cache.attention import How
from grun.cache.trial import largest, tried

ROTATE = "apply_rotary_pos_emb"
"""What transformers calls the function that rotates queries and keys, in every file of a model that has one."""
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference of numbers about 1 that are the same but for rounding, by type."""
ROUNDED = 0.05
"""The same for narrower types."""
LINEAR = ("q_proj", "k_proj", "v_proj")
"""What transformers calls the layers before attention."""


Forward = Callable[..., Any]


class _Candidate(NamedTuple):
    """A forward for a module, and what tells whether it is one."""

    forward: Forward
    pairs: Callable[[], dict[str, tuple[Tensor, Tensor]]]
    """What it gives, and what the module's own gives."""


@torch.no_grad()
def fuse(model: nn.Module) -> int:
    """Let norms, MLPs and attentions in `model`, a copy that nothing else uses, launch less; how many do."""
    ways = (
        partial(_norm_like, 0),
        partial(_norm_like, 1),
        _gated_like,
        _attention_like,
        _rotating_like,
    )
    done = 0
    for module in model.modules():
        found = next(filter(None, (_taken(way, module) for way in ways)), None)
        if found is not None:
            module.__dict__["forward"] = found
            done += 1
    return done


def _taken(way: Callable[[Any], _Candidate | None], module: Any) -> Forward | None:
    """The forward that `way` makes for `module`; None where it makes none, or another one than the module's."""
    trial = tried(partial(way, module), lambda one: one.pairs() if one else {}, _close, _apart)
    return trial.fast.forward if trial.fast else None


def _close(wanted: Tensor) -> float:
    return CLOSE.get(wanted.dtype, ROUNDED)


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return largest(found, wanted) / float(wanted.abs().max()) if found.dtype == wanted.dtype else torch.inf


def _norm_like(more: int, module: Any) -> _Candidate | None:
    """torch's own norm with the module's weight and `more`."""
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta or eps is None:
        return None  # on meta it is read from a file when the block runs
    given = _numbers(4, len(weight)).to(weight)
    forward = partial(_normed, module, more, float(eps))
    return _Candidate(forward, lambda: {"norm": (forward(given), module(given))})


def _normed(module: Any, more: int, eps: float, hidden: Tensor) -> Tensor:
    weight: Tensor = module.weight
    if hidden.dtype != weight.dtype:  # as within autocast
        own: Tensor = type(module).forward(module, hidden)
        return own
    return rms_norm(hidden, weight.shape, weight + more if more else weight, eps)


def _rotating_like(module: nn.Module) -> _Candidate | None:
    """The module's own forward with another function in the place of its file's."""
    forward: Any = type(module).forward
    own = getattr(forward, "__globals__", {}).get(ROTATE)
    if own is None:
        return None
    query, key, angles = _numbers(1, 2, 3, 8), _numbers(1, 1, 3, 8), _numbers(1, 3, 4)
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    replaced = {**forward.__globals__, ROTATE: partial(_rotated, own)}
    new = types.FunctionType(
        forward.__code__, replaced, forward.__name__, forward.__defaults__, forward.__closure__
    )  # fmt: skip
    new.__kwdefaults__ = forward.__kwdefaults__

    def pairs() -> dict[str, tuple[Tensor, Tensor]]:
        both = zip(_rotated(own, query, key, cos, sin), own(query, key, cos, sin), strict=True)
        return dict(zip(("query", "key"), both, strict=True))

    return _Candidate(types.MethodType(new, module), pairs)


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


def _turned(states: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int, out: Tensor | None = None) -> Tensor:
    out = torch.mul(states, cos, out=out)
    ends, of = out.chunk(2, dim=-1), states.chunk(2, dim=-1)
    ends[0].addcmul_(of[1], first, value=-sign)
    ends[1].addcmul_(of[0], second, value=sign)
    return out


def _layers(module: Any, names: Sequence[str]) -> list[nn.Linear] | None:
    """Linear layers of `module`, none of another kind (quantized, adapted) or read from a file when it runs."""
    found: list[Any] = [getattr(module, name, None) for name in names]
    return found if all(type(one) is nn.Linear and not one.weight.is_meta for one in found) else None


def _are_frozen(layers: Sequence[nn.Linear], states: Tensor) -> bool:
    """Whether products with `states` are as they are tried here: weights of its type that get no gradient."""
    if torch.is_autocast_enabled(states.device.type):
        return False
    trained = torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters())
    return not trained and all(layer.weight.dtype == states.dtype for layer in layers)


def _product(layer: nn.Linear, states: Tensor, out: Tensor) -> None:
    if layer.bias is None:
        torch.mm(states, layer.weight.t(), out=out)
    else:
        torch.addmm(layer.bias, states, layer.weight.t(), out=out)


def _summed(gradients: Sequence[Tensor], layers: Sequence[nn.Linear]) -> Tensor:
    """Gradient of what all `layers` read."""
    total = gradients[0] @ layers[0].weight
    for gradient, layer in zip(gradients[1:], layers[1:], strict=True):
        total.addmm_(gradient, layer.weight)
    return total


def _gated_like(module: Any) -> _Candidate | None:
    """An MLP, down(silu(gate(x)) * up(x))."""
    layers = _layers(module, ("gate_proj", "up_proj", "down_proj"))
    if layers is None:
        return None
    given = _numbers(4, layers[0].in_features).to(layers[0].weight)
    forward = partial(_gated, module)
    return _Candidate(forward, lambda: {"MLP": (forward(given), module(given))})


def _gated(module: Any, hidden: Tensor) -> Tensor:
    layers = [module.gate_proj, module.up_proj]
    if not _are_frozen(layers, hidden):
        own: Tensor = type(module).forward(module, hidden)
        return own
    product = _Gated.apply(hidden.flatten(0, -2), layers).unflatten(0, hidden.shape[:-1])
    found: Tensor = module.down_proj(product)
    return found


class _Gated(torch.autograd.Function):
    """silu(gate(x)) * up(x) of x [tokens, width]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
        gate, up = (layer(states) for layer in layers)
        opened = silu(gate)
        ctx.save_for_backward(gate, up, opened)
        ctx.layers = layers
        return opened * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gate, up, opened = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return _summed((of_gate, gradients[0] * opened), ctx.layers), None


class _Told:
    """A pack that keeps what its attention is called with, and gives the queries back."""

    starts_alone = False
    found: tuple[Tensor, How]
    """Queries, keys and values [tokens, all heads, size]."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        return self.attend_joined(block, torch.cat((query, key, value)).transpose(0, 1), len(query), how)

    def attend_joined(self, block: int, joined: Tensor, heads: int, how: How) -> Tensor:
        self.found = (joined, how)
        return joined[:, :heads]


def _attention_like(module: Any) -> _Candidate | None:
    """An attention whose queries and keys are rotated products of its input."""
    layers = _layers(module, (*LINEAR, "o_proj"))
    size = getattr(module, "head_dim", None)
    if layers is None or not isinstance(size, int):
        return None
    weight = layers[0].weight
    hidden, angles = _numbers(1, 3, layers[0].in_features).to(weight), _numbers(1, 3, size // 2)
    turns = tuple(torch.cat((part, part), dim=-1).to(weight) for part in (angles.cos(), angles.sin()))
    own, new = _Told(weight.device), _Told(weight.device)
    wanted, _ = module(hidden, position_embeddings=turns, attention_mask=None, pack=own)
    forward = partial(_attended, module, _taken(_rotating_like, module), own.found[1])

    def pairs() -> dict[str, tuple[Tensor, Tensor]]:
        found, _ = forward(hidden, turns, pack=new)
        return {"heads": (new.found[0], own.found[0]), "output": (found, wanted)}

    return _Candidate(forward, pairs)


def _attended(
    module: Any, own: Callable[..., Any] | None, how: How, hidden_states: Tensor, position_embeddings: Any = None,
    *more: Any, pack: Any, **named: Any,
) -> Any:  # fmt: skip
    """`module`'s forward, which attends as `how` says; `own` is taken where something is trained or cached here."""
    layers = [getattr(module, name) for name in LINEAR]
    if named.get("past_key_values") is not None or not _are_frozen(layers, hidden_states):
        named = {"position_embeddings": position_embeddings, "pack": pack, **named}
        return (own or partial(type(module).forward, module))(hidden_states, *more, **named)
    home, here = pack.device, hidden_states.device
    starts = pack.starts.to(here) if pack.starts_alone else None
    pack.starts_alone = False
    turns = [part.squeeze(0).unsqueeze(1) for part in position_embeddings]  # [tokens, 1, size]
    joined = _Joined.apply(hidden_states.squeeze(0), *turns, starts, layers, module.head_dim)
    heads = layers[0].out_features // module.head_dim
    out = pack.attend_joined(module.layer_idx, joined.to(home), heads, how).to(here)
    return module.o_proj(out.flatten(1).unsqueeze(0)), None


class _Joined(torch.autograd.Function):
    """Rotated queries, rotated keys, and values of x [tokens, width], side by side: [tokens, all heads, size]."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, layers: Sequence[nn.Linear],
        size: int,
    ) -> Tensor:  # fmt: skip
        """`starts`: tokens that gradients go back to alone; None: to all."""
        ctx.save_for_backward(cos, sin, starts)
        ctx.layers, ctx.count = layers, len(states)
        ctx.widths = [layer.out_features for layer in layers]
        turning = sum(ctx.widths[:2])
        straight, found = (states.new_empty(len(states), width) for width in (turning, sum(ctx.widths)))
        places = (*straight.split(ctx.widths[:2], dim=1), found[:, turning:])
        for layer, place in zip(layers, places, strict=True):
            _product(layer, states, place)
        heads = found.unflatten(1, (-1, size))
        first, second = sin.chunk(2, dim=-1)
        _turned(straight.unflatten(1, (-1, size)), cos, first, second, 1, out=heads[:, : turning // size])
        return heads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, starts = ctx.saved_tensors
        gradient = gradients[0]
        if starts is not None:
            gradient, cos, sin = (part.index_select(0, starts) for part in (gradient, cos, sin))
        turning = sum(ctx.widths[:2]) // gradient.shape[2]
        first, second = sin.chunk(2, dim=-1)
        straight = _turned(gradient[:, :turning], cos, second, first, -1).flatten(1)
        parts = (*straight.split(ctx.widths[:2], dim=1), gradient[:, turning:].flatten(1))
        found = _summed(parts, ctx.layers)
        if starts is not None:
            found = found.new_zeros(ctx.count, found.shape[1]).index_copy_(0, starts, found)
        return found, None, None, None, None, None


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
