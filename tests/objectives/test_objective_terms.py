"""Every term on small random logits: closed forms written here as loops, slopes, masks, and what changes nothing.

Numbers are float64, so 1e-9 relative leaves room for the order of sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from grun.config.options import LossConfig
from grun.data.encoding import EncodedRow, collate
from grun.method.parametrization import StepOutput
from grun.objectives.ascent import satimp, wga
from grun.objectives.distillation import ceu, undial
from grun.objectives.entropy import dual_step
from grun.objectives.objective import build_objective
from grun.objectives.preference import dpo, npo, simnpo
from grun.objectives.retain import kl
from grun.objectives.terms import OBJECTIVES, TERMS, Options, Outputs, Term, TermValue, number_of

VOCABULARY = 6
F64 = torch.float64
CLOSE = 1e-9


@dataclass
class Row:
    """Tokens of one row, and the logits at each of them, which predict the next one."""

    prompt: list[int]
    answer: list[int]
    logits: Tensor  # [tokens, vocabulary]

    def predictions(self) -> Iterator[tuple[list[float], int]]:
        """Logits and token of each answer token."""
        for number, token in enumerate(self.answer):
            yield self.logits[len(self.prompt) - 1 + number].tolist(), token


Rows = dict[str, list[Row]]
LENGTHS = {"answer": [(2, 3), (1, 1), (3, 2)], "refusal": [(2, 1), (1, 3), (3, 2)], "retain": [(1, 2), (4, 1), (2, 4)]}
"""(prompt, answer) tokens of each row; the rows of a forget row stand at the same place."""


def make_rows(seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def one(prompt: int, answer: int) -> Row:
        ids = torch.randint(VOCABULARY, (prompt + answer,), generator=generator).tolist()
        logits = 2 * torch.randn(prompt + answer, VOCABULARY, generator=generator, dtype=F64)
        return Row(ids[:prompt], ids[prompt:], logits)

    return {name: [one(*lengths) for lengths in of] for name, of in LENGTHS.items()}


def under(rows: Rows, seed: int) -> Rows:
    """The same rows under another model: other logits."""
    generator = torch.Generator().manual_seed(seed)

    def other(logits: Tensor) -> Tensor:
        return logits + torch.randn(logits.shape, generator=generator, dtype=F64)

    return {name: [replace(row, logits=other(row.logits)) for row in of] for name, of in rows.items()}


MODEL = make_rows(seed=1)
REFERENCE = under(MODEL, seed=2)


def lay_out(rows: list[Row], side: str = "right", extra: int = 0, garbage: int = 3) -> StepOutput:
    """Rows as a padded batch. Padding and prompts hold numbers that would be seen in any loss that read them."""
    length = max(len(row.logits) for row in rows) + extra
    generator = torch.Generator().manual_seed(garbage)
    ids = torch.randint(VOCABULARY, (len(rows), length), generator=generator)
    answer = torch.zeros(len(rows), length, dtype=torch.bool)
    attended = torch.zeros_like(answer)
    columns = []
    for number, row in enumerate(rows):
        start = 0 if side == "right" else length - len(row.logits)
        first, end = start + len(row.prompt), start + len(row.logits)
        ids[number, first:end] = torch.tensor(row.answer)
        answer[number, first:end] = True
        attended[number, start:end] = True
        wild = 40 * torch.randn(length, VOCABULARY, generator=generator, dtype=F64)
        before = len(row.prompt) - 1  # logits of the prompt but its last token predict nothing that counts
        columns.append(torch.cat([wild[: start + before], row.logits[before:-1], wild[end - 1 :]]))
    logits = torch.stack(columns)  # [batch, length, vocabulary]
    chosen = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    token_logprobs = torch.nn.functional.pad(chosen, (1, 0)) * answer
    return StepOutput(ids, attended, answer, token_logprobs, None, None, lambda positions: logits[positions])


def defaults(term: Term, **changes: float) -> dict[str, float]:
    """A term's published options; epsilon, which has none, is 0.3."""
    options = {name: 0.3 if default is None else default for name, default in term.options.items()}
    return {**options, **changes}


def value_of(name: str, model: Rows, reference: Rows, options: Options | None = None, **layout: int | str) -> TermValue:
    term = TERMS.get(name)

    def outputs(rows: Rows) -> dict[str, StepOutput]:
        return {of: lay_out(rows[of], **layout) for of in term.continuations}  # type: ignore[arg-type]

    return term.function(Outputs(outputs(model), outputs(reference)), options or defaults(term))


# -- closed forms -----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """What a term reads; `fixed` are the rows that its constant weights and targets are of."""

    model: Rows
    reference: Rows
    options: Mapping[str, float]
    fixed: Rows


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(one) for one in logits))
    return [one - total for one in logits]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def logprobs(rows: list[Row]) -> list[float]:
    return [log_softmax(logits)[token] for row in rows for logits, token in row.predictions()]


def summed(rows: list[Row]) -> list[float]:
    return [sum(logprobs([row])) for row in rows]


def cross_entropy(target: list[float], logits: list[float]) -> float:
    return -sum(p * log_p for p, log_p in zip(target, log_softmax(logits), strict=True))


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(one) for one in log_softmax(logits)]


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


def loop_dpo(case: Case) -> list[float]:
    beta, values = case.options["beta"], []
    for number in range(len(case.model["answer"])):
        win, lose = (
            summed([case.model[name][number]])[0] - summed([case.reference[name][number]])[0]
            for name in ("refusal", "answer")
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


def loop_kl(case: Case) -> list[float]:
    values = []
    for row, untouched in zip(case.model["retain"], case.reference["retain"], strict=True):
        for (logits, _), (expected, _) in zip(row.predictions(), untouched.predictions(), strict=True):
            of_model, of_reference = log_softmax(logits), log_softmax(expected)
            values.append(sum(math.exp(q) * (q - p) for q, p in zip(of_reference, of_model, strict=True)))
    return values


CLOSED: dict[str, Callable[[Case], list[float]]] = {
    "ga": loop_ga,
    "ga_sum": lambda case: summed(case.model["answer"]),
    "idk": lambda case: [-one for one in logprobs(case.model["refusal"])],
    "idk_concat": lambda case: [-one for one in logprobs(case.model["refusal"] + case.model["retain"])],
    "npo": loop_npo,
    "dpo": loop_dpo,
    "simnpo": loop_simnpo,
    "wga": loop_wga,
    "satimp": loop_satimp,
    "undial": loop_undial,
    "ceu": loop_ceu,
    "pdu": loop_pdu,
    "max_entropy": loop_max_entropy,
    "min_posterior": loop_min_posterior,
    "ce": lambda case: [-one for one in logprobs(case.model["retain"])],
    "ce_sum": lambda case: [-one for one in summed(case.model["retain"])],
    "kl": loop_kl,
}
"""Values that a term sums, one a token or row, in plain Python."""
CHANGED = {"beta": 0.7, "beta1": 1.5, "beta2": 0.5, "margin": 0.4, "ascent_cap": 2.5}
"""Options other than the defaults; those that are missing act between steps (`test_the_dual_step...`)."""


def test_every_term_has_a_closed_form_here() -> None:
    of_gates_and_states = {"bce_row", "bce_max", "bce_max_last", "random_mapping", "rmu", "activation_mse"}
    # in test_objectives.py, test_gate_terms.py, test_output_space_terms.py and test_rmu_terms.py
    assert set(CLOSED) == set(TERMS.names()) - of_gates_and_states


@pytest.mark.parametrize("name", CLOSED)
def test_a_term_equals_its_closed_form(name: str) -> None:
    term = TERMS.get(name)
    changed = {option: CHANGED[option] for option in term.options if option in CHANGED}
    for options in (defaults(term), defaults(term, **changed)):
        total, number = value_of(name, MODEL, REFERENCE, options)
        expected = CLOSED[name](Case(MODEL, REFERENCE, options, MODEL))
        assert number == len(expected)
        assert float(total) == pytest.approx(sum(expected), rel=CLOSE)


@pytest.mark.parametrize("name", CLOSED)
def test_a_terms_gradient_is_the_slope_of_its_closed_form_with_constant_weights(name: str) -> None:
    """Central differences; their error is the square of the step, 1e-5, and rounding divided by it."""
    term = TERMS.get(name)
    options = defaults(term)
    leaves = {of: [replace(row, logits=row.logits.clone().requires_grad_()) for row in MODEL[of]] for of in MODEL}
    value_of(name, leaves, REFERENCE, options).total.backward()
    slopes = 0
    for of in term.continuations:
        for number, row in enumerate(leaves[of]):
            gradient = torch.zeros_like(row.logits) if row.logits.grad is None else row.logits.grad
            for place in range(row.logits.numel()):
                sides = []
                for step in (1e-5, -1e-5):
                    moved = row.logits.detach().clone()
                    moved.view(-1)[place] += step
                    rows = [replace(one, logits=moved) if at == number else one for at, one in enumerate(MODEL[of])]
                    sides.append(sum(CLOSED[name](Case({**MODEL, of: rows}, REFERENCE, options, MODEL))))
                slope = (sides[0] - sides[1]) / 2e-5
                assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
                slopes += slope != 0
    assert slopes > 0


@pytest.mark.parametrize("name", CLOSED)
def test_padding_prompts_and_the_rows_beside_it_change_no_loss(name: str) -> None:
    """Left, right and more padding, other numbers in it and in prompts, and batches of one row each."""
    whole, number = value_of(name, MODEL, REFERENCE)
    for layout in ({"side": "left"}, {"extra": 3}, {"side": "left", "extra": 2}, {"garbage": 9}):
        other, count = value_of(name, MODEL, REFERENCE, **layout)  # type: ignore[arg-type]
        assert (float(other), count) == (pytest.approx(float(whole), rel=CLOSE), number)
    alone = [
        value_of(name, *({of: [rows[of][index]] for of in rows} for rows in (MODEL, REFERENCE))) for index in range(3)
    ]
    assert sum(float(one.total) for one in alone) == pytest.approx(float(whole), rel=CLOSE)
    assert sum(one.number for one in alone) == number


@pytest.mark.parametrize("name", CLOSED)
def test_the_count_is_known_before_any_pass_is_run(name: str) -> None:
    term = TERMS.get(name)
    batches = {of: collate([EncodedRow(tuple(r.prompt), tuple(r.answer)) for r in MODEL[of]], 0) for of in MODEL}
    counted = build_objective("pdu", LossConfig(epsilon=0.3), gated=False)
    made = replace(counted, terms={term.side: term}, options={term.side: defaults(term)})
    total = sum(number_of(term.per, batches[of]) for of in made.counted(term.side))
    assert total == value_of(name, MODEL, REFERENCE).number


# -- options ----------------------------------------------------------------------------------------------------------

READ = [(entry.name, option) for entry in TERMS for option in TERMS.get(entry.name).options]


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, option in READ if option in CHANGED])
def test_each_option_of_a_term_changes_its_loss(name: str, option: str) -> None:
    term = TERMS.get(name)
    before = value_of(name, MODEL, REFERENCE)
    after = value_of(name, MODEL, REFERENCE, defaults(term, **{option: CHANGED[option]}))
    assert float(after.total) != pytest.approx(float(before.total), rel=1e-3)


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
    assert {entry.name: dict(TERMS.get(entry.name).options) for entry in TERMS if TERMS.get(entry.name).options} == {
        "ga": {"ascent_cap": math.inf},
        "npo": {"beta": 0.1},
        "dpo": {"beta": 0.1},
        "simnpo": {"beta": 2.5, "margin": 0.0},
        "wga": {"beta": 1.0},
        "satimp": {"beta1": 5.0, "beta2": 1.0},
        "undial": {"beta": 10.0},
        "pdu": {"eta": 1.0, "epsilon": None, "dual_warmup_epochs": 5.0},
        "rmu": {"rmu_block": None, "steering": None, "control_seed": 42.0},
        "random_mapping": {"control_seed": 42.0},
        "activation_mse": {"rmu_block": None},
    }


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


def test_dpo_without_a_win_is_npo() -> None:
    policy, reference = torch.tensor([-3.0, -9.0], dtype=F64), torch.tensor([-4.0, -2.0], dtype=F64)
    found = dpo(torch.zeros(2, dtype=F64), policy - reference, beta=0.3)
    torch.testing.assert_close(found, npo(policy, reference, beta=0.3))


def test_simnpo_does_not_punish_length() -> None:
    short = simnpo(torch.tensor([-2.0]), torch.tensor([4]), beta=2.5, margin=0.0)
    torch.testing.assert_close(short, simnpo(torch.tensor([-20.0]), torch.tensor([40]), beta=2.5, margin=0.0))


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


def test_every_objective_says_the_most_that_it_reads_of_the_untouched_model() -> None:
    expected = {name: "none" for name in OBJECTIVES.names()}
    expected |= {name: "logprobs" for name in ("npo", "npo_only", "dpo", "dpo_only", "manual_npo_grad_diff")}
    expected |= {name: "logits" for name in ("kl", "npo_kl", "dpo_kl", "undial", "rmu_kl")}
    expected |= {"rmu": "hidden"}
    loss = {"pdu": LossConfig(epsilon=0.3)}
    loss |= dict.fromkeys(("rmu", "rmu_kl", "rmu_ce"), LossConfig(rmu_block=3, steering=6.5))
    found = {name: build_objective(name, loss.get(name, LossConfig()), gated=True).reference for name in expected}
    assert found == expected
