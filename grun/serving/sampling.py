"""The next token of a row, by the row's own rules and random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grun.errors import ModelError
from grun.evaluation.scoring import NOT_FINITE
from grun.runtime.files import content_hash

NUCLEUS = 1024
"""Most probable tokens in which a nucleus is looked for before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen."""

    temperature: float = 1.0
    """What logits are divided by; 0: the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability are drawn from."""
    seed: int = 0
    """Of the random numbers; not used at temperature 0."""
    number: int = 0
    """Which of several answers to one prompt this is, from 0; each has random numbers of its own."""
    top_logprobs: int | None = None
    """How many of the most probable tokens are told beside each token's log-probability; None: nothing is told."""

    def generator(self) -> torch.Generator:
        """A function of seed and number alone."""
        return torch.Generator().manual_seed(int(content_hash([self.seed, self.number])[:15], 16))


class Choice(NamedTuple):
    """A token that was chosen, and what the model thought of it."""

    token: int
    logprob: float | None = None
    """Log-probability, nats, before temperature and top_p; None: not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens with theirs."""


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Choice:
    """The next token of one row from its logits [vocabulary]; a draw takes as many numbers of the generator.

    ModelError for logits that are NaN.
    """
    wide = logits.float()
    if bool(wide.isnan().any()):
        raise ModelError(NOT_FINITE)
    token = int(wide.argmax()) if sampling.temperature == 0 else _drawn(wide, sampling, generator)
    if sampling.top_logprobs is None:
        return Choice(token)
    logprobs = wide.log_softmax(-1)
    best = logprobs.topk(sampling.top_logprobs)
    return Choice(token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _drawn(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The token that wins a race in which each arrives after an exponential time, at a rate of its probability.

    So rounding changes a draw as rarely as it changes the most probable token; in a running sum of probabilities over a
    large vocabulary it would do so far more often.
    """
    # Less the largest, so that a temperature next to 0 gives no infinite number.
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    times = torch.empty(len(probabilities)).exponential_(generator=generator).to(probabilities.device)
    return int((probabilities / times).argmax())


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities, 0 but for the fewest most probable tokens that together have `top_p`."""
    for count in (min(NUCLEUS, len(probabilities)), len(probabilities)):
        best = probabilities.topk(count)
        before = best.values.cumsum(-1) - best.values
        kept = max(1, int((before < top_p).sum()))
        if kept < count or count == len(probabilities):
            break
    return torch.zeros_like(probabilities).scatter(0, best.indices[:kept], best.values[:kept])
