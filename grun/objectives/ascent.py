"""Ascent: make the answers to forget less likely, token by token. Only `min_posterior`, and a cap, bound it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from grun.objectives.terms import (
    Outputs,
    TermValue,
    answer_logits_and_tokens,
    negative_log_likelihood,
    objective,
    summed,
    term,
    token_logprobs,
)

if TYPE_CHECKING:
    from torch import Tensor


@objective("kl", forget="ga", retain="kl")
@objective("gd", forget="ga", retain="ce")
@objective("ga")
@term("ga", per="token")
def ga(outputs: Outputs, *, ascent_cap: float = math.inf) -> TermValue:
    """Gradient ascent on the answer, -CE (unbounded; loss.ascent_cap bounds each row).

    With a cap, a row adds -min(its mean CE, cap) * its tokens: above the cap it has no gradient.

    Source: Maini et al. 2024 (TOFU), arXiv 2401.06121; the cap is ours.
    """
    output = outputs.model["answer"]
    total, count = negative_log_likelihood(output)
    if math.isinf(ascent_cap):
        return TermValue(-total, count)
    lengths = output.answer_counts
    mean = -output.answer_logprobs / lengths.clamp(min=1)  # nats a token, [batch]
    return TermValue(-(mean.clamp(max=ascent_cap) * lengths).sum(), count)


@objective("manual_grad_diff", forget="ga_sum", retain="ce_sum")
@term("ga_sum", per="row")
def ga_sum(outputs: Outputs) -> TermValue:
    """Gradient ascent on the summed CE of each answer, mean over rows (unbounded).

    Source: the code published with GRUN, arXiv 2502.17823.
    """
    return summed(outputs.model["answer"].answer_logprobs)


@objective("wga", retain="ce")
@term("wga", per="token", inputs=token_logprobs)
def wga(logprobs: Tensor, *, beta: float = 1.0) -> Tensor:
    """Gradient ascent, each token weighted by p^beta.

    p^beta * log p for each token, the weight p^beta constant: [tokens].

    Args:
        logprobs: log-probabilities of answer tokens, nats, shape [tokens].
        beta: how much less an unlikely token counts, > 0; towards 0 it is plain ascent.

    Source: Wang et al. 2025, arXiv 2502.19301.
    """
    return (beta * logprobs.detach()).exp() * logprobs


@objective("satimp", retain="ce", forget_weight=0.1)
@term("satimp", per="token", inputs=token_logprobs)
def satimp(logprobs: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """Gradient ascent, each token weighted by p^beta1 * (1 - p)^beta2 (saturation and importance).

    The weights are constant. A value for each token: [tokens].

    Args:
        logprobs: log-probabilities of answer tokens, nats, shape [tokens].
        beta1: saturation, >= 0: how much less an unlikely token, forgotten already, counts.
        beta2: importance, >= 0: how much less a token that the model is sure of counts.

    Source: Yang et al. 2025, arXiv 2505.11953.
    """
    fixed = logprobs.detach()
    return (beta1 * fixed).exp() * (-fixed.expm1()).clamp(min=0) ** beta2 * logprobs


UNLIKELY = -15.0
"""Log-probability below which `min_posterior` counts a token as forgotten, nats."""


@objective("min_posterior", retain="ce")
@term("min_posterior", per="token", inputs=answer_logits_and_tokens)
def min_posterior(policy: Tensor, tokens: Tensor) -> Tensor:
    """Likelihood of any other token: -log(1 - p), 0 once log p < -15 (bounded below by 0).

    log(1 - p) is the difference of two log-sums of exponentials, that of all logits but the token's and that of all,
    so that it is exact where p is near 1. Nats, >= 0, [tokens]; forgotten tokens are among them, without a slope.

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        tokens: the answer tokens, int64, shape [tokens].

    Source: Tamirisa et al. 2024 (TAR), arXiv 2408.00761; LLM360's Analysis360.
    """
    index = tokens.unsqueeze(1)
    every = policy.logsumexp(dim=-1)
    others = policy.scatter(1, index, float("-inf")).logsumexp(dim=-1)
    forgotten = policy.gather(1, index).squeeze(1) - every < UNLIKELY
    return (every - others).masked_fill(forgotten, 0.0)
