"""A fast way is tried against the model's own once, on few rows, and taken only where both give the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from grun.runtime.reading import first_line

T = TypeVar("T")

CHECKED_ROWS = 2
"""Rows of each kind, the longest, that ways are compared on."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Largest relative difference of a loss, a gradient or log-probabilities by type of the base; both only hide rounding,
not mistakes."""
ROUNDED = 0.35
"""The same for narrower types and quantized weights, whose plain passes differ as much from each other."""


def tolerance(dtype: torch.dtype, *, rounded: bool = False) -> float:
    """Largest relative difference for a base of `dtype`; `rounded`: its weights are quantized, or it runs in less."""
    return ROUNDED if rounded else TOLERANCE.get(dtype, ROUNDED)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, as a share of the norm of `wanted`."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / (wanted.norm() + 1e-6))


def largest(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two numbers."""
    return float((found - wanted).abs().max())


class Trial(NamedTuple, Generic[T]):
    """How it went."""

    fast: T | None
    """The fast way; None: it is not taken."""
    problem: str
    """Why not, in a few words."""


def tried(
    make: Callable[[], T],
    run: Callable[[T], Mapping[str, tuple[Tensor, Tensor]]],
    close: float | Callable[[Tensor], float],
    apart: Callable[[Tensor, Tensor], float] = relative,
) -> Trial[T]:
    """Try what `make` makes.

    Args:
        make: makes the fast way; may raise anything, as code of a model does that is called another way than usual.
        run: by name what that way gives and what the model's own way gives; may raise too.
        close: what they may be apart at most, or a function of what is wanted that says so; a NaN is not close.
        apart: how far two tensors are apart.
    """
    try:
        fast = make()
        for name, (found, wanted) in run(fast).items():
            difference, most = apart(found, wanted), close(wanted) if callable(close) else close
            if not difference <= most:
                return Trial(None, f"its {name} differs by {difference:.2g}, more than {most:g}")
    except Exception as error:
        return Trial(None, f"{type(error).__name__}: {first_line(error)}")
    return Trial(fast, "")
