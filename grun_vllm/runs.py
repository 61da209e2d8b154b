"""Tokens of a pass in runs, over which gates accumulate, and what is accumulated at each place of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grun_vllm.step import Step


@dataclass
class Runs:
    """Tokens in stretches, which are summarized as one, and stretches in runs: what is accumulated starts with each.

    A run is a sequence's part of the pass, or of it what belongs to one turn.
    """

    tokens: np.ndarray
    """Tokens that count, in their order."""
    stretch: np.ndarray
    """Which stretch each of them lies in."""
    last: np.ndarray
    """Last token of each stretch."""
    first: np.ndarray
    """First stretch of the run of each."""
    carried: np.ndarray
    """Whether the run of a stretch goes on from earlier passes."""

    @property
    def single(self) -> bool:
        """Whether each stretch is one token."""
        return len(self.tokens) == len(self.last)


def runs_of(step: Step, counted: np.ndarray, begins: np.ndarray | None, *, every: bool) -> Runs | None:
    """Runs of a pass; None where no token counts.

    Args:
        step: the pass.
        counted: which tokens count, bool; of each sequence the first ones.
        begins: tokens that begin a turn, bool; None: no turns are told apart.
        every: a stretch is one token; else it goes on until what is known there is kept, or a prompt ends.
    """
    tokens = np.flatnonzero(counted)
    if not len(tokens):
        return None
    opens = np.zeros(step.tokens, dtype=bool) if begins is None else begins
    of_sequence = step.sequence[tokens]
    enters = np.r_[True, of_sequence[1:] != of_sequence[:-1]]
    new_run = enters | opens[tokens]
    closes = np.r_[new_run[1:], True] | every | step.kept[tokens] | step.ends[tokens]
    stretch = np.r_[0, np.cumsum(closes)[:-1]]
    last = np.flatnonzero(closes)
    begin = np.r_[0, last[:-1] + 1]  # a run begins with a stretch
    first = np.maximum.accumulate(np.where(new_run[begin], np.arange(len(last)), 0))
    goes_on = enters & ~opens[tokens] & step.goes_on[of_sequence]
    return Runs(tokens, stretch, tokens[last], first, goes_on[begin][first])


Join = Callable[[Tensor, Tensor], Tensor]
"""What is known of earlier tokens and of later ones, [any, width] each -> of both."""


def accumulated(values: Tensor, step: Step, runs: Runs, join: Join) -> Tensor:
    """Of each stretch what is known of its run up to its end in this pass: [stretches, width] as `values`.

    In as many rounds as it takes to double a stretch to the longest run.
    """
    index = np.arange(len(values))
    longest, reach = int((index - runs.first).max()) + 1, 1
    while reach < longest:
        earlier = index - reach
        inside = step.put(earlier >= runs.first).unsqueeze(1)
        values = torch.where(inside, join(values[step.put(np.maximum(earlier, 0))], values), values)
        reach *= 2
    return values


def gone_on(values: Tensor, before: Tensor, step: Step, runs: Runs, join: Join) -> Tensor:
    """The same with what was known before the pass, [sequences, width], where a run goes on."""
    if not runs.carried.any():
        return values
    earlier = before[step.put(step.sequence[runs.last])]
    return torch.where(step.put(runs.carried).unsqueeze(1), join(earlier, values), values)
