"""Low-rank edits: from a hidden state to the change of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grun.runtime.devices import launches


def orthonormal_columns(free: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `free` [..., hidden size, rank], by thin QR.

    The signs are those that make R's diagonal positive, so the result is a smooth function of `free`, equals it where
    `free` already has orthonormal columns, and does not change when `free` is scaled (weight decay cannot hurt it).
    """
    basis, triangle = torch.linalg.qr(free)
    diagonal = triangle.detach().diagonal(dim1=-2, dim2=-1)
    return basis * torch.ones_like(diagonal).copysign_(diagonal).unsqueeze(-2)


@contextlib.contextmanager
def bases_at_once(edits: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the next pass of each of `edits` finds its basis computed, those of one shape by one QR.

    On a GPU, where each of the many small operators of a QR and of its gradient costs a launch; nowhere else.
    """
    alike: dict[Any, list[LoReftEdit]] = {}
    for edit in edits:
        if isinstance(edit, LoReftEdit) and launches(edit.rotation.device) and torch.is_grad_enabled():
            rotation = edit.rotation
            alike.setdefault((rotation.shape, rotation.dtype, rotation.device), []).append(edit)
    for several in alike.values():
        together = orthonormal_columns(torch.stack([edit.rotation for edit in several]))
        for edit, basis in zip(several, together.unbind(), strict=True):
            edit.next_basis = basis
    try:
        yield
    finally:
        for several in alike.values():
            for edit in several:
                edit.next_basis = None


class LoReftEdit(nn.Module):
    """R (f(Wh + b) - R^T h): replaces the projection of h on a rank-r subspace by an affine function of h.

    R has orthonormal columns. Parameters: `rotation` [hidden size, rank], free, of which R is the basis; `source`,
    the linear map W, b. f is `activation`, the identity where it is None.

    Source: Wu et al. 2024, arXiv 2404.03592, eq. 2; as used by GRUN, arXiv 2502.17823.
    """

    def __init__(self, hidden_size: int, rank: int, activation: Callable[[Tensor], Tensor] | None = None) -> None:
        """Random orthonormal R, torch's default initialization of W and b; not an identity at the start."""
        super().__init__()
        self.rotation = nn.Parameter(orthonormal_columns(torch.randn(hidden_size, rank)).contiguous())
        self.source = nn.Linear(hidden_size, rank)
        self.activation = activation
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        self.next_basis: Tensor | None = None
        """R of the next pass, where it was computed before (`bases_at_once`)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Change of `hidden`, same shape [..., hidden size]."""
        basis = self._basis()
        if self.activation is None and self.next_basis is not None:  # W h + b - R^T h by one product
            source = self.source
            return nn.functional.linear(hidden, source.weight - basis.mT, source.bias) @ basis.mT
        target = self.source(hidden)
        if self.activation is not None:
            target = self.activation(target)
        return (target - hidden @ basis) @ basis.mT

    def _basis(self) -> Tensor:
        """R; where nothing is trained, that of the last call if the rotation is as it was then."""
        if self.next_basis is not None:
            return self.next_basis
        rotation = self.rotation
        if torch.is_grad_enabled() or self.training or rotation.is_inference():  # whose changes nothing counts
            self._kept = None  # a fused optimizer changes a parameter without counting it
            return orthonormal_columns(rotation)
        state = (rotation._version, rotation.data_ptr(), rotation.dtype, rotation.device)
        kept = self._kept
        if kept is None or kept[0] != state:
            kept = self._kept = state, orthonormal_columns(rotation)
        return kept[1]


class SteeringVector(nn.Module):
    """v, whatever the state is. Parameter: `vector` [hidden size], 0 until it is set."""

    def __init__(self, hidden_size: int) -> None:
        """Of states of that size."""
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Change of `hidden`, same shape [..., hidden size]."""
        return self.vector.expand_as(hidden)
