"""Terms against closed forms written here by hand, presets, and the weights of the whole loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_tasks import BLOCKS, loss_of, make_task, step_loss
from tiny import ragged_rows
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from watched import CutOff, assert_equal, assert_same, logged, parameters, whole_step

from baselines.full import Full
from baselines.lora import Lora
from grun.cache.cached import CachedEngine
from grun.cache.engine import use_cached
from grun.cache.packed import PackedModel
from grun.cache.prefix import Freezer
from grun.commands.unlearn import check_rows
from grun.config.options import CacheConfig, LossConfig, TrainConfig, UnlearnConfig
from grun.data.corpus import Corpus
from grun.data.encoding import Batch, EncodedRow, collate
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.method.gated import Grun, Reft
from grun.objectives.objective import Objective, build_objective
from grun.objectives.terms import OBJECTIVES, TERMS
from grun.training.train import train
from grun.training.unlearning import UnlearnTask


def nll(model: Any, row: EncodedRow) -> Tensor:
    """Summed cross-entropy of a row's answer, from a pass over the row alone."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    start = len(row.prompt_ids)
    return cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")


def batch_rows(batch: Batch) -> list[EncodedRow]:
    """The rows that a batch was made of."""
    found = []
    for ids, mask, length in zip(batch.input_ids, batch.attention_mask, batch.prompt_lengths, strict=True):
        kept = ids[mask != 0].tolist()
        found.append(EncodedRow(tuple(kept[:length]), tuple(kept[length:])))
    return found


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
            beta = 0.1
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
            bce += [softplus(gates[block] * (-1 if opened else 1)).item() for block in BLOCKS]
        assert parts["gate"] == pytest.approx(sum(bce) / len(bce), rel=1e-9)


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
            assert "gate" not in task.objective.terms
        _, parts, _ = step_loss(task)
        assert set(parts) == {"forget", "retain"}
        assert set(task.data(0).counts) == {"forget", "retain"}


READ_EVERY_BLOCK = ("random_mapping", "random_matching")
"""Presets that read states which the cached engine does not have, and that the plain one runs for it."""


# -- every preset on a real model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        *((preset, kind) for preset in OBJECTIVES.names() for kind in (Grun, Full)),
        *((preset, Lora) for preset in ("max_entropy", "min_posterior", "random_mapping")),
    ],
)
def test_every_preset_takes_a_step_that_lowers_its_loss_whatever_may_change(preset: str, kind: Any) -> None:
    """A short step down the gradient, on one batch; kl starts at 0 exactly, the forget term moves it."""
    task = make_task(preset, kind=kind)
    first = whole_step(task)
    assert math.isfinite(first.loss) and first.gradients
    norm = sum(float(gradient.norm()) ** 2 for gradient in first.gradients.values()) ** 0.5
    assert norm > 0
    with torch.no_grad():
        for name, parameter in task.module.named_parameters():
            if name in first.gradients:
                parameter -= 1e-4 * first.gradients[name] / norm
    assert whole_step(task).loss < first.loss


@pytest.mark.parametrize("preset", OBJECTIVES.names())
def test_micro_batches_of_any_size_give_the_loss_and_gradients_of_the_whole_step(preset: str) -> None:
    """Ragged rows: token means of micro-batches differ in weight, and dpo's pairs must stay together."""
    whole, ones, threes = (
        whole_step(make_task(preset, train_config=TrainConfig(epochs=1, batch_size=8, micro_batch_size=size)))
        for size in (None, 1, 3)
    )
    assert_same(ones, whole)
    assert_same(threes, whole)


@pytest.mark.parametrize("preset", [name for name in OBJECTIVES.names() if name not in READ_EVERY_BLOCK])
def test_both_engines_give_one_loss_and_one_gradient(preset: str) -> None:
    task = make_task(preset)
    expected = whole_step(task)
    model = PackedModel(task.module.base)
    freezer = Freezer(model, min(BLOCKS), last_answer_token=bool(task.hidden))
    every = list(dict.fromkeys(row for name in task.objective.continuations for row in task.rows(name)))
    shards = freezer.shards(every, set(task.reference_rows))
    frozen = {row: shard.row(index) for shard in shards for index, row in enumerate(shard.rows)}
    task.engine = CachedEngine(task.module, model, frozen, reads_head=task.objective.reads_head)
    assert_same(whole_step(task), expected)


@pytest.mark.parametrize(
    ("preset", "quirk"),
    [
        ("npo_kl", "kl_all_positions"),
        ("undial", "undial_all_positions"),
        ("rmu_kl", "kl_row_sum"),
        ("max_entropy", "max_entropy_all_positions"),
        ("random_mapping", "random_mapping_all_positions"),
    ],
)
def test_a_quirk_that_reads_every_position_is_run_plain(
    preset: str, quirk: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(preset, quirks=[quirk])
    assert use_cached(task, UnlearnConfig(cache=CacheConfig(dir=None))) is None
    assert task.engine.name == "plain" and "the plain engine is used" in caplog.text
    side = "retain" if "kl" in preset else "forget"
    assert step_loss(task)[1][side] != pytest.approx(step_loss(make_task(preset))[1][side], rel=1e-3)


@pytest.mark.parametrize("preset", OBJECTIVES.names())
def test_each_weight_of_a_preset_scales_its_own_term(preset: str) -> None:
    total, parts, _ = step_loss(make_task(preset, gate_bias=3.0))
    for side in parts:
        changed, same, _ = step_loss(make_task(preset, loss_of(preset, **{f"{side}_weight": 5.0}), gate_bias=3.0))
        assert same == pytest.approx(parts, rel=1e-12)
        before = build_objective(preset, loss_of(preset), gated=True).weights[side]
        assert parts[side] != 0.0
        assert changed.item() - total.item() == pytest.approx((5.0 - before) * parts[side], rel=1e-6)


def test_the_gate_counts_each_prompt_once_also_where_it_runs_with_answer_and_refusal() -> None:
    task, one_pass = make_task("dpo"), make_task("npo")
    assert task.data(0).counts == {"forget": 4, "gate": 8, "retain": one_pass.data(0).counts["retain"]}
    assert step_loss(task)[1]["gate"] == pytest.approx(step_loss(one_pass)[1]["gate"], rel=1e-12)


def test_idk_concat_is_one_token_mean_and_idk_two() -> None:
    one, two = step_loss(make_task("idk_concat")), step_loss(make_task("idk"))
    counts = make_task("idk").data(0).counts
    assert counts["forget"] != counts["retain"]
    total = two[1]["forget"] * counts["forget"] + two[1]["retain"] * counts["retain"]
    assert one[1]["forget"] == pytest.approx(total / (counts["forget"] + counts["retain"]), rel=1e-12)


def test_refusals_are_asked_for_before_a_model_is_loaded() -> None:
    row = Row("Who?", "Me.")
    corpus = Corpus("jsonl", forget=[row], retain=[row])
    for preset in ("idk", "idk_concat", "dpo", "dpo_only", "dpo_kl"):
        with pytest.raises(ConfigError, match="there are no refusals, but the objective .*; name data.refusals$"):
            check_rows(corpus, UnlearnConfig(objective=preset))
    check_rows(corpus, UnlearnConfig(objective="npo"))


# -- the retain weight that adapts ------------------------------------------------------------------------------------

PDU = {"epsilon": 3.0, "eta": 0.7, "dual_warmup_epochs": 1.0}


def pdu_task(**train_options: Any) -> UnlearnTask:
    """8 forget rows, 4 a step: 2 steps an epoch, of which the first epoch warms up."""
    config = TrainConfig(**{"epochs": 3, "batch_size": 4, "lr": 0.01, "save_steps": 2, **train_options})
    return make_task("pdu", LossConfig(retain_weight=2.0, **PDU), train_config=config)


def train_pdu(folder: Path, stop_at: int | None = None, **train_options: Any) -> UnlearnTask:
    task = pdu_task(**train_options)
    config = TrainConfig(**{"epochs": 3, "batch_size": 4, "lr": 0.01, "save_steps": 2, **train_options})
    if stop_at is None:
        train(task, config, folder, seed=0)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(CutOff(task, stop_at), config, folder, seed=0)
    return task


def test_the_retain_weight_follows_the_whole_steps_retain_loss_once_a_step_after_the_warm_up(tmp_path: Path) -> None:
    """In one piece or in micro-batches of one row; the weight of each step is read off the logged loss."""
    for size in (None, 1):
        folder = tmp_path / str(size)
        task = train_pdu(folder, micro_batch_size=size)
        weight, used = 2.0, []
        for number, line in enumerate(logged(folder)):
            used.append((line["loss"] - line["forget"] - 10.0 * line["gate"]) / line["retain"])
            assert used[-1] == pytest.approx(weight, rel=1e-9)
            if number >= 2:  # behind the warm-up of one epoch
                weight = max(0.0, weight + 0.7 * (line["retain"] - 3.0))
        assert len(used) == 6 and used[2] == pytest.approx(2.0) and used[3] != pytest.approx(2.0)
        assert task.state() == {"retain_weight": pytest.approx(weight, rel=1e-12)}


def test_a_resumed_run_has_the_retain_weight_of_one_that_was_never_cut(tmp_path: Path) -> None:
    whole = train_pdu(tmp_path / "whole")
    train_pdu(tmp_path / "cut", stop_at=5)
    assert json.loads((tmp_path / "cut/checkpoints/checkpoint-4/task.json").read_text()) != {"retain_weight": 2.0}
    resumed = train_pdu(tmp_path / "cut")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert resumed.state() == whole.state() != {"retain_weight": 2.0}
    assert_equal(parameters(resumed.module), parameters(whole.module))


def test_other_objectives_have_no_state() -> None:
    task = make_task("npo")
    task.stepped({"forget": 1.0, "retain": 9.0, "gate": 0.1})
    assert task.state() == {}
    task.restore({})
    assert step_loss(task)[0].item() == step_loss(make_task("npo"))[0].item()


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


PRESETS = [
    ("ga", "ga", None, 1.0),
    ("gd", "ga", "ce", 1.0),
    ("kl", "ga", "kl", 1.0),
    ("idk", "idk", "ce", 1.0),
    ("idk_concat", "idk_concat", None, 1.0),
    ("dpo", "dpo", "ce", 1.0),
    ("altpo", "altpo", "ce", 1.0),
    ("dpo_only", "dpo", None, 1.0),
    ("dpo_kl", "dpo", "kl", 1.0),
    ("npo", "npo", "ce", 1.0),
    ("npo_only", "npo", None, 1.0),
    ("npo_kl", "npo", "kl", 1.0),
    ("simnpo", "simnpo", "ce", 0.1375),
    ("simnpo_only", "simnpo", None, 1.0),
    ("wga", "wga", "ce", 1.0),
    ("satimp", "satimp", "ce", 0.1),
    ("undial", "undial", None, 1.0),
    ("ceu", "ceu", None, 1.0),
    ("counterfactual", "counterfactual", None, 1.0),
    ("counterfactual_ce", "counterfactual", "ce", 1.0),
    ("pdu", "pdu", "ce", 1.0),
    ("manual_grad_diff", "ga_sum", "ce_sum", 1.0),
    ("manual_npo_grad_diff", "npo", "ce_sum", 0.1375),
    ("rmu", "rmu", "activation_mse", 1.0),
    ("rmu_kl", "rmu", "kl", 1.0),
    ("rmu_ce", "rmu", "ce", 1.0),
    ("max_entropy", "max_entropy", "ce", 1.0),
    ("min_posterior", "min_posterior", "ce", 1.0),
    ("random_mapping", "random_mapping", "ce", 1.0),
    ("random_matching", "random_mapping", "ce", 1.0),
]
"""Name, terms and forget weight; a retain term weighs 1."""


@pytest.mark.parametrize(("preset", "forget", "retain", "weight"), PRESETS)
def test_presets_are_what_they_say(preset: str, forget: str, retain: str | None, weight: float) -> None:
    made = build_objective(preset, loss_of(preset), gated=True)
    expected = {"forget": forget, "gate": "bce_row"} | ({"retain": retain} if retain else {})
    assert names(made) == expected
    assert made.weights == {"forget": weight, "gate": 10.0} | ({"retain": 1.0} if retain else {})


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


def test_passes_are_only_those_that_are_needed() -> None:
    assert build_objective("gd", LossConfig(), gated=True).continuations == ["answer", "retain"]
    assert build_objective("idk", LossConfig(), gated=True).continuations == ["refusal", "retain"]
    assert build_objective("ga", LossConfig(), gated=False).continuations == ["answer"]
    assert build_objective("idk_concat", LossConfig(), gated=False).continuations == ["refusal", "retain"]
    both = build_objective("dpo", LossConfig(), gated=True)
    assert (both.continuations, both.reference_continuations) == (
        ["answer", "refusal", "retain"],
        ["answer", "refusal"],
    )
    assert build_objective("npo_kl", LossConfig(), gated=False).reference_continuations == ["answer", "retain"]
    gate_alone = LossConfig(forget="none", retain="none")
    assert build_objective("gd", gate_alone, gated=True).continuations == ["answer", "retain"]


UNREAD = "has no effect: the terms in force"


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("gdd", {}, "unknown objective 'gdd': did you mean 'gd'? known: altpo, ce"),
        (
            "gd",
            {"forget": "nope"},
            "unknown term 'nope': known: activation_mse, altpo, bce_max, bce_max_last, bce_row, ",
        ),
        ("gd", {"forget": "ce"}, "loss.forget=ce is a retain term; known forget terms: ga, ga_sum, wga, satimp, "),
        ("gd", {"retain": "ga"}, "loss.retain=ga is a forget term; known retain terms: ce, ce_sum, kl, activation_mse"),
        ("gd", {"gate": "ce"}, "loss.gate=ce is a retain term; known gate terms: bce_row, bce_max, bce_max_last, none"),
        ("gd", {"retain_weight": -1.0}, "loss.retain_weight -1.0 must not be negative"),
        ("gd", {"gate_weight": float("nan")}, "loss.gate_weight nan must not be negative"),
        ("npo", {"beta": 0.0}, "loss.beta 0.0 must be greater than 0"),
        ("satimp", {"beta2": -1.0}, "loss.beta2 -1.0 must not be negative"),
        ("pdu", {}, "loss.epsilon must be set: the term pdu has no default for it (docs/objectives.md)"),
        ("rmu", {"steering": 6.5}, "loss.rmu_block must be set: the term rmu has no default for it"),
        ("rmu", {"rmu_block": 3}, "loss.steering must be set: the term rmu has no default for it"),
        ("rmu", {"rmu_block": -1, "steering": 6.5}, "loss.rmu_block -1 must not be negative"),
        ("pdu", {"epsilon": 0.3, "retain": "none"}, "loss.retain=none: the term pdu adapts the retain weight; name"),
        (
            "gd",
            {"beta": 0.1},
            f"loss.beta=0.1 {UNREAD} (ga, ce, bce_row) read forget_weight, retain_weight, gate_weight, ascent_cap, "
            "gate_warmup_steps; leave it out, or unset what a profile sets with loss.beta=null",
        ),
        (
            "gd",
            {"gate": "none", "gate_weight": 3.0},
            f"loss.gate_weight=3.0 {UNREAD} (ga, ce) read forget_weight, retain_weight, ascent_cap; leave it out, or "
            "unset what a profile sets with loss.gate_weight=10.0",
        ),
        ("npo", {"margin": 0.0}, f"loss.margin=0.0 {UNREAD} (npo, ce, bce_row) read"),
        ("npo_only", {"retain_weight": 1.0}, f"loss.retain_weight=1.0 {UNREAD} (npo, bce_row)"),
        ("gd", {"forget": "none", "forget_weight": 0.0}, f"loss.forget_weight=0.0 {UNREAD} (ce"),
        ("satimp", {"beta": 5.0}, f"loss.beta=5.0 {UNREAD} (satimp, ce, bce_row) read"),
    ],
)
def test_wrong_names_numbers_and_options_that_nothing_reads_are_refused_with_what_is_known(
    objective: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_objective(objective, LossConfig(**options), gated=True)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_settings_of_the_gate_may_stand_where_there_is_none() -> None:
    """Profiles set them for all parametrizations."""
    made = build_objective("gd", LossConfig(gate_weight=3.0, gate_warmup_steps=5), gated=False)
    assert set(made.weights) == {"forget", "retain"} and made.warmup(0) == 1.0
    with pytest.raises(ConfigError, match=r"\(ga, ce\) read forget_weight, retain_weight, ascent_cap; leave"):
        build_objective("gd", LossConfig(gate_weight=3.0, beta=1.0), gated=False)


def test_collated_rows_come_back_as_they_were() -> None:
    made = ragged_rows(5, seed=9)
    assert batch_rows(collate(made, 0)) == made  # the tests above rest on it
