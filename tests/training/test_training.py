"""The trainer: micro-batches, what a step sees, checkpoints, the log, and what happens when something goes wrong."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ragged_rows, tiny
from torch import Tensor
from torch.nn.functional import cross_entropy
from training_tasks import SHORT, Broken, finetune_task, unlearn_task
from watched import assert_equal, files_limited_to, logged, parameters, refuse_files_beyond, whole_step

from grun.config.checks import check_train
from grun.config.options import DataConfig, DemoConfig, TrainConfig
from grun.data.corpus import load_corpus
from grun.data.encoding import EncodedRow, collate
from grun.data.sampling import fixed_retain_index
from grun.errors import ConfigError, DataError, RunError
from grun.method.plain import run_plain
from grun.training import step_trainer
from grun.training.checkpoints import checkpoints_in
from grun.training.task import StepData, split
from grun.training.train import remove_checkpoints, train
from grun.training.unlearning import UnlearnTask, draw_refusals


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-6 is what the project promises; in float64 the order of sums leaves 1e-12 or so."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


# -- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gd", "npo", "finetune"])
def test_micro_batches_change_no_parameter_over_a_whole_training(kind: str, tmp_path: Path) -> None:
    """Six steps, those of 8 rows and the last ones of 5, through the real trainer with clipping and schedule."""
    found = {}
    for size in (None, 3):
        config = TrainConfig(
            epochs=3, batch_size=8, micro_batch_size=size, lr=0.01, weight_decay=0.1, save_steps=0, question_weight=0.3
        )
        task: Any = finetune_task(config) if kind == "finetune" else unlearn_task(config, kind)
        before = parameters(task.module)
        train(task, config, tmp_path / str(size), seed=0)
        found[size] = parameters(task.module)
        assert any(not torch.equal(before[name], found[size][name]) for name in before)
    assert_close(found[3], found[None])
    first, second = (logged(tmp_path / name) for name in ("None", "3"))
    assert len(first) == 6
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_finetune_loss_is_the_token_mean_of_answers_plus_a_share_of_that_of_questions() -> None:
    task = finetune_task(TrainConfig(epochs=1, batch_size=8, question_weight=0.25))
    data = task.data(0)
    (batch,) = data.micro_batches
    total, parts = task.loss(batch, data.counts, 0)
    answers, questions, lengths = 0.0, 0.0, [0, 0]
    inputs = batch["answer"]
    for ids, mask, start in zip(inputs.input_ids, inputs.attention_mask, inputs.prompt_lengths, strict=True):
        row = ids[mask != 0]
        with torch.no_grad():
            logits = task.module(row[None]).logits[0]
        losses = cross_entropy(logits[:-1], row[1:], reduction="none")  # of tokens 1, 2, ...
        questions += losses[: start - 1].sum().item()
        answers += losses[start - 1 :].sum().item()
        lengths = [lengths[0] + len(row) - int(start), lengths[1] + int(start) - 1]
    assert parts["answer"] == pytest.approx(answers / lengths[0], rel=1e-9)
    assert parts["question"] == pytest.approx(questions / lengths[1], rel=1e-9)
    assert total.item() == pytest.approx(answers / lengths[0] + 0.25 * questions / lengths[1], rel=1e-9)


def test_the_first_token_of_an_answer_counts_as_much_as_its_weight_says() -> None:
    tasks = [finetune_task(TrainConfig(epochs=1, batch_size=8, first_token_weight=weight)) for weight in (1.0, 3.0)]
    losses = []
    for task in tasks:
        data = task.data(0)
        losses.append(sum(float(task.loss(batch, data.counts, 0)[0].detach()) for batch in data.micro_batches))
    output = [run_plain(tasks[0].module, batch["answer"]) for batch in tasks[0].data(0).micro_batches]
    first = sum(float(one.token_logprobs[one.answer & (one.answer.cumsum(1) == 1)].sum()) for one in output)
    assert losses[1] - losses[0] == pytest.approx(-2 * first / tasks[0].data(0).counts["answer"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "legacy_adamw"])
def test_beta2_reaches_the_optimizer(optimizer: str, tmp_path: Path) -> None:
    """The decay of squared gradients shows in the second step: the first is the same for every decay."""
    found = {}
    for beta2 in (0.5, 0.999):
        task = finetune_task(TrainConfig(epochs=1, batch_size=4))
        config = TrainConfig(
            epochs=1, batch_size=4, lr=1e-3, schedule="constant", max_grad_norm=0.0, optimizer=optimizer, beta2=beta2
        )
        train(task, config, tmp_path / str(beta2), 0)
        found[beta2] = torch.cat([value.detach().flatten() for value in task.module.parameters()])
    assert task.steps > 1 and not torch.equal(found[0.5], found[0.999])
    with pytest.raises(ConfigError, match="train.beta2=1.0 must lie in"):
        check_train(TrainConfig(beta2=1.0))


def test_split_cuts_into_consecutive_pieces() -> None:
    assert split([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert split([1, 2, 3], None) == [[1, 2, 3]]
    assert split([1, 2, 3], 9) == [[1, 2, 3]]


# -- what a step sees -------------------------------------------------------------------------------------------------

SMALL_STEPS = TrainConfig(epochs=4, batch_size=4)
STEPS_PER_EPOCH = 4


def ids_of(data: StepData, name: str) -> list[tuple[int, ...]]:
    """Tokens of the rows of one continuation, without padding."""
    return [
        tuple(ids[mask != 0].tolist())
        for batch in data.micro_batches
        for ids, mask in zip(batch[name].input_ids, batch[name].attention_mask, strict=True)
    ]


def seen(task: UnlearnTask, name: str, epoch: int) -> list[tuple[int, ...]]:
    first = epoch * STEPS_PER_EPOCH
    return [row for step in range(first, first + STEPS_PER_EPOCH) for row in ids_of(task.data(step), name)]


def test_a_steps_data_depends_on_the_seed_and_the_step_alone() -> None:
    forwards, backwards = unlearn_task(SMALL_STEPS), unlearn_task(SMALL_STEPS)
    assert forwards.steps == 4 * STEPS_PER_EPOCH
    steps = range(forwards.steps)
    expected = {step: (ids_of(forwards.data(step), "answer"), ids_of(forwards.data(step), "retain")) for step in steps}
    torch.manual_seed(99)  # the global generator has no say
    for step in reversed(steps):
        data = backwards.data(step)
        assert (ids_of(data, "answer"), ids_of(data, "retain")) == expected[step]
    other = unlearn_task(SMALL_STEPS, seed=4)
    assert any(ids_of(other.data(step), "answer") != expected[step][0] for step in steps)


def test_an_epoch_sees_every_forget_row_once_and_as_many_retain_rows() -> None:
    task = unlearn_task(SMALL_STEPS)
    everything = sorted(row.prompt_ids + row.answer_ids for row in ragged_rows(13, seed=1))
    for epoch in range(4):
        assert sorted(seen(task, "answer", epoch)) == everything
        assert len(set(seen(task, "retain", epoch))) == 13
    assert seen(task, "answer", 0) != seen(task, "answer", 1)
    assert [task.data(step).epoch for step in (0, 3, 4)] == [0.25, 1.0, 1.25]


def test_retain_rows_are_drawn_fresh_each_epoch() -> None:
    task = unlearn_task(SMALL_STEPS)
    by_epoch = [set(seen(task, "retain", epoch)) for epoch in range(4)]
    assert len({frozenset(rows_seen) for rows_seen in by_epoch}) == 4
    assert len(set.union(*by_epoch)) > 20  # of 29; 13 if they were drawn once


def test_the_published_quirk_pairs_each_forget_row_with_one_retain_row() -> None:
    task = unlearn_task(SMALL_STEPS, fixed_pairing=True)
    forget, retain = ragged_rows(13, seed=1), ragged_rows(29, seed=3)
    expected = {
        row.prompt_ids + row.answer_ids: retain[fixed_retain_index(index, 29)] for index, row in enumerate(forget)
    }
    for epoch in range(3):
        pairs = zip(seen(task, "answer", epoch), seen(task, "retain", epoch), strict=True)
        for answer, kept in pairs:
            assert kept == expected[answer].prompt_ids + expected[answer].answer_ids


def test_a_forget_row_is_answered_by_its_own_refusal_in_every_epoch() -> None:
    task = unlearn_task(SMALL_STEPS, "idk")
    refused = {row.prompt_ids + row.answer_ids for row in ragged_rows(13, seed=2)}
    for epoch in range(2):
        assert set(seen(task, "refusal", epoch)) == refused


def test_refusals_are_drawn_once_for_a_run_and_none_twice_before_all_came() -> None:
    corpus = load_corpus(DataConfig(demo=DemoConfig(forget=2, retain=2, heldout=1, unknown=1, refused=1)))
    drawn = draw_refusals(corpus, seed=1)
    assert drawn == draw_refusals(corpus, seed=1) != draw_refusals(corpus, seed=2)
    assert len(drawn) == len(corpus.forget) == len(set(drawn))
    corpus.refusals = ["no", "never", "not known"]
    assert sorted(draw_refusals(corpus, seed=1)[:3]) == ["never", "no", "not known"]


# -- log and schedule -------------------------------------------------------------------------------------------------


def test_every_step_is_logged_with_each_term_alone(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL_STEPS, lr=0.02, save_steps=0)
    task = unlearn_task(config, "npo")
    expected = whole_step(task).parts
    task.module.zero_grad()
    result = train(task, config, tmp_path, seed=0)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert result.steps == 16 and result.resumed_from == 0
    assert result.seconds > 0 and result.peak_memory_bytes > 1e7
    assert set(lines[0]) == {"step", "epoch", "loss", "forget", "retain", "gate", "lr", "grad_norm"}
    for name in ("forget", "retain", "gate"):
        assert lines[0][name] == pytest.approx(expected[name], rel=1e-12)
    for line in lines:
        weighted = line["forget"] + line["retain"] + 10 * line["gate"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("linear", 0.0, [1 - step / 8 for step in range(8)]),
        ("linear", 2.0, [0, 1 / 2] + [1 - step / 6 for step in range(6)]),
        ("linear", 0.25, [0, 1 / 2] + [1 - step / 6 for step in range(6)]),
        ("constant", 0.0, [1.0] * 8),
        ("cosine", 0.0, [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]),
    ],
)
def test_learning_rate_follows_the_schedule(schedule: str, warmup: float, factors: list[float], tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, lr=0.02, schedule=schedule, warmup=warmup, save_steps=0)
    train(unlearn_task(config), config, tmp_path, seed=0)
    assert [line["lr"] for line in logged(tmp_path)] == pytest.approx([0.02 * factor for factor in factors], abs=1e-12)


def test_large_gradients_are_scaled_down_to_the_limit(tmp_path: Path) -> None:
    """One step of plain AdamW moves by lr whatever the scale, so the moments in the checkpoint are read."""
    config = TrainConfig(epochs=1, batch_size=13, lr=0.01, max_grad_norm=0.5, save_steps=1, keep_all_checkpoints=True)
    train(unlearn_task(config), config, tmp_path, seed=0)
    assert logged(tmp_path)[0]["grad_norm"] > 0.5  # logged as it was before
    state = torch.load(tmp_path / "checkpoints" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    first_moments = torch.cat([moments["exp_avg"].flatten() for moments in state.values()]) / 0.1
    assert first_moments.norm().item() == pytest.approx(0.5, rel=1e-4)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_checkpoints_hold_the_edit_and_nothing_of_the_frozen_base(tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, save_steps=5)
    task = unlearn_task(config)
    train(task, config, tmp_path, seed=0)
    newest = checkpoints_in(tmp_path / "checkpoints")[0]
    stored = load_file(newest / "trained.safetensors")
    assert stored.keys() == dict(task.module.named_parameters()).keys()
    assert {"edits.1.edit.rotation", "edits.3.edit.source.weight"} <= stored.keys()  # the free matrix, not R
    trained_bytes = sum(p.numel() * p.element_size() for p in task.module.parameters())
    base_bytes = sum(p.numel() * p.element_size() for p in task.parametrization.model.base.parameters())
    on_disk = {path.name: path.stat().st_size for path in newest.iterdir()}
    assert {"trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= on_disk.keys()
    assert on_disk["trained.safetensors"] < trained_bytes + 4096
    assert on_disk["optimizer.pt"] < 2 * trained_bytes + 16384
    assert base_bytes > 20 * trained_bytes
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    moments = sum(state["exp_avg"].numel() for state in optimizer["state"].values())
    assert moments == sum(parameter.numel() for parameter in task.module.parameters())


@pytest.mark.parametrize(
    ("options", "while_training", "afterwards"),
    [
        ({"save_steps": 2, "keep_checkpoints": 2}, [6, 8], []),
        ({"save_steps": 3, "keep_checkpoints": 1, "keep_all_checkpoints": True}, [3, 6, 8], [3, 6, 8]),
        ({"save_steps": 0}, [], []),
    ],
)
def test_the_newest_checkpoints_are_kept_while_training_and_none_afterwards_unless_all_are(
    options: dict[str, Any], while_training: list[int], afterwards: list[int], tmp_path: Path
) -> None:
    config = dataclasses.replace(SHORT, **options)
    train(unlearn_task(config), config, tmp_path, seed=0)
    assert checkpoints_of(tmp_path) == [f"checkpoint-{step}" for step in while_training]
    remove_checkpoints(tmp_path, config)
    assert checkpoints_of(tmp_path) == [f"checkpoint-{step}" for step in afterwards]
    assert (tmp_path / "checkpoints").exists() == bool(afterwards)


def test_a_run_whose_steps_are_all_done_only_loads_the_last_checkpoint(tmp_path: Path) -> None:
    """Cut off between the last step and saving the result."""
    config = dataclasses.replace(SHORT, save_steps=3)
    first = unlearn_task(config)
    train(first, config, tmp_path, seed=0)
    log = (tmp_path / "log.jsonl").read_bytes()
    again = unlearn_task(config)
    assert train(again, config, tmp_path, seed=0).resumed_from == 8
    for name, parameter in first.module.named_parameters():
        assert torch.equal(parameter, dict(again.module.named_parameters())[name])
    assert (tmp_path / "log.jsonl").read_bytes() == log


# -- what goes wrong --------------------------------------------------------------------------------------------------


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


@pytest.mark.parametrize("waits", [False, True], ids=["read at once", "read later"])
@pytest.mark.parametrize(
    ("spoil", "named", "save_steps"),
    [
        (lambda total: total * math.nan, "the loss is nan at step 5", 3),
        (lambda total: total + math.inf, "the loss is inf at step 5", 4),
        (InfiniteGradient.apply, "the gradient norm is (nan|inf) at step 5", 0),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state_kept(
    spoil: Any, named: str, save_steps: int, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if waits:  # as on a GPU: the steps after it are taken before anybody looks
        monkeypatch.setattr(step_trainer, "READ_AT_ONCE", set())
    config = dataclasses.replace(SHORT, save_steps=save_steps, micro_batch_size=3)
    with pytest.raises(RunError, match=named) as error:
        train(Broken(unlearn_task(config), 4, loss=spoil), config, tmp_path, seed=0)
    assert "\n" not in str(error.value)
    assert "checkpoints" in str(error.value)
    assert checkpoints_in(tmp_path / "checkpoints")[0].name == "checkpoint-4"
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]

    whole = unlearn_task(config)
    train(whole, config, tmp_path / "whole", seed=0)
    resumed = unlearn_task(config)
    assert train(resumed, config, tmp_path, seed=0).resumed_from == 4
    assert_equal(parameters(resumed.module), parameters(whole.module))
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_out_of_memory_is_one_line_that_says_what_takes_less(error: Exception, tmp_path: Path) -> None:
    def refuse() -> None:
        raise error

    config = dataclasses.replace(SHORT, save_steps=2, micro_batch_size=3)
    with pytest.raises(RunError, match="^training ran out of memory; ") as raised:
        train(Broken(unlearn_task(config), 3, data=refuse), config, tmp_path, 0, smaller=["a smaller thing"])
    message = str(raised.value)
    assert "\n" not in message and "train.micro_batch_size=1 (it is 3 now)" in message
    assert "train.gradient_checkpointing=true" in message and "a smaller thing" in message
    assert checkpoints_of(tmp_path) == ["checkpoint-2"]


def test_out_of_memory_advises_nothing_that_is_done_already(tmp_path: Path) -> None:
    def refuse() -> None:
        raise MemoryError

    config = dataclasses.replace(SHORT, save_steps=0, micro_batch_size=1, gradient_checkpointing=True)
    with pytest.raises(RunError) as raised:
        train(Broken(unlearn_task(config), 0, data=refuse), config, tmp_path, 0)
    assert "micro_batch_size" not in str(raised.value) and "gradient_checkpointing" not in str(raised.value)


def test_another_runtime_error_stays_what_it_is(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        train(Broken(unlearn_task(SHORT), 0, data=refuse), SHORT, tmp_path, 0)


@pytest.mark.parametrize(
    ("size", "named"),
    [(4000, "File too large"), (9000, "inline_container")],  # the edit takes 6 KB, its optimizer state 15 KB
    ids=["safetensors", "torch.save"],
)
def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_one_before_stays_whole(
    size: int, named: str, tmp_path: Path
) -> None:
    """Real failing writes: safetensors raises its own error, torch.save a RuntimeError."""
    config = dataclasses.replace(SHORT, save_steps=4)
    task = Broken(unlearn_task(config, dropout=0.1), 5, data=lambda: refuse_files_beyond(size))
    with (
        pytest.raises(RunError, match=r"^writing to .*checkpoints failed \(.*\); free space") as error,
        files_limited_to(-1),
    ):
        train(task, config, tmp_path, seed=0)
    assert "\n" not in str(error.value) and named in str(error.value)
    assert checkpoints_of(tmp_path) == ["checkpoint-4"]
    whole, resumed = unlearn_task(config, dropout=0.1), unlearn_task(config, dropout=0.1)
    train(whole, config, tmp_path / "whole", seed=0)
    assert train(resumed, config, tmp_path, seed=0).resumed_from == 4
    assert_equal(parameters(resumed.module), parameters(whole.module))


def test_a_full_disk_at_the_log_is_one_line(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL_STEPS, save_steps=0)
    with pytest.raises(RunError, match="writing to .* failed .File too large"), files_limited_to(500):
        train(unlearn_task(config), config, tmp_path, seed=0)
    assert 1 <= len([line for line in (tmp_path / "log.jsonl").read_text().splitlines() if line.endswith("}")]) <= 4


def test_rows_without_a_token_before_the_answer_are_refused() -> None:
    with pytest.raises(DataError, match="no token before it"):
        run_plain(tiny("llama"), collate([EncodedRow((), (3, 4))], 0))
