"""Refusal: learn to answer forget questions with "I don't know"."""

from __future__ import annotations

from grun.objectives.terms import Outputs, TermValue, negative_log_likelihood, objective, term


@objective("idk", retain="ce")
@term("idk", per="token", continuations=("refusal",))
def idk(outputs: Outputs) -> TermValue:
    """CE of a refusal in place of the answer.

    Source: Maini et al. 2024 (TOFU), arXiv 2401.06121.
    """
    return negative_log_likelihood(outputs.model["refusal"])


@objective("idk_concat")
@term("idk_concat", per="token", continuations=("refusal", "retain"))
def idk_concat(outputs: Outputs) -> TermValue:
    """CE of refusals and of retain answers in one token mean (holds its own retain part), as published by TOFU."""
    refused, kept = (negative_log_likelihood(outputs.model[name]) for name in ("refusal", "retain"))
    return TermValue(refused.total + kept.total, refused.number + kept.number)
