"""Retain terms: what must stay, read from retain rows. `none` is no term."""

from __future__ import annotations

from grun.objectives.losses import kl
from grun.objectives.terms import Options, Outputs, Term, TermValue, negative_log_likelihood, summed, term


@term("ce", "CE of the answer", side="retain", per="token", continuations=("retain",))
def _ce(outputs: Outputs, _: Options) -> TermValue:
    return negative_log_likelihood(outputs.model["retain"])


@term("ce_sum", "CE summed over each answer, mean over rows", side="retain", per="row", continuations=("retain",))
def _ce_sum(outputs: Outputs, _: Options) -> TermValue:
    return summed(-outputs.model["retain"].answer_logprobs)


def _kl_all_positions(outputs: Outputs, _: Options) -> TermValue:
    """As published by TOFU and open-unlearning: prompt and padding are positions like any other."""
    policy, reference = outputs.model["retain"], outputs.reference["retain"]
    everywhere = policy.answer.new_ones(policy.answer.shape)
    return summed(kl(policy.logits(everywhere), reference.logits(everywhere)))


KL_ALL_POSITIONS = Term("retain", "position", ("retain",), _kl_all_positions, reference="all_logits")


@term(
    "kl",
    "KL from the untouched model's next-token distributions, over answer tokens",
    side="retain",
    per="token",
    continuations=("retain",),
    reference="logits",
    quirks={"kl_all_positions": KL_ALL_POSITIONS},
)
def _kl(outputs: Outputs, _: Options) -> TermValue:
    return summed(kl(outputs.model["retain"].answer_logits(), outputs.reference["retain"].answer_logits()))
