"""Attacks with the weights in hand: relearning, taking the adapter off, rounding; and that nothing of them stays."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from attacked_models import ROWS, changed, everything_else, logits, state, with_lora
from tiny import bfloat16_kernels, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grun.config.options import DataConfig, EvaluateConfig, ModelConfig
from grun.data.corpus import load_corpus
from grun.data.encoding import IGNORED, collate, encode_rows
from grun.data.rows import Row
from grun.data.templates import TEMPLATES
from grun.errors import ConfigError
from grun.evaluation import relearning
from grun.evaluation.attacks import base, grid, weights
from grun.evaluation.attacks.base import Attack, Material
from grun.evaluation.attacks.parts import adapter_weights, own_weights, training
from grun.evaluation.attacks.weights import Relearn, part_of
from grun.evaluation.scoring import base_of, forward
from grun.loading.adapters import Loaded, load_model
from grun.loading.changed_tensors import save_changed
from grun.method.fingerprint import fingerprint
from grun.method.model import GrunModel

KINDS = ["full", "changed", "lora", "grun", "reft"]
NAMES = ("relearn_forget_10", "relearn_retain_10", "adapter_removed", "quantized_int8", "quantized_nf4")
ATTACKS = RELEARN_FORGET_10, RELEARN_RETAIN_10, ADAPTER_REMOVED, INT8, NF4 = [base.ATTACKS.get(name) for name in NAMES]
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""The 16 numbers of nf4 (arXiv 2305.14314, appendix E)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and an adapter of every kind for it."""
    place = demo.random_model(tmp_path_factory.mktemp("attacked"))
    (place / "adapter").rename(place / "grun")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    name = "model.layers.0.mlp.down_proj.weight"
    changed = {name: -base.get_parameter(name)}
    save_changed(place / "changed", changed, base_name=None, base_fingerprint=fingerprint(base))
    torch.manual_seed(1)
    GrunModel.wrap(base, blocks=[0, 1], rank=2, gate="none", template=TEMPLATES.get("tiny")).save_pretrained(
        place / "reft"
    )
    with_lora(AutoModelForCausalLM.from_pretrained(place / "model")).save_pretrained(place / "lora")
    return place


def load(folder: Path, kind: str, **options: Any) -> Loaded:
    adapter = None if kind == "full" else str(folder / kind)
    model = ModelConfig(path=str(folder / "model"), device="cpu", **options)
    return load_model(model, adapter, strict=False, gate_threshold=None)


def material(loaded: Loaded, forget: Sequence[Row] | None = None, retain: Sequence[Row] | None = None) -> Material:
    sets = load_corpus(DataConfig(demo=demo.SIZES)).sets()
    return Material(
        TEMPLATES.get("tiny"),
        loaded.tokenizer,
        others=sets["heldout"],
        forget=sets["forget"] if forget is None else forget,
        retain=sets["retain"] if retain is None else retain,
        seed=0,
    )


def config(folder: Path, kind: str = "full", **options: Any) -> EvaluateConfig:
    return demo.evaluation(folder, None if kind == "full" else kind, suite="attacks", max_new_tokens=6, **options)


@contextlib.contextmanager
def attacked(attack: Attack, loaded: Loaded, folder: Path, **options: Any) -> Iterator[Any]:
    with attack.models([attack], loaded, config(folder, **options), material(loaded)) as models:
        yield next(models)


@torch.no_grad()
def loss(loaded: Loaded, rows: Sequence[Row]) -> float:
    """Mean over the answer tokens, computed from the logits."""
    batch = collate(encode_rows(rows, loaded.tokenizer, TEMPLATES.get("tiny"), None, strict=False), 0)
    passed = forward(loaded.model, batch.input_ids, batch.attention_mask, batch.prompt_lengths)
    out = passed.logits.log_softmax(-1)
    columns = (batch.labels != IGNORED).nonzero().tolist()
    return -sum(float(out[row, at - 1, batch.labels[row, at]]) for row, at in columns) / len(columns)


# -- nothing stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_model_is_as_before_afterwards_even_where_the_attack_breaks_off(
    folder: Path, kind: str, attack: Attack
) -> None:
    if attack in (INT8, NF4):
        pytest.importorskip("bitsandbytes")
    loaded = load(folder, kind)
    if attack.unfit(loaded):
        assert attack is ADAPTER_REMOVED and kind in ("full", "changed")
        return
    before, also, said = state(loaded.model), everything_else(loaded.model), logits(loaded.model)
    with attacked(attack, loaded, folder) as model:
        assert not torch.equal(logits(model), said)
    assert not changed(before, loaded.model) and everything_else(loaded.model) == also
    with pytest.raises(RuntimeError, match="broken off"), attacked(attack, loaded, folder):
        raise RuntimeError("broken off")
    assert not changed(before, loaded.model) and everything_else(loaded.model) == also


def test_what_fails_while_it_learns_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(folder, "grun")
    loaded.model.gate_threshold = 0.5
    before, also, steps = state(loaded.model), everything_else(loaded.model), []
    step = torch.optim.AdamW.step

    def failing(optimizer: Any) -> None:
        step(optimizer)
        steps.append(1)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(torch.OutOfMemoryError), attacked(RELEARN_FORGET_10, loaded, folder):
        pass
    assert not changed(before, loaded.model) and everything_else(loaded.model) == also
    assert loaded.model.gate_threshold == 0.5


# -- relearning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", [RELEARN_FORGET_10, RELEARN_RETAIN_10], ids=lambda attack: attack.name)
def test_relearning_lowers_the_loss_of_the_rows_it_learns(folder: Path, kind: str, attack: Relearn) -> None:
    loaded = load(folder, kind)
    rows = attack.rows(material(loaded))
    before = loss(loaded, rows)
    with attacked(attack, loaded, folder):
        assert loss(loaded, rows) < before - 0.01  # edits lower it by 0.02 at least, all weights by 0.3
    assert loss(loaded, rows) == before


def test_what_trains_is_the_edits_of_grun_and_the_weights_of_everything_else(folder: Path) -> None:
    for kind in KINDS:
        loaded = load(folder, kind)
        before = state(loaded.model)
        with attacked(RELEARN_FORGET_10, loaded, folder):
            moved = changed(before, loaded.model)
        if kind in ("grun", "reft"):
            assert moved == set(loaded.model.state_dict())
        else:
            assert moved == {name for name in before if "lora_" not in name}


def test_an_eighth_of_the_forget_rows_is_learned_and_the_others_are_asked(folder: Path) -> None:
    loaded = load(folder, "full")
    rows = [Row(f"Question {number}?", f"Answer {number}.") for number in range(25)]
    given = material(loaded, forget=rows)
    assert RELEARN_FORGET_10.rows(given) == [rows[0], rows[8], rows[16]]
    asked = [row for row in rows if RELEARN_FORGET_10.asked(row, given)]
    assert asked == [row for number, row in enumerate(rows) if number not in (0, 8, 16)]
    (one,) = RELEARN_FORGET_10.asked(rows[1], given)
    assert (one.ids, one.row, one.given, one.samples) == (given.ask(rows[1]).ids, rows[1], 0, 0)


def test_where_there_is_one_forget_row_none_is_left_to_ask(folder: Path) -> None:
    loaded = load(folder, "full")
    row = Row("Who?", "She.")
    assert RELEARN_FORGET_10.asked(row, material(loaded, forget=[row])) == []


def test_on_retain_rows_alone_every_forget_row_is_asked(folder: Path) -> None:
    loaded = load(folder, "full")
    retain = [Row(f"Kept {number}?", "Yes.") for number in range(200)]
    given = material(loaded, retain=retain)
    learned = RELEARN_RETAIN_10.rows(given)
    assert len(learned) == 64 and set(row.prompt for row in learned) <= set(row.prompt for row in retain)
    assert all(len(RELEARN_RETAIN_10.asked(row, given)) == 1 for row in given.forget)
    assert RELEARN_RETAIN_10.asked(given.forget[0], material(loaded, retain=[])) == []


def test_the_same_seed_relearns_the_same_and_another_seed_in_another_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BATCH_ROWS", 2)
    found = []
    for seed in (1, 1, 2):
        loaded = load(folder, "full")
        with attacked(RELEARN_RETAIN_10, loaded, folder, seed=seed) as model:
            found.append(logits(model))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_the_longer_of_two_attacks_goes_on_where_the_shorter_stopped(folder: Path) -> None:
    both, alone = [Relearn("forget", 2), Relearn("forget", 5)], []
    for attack in both:
        loaded = load(folder, "grun")
        with attacked(attack, loaded, folder) as model:
            alone.append(logits(model))
    loaded = load(folder, "grun")
    with both[0].models(both, loaded, config(folder), material(loaded)) as models:
        found = [logits(model) for model in models]
    assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])
    assert not torch.equal(found[0], found[1])


def tuned(model: Any, weights: Sequence[nn.Parameter], micro_batch_size: int = 8) -> Tensor:
    """Logits after a few steps on the same rows."""
    options: dict[str, Any] = {"lr": 1e-3, "batch_size": 4, "pad_id": 0, "seed": "0"}
    training = relearning.fine_tune(model, weights, ROWS, micro_batch_size=micro_batch_size, **options)
    assert [next(training) for _ in range(5)] == [1, 2, 3, 4, 5]
    return logits(model)


def test_training_the_weights_beside_a_lora_is_training_the_merged_model() -> None:
    unmerged = with_lora(tiny()).get_base_model()
    merged = with_lora(tiny()).merge_and_unload()
    own = [weight for name, weight in unmerged.named_parameters() if "lora_" not in name]
    with training(unmerged, part_of(unmerged), 0) as (found, _):
        assert [id(weight) for weight in found] == [id(weight) for weight in own]
    # As of the next test; training A and B too, or another gradient, would show in the first decimal.
    assert torch.allclose(tuned(unmerged, own), tuned(merged, list(merged.parameters())), atol=1e-4)


@pytest.mark.parametrize("kind", ["published", "sticky", "pooled", "lora", "full"])
def test_losses_and_gradients_of_what_is_learned_are_those_of_the_models_own_pass(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    base = tiny()
    pooled: dict[str, Any] = {"gate": "linear", "gate_blocks": [0], "gate_pool": "maxmin"}
    rules: dict[str, Any] = {
        "published": {},
        "sticky": {"edit_write": "sticky"},
        "pooled": {"edit_write": "sticky", **pooled},
    }
    model: Any = base
    if kind in rules:
        model = GrunModel.wrap(base, blocks=[1, 2], rank=2, gate_bias=1.0, **rules[kind]).eval()
        model.gate_threshold = 1.0 if kind == "pooled" else None
    elif kind == "lora":
        model = with_lora(base).get_base_model().eval()
    own = adapter_weights(model) if kind in rules else own_weights(model)
    for weight in own:
        weight.requires_grad_(True)
    with caplog.at_level("INFO"):
        loss = relearning.loss_of(model, own, ROWS, 0)
    assert not caplog.messages  # which would say that the model's own pass is taken
    batch = collate(ROWS, 0)
    found = relearning._with_gradient(loss, batch, own)
    wanted = relearning._with_gradient(lambda some: relearning._own_loss(model, some), batch, own)
    for one, other in zip(found, wanted, strict=True):  # transformers computes its loss in float32
        assert 0 < float(other.norm()) and float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_the_size_of_a_pass_does_not_change_what_is_learned() -> None:
    found = []
    for size in (1, 3, 8):
        model = tiny()
        found.append(tuned(model, list(model.parameters()), size))
    # The loss itself is float32 in transformers; five steps change logits by up to 3.
    assert torch.allclose(found[0], found[2], atol=1e-4) and torch.allclose(found[1], found[2], atol=1e-4)
    assert not torch.allclose(found[0], logits(tiny()), atol=0.1)


def test_a_gate_threshold_that_shuts_every_gate_does_not_keep_the_edits_from_training() -> None:
    model = GrunModel.wrap(tiny(), blocks=[1, 2], rank=2).eval()
    model.gate_threshold = 1.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned(model, list(model.parameters()))
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.gate_threshold == 1.0


def test_weights_in_bfloat16_train_so_which_a_line_says_and_come_back_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(folder, "full", dtype="bfloat16")
    before = state(loaded.model)
    with attacked(RELEARN_FORGET_10, loaded, folder):
        assert changed(before, loaded.model) and next(loaded.model.parameters()).dtype == torch.bfloat16
    assert not changed(before, loaded.model)
    assert "relearn_forget_10 trains in bfloat16" in caplog.text and "model.dtype=float32" in caplog.text


@pytest.mark.parametrize(("quantization", "kernels"), [("8bit", False), ("4bit", False), ("4bit", True)])
def test_an_adapter_relearns_beside_a_quantized_base(
    folder: Path, quantization: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16_kernels(monkeypatch, kernels)
    loaded = load(folder, "grun", quantization=quantization)
    before = state(loaded.model)
    with attacked(RELEARN_FORGET_10, loaded, folder):
        assert changed(before, loaded.model) == set(loaded.model.state_dict())
    assert not changed(before, loaded.model)


# -- the adapter taken off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "grun", "reft"])
def test_without_its_adapter_the_model_answers_as_its_base(folder: Path, tmp_path: Path, kind: str) -> None:
    base = load(folder, "full").model
    loaded = load(folder, kind)
    with attacked(ADAPTER_REMOVED, loaded, folder) as model:
        assert torch.equal(logits(model), logits(base))
    removed = demo.evaluated(config(folder, kind, attacks=["adapter_removed"]), tmp_path / kind)
    plain = demo.evaluated(config(folder, attacks=["plain"]), tmp_path / "base")
    assert removed["attacks"]["adapter_removed"] == {**plain["attacks"]["plain"], "access": "weights"}


# -- rounded weights --------------------------------------------------------------------------------------------------


def nearest(weight: Tensor) -> Tensor:
    """nf4: each block of 64 by its largest absolute value, each number to the nearest level."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS)
    found = levels[(blocks / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale
    return found.reshape(weight.shape)


def by_rows(weight: Tensor) -> Tensor:
    """int8: each output, taken as float16, by its largest absolute value, which is 127."""
    weight = weight.half().float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("kind", ["full", "lora", "grun"])
@pytest.mark.parametrize(("attack", "by_hand"), [(INT8, by_rows), (NF4, nearest)], ids=["int8", "nf4"])
def test_the_linear_layers_of_the_blocks_are_rounded_and_nothing_else_is(
    folder: Path, kind: str, attack: Attack, by_hand: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = load(folder, kind)
    before = state(loaded.model)
    with attacked(attack, loaded, folder):
        assert changed(before, loaded.model) == {
            name for name in before if "_proj" in name and name.endswith("weight") and "lora_" not in name
        }
        for name in changed(before, loaded.model):
            off = (base_of(loaded.model).state_dict()[name] - by_hand(before[name])).abs()
            # float32; a number half-way between two levels, 1e-3 apart at least, may go to either, which is rare
            assert float((off > 1e-6).float().mean()) < 0.001


def test_rows_are_outputs_where_a_layer_holds_its_weight_transposed(folder: Path) -> None:
    """GPT-2's Conv1D."""
    pytest.importorskip("bitsandbytes")
    loaded = load(folder, "full")
    loaded.model = tiny("gpt2", dtype=torch.float32)
    name = "transformer.h.0.mlp.c_fc.weight"
    before = loaded.model.get_parameter(name).detach().clone()  # [inputs, outputs]
    with attacked(INT8, loaded, folder) as model:
        off = (model.get_parameter(name) - by_rows(before.mT).mT).abs()
        assert float((off > 1e-6).float().mean()) < 0.001  # as above


# -- who cannot be attacked so ----------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_told_why(folder: Path) -> None:
    full, grun = load(folder, "full"), load(folder, "grun")
    assert ADAPTER_REMOVED.unfit(full) == ADAPTER_REMOVED.unfit(load(folder, "changed"))
    assert ADAPTER_REMOVED.unfit(full) == "needs an adapter that can be taken off"
    assert "float16 is too narrow" in str(RELEARN_FORGET_10.unfit(load(folder, "full", dtype="float16")))
    for loaded in (full, grun):
        base_of(loaded.model).quantization_method = "bitsandbytes"
        assert INT8.unfit(loaded) == NF4.unfit(loaded) == "needs a base that is not quantized already"
    assert "those of a quantized base do not" in str(RELEARN_FORGET_10.unfit(full))
    assert RELEARN_FORGET_10.unfit(grun) is None  # its edits train beside such weights


def test_one_that_was_named_is_an_error_and_else_it_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "RATES", (1.0,))  # a ninth of the time
    monkeypatch.setattr(grid, "parts_of", lambda loaded: ["all"])
    named = config(folder, attacks=["plain", "adapter_removed"])
    with pytest.raises(ConfigError, match="adapter_removed needs an adapter that can be taken off; or leave it out"):
        demo.evaluated(named, tmp_path / "named")
    found = demo.evaluated(config(folder, attacks=["weights"], attack_queries=2), tmp_path / "kind")
    assert found["left_out"]["adapter_removed"] == "needs an adapter that can be taken off"
    assert {"relearn_forget_10", "relearn_forget_50", "relearn_retain_50"} <= set(found["attacks"])


def test_without_bitsandbytes_a_line_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes, .*: pip install 'grun-unlearning\[quantization\]'"
    ) as e:
        demo.evaluated(config(folder, attacks=["quantized_nf4"]), tmp_path / "out")
    assert "\n" not in str(e.value)
