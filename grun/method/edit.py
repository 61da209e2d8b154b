"""Low-rank edits: from a hidden state to the change of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def orthonormal_columns(free: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `free` [hidden size, rank], by thin QR.

    The signs are those that make R's diagonal positive, so the result is a smooth function of `free`, equals it where
    `free` already has orthonormal columns, and does not change when `free` is scaled (weight decay cannot hurt it).
    """
    basis, triangle = torch.linalg.qr(free)
    signs = torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(free.dtype)
    return basis * signs


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

    def forward(self, hidden: Tensor) -> Tensor:
        """Change of `hidden`, same shape [..., hidden size]."""
        basis = self._basis()
        target = self.source(hidden)
        if self.activation is not None:
            target = self.activation(target)
        return (target - hidden @ basis) @ basis.mT

    def _basis(self) -> Tensor:
        """R; where nothing is trained, that of the last call if the rotation is as it was then."""
        rotation = self.rotation
        if torch.is_grad_enabled() or self.training or rotation.is_inference():  # whose changes nothing counts
            self._kept = None  # a fused optimizer changes a parameter without counting it
            return orthonormal_columns(rotation)
        state = (rotation._version, rotation.data_ptr(), rotation.dtype, rotation.device)
        kept = self._kept
        if kept is None or kept[0] != state:
            kept = self._kept = state, orthonormal_columns(rotation)
        return kept[1]
