"""Noise on what a module reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GaussianNoise(nn.Module):
    """Add normal noise in training, nothing otherwise; it holds no weights.

    Source: training with noise as regularization, Bishop 1995, Neural Computation 7.
    """

    def __init__(self, deviation: float) -> None:
        """`deviation`: standard deviation of the noise, in units of the input."""
        super().__init__()
        self.deviation = deviation

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs of any shape; the same shape."""
        return inputs + self.deviation * torch.randn_like(inputs) if self.training else inputs
