"""Noise on what a module reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FILLED = 16
"""torch fills normal numbers in groups of so many, so rows of whole groups are the same in a longer draw."""


class GaussianNoise(nn.Module):
    """Add normal noise in training, nothing otherwise; it holds no weights.

    Source: training with noise as regularization, Bishop 1995, Neural Computation 7.
    """

    def __init__(self, deviation: float) -> None:
        """`deviation`: standard deviation of the noise, in units of the input."""
        super().__init__()
        self.deviation = deviation
        self.row_seeds: Sequence[int] | None = None
        """For each row of a pass the number that its noise is drawn from; None: torch's generator."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [batch, positions, size], or of any shape without row seeds; the same shape."""
        if not self.training:
            return inputs
        if self.row_seeds is None:
            return inputs + self.deviation * torch.randn_like(inputs)
        _, positions, size = inputs.shape
        whole = -(-size // FILLED) * FILLED
        draws = [
            torch.randn(positions, whole, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            for seed in self.row_seeds
        ]
        return inputs + self.deviation * torch.stack(draws)[..., :size].to(inputs)
