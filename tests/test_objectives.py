"""Terms against closed forms written here by hand, presets, and the weights of the whole loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor
from torch.nn.functional import cross_entropy

from grun.config import LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import Batch, EncodedRow, collate
from grun.errors import ConfigError
from grun.method.parametrization import Grun, Reft
from grun.objectives.presets import OBJECTIVES, Objective, build_objective
from grun.objectives.terms import TERMS, Outputs, TermValue, npo
from grun.parametrization import StepOutput
from grun.unlearn import UnlearnRows, UnlearnTask

BLOCKS = [1, 3]


def output(
    logprobs: list[list[float]],
    answer: list[list[int]],
    gates: dict[int, list[list[float]]] | None = None,
    gate_mask: list[list[int]] | None = None,
) -> StepOutput:
    """A StepOutput made by hand; its log-probabilities and gates are leaves."""
    counted = torch.tensor(answer, dtype=torch.bool)
    logits = {block: torch.tensor(values, requires_grad=True) for block, values in (gates or {}).items()}
    first = next(iter(logits.values()), None)
    mask = None if first is None else torch.ones_like(first, dtype=torch.bool)
    return StepOutput(
        input_ids=torch.zeros_like(counted, dtype=torch.long),
        attended=torch.ones_like(counted),
        answer=counted,
        token_logprobs=torch.tensor(logprobs, requires_grad=True),
        gate_logits=logits or None,
        gate_mask=mask if gate_mask is None else torch.tensor(gate_mask, dtype=torch.bool),
        logits_at=lambda _: torch.empty(0),
    )


def term(name: str, model: dict[str, StepOutput], reference: dict[str, StepOutput] | None = None) -> TermValue:
    return TERMS.get(name).function(Outputs(model, reference or {}), LossConfig())


def rows(count: int, seed: int, answer: tuple[int, int] = (1, 7)) -> list[EncodedRow]:
    """Rows of random tokens and ragged lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return tuple(torch.randint(1, 64, (length,), generator=generator).tolist())

    return [EncodedRow(ids(2, 9), ids(*answer)) for _ in range(count)]


def nll(model: Any, row: EncodedRow) -> Tensor:
    """Summed cross-entropy of a row's answer, from a pass over the row alone."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    start = len(row.prompt_ids)
    return cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")


def make_task(
    objective: str = "gd", loss: LossConfig | None = None, *, kind: Any = Grun, batch_size: int = 4, **method: Any
) -> UnlearnTask:
    """A task over a float64 Llama of four blocks and rows of random tokens."""
    config = UnlearnConfig(
        objective=objective,
        method=MethodConfig(blocks=BLOCKS, **method),
        loss=loss or LossConfig(),
        train=TrainConfig(epochs=3, batch_size=batch_size),
        seed=3,
    )
    base = tiny("llama", dtype=torch.float64)
    torch.manual_seed(5)
    parametrization = kind(config.method)
    parametrization.prepare(base, None)
    made = build_objective(objective, config.loss, gated=kind is Grun and config.method.gate != "none")
    data = UnlearnRows(rows(8, seed=1), rows(8, seed=2), rows(11, seed=3))
    return UnlearnTask(parametrization, made, data, config, pad_id=0, device=base.device)


def step_loss(task: UnlearnTask, step: int = 0) -> tuple[Tensor, dict[str, float], dict[str, Batch]]:
    """Loss and terms of a step that is one micro-batch."""
    data = task.data(step)
    (batch,) = data.micro_batches
    return *task.loss(batch, data.counts, step), batch


def batch_rows(batch: Batch) -> list[EncodedRow]:
    """The rows that a batch was made of."""
    found = []
    for ids, mask, length in zip(batch.input_ids, batch.attention_mask, batch.prompt_lengths, strict=True):
        kept = ids[mask != 0].tolist()
        found.append(EncodedRow(tuple(kept[:length]), tuple(kept[length:])))
    return found


# -- terms on numbers -------------------------------------------------------------------------------------------------


def test_token_terms_sum_log_probabilities_and_count_answer_tokens() -> None:
    made = output([[0.0, -1.0, -2.0], [0.0, 0.0, -0.5]], [[0, 1, 1], [0, 0, 1]])
    for name, continuation, sign in (("ga", "answer", -1), ("idk", "refusal", 1), ("ce", "retain", 1)):
        total, count = term(name, {continuation: made})
        assert total.item() == sign * 3.5
        assert count == 3
        assert TERMS.get(name).per == "token"
        assert TERMS.get(name).continuations == (continuation,)


def test_terms_read_only_the_pass_that_they_name() -> None:
    named = output([[0.0, -1.0]], [[0, 1]])
    others = {name: output([[0.0, -9.0]], [[0, 1]]) for name in ("answer", "refusal", "retain")}
    for name, continuation in (("ga", "answer"), ("idk", "refusal"), ("ce", "retain")):
        assert abs(term(name, {**others, continuation: named}).total.item()) == 1.0


def test_npo_equals_its_formula_in_each_row() -> None:
    policy, reference, beta = [-1.0, -20.0, -3.0], [-2.0, -5.0, -3.0], 0.3
    found = npo(torch.tensor(policy), torch.tensor(reference), beta=beta)
    for value, p, r in zip(found.tolist(), policy, reference, strict=True):
        assert value == pytest.approx(2 / beta * math.log(1 + math.exp(beta * (p - r))), rel=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_npo_at_the_reference_is_two_over_beta_times_ln_2(beta: float) -> None:
    same = torch.tensor([-3.0, -70.0], dtype=torch.float64)
    assert npo(same, same, beta=beta).tolist() == pytest.approx([2 / beta * math.log(2)] * 2, rel=1e-12)


def test_npo_gradient_is_ascent_for_small_beta_and_dies_where_the_row_is_forgotten() -> None:
    def slope(difference: float, beta: float) -> float:
        policy = torch.tensor([difference - 4.0], dtype=torch.float64, requires_grad=True)
        npo(policy, torch.tensor([-4.0], dtype=torch.float64), beta=beta).sum().backward()
        assert policy.grad is not None
        return float(policy.grad)

    assert slope(-7.0, 1e-9) == pytest.approx(1.0, abs=1e-6)  # ascent: d(log p) / d(log p)
    for difference in (-3.0, 0.0, 2.0):  # 2 sigmoid(beta * difference), by hand
        assert slope(difference, 0.5) == pytest.approx(2 / (1 + math.exp(-0.5 * difference)), rel=1e-12)
    assert slope(-400.0, 0.5) < 1e-12
    assert float(npo(torch.tensor(-400.0), torch.tensor(0.0), beta=0.5)) < 1e-12  # bounded below by 0


def test_npo_term_is_a_row_mean_over_summed_log_probabilities() -> None:
    model = output([[0.0, -1.0, -2.0], [0.0, 0.0, -0.5]], [[0, 1, 1], [0, 0, 1]])
    untouched = output([[0.0, -1.5, -0.5], [0.0, 0.0, -0.1]], [[0, 1, 1], [0, 0, 1]])
    total, count = term("npo", {"answer": model}, {"answer": untouched})
    beta = LossConfig().beta
    expected = sum(2 / beta * math.log(1 + math.exp(beta * d)) for d in (-3.0 + 2.0, -0.5 + 0.1))
    assert count == 2
    assert total.item() == pytest.approx(expected, rel=1e-6)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_bce_row_is_the_mean_over_blocks_and_rows_of_both_halves() -> None:
    forget = output([[0.0], [0.0]], [[0], [0]], {20: [[1.5], [-2.0]], 31: [[0.0], [4.0]]})
    retain = output([[0.0], [0.0]], [[0], [0]], {20: [[-1.0], [2.5]], 31: [[3.0], [-0.5]]})
    total, count = term("bce_row", {"answer": forget, "retain": retain})
    opened = [softplus(-x) for x in (1.5, -2.0, 0.0, 4.0)]  # -log sigmoid(x)
    closed = [softplus(x) for x in (-1.0, 2.5, 3.0, -0.5)]  # -log(1 - sigmoid(x))
    assert count == 4
    assert total.item() / count == pytest.approx(sum(opened + closed) / 8, rel=1e-6)


def test_bce_row_means_over_the_positions_that_count() -> None:
    gates = {0: [[1.0, 9.0], [2.0, -3.0]]}
    made = output([[0.0], [0.0]], [[0], [0]], gates, gate_mask=[[1, 0], [1, 1]])
    total, count = term("bce_row", {"refusal": made})
    assert count == 2
    assert total.item() == pytest.approx(softplus(-1.0) + (softplus(-2.0) + softplus(3.0)) / 2, rel=1e-6)


def test_a_gate_wide_open_on_a_retain_row_still_learns() -> None:
    retain = output([[0.0]], [[0]], {20: [[20.0]]})
    total, _ = term("bce_row", {"retain": retain})
    total.backward()
    assert retain.gate_logits is not None
    assert total.item() == pytest.approx(20.0, rel=1e-6)
    assert float(retain.gate_logits[20].grad) == pytest.approx(1.0, abs=1e-6)


# -- terms on a real model --------------------------------------------------------------------------------------------


def test_every_term_equals_its_closed_form_on_a_model() -> None:
    """Ragged padded batches against a pass over each row alone; 1e-9 in float64 leaves room for the order of sums."""
    for objective, continuation in (("gd", "answer"), ("idk", "refusal"), ("npo", "answer")):
        task = make_task(objective)
        _, parts, batch = step_loss(task)
        model = task.parametrization.model
        forget, retain = batch_rows(batch[continuation]), batch_rows(batch["retain"])

        def edited(row: EncodedRow, model: Any = model) -> Tensor:
            ids = torch.tensor([row.prompt_ids + row.answer_ids])
            made = model(input_ids=ids, prompt_lengths=torch.tensor([len(row.prompt_ids)]), use_cache=False)
            start = len(row.prompt_ids)
            return cross_entropy(made.logits[0, start - 1 : -1], ids[0, start:], reduction="sum")

        with torch.no_grad():
            of_forget = torch.stack([edited(row) for row in forget])
            of_retain = torch.stack([edited(row) for row in retain])
            with model.disabled():
                untouched = torch.stack([nll(model.base, row) for row in forget])
            lengths = sum(len(row.answer_ids) for row in forget)
            beta = LossConfig().beta
            expected = {
                "gd": -of_forget.sum() / lengths,
                "idk": of_forget.sum() / lengths,
                "npo": (2 / beta * torch.log1p(torch.exp(beta * (untouched - of_forget)))).mean(),
            }[objective]
            kept = of_retain.sum() / sum(len(row.answer_ids) for row in retain)
        assert parts["forget"] == pytest.approx(float(expected), rel=1e-9)
        assert parts["retain"] == pytest.approx(float(kept), rel=1e-9)

        bce = []
        for row, opened in [(row, True) for row in forget] + [(row, False) for row in retain]:
            with torch.no_grad():
                gates = model(torch.tensor([row.prompt_ids])).gate_logits  # the prompt alone ends where the gate reads
            bce += [softplus(-float(gates[block]) if opened else float(gates[block])) for block in BLOCKS]
        assert parts["gate"] == pytest.approx(sum(bce) / len(bce), rel=1e-9)


def test_npo_starts_at_two_over_beta_ln_2_where_the_edit_changes_nothing() -> None:
    task = make_task("npo", gate_bias=-60.0)  # the gate is shut: sigmoid(-60) = 9e-27
    _, parts, _ = step_loss(task)
    assert parts["forget"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-9)


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    for objective, weights in (("gd", (1.5, 2.5, 7.0)), ("npo", (100.0, 1.0, 10.0))):
        forget, retain, gate = weights
        task = make_task(objective, LossConfig(forget_weight=forget, retain_weight=retain, gate_weight=gate))
        total, parts, _ = step_loss(task)
        expected = forget * parts["forget"] + retain * parts["retain"] + gate * parts["gate"]
        assert total.item() == pytest.approx(expected, rel=1e-12)


def test_ascent_alone_still_trains_the_gate_on_retain_rows() -> None:
    task = make_task("ga")
    _, parts, batch = step_loss(task)
    assert set(parts) == {"forget", "gate"}
    assert set(batch) == {"answer", "retain"}
    assert task.data(0).counts["gate"] == 8


def test_gate_term_trains_edits_of_lower_blocks_too() -> None:
    """Spec 2.1: no stop-gradient, the gate of block 3 reads a state that block 1 edited."""
    task = make_task("gd", LossConfig(forget_weight=0.0, retain_weight=0.0))
    total, _, _ = step_loss(task)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in task.module.named_parameters()}
    lower = gradients["edits.1.edit.source.weight"]
    assert lower is not None and float(lower.abs().sum()) > 0


def test_a_parametrization_without_gate_has_no_gate_term() -> None:
    for task in (make_task(kind=Reft), make_task(gate="none")):
        if not isinstance(task.parametrization, Reft):
            assert "gate" not in task._objective.terms
        _, parts, _ = step_loss(task)
        assert set(parts) == {"forget", "retain"}
        assert set(task.data(0).counts) == {"forget", "retain"}


# -- warm-up ----------------------------------------------------------------------------------------------------------


def test_warm_up_rises_linearly_from_nothing_to_one() -> None:
    made = build_objective("gd", LossConfig(gate_warmup_steps=4), gated=True)
    assert [made.warmup(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_there_is_no_warm_up_by_default_nor_without_a_gate() -> None:
    assert LossConfig().gate_warmup_steps == 0
    assert build_objective("gd", LossConfig(), gated=True).warmup(0) == 1.0
    assert build_objective("gd", LossConfig(gate_warmup_steps=-1), gated=True).warmup(0) == 1.0
    assert build_objective("gd", LossConfig(gate_warmup_steps=4), gated=False).warmup(0) == 1.0


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (1, 0.25), (4, 1.0), (5, 1.0)])
def test_warm_up_weighs_forget_and_retain_but_not_the_gate(step: int, weight: float) -> None:
    task = make_task("gd", LossConfig(gate_warmup_steps=4, retain_weight=2.0, gate_weight=10.0))
    total, parts, _ = step_loss(task, step)
    expected = weight * (parts["forget"] + 2.0 * parts["retain"]) + 10.0 * parts["gate"]
    assert total.item() == pytest.approx(expected, rel=1e-12)


# -- presets ----------------------------------------------------------------------------------------------------------


def names(made: Objective) -> dict[str, str]:
    return {side: next(e.name for e in TERMS if TERMS.get(e.name) is used) for side, used in made.terms.items()}


@pytest.mark.parametrize(
    ("preset", "forget", "retain"), [("ga", "ga", None), ("gd", "ga", "ce"), ("idk", "idk", "ce"), ("npo", "npo", "ce")]
)
def test_presets_are_what_they_say(preset: str, forget: str, retain: str | None) -> None:
    made = build_objective(preset, LossConfig(), gated=True)
    expected = {"forget": forget, "gate": "bce_row"} | ({"retain": retain} if retain else {})
    assert names(made) == expected
    assert made.weights == {"forget": 1.0, "gate": 10.0} | ({"retain": 1.0} if retain else {})


def test_every_preset_is_tested_above() -> None:
    assert OBJECTIVES.names() == ["ga", "gd", "idk", "npo"]


def test_options_replace_terms_and_weights_of_a_preset() -> None:
    options = LossConfig(forget="npo", retain="none", gate="none", forget_weight=3.0)
    made = build_objective("gd", options, gated=True)
    assert names(made) == {"forget": "npo"}
    assert made.weights == {"forget": 3.0}
    assert made.continuations == ["answer"]
    assert made.reference_continuations == ["answer"]


def test_a_weight_of_zero_is_kept_and_not_taken_for_unset() -> None:
    made = build_objective("gd", LossConfig(forget_weight=0.0, retain_weight=0.0, gate_weight=0.0), gated=True)
    assert made.weights == {"forget": 0.0, "retain": 0.0, "gate": 0.0}


def test_only_npo_runs_the_untouched_model() -> None:
    expected: dict[str, list[str]] = {"ga": [], "gd": [], "idk": [], "npo": ["answer"]}
    for preset, passes in expected.items():
        assert build_objective(preset, LossConfig(), gated=True).reference_continuations == passes


def test_passes_are_only_those_that_are_needed() -> None:
    assert build_objective("gd", LossConfig(), gated=True).continuations == ["answer", "retain"]
    assert build_objective("idk", LossConfig(), gated=True).continuations == ["refusal", "retain"]
    assert build_objective("ga", LossConfig(), gated=False).continuations == ["answer"]
    gate_alone = LossConfig(forget="none", retain="none")
    assert build_objective("gd", gate_alone, gated=True).continuations == ["answer", "retain"]


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("gdd", LossConfig(), "unknown objective 'gdd': did you mean 'gd'? known: ga, gd, idk, npo"),
        ("gd", LossConfig(forget="nope"), "unknown term 'nope': known: bce_row, ce, ga, idk, npo"),
        ("gd", LossConfig(forget="ce"), "loss.forget=ce is a retain term; known forget terms: ga, idk, npo, none"),
        ("gd", LossConfig(retain="ga"), "loss.retain=ga is a forget term; known retain terms: ce, none"),
        ("gd", LossConfig(gate="ce"), "loss.gate=ce is a retain term; known gate terms: bce_row, none"),
        ("gd", LossConfig(retain_weight=-1.0), "loss.retain_weight -1.0 must not be negative"),
        ("npo", LossConfig(beta=0.0), "loss.beta 0.0 must be greater than 0"),
    ],
)
def test_wrong_names_and_numbers_are_refused_with_what_is_known(
    objective: str, options: LossConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_objective(objective, options, gated=True)
    assert str(error.value) == message


def test_collated_rows_come_back_as_they_were() -> None:
    made = rows(5, seed=9)
    assert batch_rows(collate(made, 0)) == made  # the tests above rest on it
