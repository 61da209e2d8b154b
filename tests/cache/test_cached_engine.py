"""The cached engine gives the plain engine's losses, gradients and adapters from what varies alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from engine_steps import (
    DATA,
    ONE_STEP,
    PaddedLeft,
    cached,
    config_of,
    difference,
    edited,
    frozen_rows,
    objective_of,
    rows,
    step_of,
    task_of,
    unlearn_rows,
)
from safetensors.torch import load_file
from tiny import DEPTH, PACKABLE, RULES, WINDOW, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from watched import CutOff, assert_same, saved_bytes, whole_step

from baselines.full import Full
from grun.cache import gate_pretraining, prefix, shard
from grun.cache.attention import Pack
from grun.cache.cached import CachedEngine
from grun.cache.engine import use_cached
from grun.cache.gate_pretraining import pretrain_gates
from grun.cache.packed import PackedModel
from grun.cache.store import Completed
from grun.config.options import LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.errors import ConfigError, ModelError
from grun.loading.checks import check
from grun.method.gate import set_bias
from grun.method.gating import GaussianNoise, WindowsGate
from grun.method.plain import PlainEngine, capture
from grun.objectives.objective import Objective
from grun.objectives.terms import Options, Outputs, Term, TermValue
from grun.training.recomputation import recompute_blocks
from grun.training.train import train
from grun.training.unlearning import UnlearnRows, UnlearnTask
from pyvene_custom import find_blocks

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
OBJECTIVES = ["ga", "gd", "idk", "npo"]
CLOSE = 1e-9
"""Relative, in float64: the order of sums leaves 1e-13 or so, any mistake much more."""


# -- losses and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "close"),
    [*((family, F64, CLOSE) for family in PACKABLE), *((family, F32, 1e-5) for family in ("llama", "gemma2", "gpt2"))],
    ids=str,
)
def test_losses_and_gradients_are_the_plain_ones_whichever_side_is_padded(
    family: str, dtype: torch.dtype, close: float
) -> None:
    """In float32 to its rounding: 1e-5 is some hundred roundings of 6e-8 each."""
    for objective in OBJECTIVES:
        task = task_of(objective, tiny(family, dtype=dtype))
        found = step_of(task, cached(task))
        assert set(found.parts) == set(objective_of(objective).terms)
        for engine in (None, PaddedLeft(edited(task))):
            assert difference(found, step_of(task, engine)) < close, (objective, engine)


def test_the_last_block_alone_is_edited_from_one_token_of_each_row() -> None:
    """What the other answer tokens predict cannot change, and is in the cache."""
    for objective in OBJECTIVES:
        task = task_of(objective, blocks=[DEPTH - 1])
        engine = cached(task)
        assert {len(row.states) for row in frozen_rows(task, PackedModel(edited(task).base)).values()} == {1}
        assert difference(step_of(task, engine), step_of(task)) < CLOSE


@pytest.mark.parametrize("draw", range(25))
def test_any_edits_on_any_rows_in_any_micro_batches(draw: int) -> None:
    """Edits of the first and of the last block, side by side or apart."""
    drawn = random.Random(draw)
    first = {0: 0, 1: DEPTH - 1}.get(draw % 5, drawn.randrange(DEPTH))
    blocks = sorted({first, *drawn.sample(range(first, DEPTH), drawn.randint(1, DEPTH - first))})

    def lengths(count: int) -> list[tuple[int, int]]:
        return [
            (drawn.choice([1, drawn.randint(1, 20)]), drawn.choice([1, drawn.randint(1, 14)])) for _ in range(count)
        ]

    forget, retain = rows(lengths(drawn.randint(1, 7)), seed=draw), rows(lengths(drawn.randint(1, 9)), seed=draw + 100)
    data = unlearn_rows(forget, [drawn.randint(1, 9) for _ in forget], retain)
    task = task_of(
        drawn.choice(OBJECTIVES),
        drawn.choice(PACKABLE),
        dataclasses.replace(ONE_STEP, micro_batch_size=drawn.choice([None, 1, 2, 3])),
        data=data,
        blocks=blocks,
        rank=drawn.randint(1, 6),
        gate=drawn.choice(["linear", "mlp_3", "none"]),
        activation=drawn.choice([None, "tanh"]),
    )
    assert difference(step_of(task, cached(task), step=1), step_of(task, step=1)) < CLOSE


@pytest.mark.parametrize("rule", RULES, ids="-".join)
@pytest.mark.parametrize(
    ("family", "blocks", "gate"), [("llama", [1, 3], "linear"), ("gpt2", [3], "mlp_3"), ("gemma2", [0, 2], "none")]
)
def test_edits_at_any_tokens_are_run_alike(family: str, blocks: list[int], gate: str, rule: tuple[str, ...]) -> None:
    read, accumulate, write = rule
    gated = gate != "none"
    for objective, of_gate in (("npo", "bce_row"), ("kl", "bce_max"), ("idk", "bce_max")):
        loss = LossConfig(gate=of_gate) if gated else LossConfig()
        positions = {"gate_read": read, "gate_accumulate": accumulate, "edit_write": write}
        task = task_of(objective_of(objective, loss, gated=gated), family, blocks=blocks, gate=gate, **positions)
        if (rule_in_force := edited(task).rule).read == "every_token":
            rule_in_force.reset = DATA.answers[2].prompt_ids[6:7]  # in the midst of a row
        assert difference(step_of(task, cached(task)), step_of(task)) < CLOSE


def in_turns() -> UnlearnRows:
    """`DATA` with a user's turn at the beginning of each prompt, and another one in its midst."""
    begins = DATA.answers[2].prompt_ids[6:7]

    def asked(row: EncodedRow) -> EncodedRow:
        half = len(row.prompt_ids) // 2
        return EncodedRow((*begins, *row.prompt_ids[:half], *begins, *row.prompt_ids[half:]), row.answer_ids)

    sides = (DATA.answers, DATA.refusals, DATA.retain)
    return UnlearnRows(*([asked(row) for row in side] for side in sides))


@pytest.mark.parametrize("write", ["sticky", "last_prompt"])
@pytest.mark.parametrize(
    ("pool", "gate"), [("maxmin", "linear"), ("windows", "linear"), ("mean", "noisy_mlp_3"), ("last", "mlp_3")]
)
def test_a_gate_for_all_edits_is_read_once_a_prompt_and_trained_alike(pool: str, gate: str, write: str) -> None:
    """It reads a block below the first edited one, and that one before it is edited."""
    for objective, family in (("gd", "llama"), ("npo", "gpt2"), ("idk", "gemma2")):
        options = {"gate_blocks": [0, 1], "gate_pool": pool, "gate": gate, "edit_write": write}
        task = task_of(objective, family, data=DATA if pool != "windows" else in_turns(), **options)
        edited(task).rule.reset = DATA.answers[2].prompt_ids[6:7]  # in the midst of a row
        if pool == "windows":
            pooled = edited(task).pooled
            assert pooled is not None and isinstance(pooled.gate, WindowsGate)
            pooled.gate.follow_up.load_state_dict(pooled.gate.window.state_dict())
            set_bias(pooled.gate.follow_up, 0.01)  # a little above that of the turn: the logit of many rows
            set_bias(pooled.gate.window, 0.0)
        engine = cached(task)
        assert difference(step_of(task, engine), step_of(task)) < CLOSE


@pytest.mark.parametrize("objective", ["gd", "npo", "idk"])
def test_with_a_gate_that_is_fixed_edits_alone_are_trained_alike(objective: str) -> None:
    made = objective_of(objective, LossConfig(retain="none"), gated=False)
    task = task_of(made, gate_blocks=[0], gate_pool="maxmin", edit_write="sticky", gate_fit="logistic")
    wanted = whole_step(task)
    task.engine = cached(task)
    assert not any("gate" in name for name in wanted.gradients)
    assert_same(whole_step(task), wanted)


def test_rows_longer_than_a_pass_and_caches_of_many_shards_are_no_reason_for_the_plain_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix, "tokens_per_pass", lambda _: WINDOW)
    monkeypatch.setattr(shard, "SHARD_BYTES", 1)
    task = task_of("npo")
    plain = task.engine
    use = use_cached(task, config_of())
    assert use is not None and use.built == len({*DATA.answers, *task.rows("retain")})
    assert difference(step_of(task), step_of(task, plain)) < CLOSE


def test_a_step_output_holds_the_last_prompt_token_and_the_answer() -> None:
    task = task_of()
    batch = task.data(0).micro_batches[0]["retain"]
    with torch.no_grad():
        plain, found = task.engine.run({"retain": batch})["retain"], cached(task).run({"retain": batch})["retain"]
    for number, row in enumerate(batch.encoded):
        answer, start = len(row.answer_ids), len(row.prompt_ids)
        assert found.input_ids[number, : answer + 1].tolist() == [row.prompt_ids[-1], *row.answer_ids]
        assert found.answer[number].nonzero().flatten().tolist() == list(range(1, answer + 1))
        assert found.attended[number].nonzero().flatten().tolist() == list(range(answer + 1))
        expected = plain.token_logprobs[number, start : start + answer]
        torch.testing.assert_close(found.token_logprobs[number, 1 : answer + 1], expected, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(found.answer_logprobs, plain.answer_logprobs, rtol=CLOSE, atol=CLOSE)
    assert torch.equal(found.answer_counts, plain.answer_counts)
    assert found.gate_logits is not None and plain.gate_logits is not None
    for block, logits in plain.gate_logits.items():
        torch.testing.assert_close(found.gate_logits[block], logits, rtol=CLOSE, atol=CLOSE)
    before = found.answer.roll(-1, dims=1)
    expected = plain.logits(plain.answer.roll(-1, dims=1))
    torch.testing.assert_close(found.logits(before), expected, rtol=CLOSE, atol=CLOSE)
    with pytest.raises(ModelError, match="no logits"):
        found.logits(found.attended)


# -- rounded weights --------------------------------------------------------------------------------------------------


def test_a_bfloat16_base_is_as_close_to_exact_arithmetic_as_its_plain_passes_are() -> None:
    """Both engines against the same weights in float64.

    Measured on these wildly random models: 0.09 to 0.45 plain, 0.01 to 0.40 cached, 0.08 to 0.12 between them, of which
    about three times is allowed.
    """
    for family in ("llama", "gemma3"):
        for objective in ("gd", "npo"):
            task = task_of(objective, tiny(family, dtype=BF16))
            plain, found = step_of(task), step_of(task, cached(task))
            exact = tiny(family, dtype=BF16)
            nn.Module.to(exact, F64)
            of_exact = task_of(objective, exact)
            with torch.no_grad():
                for parameter, value in zip(of_exact.module.parameters(), task.module.parameters(), strict=True):
                    parameter.copy_(value)
            wanted = step_of(of_exact)
            assert difference(found, wanted) < 1.2 * difference(plain, wanted)
            assert difference(found, plain) < 0.35


def test_an_int8_base_gives_what_its_plain_passes_give_within_their_rounding(tmp_path: Path) -> None:
    """Activations are rounded to 8 bits too: measured 0.05, of which about three times is allowed."""
    pytest.importorskip("bitsandbytes")
    tiny("llama", dtype=F32).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    for objective in ("gd", "npo"):
        task = task_of(objective, base)
        assert 0 < difference(step_of(task, cached(task)), step_of(task)) < 0.15
        edited(task).unwrap()


# -- whole trainings --------------------------------------------------------------------------------------------------

MANY = unlearn_rows(
    rows([(1 + n % 11, 1 + 5 * n % 9) for n in range(13)], seed=6),
    [1 + n % 6 for n in range(13)],
    rows([(2 + 3 * n % 10, 1 + n % 8) for n in range(29)], seed=7),
)
LONG = TrainConfig(epochs=25, batch_size=8, lr=2e-3, save_steps=0)
"""50 steps, of 8 rows and of the last 5."""


def with_cache(task: UnlearnTask, folder: Path | None = None) -> Completed:
    """Put `task` on the cached engine as a run does."""
    use = use_cached(task, config_of(folder=folder))
    assert use is not None and isinstance(task.engine, CachedEngine)
    return use


@pytest.mark.parametrize("objective", ["gd", "npo"])
def test_fifty_steps_end_in_the_same_adapter(objective: str, tmp_path: Path) -> None:
    """The cached run alone accumulates over micro-batches. 1e-7: AdamW amplifies a difference of 1e-14 in each step."""
    plain = task_of(objective, train_config=LONG, data=MANY)
    found = task_of(objective, train_config=dataclasses.replace(LONG, micro_batch_size=3), data=MANY)
    with_cache(found)
    before = {name: value.clone() for name, value in plain.module.state_dict().items()}
    train(plain, LONG, tmp_path / "plain", seed=0)
    assert train(found, LONG, tmp_path / "cached", seed=0).steps == 50
    for name, value in plain.module.state_dict().items():
        assert not torch.allclose(value, before[name])
        assert float((found.module.state_dict()[name] - value).norm() / value.norm()) < 1e-7, name


@pytest.mark.parametrize("kept", [True, False], ids=["found", "new"])
def test_a_resumed_run_ends_bit_identical_with_the_cache_it_finds_and_with_a_new_one(
    kept: bool, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=5, batch_size=8, lr=0.01, save_steps=4, micro_batch_size=3)

    def make(cache: Path) -> tuple[UnlearnTask, Completed]:
        task = task_of("npo", train_config=config, data=MANY, dropout=0.2)
        return task, with_cache(task, cache)

    whole, use = make(tmp_path / "cache")
    assert use.found == 0
    train(whole, config, tmp_path / "whole", seed=0)
    with pytest.raises(KeyboardInterrupt):
        train(CutOff(make(tmp_path / "cache")[0], at=6), config, tmp_path / "run", seed=0)
    resumed, use = make(tmp_path / ("cache" if kept else "other"))
    assert (use.built == 0) == kept
    assert train(resumed, config, tmp_path / "run", seed=0).resumed_from == 4
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


# -- dropout ----------------------------------------------------------------------------------------------------------


ANY_RULE = [("last_prompt", "none", "last_prompt"), *RULES]


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3},
        {"dropout": 0.3, "quirk": True},
        *(
            dict(zip(("gate_read", "gate_accumulate", "edit_write"), rule, strict=True), gate="noisy_mlp_3")
            for rule in ANY_RULE
        ),
    ],
    ids=["dropout of the change", "dropout of the state", *(f"noise {'-'.join(rule)}" for rule in ANY_RULE)],
)
def test_what_is_drawn_is_the_same_in_both_engines_and_in_any_micro_batches(options: dict[str, Any]) -> None:
    found, without = [], []
    for size in (None, 3):
        config = dataclasses.replace(ONE_STEP, micro_batch_size=size)
        task = task_of("npo", train_config=config, **options)
        found += [step_of(task), step_of(task, cached(task))]
        quiet = task_of("npo", train_config=config, **{**options, "dropout": 0.0, "quirk": False})
        for module in quiet.module.modules():
            if isinstance(module, GaussianNoise):
                module.deviation = 0.0
        without.append(step_of(quiet))
    assert difference(without[0], found[0]) > 0.01
    for step in found[1:]:
        assert difference(step, found[0]) < CLOSE


def test_dropout_is_another_one_at_another_step_row_and_block() -> None:
    """The entries that one edit drops of one and the same state."""
    task = task_of(train_config=dataclasses.replace(ONE_STEP, batch_size=7), dropout=0.3)
    edits = edited(task).train().edit_at()
    state = torch.randn(1, 1, 32, dtype=F64, generator=torch.Generator().manual_seed(0))

    def dropped(seed: int, block: int) -> tuple[bool, ...]:
        with edited(task).drawing([seed]), torch.no_grad():
            output = edits[block](state).output
        return tuple((output == state).flatten().tolist())

    def seeds(step: int) -> dict[tuple[str, EncodedRow], int]:
        (batches,) = task.data(step).micro_batches
        return {
            (name, row): seed for name, b in batches.items() for row, seed in zip(b.encoded, b.seeds or (), strict=True)
        }

    first, again, second = seeds(0), seeds(0), seeds(1)
    assert first == again
    masks = [dropped(seed, block) for found in (first, second) for seed in found.values() for block in edits]
    assert 0.2 < sum(map(sum, masks)) / sum(map(len, masks)) < 0.4
    shared = [key for key in first if key in second and dropped(first[key], 1) == dropped(second[key], 1)]
    assert {key[0] for key in first} == {"answer", "retain"} and shared == []
    rows_of_one_step = [dropped(seed, 1) for seed in first.values()]
    assert len(set(rows_of_one_step)) == len(rows_of_one_step)
    assert [key for key, seed in first.items() if dropped(seed, 1) == dropped(seed, 3)] == []


# -- hidden states and what else a term may read ----------------------------------------------------------------------


def reading(*blocks: int) -> Objective:
    """Retain cross-entropy, and a forget term that reads hidden states of `blocks` where they are attended."""

    def total(outputs: Outputs, _: Options) -> TermValue:
        output = outputs.model["answer"]
        before = output.answer.roll(-1, dims=1)  # from the last prompt token on
        return TermValue(torch.stack([output.hidden(block)[before].pow(2).mean() for block in blocks]).sum(), 1)

    term = Term("forget", "row", ("answer",), total, hidden=lambda *_: blocks)
    made = objective_of("gd")
    return dataclasses.replace(made, terms={**made.terms, "forget": term})


@pytest.mark.parametrize(("blocks", "read"), [([1, 2], (1, 2, 3)), ([1], (3,)), ([3], (3,))])
def test_hidden_states_are_the_plain_ones_where_something_varies(blocks: list[int], read: tuple[int, ...]) -> None:
    for family in ("llama", "gpt2"):
        task = task_of(reading(*read), family, blocks=blocks)
        engine = cached(task)
        batch = task.data(0).micro_batches[0]
        with torch.no_grad():
            plain, found = task.engine.run(batch, read), engine.run(batch, read)
        for name in batch:
            for number, row in enumerate(batch[name].encoded):
                start, answer = len(row.prompt_ids) - 1, len(row.answer_ids)
                for block in read:
                    expected = plain[name].hidden(block)[number, start : start + answer + 1]
                    ours = found[name].hidden(block)[number, : answer + 1]
                    torch.testing.assert_close(ours, expected, rtol=CLOSE, atol=CLOSE)
        assert difference(step_of(task, engine), step_of(task)) < CLOSE


def test_hidden_states_that_no_term_named_are_not_there() -> None:
    task = task_of()
    output = cached(task).run(task.data(0).micro_batches[0], hidden=[2])["answer"]
    assert output.hidden(2).shape[-1] == 32
    with pytest.raises(KeyError):
        output.hidden(1)


# -- which engine is used ---------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("grun")]


def falls_back(task: UnlearnTask, caplog: pytest.LogCaptureFixture) -> str:
    """The one line that says why the plain engine stays."""
    before, caplog.handler.level = task.engine, logging.INFO
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert use_cached(task, config_of()) is None
    assert task.engine is before
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in task.module.parameters())
    (line,) = lines(caplog)
    assert line.startswith("the plain engine is used") and "\n" not in line
    return line


def test_what_cannot_be_packed_or_lies_below_the_first_edit_is_run_plain(caplog: pytest.LogCaptureFixture) -> None:
    falls_back(task_of(base="odd"), caplog)
    falls_back(task_of(reading(0, 2), blocks=[1, 3]), caplog)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Pack.attend

    def scaled(self: Pack, block: int, query: Tensor, *others: Any) -> Tensor:
        return attend(self, block, 1.1 * query, *others)

    monkeypatch.setattr(Pack, "attend", scaled)


def wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pack.__init__

    def from_zero(self: Pack, lengths: Any, before: Any, *others: Any, **more: Any) -> None:
        made(self, lengths, before, *others, **more)
        self.positions = self.positions - torch.tensor(before).repeat_interleave(torch.tensor(lengths))

    monkeypatch.setattr(Pack, "__init__", from_zero)


@pytest.mark.parametrize("spoil", [wrong_scale, wrong_positions])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_packed_passes_that_are_wrong_are_found_out(
    spoil: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = task_of(base=tiny("llama", dtype=dtype))
    spoil(monkeypatch)
    assert "differs by" in falls_back(task, caplog)


def test_all_weights_are_trained_plain_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny("llama")
    full = Full(MethodConfig())
    full.prepare(base, None)
    objective = objective_of("gd", gated=False)
    task = UnlearnTask(full, objective, DATA, config_of(), pad_id=0, device=base.device)
    with caplog.at_level(logging.INFO):
        assert use_cached(task, config_of()) is None
    assert isinstance(task.engine, PlainEngine) and lines(caplog) == []


# -- the untouched model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [[1, 3], [3]])
def test_reference_log_probabilities_come_from_the_cache(blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("npo", blocks=blocks)
    engine = cached(task)
    batch = {"answer": task.data(0).micro_batches[0]["answer"]}
    plain = task.engine.reference(batch)["answer"]
    passes: list[int] = []
    real = PackedModel.run

    def counted(self: PackedModel, *arguments: Any, **options: Any) -> Any:
        passes.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(PackedModel, "run", counted)
    found = engine.reference(batch)["answer"]
    assert passes == []
    torch.testing.assert_close(found.answer_logprobs, plain.answer_logprobs, rtol=CLOSE, atol=CLOSE)
    for number, row in enumerate(batch["answer"].encoded):
        start, answer = len(row.prompt_ids), len(row.answer_ids)
        expected = plain.token_logprobs[number, start : start + answer]
        torch.testing.assert_close(found.token_logprobs[number, 1 : answer + 1], expected, rtol=CLOSE, atol=CLOSE)
    first = torch.zeros_like(found.answer)
    first[:, 0] = True
    last_prompt = batch["answer"].prompt_lengths.unsqueeze(1) - 1 == torch.arange(plain.answer.shape[1])
    logits = found.logits(first)
    torch.testing.assert_close(logits, plain.logits(last_prompt), rtol=CLOSE, atol=CLOSE)
    assert passes == [1] and not logits.requires_grad
    found.logits(first)
    assert passes == [1]


def test_rows_that_were_frozen_without_a_reference_get_one(tmp_path: Path) -> None:
    first = task_of("gd")
    with_cache(first, tmp_path)
    task = task_of("npo")
    plain = task.engine
    assert with_cache(task, tmp_path).built == 0
    engine: Any = task.engine
    assert bool(engine._frozen[DATA.answers[0]].reference.isnan().all())
    batch = {"answer": task.data(0).micro_batches[0]["answer"]}
    expected, found = plain.reference(batch)["answer"], engine.reference(batch)["answer"]
    torch.testing.assert_close(found.answer_logprobs, expected.answer_logprobs, rtol=CLOSE, atol=CLOSE)
    assert difference(step_of(task), step_of(task, plain)) < CLOSE


# -- gates trained first ----------------------------------------------------------------------------------------------


def test_gates_trained_first_separate_forget_and_retain_prompts_and_no_edit_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven and nine points in 32 dimensions can be separated."""
    monkeypatch.setattr(gate_pretraining, "LEARNING_RATE", 0.02)
    task = task_of(blocks=[1, 3], gate="mlp_3")
    engine, model = cached(task), edited(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forget, retain = task.rows("answer"), task.rows("retain")
    early = pretrain_gates(engine, forget, retain, 1)
    late = pretrain_gates(engine, forget, retain, 150)
    assert early.keys() == late.keys() == {1, 3}
    assert all(late[block] < 0.3 * early[block] for block in late)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".gate." in name}
    assert all(parameter.grad is None for parameter in model.parameters())

    def gates(of: list[EncodedRow], block: int) -> Tensor:
        """Gate logits at the end of each prompt alone, run through the untouched model itself."""
        states = []
        with model.disabled() as base, torch.no_grad():
            for row in of:
                captured: dict[int, Tensor] = {}
                with capture(base, [block], captured):
                    base(torch.tensor([row.prompt_ids]))
                states.append(captured[block][0, -1])
            gate: Any = model.edit_at()[block].gate
            logits: Tensor = gate(torch.stack(states))
            return logits

    for block in late:
        assert float(gates(forget, block).min()) > float(gates(retain, block).max())  # AUC 1


def test_training_gates_first_needs_a_gate_and_the_cached_engine() -> None:
    check(UnlearnConfig(train=TrainConfig(gate_pretraining=5)))
    for changes in (
        {"train": TrainConfig(gate_pretraining=5, engine="plain")},
        {"train": TrainConfig(gate_pretraining=5), "method": MethodConfig(gate="none")},
        {"train": TrainConfig(gate_pretraining=5), "method": MethodConfig(parametrization="reft")},
    ):
        with pytest.raises(ConfigError, match="train.gate_pretraining needs a .*gate"):
            check(UnlearnConfig(**changes))


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def test_recomputing_blocks_keeps_less_and_changes_nothing() -> None:
    """Without it the gradients into constant inputs are left out, so linear layers run on other numbers of rows."""
    found, sizes = [], []
    for recomputed in (False, True):
        task = task_of(
            "npo", dropout=0.2, blocks=[0, 2], train_config=dataclasses.replace(ONE_STEP, batch_size=13), data=MANY
        )
        if recomputed:
            recompute_blocks(find_blocks(edited(task).base)[1])
        config = config_of(TrainConfig(gradient_checkpointing=recomputed))
        assert use_cached(task, config) is not None
        found.append(step_of(task))
        batch = task.data(0).micro_batches[0]
        sizes.append(saved_bytes(lambda task=task, batch=batch: task.engine.run(batch)))
    assert difference(found[1], found[0]) < 1e-12
    assert sizes[1] < 0.6 * sizes[0]


# -- the run ----------------------------------------------------------------------------------------------------------


def run_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_records_which_engine_it_took_and_what_it_found_frozen(taught: Path, tmp_path: Path) -> None:
    more = ["train.epochs=2", f"cache.dir={tmp_path / 'cache'}"]
    assert demo.unlearn(taught, tmp_path / "cached", *more) == 0
    assert demo.unlearn(taught, tmp_path / "plain", *more, "train.engine=plain") == 0
    assert demo.unlearn(taught, tmp_path / "npo", *more, "objective=npo") == 0
    assert demo.unlearn(taught, tmp_path / "idk", *more, "objective=idk", "cache.dir=null") == 0
    cache = run_of(tmp_path / "cached")["cache"]
    assert run_of(tmp_path / "cached")["engine"] == "cached"
    assert (cache["found"], cache["where"]) == (0, "memory")
    assert cache["built"] == cache["rows"] > 20 and cache["bytes"] > 0 and cache["seconds"] > 0
    assert (run_of(tmp_path / "plain")["engine"], run_of(tmp_path / "plain")["cache"]) == ("plain", None)
    again = run_of(tmp_path / "npo")["cache"]
    assert (again["built"], again["found"], again["rows"]) == (0, cache["rows"], cache["rows"])
    assert run_of(tmp_path / "idk")["cache"]["found"] == 0
    expected = adapter(tmp_path / "plain")
    for name, value in adapter(tmp_path / "cached").items():
        # Float32, six steps: 2e-7 was measured, and AdamW turns rounding of a small gradient into more.
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-5, name


def test_changed_weights_under_the_same_name_are_frozen_again(taught: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(taught, model)
    more = ["train.epochs=1", f"cache.dir={tmp_path / 'cache'}"]
    assert demo.unlearn(model, tmp_path / "first", *more) == 0
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    changed.save_pretrained(model)
    assert demo.unlearn(model, tmp_path / "second", *more) == 0
    first, second = (run_of(tmp_path / name)["cache"] for name in ("first", "second"))
    assert (second["found"], second["built"]) == (0, first["built"])
    assert demo.unlearn(model, tmp_path / "third", *more, "cache.dir=null") == 0
    for name, value in adapter(tmp_path / "third").items():
        assert torch.equal(adapter(tmp_path / "second")[name], value)
