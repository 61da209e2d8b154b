"""Entropy: make the predictions of forget answers flat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grun.objectives.terms import Outputs, Variant, answer_logits, objective, term

if TYPE_CHECKING:
    from torch import Tensor


def _all_logits(outputs: Outputs) -> tuple[Tensor]:
    """As LLM360: prompt and padding are positions like any other, and so is the last column."""
    output = outputs.model["answer"]
    return (output.logits(output.answer.new_ones(output.answer.shape)),)


@objective("max_entropy", retain="ce")
@term(
    "max_entropy",
    per="token",
    inputs=answer_logits,
    quirks={"max_entropy_all_positions": Variant("position", inputs=_all_logits)},
)
def max_entropy(policy: Tensor) -> Tensor:
    """Negative entropy of the predictions of answer tokens (bounded below by -ln V).

    sum_v p(v) log p(v) at each position: between -ln V, where the prediction is uniform, and 0. Nats: [positions].

    Args:
        policy: logits, shape [positions, vocabulary].

    Source: Tamirisa et al. 2024 (TAR), arXiv 2408.00761; LLM360's Analysis360.
    """
    logprobs = policy.log_softmax(dim=-1)
    return (logprobs.exp() * logprobs).sum(dim=-1)


def dual_step(
    weight: float, retain: float, epochs: int, *, eta: float = 1.0, epsilon: float, dual_warmup_epochs: float = 5.0
) -> float:
    """Weight of the retain term for the next step: max(0, weight + eta * (retain - epsilon)).

    Args:
        weight: in this step, the dual variable of the constraint retain <= epsilon.
        retain: the retain term over the whole of this step.
        epochs: finished before this step.
        eta: step size, > 0.
        epsilon: value up to which the retain term may rise, >= 0.
        dual_warmup_epochs: epochs before the weight first changes.

    Source: Entesari et al. 2025, arXiv 2506.05314.
    """
    return weight if epochs < dual_warmup_epochs else max(0.0, weight + eta * (retain - epsilon))


@objective("pdu", retain="ce")
@term("pdu", per="token", inputs=answer_logits, dual=dual_step)
def pdu(policy: Tensor) -> Tensor:
    """(largest logit - mean logit)^2, the retain weight a dual variable that holds the retain term at epsilon.

    A distance of the logits from a uniform prediction for each token, 0 where all are equal: [tokens].

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].

    Source: Entesari et al. 2025, arXiv 2506.05314.
    """
    return (policy.max(dim=-1).values - policy.mean(dim=-1)) ** 2
