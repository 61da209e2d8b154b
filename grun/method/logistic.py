"""A linear gate as a convex problem: balanced logistic regression with an L2 penalty, fitted in float64.

Nothing here is drawn: the same features give the same gate, in whatever order they come.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C, the inverse of the L2 penalty's weight, that are tried."""
FOLDS = 5
"""Parts of which each is left out once to choose among them."""
WORSE = 1.01
"""Times the lowest mean loss so far: above it a value of C ends the search."""
EXACT = {"maxiter": 1000, "maxfun": 2000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-8}
"""When L-BFGS ends in the fit that is used."""
NEAR = {"maxiter": 100, "maxfun": 200, "maxcor": 20, "ftol": 1e-5, "gtol": 1e-3}
"""The same in those that are only compared, which takes a tenth of the time."""


@dataclass(frozen=True)
class Line:
    """A linear gate: logit = features @ weight + bias."""

    weight: Tensor
    """Float64, [size]."""
    bias: float

    def logits(self, features: Tensor) -> Tensor:
        """Of features [rows, size], float64: [rows]."""
        return features @ self.weight + self.bias


def fit(features: Tensor, target: Tensor, strength: float, stop: Mapping[str, float] = EXACT) -> Line:
    """Minimize C * sum_i w_i log(1 + exp(-y_i f(x_i))) + |v|^2 / 2 over f(x) = v x' + b.

    x' are the features minus their mean, divided by their standard deviation; y_i is 1 or -1, and w_i so that both
    classes weigh as much: rows / (2 * rows of the class). That is scikit-learn's LogisticRegression(C,
    class_weight="balanced") on StandardScaler's features; what is returned is in terms of the features themselves.

    Args:
        features: float64, [rows, size].
        target: which rows the gate is to open on, bool [rows]; there are both kinds.
        strength: C.
        stop: when L-BFGS ends, `EXACT` or `NEAR`.
    """
    whole = torch.ones(1, len(target), dtype=torch.bool, device=features.device)
    (lines,) = fit_parts(features, target, whole, [strength], stop, features.dtype)
    return lines[0]


def choose_strength(features: Tensor, target: Tensor, units: Sequence[Hashable]) -> tuple[float, Tensor]:
    """The C whose gates do best on units they were not fitted on, and the logits that rows got there, [rows].

    By the balanced mean of log(1 + exp(-y f(x))); the smallest of equals. Once it has risen, larger values, which take
    longest, are not tried. Rows of one unit are left out together. ValueError with fewer than two units of a kind.
    """
    order = {of_kind: folds(target == of_kind, units) for of_kind in (True, False)}
    fold = torch.where(target, order[True], order[False])
    present = [number for number in range(FOLDS) if bool((fold == number).any())]
    inside = torch.stack([fold != number for number in present])
    found: list[tuple[float, Tensor]] = []
    for lines in fit_parts(features, target, inside.to(features.device), STRENGTHS, NEAR, torch.float32):
        logits = torch.empty(len(target), dtype=features.dtype)
        for out, line in zip(~inside, lines, strict=True):
            logits[out] = line.logits(features[out]).cpu()
        losses = softplus(torch.where(target, -logits, logits))
        found.append((float(losses[target].mean() + losses[~target].mean()), logits))
        if found[-1][0] > WORSE * min(loss for loss, _ in found):
            break
    best = min(range(len(found)), key=lambda place: found[place][0])
    return STRENGTHS[best], found[best][1]


def fit_parts(
    features: Tensor,
    target: Tensor,
    inside: Tensor,
    strengths: Sequence[float],
    stop: Mapping[str, float],
    dtype: torch.dtype,
) -> Iterator[list[Line]]:
    """`fit` to several parts of the rows, for one value of C after another, each beginning where the one before ended.

    The parts are one problem, of which each evaluation reads the features once.

    Args:
        features, target: as in `fit`.
        inside: rows of each part, bool [parts, rows].
        strengths: values of C.
        stop: options of L-BFGS.
        dtype: that products with the features are computed in.
    """
    center, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-9 * features.abs().amax(dim=0), scale, 1.0)
    scaled = (features - center) / scale
    share = inside.to(features) / inside.sum(dim=1, keepdim=True)  # [parts, rows]
    mean = share @ scaled  # of each part, [parts, size]
    deviation = (share @ scaled.square() - mean.square()).clamp(min=0).sqrt()
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)  # what is constant in a part
    target, sign = target.to(features.device), torch.where(target, 1.0, -1.0).to(features)
    balanced = torch.zeros_like(share)
    for of_kind in (target, ~target):
        chosen = (inside & of_kind).to(features)
        balanced += 0.5 * chosen * inside.sum(dim=1, keepdim=True) / chosen.sum(dim=1, keepdim=True)
    scaled = scaled.to(dtype)

    def loss_and_slope(point: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        found = torch.from_numpy(point).to(features).view(len(inside), -1)
        vectors, weights = found[:, :-1], found[:, :-1] / deviation
        logits = (weights.to(dtype) @ scaled.T).to(features)
        margin = sign * (logits + (found[:, -1] - (weights * mean).sum(dim=1)).unsqueeze(1))  # [parts, rows]
        pull = -strength * sign * balanced * torch.sigmoid(-margin)  # derivative by each logit
        value = strength * (balanced * softplus(-margin)).sum() + vectors.square().sum() / 2
        total = pull.sum(dim=1, keepdim=True)
        slope = ((pull.to(dtype) @ scaled).to(features) - total * mean) / deviation + vectors
        return float(value), torch.cat((slope, total), dim=1).flatten().cpu().numpy()

    at = np.zeros(len(inside) * (features.shape[1] + 1))
    for strength in strengths:
        at = minimize(loss_and_slope, at, args=(strength,), method="L-BFGS-B", jac=True, options=dict(stop)).x
        found = torch.from_numpy(at).to(features).view(len(inside), -1)
        weights = found[:, :-1] / deviation
        biases = found[:, -1] - (weights * mean).sum(dim=1)
        lines = zip(weights / scale, biases, strict=True)
        yield [Line(weight, float(bias - weight @ center)) for weight, bias in lines]


def folds(chosen: Tensor, units: Sequence[Hashable]) -> Tensor:
    """Number of the fold of each row chosen, [rows]: units in turn, in an order of their own; -1 elsewhere."""
    there = sorted({unit for unit, one in zip(units, chosen.tolist(), strict=True) if one}, key=shuffled)
    if len(there) < 2:
        raise ValueError(f"{len(there)} unit of rows; at least 2 are needed to leave one out")
    fold = {unit: place % FOLDS for place, unit in enumerate(there)}
    return torch.tensor([fold[unit] if one else -1 for unit, one in zip(units, chosen.tolist(), strict=True)])


def shuffled(unit: Hashable) -> tuple[int, str]:
    """Key by which units stand in an order that has nothing to do with their names, and is always the same."""
    return crc32(repr(unit).encode()), repr(unit)


def groups_needed(rate: float) -> int:
    """Fewest units set aside that can promise a rate: K of them promise no less than 1 / (K + 1)."""
    return math.ceil(1 / rate - 1e-9) - 1


def conformal(scores: Tensor, units: Sequence[Hashable], rate: float) -> tuple[float, float]:
    """A threshold that a new row passes with a probability of at most the bound, and the bound.

    Split conformal prediction, of rows that were used for nothing else. Rows of one unit are alike, so it is units that
    are taken to be exchangeable: the new row is any row of a new unit. With K units, and s_k(t) the share of unit k's
    rows that score above t, the bound of a threshold t is (s_1(t) + ... + s_K(t) + 1) / (K + 1). The threshold is the
    lowest score whose bound is at most `rate`, or the highest score where there is none: no less than 1 / (K + 1) can
    be promised. Where each row is a unit this is the k-th lowest score, k = ceil((K + 1)(1 - rate)).

    Args:
        scores: logits, [rows], at least one.
        units: what each row belongs to.
        rate: wanted share of false positives, in (0, 1).

    Source: Lee, Barber and Willett 2023, Distribution-free inference with hierarchical data, arXiv 2306.06342.
    """
    rows_of = Counter(units)
    order = scores.argsort(descending=True).tolist()
    threshold = float(scores[order[0]])
    bound = least = 1 / (len(rows_of) + 1)
    above = 1.0
    for place, row in enumerate(order):
        score = float(scores[row])
        if place and score < float(scores[order[place - 1]]):  # all that are higher are in `above`
            now = above * least
            if now > rate + 1e-9:
                break
            threshold, bound = score, now
        above += 1 / rows_of[units[row]]
    return threshold, bound
