"""Retain terms: what must stay as it is, read from retain rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grun.objectives.terms import Outputs, TermValue, Variant, negative_log_likelihood, summed, term

if TYPE_CHECKING:
    from torch import Tensor


@term("ce", side="retain", per="token", continuations=("retain",))
def ce(outputs: Outputs) -> TermValue:
    """CE of the answer."""
    return negative_log_likelihood(outputs.model["retain"])


@term("ce_sum", side="retain", per="row", continuations=("retain",))
def ce_sum(outputs: Outputs) -> TermValue:
    """CE summed over each answer, mean over rows."""
    return summed(-outputs.model["retain"].answer_logprobs)


def _of_both(outputs: Outputs) -> tuple[Tensor, Tensor]:
    return outputs.model["retain"].answer_logits(), outputs.reference["retain"].answer_logits()


def _of_both_everywhere(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """As published by TOFU and open-unlearning: prompt and padding are positions like any other."""
    policy, reference = outputs.model["retain"], outputs.reference["retain"]
    everywhere = policy.answer.new_ones(policy.answer.shape)
    return policy.logits(everywhere), reference.logits(everywhere)


def _kl_row_sum(outputs: Outputs) -> TermValue:
    """As published by GRUN: summed over all positions, padding included, and divided by the rows alone."""
    return TermValue(kl(*_of_both_everywhere(outputs)).sum(), len(outputs.model["retain"].answer))


@term(
    "kl",
    side="retain",
    per="token",
    continuations=("retain",),
    inputs=_of_both,
    reference="logits",
    quirks={
        "kl_all_positions": Variant("position", inputs=_of_both_everywhere, reference="all_logits"),
        "kl_row_sum": Variant("row", _kl_row_sum, reference="all_logits"),
    },
)
def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL from the untouched model's next-token distributions, over answer tokens.

    KL(p_ref || p) = sum_v p_ref(v) * (log p_ref(v) - log p(v)) at each position, nats, [positions]; 0 where the
    model is still the reference.

    Args:
        policy: logits under the model being changed, shape [positions, vocabulary].
        reference: the same under the untouched model.

    Source: Maini et al. 2024 (TOFU), arXiv 2401.06121; there the mean is over all positions.
    """
    expected = reference.log_softmax(dim=-1)
    return (expected.exp() * (expected - policy.log_softmax(dim=-1))).sum(dim=-1)
