"""Terms on small random logits against closed forms: values, slopes, masks, counts, and what changes nothing.

A test of a term gives its name and a plain Python function from a `Case` to the values that it sums:

    @pytest.mark.parametrize("check", CHECKS)
    def test_mine(check):
        check("mine", lambda case: [math.exp(one) for one in logprobs(case.model["answer"])])

Numbers are float64, so 1e-9 relative leaves room for the order of sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from grun.config.options import LossConfig
from grun.data.encoding import EncodedRow, collate
from grun.method.parametrization import StepOutput
from grun.objectives.objective import build_objective
from grun.objectives.terms import TERMS, Options, Outputs, Term, TermValue, number_of

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
LENGTHS["alternate"] = [(2, 2), (1, 2), (3, 4)]
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
    return StepOutput(ids, attended, answer, token_logprobs, lambda positions: logits[positions])


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


Closed = Callable[[Case], list[float]]
"""Values that a term sums, one a token or row, in plain Python."""
CHANGED = {"beta": 0.7, "beta1": 1.5, "beta2": 0.5, "margin": 0.4, "ascent_cap": 2.5}
"""Options other than the defaults; those that are missing act between steps (`test_the_dual_step...`)."""


def equals_its_closed_form(name: str, closed: Closed) -> None:
    term = TERMS.get(name)
    changed = {option: CHANGED[option] for option in term.options if option in CHANGED}
    for options in (defaults(term), defaults(term, **changed)):
        total, number = value_of(name, MODEL, REFERENCE, options)
        expected = closed(Case(MODEL, REFERENCE, options, MODEL))
        assert number == len(expected)
        assert float(total) == pytest.approx(sum(expected), rel=CLOSE)


def has_the_slope_of_its_closed_form_with_constant_weights(name: str, closed: Closed) -> None:
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
                    sides.append(sum(closed(Case({**MODEL, of: rows}, REFERENCE, options, MODEL))))
                slope = (sides[0] - sides[1]) / 2e-5
                assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
                slopes += slope != 0
    assert slopes > 0


def reads_no_padding_prompts_and_other_rows(name: str, closed: Closed) -> None:
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


def has_a_count_that_is_known_before_any_pass(name: str, closed: Closed) -> None:
    term = TERMS.get(name)
    batches = {of: collate([EncodedRow(tuple(r.prompt), tuple(r.answer)) for r in MODEL[of]], 0) for of in MODEL}
    counted = build_objective("pdu", LossConfig(epsilon=0.3), gated=False)
    made = replace(counted, terms={term.side: term}, options={term.side: defaults(term)})
    total = sum(number_of(term.per, batches[of]) for of in made.counted(term.side))
    assert total == value_of(name, MODEL, REFERENCE).number


CHECKS = (
    equals_its_closed_form,
    has_the_slope_of_its_closed_form_with_constant_weights,
    reads_no_padding_prompts_and_other_rows,
    has_a_count_that_is_known_before_any_pass,
)
