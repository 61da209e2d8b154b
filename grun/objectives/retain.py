"""Retain terms: what must stay, read from retain rows. `none` is no term."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from grun.objectives.losses import kl, steered
from grun.objectives.terms import TERMS, Options, Outputs, Term, TermValue, Unit, negative_log_likelihood, summed, term


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


def _kl_row_sum(outputs: Outputs, options: Options) -> TermValue:
    """As published by GRUN: summed over all positions, padding included, and divided by the rows alone."""
    everywhere = _kl_all_positions(outputs, options).total
    return TermValue(everywhere, len(outputs.model["retain"].answer))


KL_ALL_POSITIONS = Term("retain", "position", ("retain",), _kl_all_positions, reference="all_logits")
KL_ROW_SUM = Term("retain", "row", ("retain",), _kl_row_sum, reference="all_logits")


@term(
    "kl",
    "KL from the untouched model's next-token distributions, over answer tokens",
    side="retain",
    per="token",
    continuations=("retain",),
    reference="logits",
    quirks={"kl_all_positions": KL_ALL_POSITIONS, "kl_row_sum": KL_ROW_SUM},
)
def _kl(outputs: Outputs, _: Options) -> TermValue:
    return summed(kl(outputs.model["retain"].answer_logits(), outputs.reference["retain"].answer_logits()))


def _activation_mse_at(columns: str) -> Callable[[Outputs, Options], TermValue]:
    """The term activation_mse at the columns that the field `columns` of a StepOutput names."""

    def function(outputs: Outputs, options: Options) -> TermValue:
        block = int(options["rmu_block"])
        found, wanted = (  # [states, hidden size], in one order, however wide each pass was padded
            output.hidden(block)[getattr(output, columns)]
            for output in (outputs.model["retain"], outputs.reference["retain"])
        )
        return summed(steered(found, wanted))

    return function


def _activation_mse(per: Unit, columns: str, quirks: Mapping[str, Term] | None = None) -> Term:
    return Term(
        "retain",
        per,
        ("retain",),
        _activation_mse_at(columns),
        reference="hidden",
        hidden=lambda options, _: (int(options["rmu_block"]),),
        reads_head=False,
        options={"rmu_block": None},
        quirks=quirks or {},
    )


TERMS.add(
    "activation_mse",
    _activation_mse("state", "states", {"rmu_answer_states": _activation_mse("token", "answer")}),
    "retain: hold a block's output where the untouched model has it",
)
