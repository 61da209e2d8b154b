"""The gate term bce_max and the cap on ascent, on step outputs made by hand.

Numbers are float64 and expected values plain Python, so 1e-12 relative leaves room for the order of sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from grun.config.options import LossConfig, UnlearnConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.method.parametrization import StepOutput
from grun.objectives.objective import build_objective
from grun.objectives.terms import TERMS, Outputs, TermValue, number_of

F64 = torch.float64
CLOSE = 1e-12


def gates(
    logits: dict[int, list[list[float]]], counted: list[list[int]] | None = None, prompt: list[list[int]] | None = None
) -> StepOutput:
    """Gate logits by block, [batch, positions read], as leaves; everything counts and is prompt where not said."""
    made = {block: torch.tensor(values, dtype=F64, requires_grad=True) for block, values in logits.items()}
    shape = next(iter(made.values())).shape
    none = torch.zeros(shape[0], 1, dtype=torch.bool)
    return StepOutput(
        input_ids=none.long(),
        attended=none,
        answer=none,
        token_logprobs=none.double(),
        gate_logits=made,
        gate_mask=torch.ones(shape, dtype=torch.bool) if counted is None else torch.tensor(counted, dtype=torch.bool),
        logits_at=lambda _: torch.empty(0),
        gate_prompt=None if prompt is None else torch.tensor(prompt, dtype=torch.bool),
    )


def value(name: str, **passes: StepOutput) -> TermValue:
    return TERMS.get(name).function(Outputs(passes, {}), {})


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def leaf(output: StepOutput, block: int = 0) -> Tensor:
    assert output.gate_logits is not None
    return output.gate_logits[block]


def slope(output: StepOutput, block: int = 0) -> list[list[float]]:
    gradient = leaf(output, block).grad
    assert gradient is not None
    return gradient.tolist()


# -- forget rows ------------------------------------------------------------------------------------------------------


LATE = [9.0, -1.0, 2.0, 0.5, 8.0, 7.0], [0, 1, 1, 1, 1, 0]
MAXIMUM, LAST = "bce_max", "bce_max_last"


@pytest.mark.parametrize(
    ("name", "rows", "row", "counted", "prompt", "expected"),
    [
        # A forget row opens at the mean of its three highest gates, of those in the prompt that count.
        (MAXIMUM, "answer", [0.5, -4.0, 2.0, -1.0, 1.0], None, None, softplus(-(0.5 + 2.0 + 1.0) / 3)),
        (MAXIMUM, "answer", [9.0, -1.0, 2.0, 8.0, 0.0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0], softplus(-(-1.0 + 2.0) / 2)),
        # At the last prompt token too; where nothing says what is prompt, the last counts.
        (LAST, "answer", *LATE, [1, 1, 1, 1, 0, 0], softplus(-(-1.0 + 2.0 + 0.5) / 3) + softplus(-0.5)),
        (LAST, "answer", *LATE, None, softplus(-(2.0 + 0.5 + 8.0) / 3) + softplus(-8.0)),
        # A retain row shuts its highest gate and all on average, in its answer too.
        (MAXIMUM, "retain", [0.5, -4.0, 2.0, 3.0], None, None, softplus(3.0) + sum(map(softplus, (0.5, -4, 2, 3))) / 4),
        (MAXIMUM, "retain", [0.5, 2.0, 3.0, 50.0], [1, 1, 1, 0], [1, 1, 0, 0],
         softplus(3.0) + sum(map(softplus, (0.5, 2, 3))) / 3),
    ],
)  # fmt: skip
def test_a_row_is_taken_at_its_highest_gates(
    name: str, rows: str, row: list[float], counted: list[int] | None, prompt: list[int] | None, expected: float
) -> None:
    made = gates({0: [row]}, None if counted is None else [counted], None if prompt is None else [prompt])
    total, count = value(name, **{rows: made})
    assert (total.item(), count) == (pytest.approx(expected, rel=CLOSE), 1)


def test_only_the_gates_that_are_highest_learn_from_a_forget_row() -> None:
    made = gates({0: [[0.5, -4.0, 2.0, -1.0, 1.0]]})
    value("bce_max", answer=made).total.backward()
    pull = -1 / (1 + math.exp(3.5 / 3)) / 3  # of -log sigmoid at the mean, shared by three
    assert slope(made) == [pytest.approx([pull, 0.0, pull, 0.0, pull], rel=CLOSE)]


def test_bce_max_last_shuts_retain_rows_as_bce_max_does_and_skips_rows_that_count_nowhere() -> None:
    retain = gates({0: [[0.5, -4.0], [2.0, 3.0]]}, [[1, 1], [1, 0]])
    assert value("bce_max_last", retain=retain).total.item() == value("bce_max", retain=retain).total.item()
    nowhere, count = value("bce_max_last", answer=gates({0: [[1.0, 2.0], [3.0, 4.0]]}, [[0, 0], [0, 1]]))
    assert (nowhere.item(), count) == (pytest.approx(2 * softplus(-4.0), rel=CLOSE), 2)


def test_a_prompt_is_counted_once_where_answer_and_refusal_are_run() -> None:
    answer, refusal = gates({0: [[1.0]]}), gates({0: [[-7.0]]})
    total, count = value("bce_max", answer=answer, refusal=refusal)
    assert (total.item(), count) == (pytest.approx(softplus(-1.0), rel=CLOSE), 1)
    total, count = value("bce_max", refusal=refusal)
    assert (total.item(), count) == (pytest.approx(softplus(7.0), rel=CLOSE), 1)


# -- retain rows ------------------------------------------------------------------------------------------------------


def test_every_gate_that_counts_on_a_retain_row_learns() -> None:
    made = gates({0: [[0.5, 2.0, -1.0]]}, [[1, 1, 0]])
    value("bce_max", retain=made).total.backward()
    first, second = (1 / (1 + math.exp(-x)) for x in (0.5, 2.0))
    assert slope(made) == [pytest.approx([first / 2, second / 2 + second, 0.0], rel=CLOSE)]


# -- both -------------------------------------------------------------------------------------------------------------


def test_the_term_is_the_mean_over_blocks_and_rows() -> None:
    forget = gates({3: [[1.0, 0.0], [4.0, -4.0]], 5: [[2.0, -1.0], [0.0, 0.0]]}, [[1, 1], [1, 0]])
    retain = gates({3: [[-1.0, -3.0]], 5: [[0.5, 1.5]]})
    total, count = value("bce_max", answer=forget, retain=retain)
    opened = [softplus(-x) for x in (0.5, 4.0, 0.5, 0.0)]
    shut = [softplus(-1.0) + (softplus(-1.0) + softplus(-3.0)) / 2, softplus(1.5) + (softplus(0.5) + softplus(1.5)) / 2]
    assert count == 3
    assert total.item() == pytest.approx(sum(opened) / 2 + sum(shut) / 2, rel=CLOSE)


def test_one_position_read_is_bce_row_with_the_retain_half_twice() -> None:
    forget, retain = gates({0: [[1.0], [-2.0]]}), gates({0: [[0.5], [3.0]]})
    total, count = value("bce_max", answer=forget, retain=retain)
    of_rows = [value("bce_row", answer=forget).total, value("bce_row", retain=retain).total]
    assert count == 4
    assert total.item() == pytest.approx(of_rows[0].item() + 2 * of_rows[1].item(), rel=CLOSE)


@pytest.mark.parametrize("name", ["answer", "retain"])
def test_a_row_without_a_position_that_counts_adds_nothing(name: str) -> None:
    made = gates({0: [[1.0, 2.0], [3.0, 4.0]]}, [[0, 0], [1, 1]])
    total, count = value("bce_max", **{name: made})
    alone, _ = value("bce_max", **{name: gates({0: [[3.0, 4.0]]})})
    total.backward()
    assert (total.item(), count) == (pytest.approx(alone.item(), rel=CLOSE), 2)
    assert slope(made)[0] == [0.0, 0.0]


def test_rows_give_the_same_together_and_one_by_one() -> None:
    """Padding to another width changes nothing, so that micro-batches cannot."""
    rows = [[0.3, -1.0, 2.0, 1.1, -0.2], [0.7, 0.1], [-2.0, 1.0, 0.4]]
    for name in ("answer", "retain"):
        padded = [row + [99.0] * (5 - len(row)) for row in rows]
        counted = [[1] * len(row) + [0] * (5 - len(row)) for row in rows]
        together, count = value("bce_max", **{name: gates({0: padded}, counted)})
        alone = [value("bce_max", **{name: gates({0: [row]})}).total.item() for row in rows]
        assert (together.item(), count) == (pytest.approx(sum(alone), rel=CLOSE), 3)


def test_a_wide_open_gate_on_a_retain_row_still_learns_in_float32() -> None:
    made = gates({0: [[30.0, 0.0]]})
    made.gate_logits = {0: torch.tensor([[30.0, 0.0]], requires_grad=True)}
    value("bce_max", retain=made).total.backward()
    assert slope(made)[0][0] == pytest.approx(1.5, abs=1e-6)


def test_bce_row_is_the_mean_over_blocks_rows_and_all_positions_that_count_prompt_or_not() -> None:
    forget = gates({20: [[1.5, 9.0], [-2.0, 3.0]], 31: [[0.0, 9.0], [4.0, 1.0]]}, [[1, 0], [1, 1]], [[1, 0], [1, 0]])
    retain = gates({20: [[-1.0], [2.5]], 31: [[3.0], [-0.5]]})
    total, count = value("bce_row", answer=forget, retain=retain)
    opened = [softplus(-1.5), softplus(0.0), *((softplus(-x) + softplus(-y)) / 2 for x, y in ((-2.0, 3.0), (4.0, 1.0)))]
    closed = [softplus(x) for x in (-1.0, 2.5, 3.0, -0.5)]
    assert count == 4
    assert total.item() == pytest.approx(sum(opened + closed) / 2, rel=CLOSE)


def test_the_objective_counts_its_rows() -> None:
    made = build_objective("idk", LossConfig(gate="bce_max"), gated=True)
    batch = collate([EncodedRow((1, 2), (3,)), EncodedRow((1,), (3, 4))], 0)
    assert made.counted("gate") == ["refusal", "retain"]
    assert sum(number_of(made.terms["gate"].per, batch) for _ in made.counted("gate")) == 4


# -- the cap on ascent ------------------------------------------------------------------------------------------------


def answers(rows: Sequence[Sequence[float]]) -> StepOutput:
    """Log-probabilities of answer tokens, behind one prompt token; rows may differ in length."""
    length = 1 + max(map(len, rows))
    logprobs = torch.zeros(len(rows), length, dtype=F64)
    answer = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        logprobs[number, 1 : 1 + len(row)] = torch.tensor(row, dtype=F64)
        answer[number, 1 : 1 + len(row)] = True
    logprobs.requires_grad_()
    return StepOutput(answer.long(), answer, answer, logprobs, lambda _: torch.empty(0))


ROWS = [[-1.0, -2.0], [-9.0, -4.0, -5.0], [-3.0]]
"""Mean negative log-likelihoods 1.5, 6 and 3 nats."""


def ascent(rows: Sequence[Sequence[float]], cap: float | None) -> tuple[TermValue, StepOutput]:
    objective = build_objective("ga", LossConfig(ascent_cap=cap), gated=False)
    made = answers(rows)
    return objective.terms["forget"].function(Outputs({"answer": made}, {}), objective.options["forget"]), made


def test_a_row_above_the_cap_counts_as_the_cap_and_has_no_gradient() -> None:
    (total, count), made = ascent(ROWS, cap=4.0)
    total.backward()
    assert count == 6
    assert total.item() == pytest.approx(-(1.5 * 2 + 4.0 * 3 + 3.0 * 1), rel=CLOSE)
    gradient = made.token_logprobs.grad
    assert gradient is not None
    of_answers = [row[counted].tolist() for row, counted in zip(gradient, made.answer, strict=True)]
    assert of_answers == [[1, 1], [0, 0, 0], [1]]  # ascent: the slope of log p is 1


def test_a_row_is_capped_by_its_own_mean_not_by_its_tokens_or_the_batch() -> None:
    (total, _), _ = ascent([[-9.0, -0.5]], cap=5.0)  # one token above, the mean below
    assert total.item() == pytest.approx(-9.5, rel=CLOSE)
    alone = sum(ascent([row], cap=4.0)[0].total.item() for row in ROWS)
    assert ascent(ROWS, cap=4.0)[0].total.item() == pytest.approx(alone, rel=CLOSE)


def test_without_a_cap_ascent_is_what_it_was_bit_for_bit() -> None:
    (total, count), made = ascent(ROWS, cap=None)
    assert torch.equal(total, made.token_logprobs.sum()) and count == 6
    assert LossConfig().ascent_cap is None


@pytest.mark.parametrize("preset", ["ga", "gd", "kl"])
def test_every_preset_of_ascent_takes_the_cap(preset: str) -> None:
    made = build_objective(preset, LossConfig(ascent_cap=6.0), gated=True)
    assert made.options["forget"] == {"ascent_cap": 6.0}
    assert build_objective(preset, LossConfig(), gated=True).options["forget"] == {"ascent_cap": math.inf}


def test_a_cap_that_no_term_reads_or_that_is_not_positive_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"loss.ascent_cap=6.0 has no effect: the terms in force \(npo, ce, bce_row\)"
    ):
        check(UnlearnConfig(objective="npo", loss=LossConfig(ascent_cap=6.0)))
    with pytest.raises(ConfigError, match="loss.ascent_cap 0.0 must be greater than 0"):
        check(UnlearnConfig(objective="gd", loss=LossConfig(ascent_cap=0.0)))
