"""RMU as an objective: values by hand from hidden states, gradients of both engines, the untouched states, quirks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import DEPTH, WIDTH, blocks_of, plain_hooks, ragged_rows, tiny
from torch import Tensor
from watched import assert_same, whole_step

from baselines.full import Full
from baselines.lora import Lora
from grun.cache.engine import use_cached
from grun.cache.packed import PackedModel
from grun.cache.reference import use_reference
from grun.commands.unlearn import check_blocks
from grun.config.checks import quirks_in_force
from grun.config.options import CacheConfig, LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import ConfigError
from grun.method.gated import Grun
from grun.method.parametrization import StepOutput
from grun.objectives.objective import build_objective
from grun.objectives.terms import number_of
from grun.training.unlearning import UnlearnRows, UnlearnTask

PRESETS = ("rmu", "rmu_kl", "rmu_ce")
UNTOUCHED = tiny("llama")
CLOSE = 1e-9
"""Relative, in float64: the order of sums leaves 1e-13 or so, any mistake much more."""
ONE_TOKEN = [EncodedRow((5,), (9,)), EncodedRow((7, 3, 8), (4,)), EncodedRow((6,), (2, 11, 3))]
"""Prompts and answers of a single token."""
DATA = UnlearnRows(ONE_TOKEN + ragged_rows(4, seed=1), [], ragged_rows(3, seed=2) + ONE_TOKEN[:2] + ragged_rows(4, 4))
"""Ragged; in batches of them the longest answer of the retain rows is not that of the forget rows."""


def config_of(objective: str = "rmu", rows: int = 7, micro: int | None = None, **options: Any) -> UnlearnConfig:
    loss = {"steering": 6.5, "rmu_block": 3, **options.pop("loss", {})}
    return UnlearnConfig(
        objective=objective,
        method=MethodConfig(**{"blocks": [1, 3], **options.pop("method", {})}),
        loss=LossConfig(**loss),
        train=TrainConfig(epochs=2, batch_size=rows, micro_batch_size=micro),
        cache=CacheConfig(dir=None),
        **{"seed": 3, **options},
    )


def task_of(config: UnlearnConfig, kind: Any = Grun, family: str = "llama") -> UnlearnTask:
    """A task with the plain engine; equal settings give equal edits."""
    quirks = quirks_in_force(config)
    base = tiny(family)
    torch.manual_seed(5)
    parametrization = kind(config.method)
    parametrization.prepare(base, None)
    objective = build_objective(config.objective, config.loss, gated=kind is Grun, quirks=quirks)
    return UnlearnTask(parametrization, objective, DATA, config, pad_id=0, device=base.device, depth=DEPTH)


def cached_task_of(config: UnlearnConfig, family: str = "llama") -> UnlearnTask:
    task = task_of(config, family=family)
    assert use_cached(task, config) is not None and task.engine.name == "cached"
    return task


def states_by_hand(row: EncodedRow, block: int, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Output of a block for a row alone, under `weights` of edits or untouched: [tokens, width]."""
    seen: list[Tensor] = []
    with torch.no_grad(), plain_hooks(UNTOUCHED, "llama", weights or {}, [[len(row.prompt_ids) - 1]]):
        watch = blocks_of(UNTOUCHED, "llama")[block].register_forward_hook(lambda _, __, output: seen.append(output))
        UNTOUCHED(input_ids=torch.tensor([row.prompt_ids + row.answer_ids]), use_cache=False)
        watch.remove()
    return seen[0][0]


def control(steering: float, seed: int = 42) -> Tensor:
    drawn = torch.rand(WIDTH, generator=torch.Generator().manual_seed(seed))
    return (steering * drawn / drawn.norm()).double()


def mean_over_states(rows: Sequence[EncodedRow], distances: Callable[[EncodedRow], Tensor], first: int = -1) -> float:
    """Mean over the tokens of all rows from the last prompt token on (`first` = 0: from the answer on)."""
    kept = [distances(row)[len(row.prompt_ids) + first :] for row in rows]  # each [tokens]
    return float(torch.cat(kept).mean())


def parts_of(task: UnlearnTask) -> tuple[dict[str, float], dict[str, list[EncodedRow]]]:
    """Terms of the first step, and the rows it reads."""
    (batch,) = task.data(0).micro_batches
    return whole_step(task).parts, {name: list(part.encoded) for name, part in batch.items()}


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize(("quirks", "first"), [([], -1), (["rmu_answer_states"], 0)], ids=["published", "quirk"])
def test_both_terms_are_what_the_hidden_states_of_rows_alone_give(block: int, quirks: list[str], first: int) -> None:
    """The mean is over the edited token and the answer; under the quirk over the answer alone."""
    task = task_of(config_of(loss={"rmu_block": block}, quirks=quirks))
    weights = {name: value.detach().clone() for name, value in task.module.state_dict().items()}
    parts, rows = parts_of(task)

    def to_control(row: EncodedRow) -> Tensor:
        return (states_by_hand(row, block, weights) - control(6.5)).pow(2).mean(dim=1)

    def to_untouched(row: EncodedRow) -> Tensor:
        return (states_by_hand(row, block, weights) - states_by_hand(row, block)).pow(2).mean(dim=1)

    assert parts["forget"] == pytest.approx(mean_over_states(rows["answer"], to_control, first), rel=CLOSE)
    assert parts["retain"] == pytest.approx(mean_over_states(rows["retain"], to_untouched, first), rel=CLOSE)


def test_an_edit_of_the_block_that_is_read_learns_from_the_edited_token_alone() -> None:
    """So under the quirk, which leaves that token out, nothing moves it."""
    for quirks, learns in (([], True), (["rmu_answer_states"], False)):
        step = whole_step(task_of(config_of(method={"blocks": [3]}, loss={"gate_weight": 0.0}, quirks=quirks)))
        assert bool(step.gradients["edits.3.edit.source.weight"].any()) is learns


def test_states_are_the_last_prompt_token_and_the_answer_in_every_layout() -> None:
    rows = DATA.retain
    wanted = sum(len(row.answer_ids) + 1 for row in rows)
    for side in ("right", "left"):
        batch = collate(rows, 0, side=side)
        assert number_of("state", batch) == wanted
        assert number_of("token", batch) == wanted - len(rows)
    config = config_of()
    for task in (task_of(config), cached_task_of(config)):
        output = task.engine.run({"retain": collate(rows, 0)})["retain"]
        assert output.states.sum(dim=1).tolist() == [len(row.answer_ids) + 1 for row in rows]
        assert output.input_ids[output.states].tolist() == [t for r in rows for t in (r.prompt_ids[-1], *r.answer_ids)]


def test_the_control_vector_is_that_of_the_seed_and_the_length() -> None:
    task = task_of(config_of(loss={"steering": 2.0, "control_seed": 7}))
    weights = {name: value.detach().clone() for name, value in task.module.state_dict().items()}
    parts, rows = parts_of(task)
    wanted = mean_over_states(
        rows["answer"], lambda row: (states_by_hand(row, 3, weights) - control(2.0, seed=7)).pow(2).mean(dim=1)
    )
    assert parts["forget"] == pytest.approx(wanted, rel=CLOSE)


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", PRESETS)
@pytest.mark.parametrize(
    ("family", "blocks", "read"),
    [("llama", [1, 3], 3), ("llama", [3], 3), ("llama", [0], 2), ("gpt2", [1, 2], 2), ("mistral", [1], 3)],
)
def test_the_cached_engine_gives_the_plain_ones_loss_and_gradients(
    objective: str, family: str, blocks: list[int], read: int
) -> None:
    """In every step of an epoch, with batches whose retain answers are longer or shorter than the forget answers."""
    config = config_of(objective, rows=3, method={"blocks": blocks}, loss={"rmu_block": read})
    plain, cached = task_of(config, family=family), cached_task_of(config, family)
    for step in range(plain.steps):
        assert_same(whole_step(cached, step), whole_step(plain, step))


@pytest.mark.parametrize("objective", PRESETS)
def test_micro_batches_do_not_change_the_cached_step(objective: str) -> None:
    """Nor the plain one: test_objectives.py."""
    whole = whole_step(cached_task_of(config_of(objective)))
    for size in (1, 3):
        assert_same(whole_step(cached_task_of(config_of(objective, micro=size))), whole)


@pytest.mark.parametrize("make", [task_of, cached_task_of], ids=["plain", "cached"])
def test_every_edit_up_to_the_block_that_is_read_learns_from_the_terms_alone(
    make: Callable[[UnlearnConfig], UnlearnTask],
) -> None:
    """Its gate too: without the gate term."""
    config = config_of(method={"blocks": [0, 1, 2]}, loss={"rmu_block": 2, "gate_weight": 0.0})
    gradients = whole_step(make(config)).gradients
    assert len(gradients) == 3 * 5 and all(float(gradient.norm()) > 0 for gradient in gradients.values())


@pytest.mark.parametrize(("objective", "runs"), [("rmu", False), ("rmu_ce", True), ("rmu_kl", True)])
def test_a_cached_step_runs_the_lm_head_only_where_a_term_reads_it(
    objective: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = cached_task_of(config_of(objective))
    calls: list[int] = []
    logits = PackedModel.logits

    def counted(self: PackedModel, states: Tensor) -> Tensor:
        calls.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(PackedModel, "logits", counted)
    head = task.parametrization.model.base.get_output_embeddings()
    head.register_forward_hook(lambda _, __, output: calls.append(len(output)))
    whole_step(task)
    assert bool(calls) is runs


# -- the untouched model ----------------------------------------------------------------------------------------------


def untouched_states(task: UnlearnTask) -> list[tuple[StepOutput, tuple[EncodedRow, ...]]]:
    found = []
    for step in range(task.steps):
        (batch,) = task.data(step).micro_batches
        found.append((task.engine.reference({"retain": batch["retain"]}, (2,))["retain"], batch["retain"].encoded))
    return found


@pytest.mark.parametrize("kind", ["grun", "grun, cached", "lora", "full"])
def test_retain_states_are_held_where_the_untouched_model_has_them_throughout_training(kind: str) -> None:
    config = config_of(rows=3, loss={"rmu_block": 2}, method={"blocks": [1, 2]})
    if kind == "grun, cached":
        task = cached_task_of(config)
    else:
        made: dict[str, Any] = {"grun": Grun, "lora": Lora, "full": Full}
        task = task_of(config, made[kind])
        base = task.parametrization.model if kind in ("lora", "full") else task.parametrization.model.base
        assert use_reference(task, base, "hidden", config, pad_id=0) is None  # kept otherwise than as numbers
    for _ in range(3):
        gradients = whole_step(task).gradients
        norm = sum(float(gradient.norm()) ** 2 for gradient in gradients.values()) ** 0.5
        with torch.no_grad():
            for name, parameter in task.module.named_parameters():
                if name in gradients:
                    parameter -= 0.1 * gradients[name] / norm
    assert whole_step(task).parts["retain"] > 0.01  # the model has moved
    for output, rows in untouched_states(task):
        assert not output.hidden(2).requires_grad
        start = [len(row.prompt_ids) - 1 for row in rows]
        wanted = torch.cat([states_by_hand(row, 2)[first:] for row, first in zip(rows, start, strict=True)])
        torch.testing.assert_close(output.hidden(2)[output.states], wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("kind", [Lora, Full])
def test_before_the_first_step_the_retain_states_are_the_untouched_ones(kind: Any) -> None:
    parts = whole_step(task_of(config_of(), kind)).parts
    assert parts["retain"] == 0.0 and parts["forget"] > 0.0


# -- published quirks -------------------------------------------------------------------------------------------------


def test_kl_row_sum_adds_up_every_column_and_divides_by_the_rows_alone() -> None:
    task = task_of(config_of("rmu_kl", quirks=["kl_row_sum"]))
    parts, rows = parts_of(task)
    batch = collate(rows["retain"], 0)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    model = task.parametrization.model
    with torch.no_grad():
        edited = model(**given, prompt_lengths=batch.prompt_lengths).logits.log_softmax(-1)
        untouched = UNTOUCHED(**given).logits.log_softmax(-1)
    total = float((untouched.exp() * (untouched - edited)).sum())  # over rows, columns (padding too) and vocabulary
    assert parts["retain"] == pytest.approx(total / len(rows["retain"]), rel=CLOSE)
    assert task.data(0).counts["retain"] == len(rows["retain"])
    assert parts["retain"] != pytest.approx(whole_step(task_of(config_of("rmu_kl"))).parts["retain"], rel=0.1)


def test_as_published_the_block_before_the_one_that_is_named_is_read() -> None:
    published, ours = config_of(compat="grun-paper"), config_of(loss={"rmu_block": 2}, quirks=["rmu_answer_states"])
    objective = build_objective("rmu", published.loss, gated=True, quirks=quirks_in_force(published))
    assert objective.hidden(DEPTH) == (2,)
    assert whole_step(task_of(published)).parts["forget"] == pytest.approx(
        whole_step(task_of(ours)).parts["forget"], rel=CLOSE
    )


def test_as_published_the_last_block_may_be_edited_though_nothing_but_its_gate_learns() -> None:
    config = config_of(compat="grun-paper")
    objective = build_objective("rmu", config.loss, gated=True, quirks=quirks_in_force(config))
    check_blocks(objective, config.method, DEPTH, later_edits=True)
    gradients = whole_step(task_of(config)).gradients
    assert {name for name, gradient in gradients.items() if name.startswith("edits.3.") and gradient.any()} == {
        "edits.3.gate.0.weight",
        "edits.3.gate.0.bias",
    }
    assert gradients["edits.1.edit.source.weight"].any()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "loss", "method", "message"),
    [
        ("rmu", {"rmu_block": 4}, {}, "loss.rmu_block: the objective reads the output of block 4, but the model has 4"),
        ("rmu_ce", {"rmu_block": 9}, {"parametrization": "lora"}, "loss.rmu_block: the objective reads the output of"),
        ("rmu", {"rmu_block": 2}, {}, "method.blocks=[1, 3]: the objective reads the output of block 2, so the edit"),
        ("rmu", {"rmu_block": 2}, {"blocks": [1, -1]}, "method.blocks=[1, -1]: the objective reads the output of"),
        ("rmu", {"rmu_block": 0}, {}, "method.blocks=[1, 3]: the objective reads the output of block 0, which no edit"),
        ("rmu_kl", {"rmu_block": 0}, {}, "method.blocks=[1, 3]: the objective reads the output of block 0, which no"),
    ],
)
def test_blocks_that_cannot_be_read_or_trained_are_refused(
    objective: str, loss: dict[str, int], method: dict[str, Any], message: str
) -> None:
    config = config_of(objective, loss=loss, method=method)
    made = build_objective(objective, config.loss, gated=True)
    with pytest.raises(ConfigError) as error:
        check_blocks(made, config.method, DEPTH, later_edits=False)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_blocks_that_another_term_or_parametrization_trains_are_let_pass() -> None:
    for objective, kind in (("rmu_ce", "grun"), ("rmu_kl", "reft"), ("rmu", "full"), ("rmu", "lora"), ("gd", "grun")):
        loss = LossConfig() if objective == "gd" else LossConfig(rmu_block=2, steering=6.5)
        made = build_objective(objective, loss, gated=True)
        check_blocks(made, MethodConfig(blocks=[1, 3], parametrization=kind), DEPTH, later_edits=False)


def test_as_published_block_0_would_be_the_embeddings() -> None:
    config = config_of(compat="grun-paper", loss={"rmu_block": 0})
    with pytest.raises(ConfigError, match="loss.rmu_block 0 must be 1 or more"):
        build_objective("rmu", config.loss, gated=True, quirks=quirks_in_force(config))


def test_the_loss_of_states_in_bfloat16_is_taken_in_float32() -> None:
    """The distance of a state of length 300 has steps of 8 in bfloat16."""
    from grun.objectives.rmu import steered

    states = torch.full((2, WIDTH), 37.25, dtype=torch.bfloat16)
    value = steered(states, control(300.0).bfloat16().float())
    assert value.dtype == torch.float32
    wanted = (states.double() - control(300.0).bfloat16().double()).pow(2).mean(dim=1)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0)  # float32
    assert not math.isclose(float(value[0]), float(value[0].bfloat16()), rel_tol=1e-6)
