"""LLM360's losses: closed forms, bounds, what padding does to them, and every parametrization that runs them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny import blocks_of, ragged_rows, tiny
from torch import Tensor

from grun.config.checks import quirks_in_force
from grun.config.options import LossConfig, UnlearnConfig
from grun.data.encoding import collate
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.method.parametrization import EMBEDDINGS
from grun.method.plain import run_plain
from grun.objectives.ascent import min_posterior
from grun.objectives.entropy import max_entropy
from grun.objectives.objective import build_objective
from grun.objectives.rmu import random_mapping, random_table
from grun.objectives.terms import OBJECTIVES, TERMS, Outputs, TermValue, number_of

F64 = torch.float64
QUIRKS = {"max_entropy": "max_entropy_all_positions", "random_mapping": "random_mapping_all_positions"}
ROWS = ragged_rows(5, seed=7)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_max_entropy_lies_between_minus_ln_v_for_uniform_predictions_and_0_for_sure_ones() -> None:
    values = max_entropy(torch.stack([torch.full((7,), 4.0), torch.tensor([900.0] + [0.0] * 6)]))
    assert values.tolist() == pytest.approx([-math.log(7), 0.0], abs=1e-6)  # float32
    random = max_entropy(5 * normal(200, 7))
    assert float(random.min()) >= -math.log(7) and float(random.max()) <= 0


def test_min_posterior_is_exact_where_p_rounds_to_1() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    value = min_posterior(logits, torch.tensor([0]))
    assert float(value.detach()) == pytest.approx(60 - math.log(2), rel=1e-6)  # float32
    value.sum().backward()
    assert logits.grad is not None and float(logits.grad[0, 0]) == pytest.approx(1.0)


def test_min_posterior_leaves_tokens_below_the_threshold_alone_and_keeps_them_in_the_mean() -> None:
    logits = torch.tensor([[-14.0, 0.0], [-16.0, 0.0], [-700.0, 0.0]], dtype=F64, requires_grad=True)
    values = min_posterior(logits, torch.zeros(3, dtype=torch.long))
    assert values.tolist() == [pytest.approx(math.exp(-14), rel=1e-6), 0.0, 0.0]  # -log(1 - p) is about p
    values.sum().backward()
    assert logits.grad is not None
    assert logits.grad[1:].tolist() == [[0.0, 0.0]] * 2 and float(logits.grad[0, 0]) > 0


def test_random_mapping_takes_the_absolute_cosine() -> None:
    hidden, target = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[5.0, 0.0]] * 4)
    expected = [0.0, 0.0, 1.0, 1 - math.sqrt(0.5)]
    assert random_mapping(hidden, target).tolist() == pytest.approx(expected, abs=1e-6)  # float32
    assert random_mapping(hidden.bfloat16(), target).dtype == torch.float32


def test_the_slope_of_random_mapping_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda x: random_mapping(x, normal(3, 6, seed=1)), (2 * normal(3, 6).requires_grad_(),)
    )


def test_the_random_table_is_standard_normal_and_a_function_of_its_seed() -> None:
    table = random_table(400, 50, seed=42)
    assert table.shape == (400, 50) and table.dtype == torch.float32
    assert abs(float(table.mean())) < 0.03 and abs(float(table.std()) - 1) < 0.03  # 4 standard errors of 20,000 draws
    assert torch.equal(table, random_table(400, 50, seed=42))
    assert not torch.equal(table, random_table(400, 50, seed=43))


# -- terms on a model -------------------------------------------------------------------------------------------------

MODEL = tiny("llama")
DEPTH = 4


@torch.no_grad()
def value_of(name: str, quirk: bool = False, side: str = "right", columns: int = 0, **loss: Any) -> TermValue:
    """The term on ROWS, padded to at least `columns`."""
    objective = build_objective(name, LossConfig(**loss), gated=False, quirks=[QUIRKS[name]] if quirk else [])
    term = objective.terms["forget"]
    batch = collate(ROWS, 0, side=side)
    if extra := max(0, columns - batch.input_ids.shape[1]):
        where = (0, extra) if side == "right" else (extra, 0)
        pad = torch.nn.functional.pad
        batch = dataclasses.replace(
            batch,
            input_ids=pad(batch.input_ids, where),
            attention_mask=pad(batch.attention_mask, where),
            labels=pad(batch.labels, where, value=-100),
        )
    output = run_plain(MODEL, batch, term.hidden(objective.options["forget"], DEPTH))
    value = term.function(Outputs({"answer": output}, {}), objective.options["forget"])
    assert value.number == number_of(term.per, batch)
    return value


def states_of(ids: list[int]) -> list[Tensor]:
    """Embeddings and the output of each block, by hooks, of a row alone."""
    found: list[Tensor] = []
    modules = [MODEL.get_input_embeddings(), *blocks_of(MODEL, "llama")]
    handles = [m.register_forward_hook(lambda *a: found.append(a[2][0] if a[2].dim() == 3 else a[2])) for m in modules]
    try:
        with torch.no_grad():
            MODEL(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize(("side", "columns"), [("right", 0), ("left", 0), ("right", 30)])
def test_random_mapping_is_what_rows_without_padding_give(side: str, columns: int) -> None:
    """Float64 but for the rotary positions, which are float32 and others where padding stands on the left."""
    total, count = 0.0, 0
    table = torch.randn(64, 32, generator=torch.Generator().manual_seed(42))
    for row in ROWS:
        ids, start = [*row.prompt_ids, *row.answer_ids], len(row.prompt_ids)
        for state in states_of(ids):
            for column in range(start - 1, len(ids)):
                a, b = state[column], table[ids[column]].double()
                total += (1 - abs(float(a @ b)) / float(a.norm() * b.norm())) / (DEPTH + 1)
        count += len(row.answer_ids) + 1
    found = value_of("random_mapping", side=side, columns=columns)
    assert found.number == count
    assert float(found.total) == pytest.approx(total, rel=1e-6 if side == "left" else 1e-9)


@pytest.mark.parametrize("name", QUIRKS)
def test_under_its_quirk_a_term_is_a_mean_over_padding_too(name: str) -> None:
    found, longer = value_of(name, quirk=True), value_of(name, quirk=True, columns=30)
    length = max(map(len, ROWS))
    assert (found.number, longer.number) == (len(ROWS) * length, len(ROWS) * 30)
    assert float(longer.total / longer.number) != pytest.approx(float(found.total / found.number), rel=1e-3)


def test_max_entropy_under_its_quirk_is_the_mean_over_every_column_of_the_batch() -> None:
    batch = collate(ROWS, 0)
    with torch.no_grad():
        logits = MODEL(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    p = logits.softmax(-1)
    assert float(value_of("max_entropy", quirk=True).total) == pytest.approx(float((p * p.log()).sum()), rel=1e-9)


def test_random_mapping_reads_the_embeddings_and_every_block_and_obeys_its_seed() -> None:
    assert TERMS.get("random_mapping").hidden({}, 3) == (EMBEDDINGS, 0, 1, 2)
    assert float(value_of("random_mapping", control_seed=7).total) != float(value_of("random_mapping").total)


def test_llm360s_quirks_are_those_of_padding() -> None:
    config = UnlearnConfig(compat="llm360", objective="max_entropy")
    assert quirks_in_force(config) == list(QUIRKS.values())
    check(config)


# -- in unlearning ----------------------------------------------------------------------------------------------------


def test_random_matching_is_another_name_of_random_mapping() -> None:
    assert OBJECTIVES.get("random_matching") == OBJECTIVES.get("random_mapping")


def test_an_option_that_max_entropy_does_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss.control_seed=3 has no effect"):
        build_objective("max_entropy", LossConfig(control_seed=3), gated=False)
