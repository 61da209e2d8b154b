"""Terms of answers' probabilities: closed forms written here as loops, options, what papers state, published quirks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from closed_forms import (
    CHANGED,
    CHECKS,
    CLOSE,
    F64,
    MODEL,
    REFERENCE,
    VOCABULARY,
    Case,
    Closed,
    cross_entropy,
    lay_out,
    log_sigmoid,
    log_softmax,
    logprobs,
    softmax,
    summed,
)
from objective_tasks import loss_of

from grun.config.options import LossConfig
from grun.method.parametrization import StepOutput
from grun.objectives.ascent import satimp, wga
from grun.objectives.distillation import ceu, undial
from grun.objectives.entropy import dual_step
from grun.objectives.objective import build_objective
from grun.objectives.preference import dpo, npo
from grun.objectives.retain import kl
from grun.objectives.terms import TERMS, Continuation, Outputs, TermValue


def loop_ga(case: Case) -> list[float]:
    values, cap = [], case.options["ascent_cap"]
    for row in case.model["answer"]:
        of_tokens = logprobs([row])
        capped = -sum(of_tokens) / len(of_tokens) > cap
        values += [-cap] * len(of_tokens) if capped else of_tokens
    return values


def loop_npo(case: Case) -> list[float]:
    beta = case.options["beta"]
    pairs = zip(summed(case.model["answer"]), summed(case.reference["answer"]), strict=True)
    return [-2 / beta * log_sigmoid(-beta * (ours - theirs)) for ours, theirs in pairs]


def loop_dpo(case: Case, preferred: Continuation = "refusal") -> list[float]:
    beta, values = case.options["beta"], []
    for number in range(len(case.model["answer"])):
        win, lose = (
            summed([case.model[name][number]])[0] - summed([case.reference[name][number]])[0]
            for name in (preferred, "answer")
        )
        values.append(-2 / beta * log_sigmoid(beta * (win - lose)))
    return values


def loop_simnpo(case: Case) -> list[float]:
    beta, margin, values = case.options["beta"], case.options["margin"], []
    for row in case.model["answer"]:
        values.append(-2 / beta * log_sigmoid(beta * (-summed([row])[0] / len(row.answer) - margin)))
    return values


def loop_wga(case: Case) -> list[float]:
    pairs = zip(logprobs(case.model["answer"]), logprobs(case.fixed["answer"]), strict=True)
    return [math.exp(fixed) ** case.options["beta"] * log_p for log_p, fixed in pairs]


def loop_satimp(case: Case) -> list[float]:
    values = []
    for log_p, fixed in zip(logprobs(case.model["answer"]), logprobs(case.fixed["answer"]), strict=True):
        p = math.exp(fixed)
        values.append(p ** case.options["beta1"] * (1 - p) ** case.options["beta2"] * log_p)
    return values


def loop_undial(case: Case) -> list[float]:
    values = []
    for row, teacher in zip(case.model["answer"], case.reference["answer"], strict=True):
        for (logits, token), (taught, _) in zip(row.predictions(), teacher.predictions(), strict=True):
            lowered = [one - case.options["beta"] * (number == token) for number, one in enumerate(taught)]
            values.append(cross_entropy(softmax(lowered), logits))
    return values


def loop_ceu(case: Case) -> list[float]:
    values = []
    for row, fixed in zip(case.model["answer"], case.fixed["answer"], strict=True):
        for (logits, token), (aim, _) in list(zip(row.predictions(), fixed.predictions(), strict=True))[1:]:
            others = sum(math.exp(one) for number, one in enumerate(aim) if number != token)
            target = [math.exp(one) / others * (number != token) for number, one in enumerate(aim)]
            values.append(cross_entropy(target, logits))
    return values


def loop_pdu(case: Case) -> list[float]:
    of_tokens = [logits for row in case.model["answer"] for logits, _ in row.predictions()]
    return [(max(logits) - sum(logits) / len(logits)) ** 2 for logits in of_tokens]


def loop_max_entropy(case: Case) -> list[float]:
    of_tokens = [softmax(logits) for row in case.model["answer"] for logits, _ in row.predictions()]
    return [sum(p * math.log(p) for p in of) for of in of_tokens]


def loop_min_posterior(case: Case) -> list[float]:
    return [-math.log(1 - math.exp(one)) for one in logprobs(case.model["answer"])]


def loop_kl(case: Case, of: Continuation = "retain") -> list[float]:
    values = []
    for row, untouched in zip(case.model[of], case.reference[of], strict=True):
        for (logits, _), (expected, _) in zip(row.predictions(), untouched.predictions(), strict=True):
            of_model, of_reference = log_softmax(logits), log_softmax(expected)
            values.append(sum(math.exp(q) * (q - p) for q, p in zip(of_reference, of_model, strict=True)))
    return values


CLOSED: dict[str, Closed] = {
    "ga": loop_ga,
    "ga_sum": lambda case: summed(case.model["answer"]),
    "idk": lambda case: [-one for one in logprobs(case.model["refusal"])],
    "idk_concat": lambda case: [-one for one in logprobs(case.model["refusal"] + case.model["retain"])],
    "npo": loop_npo,
    "dpo": loop_dpo,
    "altpo": lambda case: loop_dpo(case, "alternate"),
    "simnpo": loop_simnpo,
    "wga": loop_wga,
    "satimp": loop_satimp,
    "undial": loop_undial,
    "ceu": loop_ceu,
    "counterfactual": lambda case: loop_kl(case, "answer"),
    "pdu": loop_pdu,
    "max_entropy": loop_max_entropy,
    "min_posterior": loop_min_posterior,
    "ce": lambda case: [-one for one in logprobs(case.model["retain"])],
    "ce_sum": lambda case: [-one for one in summed(case.model["retain"])],
    "kl": loop_kl,
}
"""Values that a term sums, one a token or row, in plain Python."""


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("check", CHECKS)
def test_a_term(check: Callable[[str, Closed], None], name: str) -> None:
    check(name, CLOSED[name])


# -- options ----------------------------------------------------------------------------------------------------------

READ = [(entry.name, option) for entry in TERMS for option in TERMS.get(entry.name).options]


@pytest.mark.parametrize(("option", "value"), [("eta", 0.5), ("epsilon", 0.1), ("dual_warmup_epochs", 5.0)])
def test_each_option_of_the_dual_step_changes_the_next_retain_weight(option: str, value: float) -> None:
    def next_weights(**options: float) -> dict[str, float]:
        loss = LossConfig(**{"epsilon": 0.3, "dual_warmup_epochs": 0.0, **options})  # type: ignore[arg-type]
        made = build_objective("pdu", loss, gated=False)
        return made.next_weights({"forget": 1.0, "retain": 2.0}, {"forget": 0.1, "retain": 0.7}, epochs=4)

    before, after = next_weights(), next_weights(**{option: value})
    assert before["forget"] == after["forget"] == 1.0
    assert before["retain"] != after["retain"]


def test_every_option_of_a_term_is_a_field_of_the_config_and_every_such_field_is_some_terms() -> None:
    given = {"forget", "retain", "gate", "forget_weight", "retain_weight", "gate_weight", "gate_warmup_steps"}
    assert {option for _, option in READ} == {field.name for field in fields(LossConfig)} - given
    elsewhere = {"eta", "epsilon", "dual_warmup_epochs"}  # in the tests of the dual step
    elsewhere |= {"steering", "rmu_block", "control_seed"}  # in test_rmu_terms.py and test_output_space_terms.py
    assert {option for name, option in READ if option not in CHANGED} == elsewhere


def test_options_have_the_published_defaults() -> None:
    published: dict[str, dict[str, float | None]] = {
        "ga": {"ascent_cap": math.inf},
        "npo": {"beta": 0.1},
        "dpo": {"beta": 0.1},
        "altpo": {"beta": 0.1},
        "simnpo": {"beta": 2.5, "margin": 0.0},
        "wga": {"beta": 1.0},
        "satimp": {"beta1": 5.0, "beta2": 1.0},
        "undial": {"beta": 10.0},
        "pdu": {"eta": 1.0, "epsilon": None, "dual_warmup_epochs": 5.0},
        "rmu": {"rmu_block": None, "steering": None, "control_seed": 42.0},
        "random_mapping": {"control_seed": 42.0},
        "activation_mse": {"rmu_block": None},
    }
    assert {name: dict(TERMS.get(name).options) for name in published} == published


# -- single losses: what their papers say of them ---------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_preferences_at_the_reference_are_two_over_beta_times_ln_2(beta: float) -> None:
    same = torch.tensor([-3.0, -70.0], dtype=F64)
    expected = pytest.approx([2 / beta * math.log(2)] * 2, rel=1e-12)
    assert npo(same, same, beta=beta).tolist() == expected
    assert dpo(same - same, same - same, beta=beta).tolist() == expected


def test_npo_gradient_is_ascent_for_small_beta_and_dies_where_the_row_is_forgotten() -> None:
    def slope(difference: float, beta: float) -> float:
        policy = torch.tensor([difference - 4.0], dtype=F64, requires_grad=True)
        npo(policy, torch.tensor([-4.0], dtype=F64), beta=beta).sum().backward()
        assert policy.grad is not None
        return float(policy.grad)

    assert slope(-7.0, 1e-9) == pytest.approx(1.0, abs=1e-6)  # ascent: d(log p) / d(log p)
    for difference in (-3.0, 0.0, 2.0):  # 2 sigmoid(beta * difference), by hand
        assert slope(difference, 0.5) == pytest.approx(2 / (1 + math.exp(-0.5 * difference)), rel=1e-12)
    assert slope(-400.0, 0.5) < 1e-12
    assert float(npo(torch.tensor(-400.0), torch.tensor(0.0), beta=0.5)) < 1e-12  # bounded below by 0


def test_weighted_ascent_becomes_ascent_for_small_powers_and_leaves_forgotten_tokens_alone() -> None:
    log_p = torch.tensor([-0.1, -3.0, -60.0], dtype=F64, requires_grad=True)
    torch.testing.assert_close(wga(log_p, beta=1e-12), log_p)
    torch.testing.assert_close(satimp(log_p, beta1=0.0, beta2=0.0), log_p)
    wga(log_p, beta=1.0).sum().backward()
    assert log_p.grad is not None
    torch.testing.assert_close(log_p.grad, log_p.detach().exp())  # no slope through the weight
    sure = torch.zeros(1, dtype=F64, requires_grad=True)  # p = 1
    satimp(sure, beta1=5.0, beta2=1.0).sum().backward()
    assert sure.grad is not None and float(sure.grad) == 0.0


def test_undial_is_least_where_the_model_is_the_lowered_reference() -> None:
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(5, VOCABULARY, generator=generator, dtype=F64)
    tokens = torch.tensor([0, 3, 5, 1, 1])
    goal = (reference - 10.0 * torch.nn.functional.one_hot(tokens, VOCABULARY)).requires_grad_()
    undial(goal, reference, tokens, beta=10.0).sum().backward()
    assert goal.grad is not None and float(goal.grad.abs().max()) < 1e-12


def test_ceu_lowers_the_true_token_alone_and_keeps_the_others_ratios() -> None:
    """The slope of each other token is p minus its share without the true one, that of the true token its p."""
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(5), dtype=F64).requires_grad_()
    tokens = torch.tensor([2, 0, 5])
    ceu(logits, tokens).sum().backward()
    p = logits.detach().softmax(-1)
    of_token = p.gather(1, tokens[:, None])
    expected = (p - p / (1 - of_token)).scatter(1, tokens[:, None], of_token)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)


def test_kl_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(6), dtype=F64)
    assert float(kl(logits + 3.0, logits).abs().max()) < 1e-12  # a shift of all logits is the same distribution
    assert float(kl(logits * 1.5, logits).min()) > 0


def test_the_retain_weight_rises_above_epsilon_and_never_falls_below_zero() -> None:
    assert dual_step(1.0, 0.5, 5, eta=2.0, epsilon=0.3) == pytest.approx(1.4)
    assert dual_step(1.0, 0.1, 5, eta=2.0, epsilon=0.3) == pytest.approx(0.6)
    assert dual_step(0.1, 0.1, 5, eta=2.0, epsilon=0.3) == 0.0


def test_losses_of_bfloat16_logits_are_computed_in_float32() -> None:
    output = lay_out(MODEL["answer"])
    narrow = replace(output, logits_at=lambda positions: output.logits_at(positions).bfloat16())
    assert narrow.answer_logits().dtype == torch.float32 and output.answer_logits().dtype == F64


# -- published quirks -------------------------------------------------------------------------------------------------


def under_quirk(name: str) -> tuple[TermValue, StepOutput, StepOutput]:
    """Value of the term that the quirk puts in the place of `name`, and the two passes that it read."""
    objective = build_objective(name, LossConfig(), gated=False, quirks=[f"{name}_all_positions"])
    term = objective.terms[TERMS.get(name).side]
    (of,) = term.continuations
    model, reference = lay_out(MODEL[of], extra=1), lay_out(REFERENCE[of], extra=1, garbage=8)
    return term.function(Outputs({of: model}, {of: reference}), objective.options[term.side]), model, reference


def test_kl_all_positions_is_a_mean_over_prompt_and_padding_too() -> None:
    found, model, reference = under_quirk("kl")
    every = torch.ones_like(model.answer)
    expected = 0.0
    for ours, theirs in zip(model.logits(every).tolist(), reference.logits(every).tolist(), strict=True):
        p, q = log_softmax(ours), log_softmax(theirs)
        expected += sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
    assert found.number == model.answer.numel()
    assert float(found.total) == pytest.approx(expected, rel=CLOSE)


def test_undial_all_positions_lowers_a_token_from_the_vocabularys_end_where_nothing_is_to_be_forgotten() -> None:
    found, model, reference = under_quirk("undial")
    every = torch.ones_like(model.answer)
    shape = (*model.answer.shape, VOCABULARY)
    ours, theirs = model.logits(every).view(shape), reference.logits(every).view(shape)
    expected = 0.0
    rows, length = model.answer.shape
    for row in range(rows):
        for column in range(length - 1):
            predicted = bool(model.answer[row, column + 1])
            token = (
                int(model.input_ids[row, column + 1]) if predicted else 2
            )  # -100, 17 times round the vocabulary of 6
            lowered = [x - 10.0 * (n == token) for n, x in enumerate(theirs[row, column].tolist())]
            expected += cross_entropy(softmax(lowered), ours[row, column].tolist())
    assert found.number == rows * (length - 1)
    assert float(found.total) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("name", ["kl", "undial"])
def test_quirks_are_off_by_default_and_need_the_untouched_models_logits_everywhere(name: str) -> None:
    plain = build_objective(name, LossConfig(), gated=True)
    quirky = build_objective(name, LossConfig(), gated=True, quirks=["dropout_on_hidden", f"{name}_all_positions"])
    assert TERMS.get(name) in plain.terms.values() and TERMS.get(name) not in quirky.terms.values()
    assert (plain.reference, quirky.reference) == ("logits", "all_logits")
    assert plain.reference_continuations == quirky.reference_continuations


@pytest.mark.parametrize(
    ("names", "reads"),
    [
        (("ga", "gd", "idk", "simnpo", "pdu", "rmu_ce", "manual_grad_diff"), "none"),
        (("npo", "npo_only", "dpo", "dpo_only", "altpo", "manual_npo_grad_diff"), "logprobs"),
        (("kl", "npo_kl", "dpo_kl", "undial", "rmu_kl"), "logits"),
        (("rmu",), "hidden"),
    ],
)
def test_an_objective_reads_the_most_that_a_term_of_it_reads_of_the_untouched_model(
    names: tuple[str, ...], reads: str
) -> None:
    for name in names:
        assert build_objective(name, loss_of(name), gated=True).reference == reads, name
