"""A device that only counts: tensors on it say they lie elsewhere, and lie on the CPU.

What a real one is told by launches and copies shows here without one, values included: kernels launched, bytes copied
to it, and each time the host waits for one of its values. It is a backend of torch's own kind, in Python
(`torch.utils.backend_registration`), so code that asks for a tensor's device takes the path of a GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "pretended"
LIBRARY = torch.library.Library("aten", "IMPL")
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.equal.default, aten.repeat_interleave.Tensor, aten._unique2.default,
}  # fmt: skip
"""Operators whose result, or the shape of it, the host waits for."""
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias",
    "detach", "lift_fresh", "alias", "is_same_size", "resize_",
}  # fmt: skip
"""Operators that launch nothing, besides views."""


@dataclass
class Counts:
    """What was told to the device."""

    launches: int = 0
    """Operators that compute something: each is at least one kernel."""
    waits: int = 0
    """Values that the host waited for."""
    bytes: int = 0
    """Bytes copied from host to device."""
    by_name: Counter[str] = field(default_factory=Counter)
    """Launches by operator."""

    def since(self, before: Counts) -> Counts:
        """The difference to what was counted `before`."""
        return Counts(
            self.launches - before.launches,
            self.waits - before.waits,
            self.bytes - before.bytes,
            self.by_name - before.by_name,
        )

    def copy(self) -> Counts:
        """As it is now."""
        return Counts(self.launches, self.waits, self.bytes, Counter(self.by_name))


COUNTS = Counts()
"""Of this process."""


class Pretended(Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        """Around a tensor of the CPU."""
        made: Pretended = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=torch.device(NAME, 0), strides=inner.stride(),
            storage_offset=inner.storage_offset(), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """Its values, which the host waits for."""
        COUNTS.waits += 1
        return self.inner.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.rms_norm:
            return _OneKernel.apply(func, args[0], *args[1:], *(kwargs or {}).values())
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # which would give what is copied to the CPU this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = tree_flatten((args, kwargs))[0]
    here = [value for value in given if isinstance(value, Pretended)]
    device = kwargs.get("device")
    to_host = func is aten._to_copy.default and device is not None and device.type == "cpu"
    is_here = not to_host and (bool(here) or (device is not None and device.type == NAME))
    if func is aten.copy_.default and here and not isinstance(args[0], Pretended):
        to_host, is_here = True, False
    if to_host:
        COUNTS.waits += bool(here)
    elif is_here:
        _count(func, args, given, here)
    inner_args, inner_kwargs = tree_map_only(Pretended, lambda value: value.inner, (args, kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if func is aten._to_copy.default and is_here and not here:
        found: Any = inner_args[0].clone().to(inner_kwargs.get("dtype") or inner_args[0].dtype)
    else:
        found = func(*inner_args, **inner_kwargs)
    if not is_here:
        return found
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, Pretended, found))


def _count(func: Any, args: Any, given: list[Any], here: list[Pretended]) -> None:
    name = func.overloadpacket.__name__
    masks = isinstance(args[1], list | tuple) if name.startswith(("index", "_index", "_unsafe_index")) else False
    if masks and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1]):
        COUNTS.waits += 1  # how many are True
    if func in WAITS:
        COUNTS.waits += 1
    outside = [one for one in given if isinstance(one, Tensor) and not isinstance(one, Pretended) and one.dim()]
    if name in ("_to_copy", "copy_") and outside:
        COUNTS.bytes += sum(one.nbytes for one in outside)
    elif outside and here:
        raise RuntimeError(f"{func}: tensors of two devices")
    elif not func.is_view and name not in FREE:
        COUNTS.launches += 1
        COUNTS.by_name[name] += 1


class _Attention(torch.autograd.Function):
    """One kernel forward and one backward, as on a GPU; the CPU's own does the work."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any) -> Tensor:
        inner = [one.inner.detach().requires_grad_() for one in (query, key, value)]  # type: ignore[attr-defined]
        with torch.enable_grad():
            found = nn.functional.scaled_dot_product_attention(
                *inner, attn_mask=None if mask is None else mask.inner, **options
            )
        ctx.inner, ctx.found = inner, found
        _tell("scaled_dot_product_attention")
        return Pretended(found.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _tell("scaled_dot_product_attention_backward")
        found = torch.autograd.grad(ctx.found, ctx.inner, gradients[0].inner)
        return (*map(Pretended, found), None, None)


class _OneKernel(torch.autograd.Function):
    """One kernel forward and one backward, as on a GPU, whatever the CPU takes; the gradient is that of one tensor."""

    @staticmethod
    def forward(ctx: Any, func: Any, states: Tensor, *others: Any) -> Tensor:
        inner: Tensor = states.inner.detach().requires_grad_()  # type: ignore[attr-defined]
        with torch.enable_grad():
            found = func(inner, *(one.inner if isinstance(one, Pretended) else one for one in others))
        ctx.inner, ctx.found, ctx.others = inner, found, len(others)
        _tell(func.__name__)
        return Pretended(found.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _tell("backward of one kernel")
        found = torch.autograd.grad(ctx.found, ctx.inner, gradients[0].inner)
        return (None, Pretended(found[0]), *(None for _ in range(ctx.others)))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    found: Tensor = _Attention.apply(query, key, value, attn_mask, options)
    return found


def _tell(name: str) -> None:
    COUNTS.launches += 1
    COUNTS.by_name[name] += 1


def _run_here(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(operator, args, kwargs)


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _run(aten.copy_.default, (target, source), {})
    return target


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]


def device() -> torch.device:
    """The device; made with the first call, and for the rest of the process."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())  # type: ignore[no-untyped-call]
        in_threads = (aten.empty.memory_format, aten.empty_strided.default)  # which have no mode
        for operator in (*in_threads, aten.silu_backward.default):  # one kernel on a GPU, else taken apart
            LIBRARY.impl(operator, partial(_run_here, operator), "PrivateUse1")
        LIBRARY.impl(aten._copy_from.default, _copied, "PrivateUse1")
    return torch.device(NAME, 0)


def move(module: nn.Module) -> None:
    """Put all parameters and buffers of `module` on the device, in place; what is shared stays shared."""
    device()
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, Pretended):
                new = nn.Parameter(Pretended(parameter.data), parameter.requires_grad)
                part._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Pretended):
                part._buffers[name] = moved.setdefault(id(buffer), Pretended(buffer))


@contextlib.contextmanager
def on_it() -> Iterator[Counts]:
    """Within the block tensors can be made on the device and copied to it; `Trainer` leaves modules where they are."""
    from accelerate import Accelerator
    from transformers import Trainer

    device()
    with (
        mock.patch.object(Trainer, "_move_model_to_device"),
        mock.patch.object(Accelerator, "prepare_model", lambda self, model, **_: model),
        mock.patch("torch.optim.optimizer._foreach_supported_types", [Tensor, nn.Parameter, Pretended]),
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),
        _Mode(),
    ):
        yield COUNTS
