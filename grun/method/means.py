"""Gates that are one direction, taken from means of prompts: nothing is minimized, and nothing is drawn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from grun.method.logistic import FOLDS, Line, folds

LOGIT = 4.0
"""Logit at the mean of each side, with its sign: a probability of 0.982 or 0.018."""
NEAREST = 1e-9
"""Least distance of the two means along the direction, so that equal ones give finite numbers."""


def by_means(features: Tensor, target: Tensor, gate: str) -> Line:
    """The direction of a gate, with a logit of 0 halfway between the means of both sides.

    `similarity`: the mean of what is to open the gate; `condition`: the difference of both means.

    Args:
        features: normalized to one length, so that products with a direction are cosines but for a factor, float64
            [rows, size].
        target: which rows the gate is to open on, bool [rows]; there are both kinds.
        gate: a name in `grun.method.gate.BY_MEANS`.
    """
    opened, shut = features[target].mean(dim=0), features[~target].mean(dim=0)
    direction = opened if gate == "similarity" else opened - shut
    gap = float((opened - shut) @ direction)
    weight = direction * (2 * LOGIT / max(abs(gap), NEAREST))
    return Line(weight, -float((opened + shut) @ weight) / 2)


def means_held_out(features: Tensor, target: Tensor, units: Sequence[Hashable], gate: str) -> tuple[Line, Tensor]:
    """`by_means` of all rows, and the logits of each row under that of the folds without its unit, [rows]."""
    fold = torch.where(target, folds(target, units), folds(~target, units)).to(features.device)
    logits = torch.zeros(len(target), dtype=features.dtype)
    for out in (fold == number for number in range(FOLDS)):
        if bool(out.any()):
            line = by_means(features[~out], target.to(out.device)[~out], gate)
            logits[out.cpu()] = line.logits(features[out]).cpu()
    return by_means(features, target.to(features.device), gate), logits
