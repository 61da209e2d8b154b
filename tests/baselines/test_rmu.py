"""RMU: the loss and its gradients written a second time, what changes and what does not, and what is never run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEPTH, WIDTH, blocks_of, ragged_rows, tiny
from torch import Tensor, nn
from watched import whole_step

from baselines.rmu.task import RmuTask, Topic, Truncated
from baselines.tensors import in_float32, named_tensors, numbered_tensors, write_back
from grun.config.options import TrainConfig
from grun.data.encoding import Batch, collate
from grun.errors import ConfigError
from grun.objectives.rmu import control_vector, steered
from grun.training.train import train

BLOCK = 2
"""Of the loss; one more block lies above it."""
CHANGED = [1, 2]


def batches(count: int, seed: int, side: str = "left") -> list[Batch]:
    return [collate(ragged_rows(3, seed + number), 0, side=side) for number in range(count)]


def topic(name: str, seed: int, *, alpha: float = 2.0, count: int = 4, number: int = 0) -> Topic:
    control = control_vector(WIDTH, 3.0, 42, number)
    return Topic(name, batches(count, seed), batches(count, seed + 50), alpha, control)


def made(
    base: Any, topics: Sequence[Topic] | None = None, *, names: Sequence[str] = ("mlp.down_proj",), **options: Any
) -> RmuTask:
    values = {"block": BLOCK, "steps": 4, **options}
    return RmuTask(base, named_tensors(base, CHANGED, names), topics or [topic("bio", 1)], **values)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def training(steps: int = 4, **options: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 0.01, "schedule": "constant", "max_grad_norm": 0.0, "save_steps": 0, **options})


def hidden_of(base: Any, family: str, block: int, batch: Batch) -> Tensor:
    """Output of a block in a whole pass, by a hook written here."""
    seen = []
    handle = blocks_of(base, family)[block].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    handle.remove()
    return seen[0]


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_control_vectors_are_draws_of_one_stream_with_the_length_asked_for() -> None:
    for size, coefficient, seed in ((16, 2.0, 7), (4096, 20.0, 42), (16, 0.0, 42)):
        generator = torch.Generator().manual_seed(seed)
        for number in range(3):
            drawn = torch.rand(size, generator=generator)
            vector = control_vector(size, coefficient, seed, number)
            assert vector.dtype == torch.float32
            torch.testing.assert_close(vector, coefficient * drawn / drawn.norm())


def test_steered_is_the_mean_square_distance_of_each_position() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.bfloat16)
    found = steered(hidden, torch.tensor([1.0, 0.0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[2.0, 10.0]]))


# -- the truncated forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "odd"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pass_that_stops_gives_activations_and_gradients_of_a_whole_one(family: str, side: str) -> None:
    base = tiny(family)
    batch = collate(ragged_rows(3, 5), 0, side=side)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for run in (lambda: Truncated(base, BLOCK)(batch), lambda: hidden_of(base, family, BLOCK, batch)):
        base.zero_grad()
        hidden = run()
        hidden.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), gradients))
    (stopped, of_stopped), (whole, of_whole) = found
    assert torch.equal(stopped, whole)  # the same operations in the same order
    assert of_stopped.keys() == of_whole.keys() and of_stopped
    for name, gradient in of_whole.items():
        assert torch.equal(of_stopped[name], gradient), name


def test_no_later_block_and_no_head_is_run_and_no_hook_stays() -> None:
    base = tiny("llama")
    ran: list[int] = []
    for number, block in enumerate(blocks_of(base, "llama")):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    base.lm_head.register_forward_hook(lambda *_: ran.append(99))
    truncated = Truncated(base, 1)
    truncated(batches(1, 0)[0])
    assert ran == [0, 1]
    assert not blocks_of(base, "llama")[1]._forward_hooks
    base(input_ids=torch.tensor([[1, 2]]))
    assert ran == [0, 1, 0, 1, 2, 3, 99]


# -- the task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["all", "attended", "attended_no_bos"])
def test_the_loss_is_the_published_formula_over_the_positions_that_count(mask: str) -> None:
    base = tiny("llama")
    subject = topic("bio", 1, alpha=2.0)
    task = made(base, [subject], loss_mask=mask)
    untouched = tiny("llama")
    with torch.no_grad():  # away from the start, where the retain loss is 0
        for parameter in task.module.parameters():
            parameter.add_(0.1)
    data = task.data(1)
    (micro_batch,) = data.micro_batches
    loss, parts = task.loss(micro_batch, data.counts, 1)

    def mean(batch: Batch, aims: Any) -> Tensor:
        values = []
        for row, ids in enumerate(batch.input_ids):
            attended = batch.attention_mask[row].nonzero().flatten().tolist()
            columns = {"all": range(len(ids)), "attended": attended, "attended_no_bos": attended[1:]}[mask]
            hidden = hidden_of(base, "llama", BLOCK, batch)[row]
            values += [(hidden[column] - aims(row, column)).square().mean() for column in columns]
        return torch.stack(values).mean()

    retain = subject.retain[1]
    frozen = hidden_of(untouched, "llama", BLOCK, retain).detach()
    forget_loss = mean(subject.forget[1], lambda row, column: subject.control)
    retain_loss = 2.0 * mean(retain, lambda row, column: frozen[row, column])
    assert retain_loss > 0
    assert parts == pytest.approx({"forget": forget_loss.item(), "retain": retain_loss.item()}, rel=1e-9)
    found = torch.autograd.grad(loss, list(task.module.parameters()))
    expected = torch.autograd.grad(forget_loss + retain_loss, list(task.module.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_forget_loss_falls_and_alpha_keeps_retain_activations_where_they_were(tmp_path: Path) -> None:
    forget, retain = batches(1, 1), batches(1, 51)
    drift = {}
    for alpha in (0.0, 100.0):
        subject = Topic("bio", forget * 12, retain * 12, alpha, control_vector(WIDTH, 0.0, 42))
        base = tiny("llama", dtype=torch.float32)
        with torch.no_grad():
            before = Truncated(base, BLOCK)(retain[0])
        train(made(base, [subject], steps=12), training(lr=0.03), tmp_path / str(alpha), seed=0)
        with torch.no_grad():
            drift[alpha] = (Truncated(base, BLOCK)(retain[0]) - before).norm().item()
        log = (tmp_path / str(alpha) / "log.jsonl").read_text().splitlines()
        losses = [json.loads(line)["forget"] for line in log]
        assert losses[-1] < 0.9 * losses[0]
    assert drift[100.0] < 0.7 * drift[0.0]


def counted_passes(base: Any) -> list[Tensor]:
    """Ids of every pass from now on."""
    seen: list[Tensor] = []
    base.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    return seen


def test_an_alpha_of_zero_runs_no_retain_pass_at_all(tmp_path: Path) -> None:
    subject = topic("bio", 1, alpha=0.0)
    base = tiny("llama", dtype=torch.float32)
    seen = counted_passes(base)
    train(made(base, [subject]), training(), tmp_path, seed=0)
    assert len(seen) == 4
    assert all(torch.equal(ids, batch.input_ids) for ids, batch in zip(seen, subject.forget, strict=True))
    assert all(json.loads(line)["retain"] == 0 for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_each_retain_batch_is_run_untouched_once_also_if_two_topics_share_it() -> None:
    shared = batches(4, 80)
    topics = [dataclasses.replace(topic(name, seed), retain=shared) for name, seed in (("bio", 1), ("cyber", 20))]
    base = tiny("llama")
    seen = counted_passes(base)
    task = made(base, topics, steps=4)  # two batches of each topic
    assert len(seen) == 2
    assert task.frozen_bytes == sum(batch.input_ids.numel() * WIDTH * 8 for batch in shared[:2])


def test_topics_take_turns_and_each_reads_its_batches_in_order() -> None:
    topics = [topic("bio", 1), topic("cyber", 20, number=1, alpha=5.0)]
    task = made(tiny("llama"), topics, steps=5)
    assert task.steps == 5
    for step in range(5):
        own, place = topics[step % 2], step // 2
        (micro_batch,) = task.data(step).micro_batches
        forget, retain = micro_batch["forget"], micro_batch["retain"]
        assert torch.equal(forget.input_ids, own.forget[place].input_ids)
        assert torch.equal(retain.input_ids, own.retain[place].input_ids)
        assert torch.equal(forget.target, own.control)  # type: ignore[attr-defined]
        assert retain.weight == own.alpha  # type: ignore[attr-defined]


def test_a_step_of_several_batches_has_the_mean_of_their_losses() -> None:
    subject = topic("bio", 1)
    single = made(tiny("llama"), [subject], steps=4)
    alone = [single.loss(data.micro_batches[0], data.counts, 0) for data in (single.data(2), single.data(3))]
    found = whole_step(made(tiny("llama"), [subject], steps=2, accumulation=2), 1)
    assert found.loss == pytest.approx(sum(loss.item() for loss, _ in alone) / 2, rel=1e-9)
    assert found.parts["forget"] == pytest.approx(sum(parts["forget"] for _, parts in alone) / 2, rel=1e-9)


def test_too_few_batches_an_unknown_mask_and_a_block_beyond_the_depth_are_errors() -> None:
    base = tiny("llama")
    with pytest.raises(ConfigError, match="bio: 4 forget batches, but 5 steps take 5"):
        made(base, steps=5)
    with pytest.raises(ConfigError, match="loss mask 'some' is unknown"):
        made(base, loss_mask="some")
    with pytest.raises(ConfigError, match=f"there is no block {DEPTH}; this model has {DEPTH}, 0 to {DEPTH - 1}"):
        made(base, block=DEPTH)
    with pytest.raises(ConfigError, match="nothing to train: the loss reads block 0"):
        made(base, block=0)


def test_the_log_of_a_step_has_losses_and_if_verbose_what_the_published_trace_has(tmp_path: Path) -> None:
    for verbose in (False, True):
        base = tiny("llama", dtype=torch.float32)
        train(made(base, verbose=verbose), training(), tmp_path / str(verbose), seed=0)
    plain, verbose_log = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("False", "True")
    )
    usual = {"step", "epoch", "loss", "forget", "retain", "lr", "grad_norm"}
    assert set(plain[0]) == usual
    of_activations = {f"{side}_{name}" for side in ("forget", "retain") for name in ("cosine", "norm", "frozen_norm")}
    assert set(verbose_log[0]) == usual | of_activations | {"gradient"}
    assert [line["loss"] for line in plain] == [line["loss"] for line in verbose_log]
    first, last = verbose_log[0], verbose_log[-1]
    assert first["retain"] == 0 and last["retain"] > 0
    assert first["loss"] == pytest.approx(first["forget"] + first["retain"])
    # At the start the model is the untouched one; float32.
    assert first["forget_cosine"] == pytest.approx(1, abs=1e-6) and first["forget_norm"] == first["forget_frozen_norm"]
    assert last["forget_cosine"] < 0.9999 and last["gradient"] > 0


def test_norms_and_cosines_are_means_over_tokens_and_the_gradient_is_that_of_the_first_tensor() -> None:
    base, untouched = tiny("llama"), tiny("llama")
    subject = topic("bio", 1)
    task = made(base, [subject], verbose=True)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.mul_(1.5)
    step = task.data(0)
    loss, parts = task.loss(step.micro_batches[0], step.counts, 0)
    batch = subject.forget[0]
    attended = batch.attention_mask != 0
    with torch.no_grad():
        updated = hidden_of(base, "llama", BLOCK, batch)[attended]
        frozen = hidden_of(untouched, "llama", BLOCK, batch)[attended]
    assert parts["forget_norm"] == pytest.approx(updated.norm(dim=1).mean().item())
    assert parts["forget_frozen_norm"] == pytest.approx(frozen.norm(dim=1).mean().item())
    cosine = (updated * frozen).sum(1) / updated.norm(dim=1) / frozen.norm(dim=1)
    assert parts["forget_cosine"] == pytest.approx(cosine.mean().item())
    loss.backward()
    task.stepped(parts)
    first = base.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert first.grad is not None
    assert parts["gradient"] == pytest.approx(first.grad.abs().mean().item())


# -- which tensors ----------------------------------------------------------------------------------------------------


def test_tensors_are_chosen_by_the_end_of_their_name_in_the_block() -> None:
    base = tiny("gpt2")
    assert list(named_tensors(base, [1], ["mlp.c_proj"])) == [
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.bias",
    ]
    assert list(named_tensors(base, [0, 3], ["mlp.c_proj.weight", "ln_2.bias"])) == [
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.ln_2.bias",
        "transformer.h.3.mlp.c_proj.weight",
        "transformer.h.3.ln_2.bias",
    ]
    assert len(named_tensors(base, [1], ["c_proj"])) == 4  # of attention and feed-forward layer
    with pytest.raises(ConfigError, match=r"block 1 has no tensor called 'proj'; it has 0 ln_1.weight, "):
        named_tensors(base, [1], ["proj"])


@pytest.mark.parametrize(
    ("family", "meaning"),
    [("llama", "mlp.down_proj"), ("mistral", "mlp.down_proj"), ("qwen2", "self_attn.o_proj"),
     ("qwen3", "mlp.gate_proj"), ("gpt2", "ln_2")],
)  # fmt: skip
def test_what_number_6_means_depends_on_the_architecture_and_is_printed(
    family: str, meaning: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="baselines")
    chosen = numbered_tensors(tiny(family), [1, 2], [6])
    assert [name.split(".", 3)[3] for name in chosen] == [f"{meaning}.weight"] * 2
    assert f"param id 6 is {meaning}.weight in blocks [1, 2]" in caplog.text


def test_a_number_that_chooses_nothing_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"param id 6 chooses nothing: block 1 has 6 tensors, 0 .*3 mlp.down_proj.w"):
        numbered_tensors(tiny("phi3"), [1], [6])
    with pytest.raises(ConfigError, match=f"there is no block {DEPTH}; this model has {DEPTH}"):
        numbered_tensors(tiny("llama"), [1, DEPTH], [6])


def test_float32_masters_keep_what_bfloat16_would_lose_and_are_written_back(tmp_path: Path) -> None:
    base = tiny("llama", dtype=torch.bfloat16)
    before = copies(base)
    tensors = named_tensors(base, CHANGED, ["mlp.down_proj"])
    wide = in_float32(tensors)
    task = RmuTask(base, wide, [topic("bio", 1)], block=BLOCK, steps=4)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    start = task.loss(task.data(0).micro_batches[0], task.data(0).counts, 0)[1]
    train(task, training(lr=1e-5), tmp_path, seed=0)
    assert start["retain"] == 0  # the copies, cast, are the model's own tensors
    assert all(parameter.dtype == torch.float32 for parameter in wide.values())
    for name, parameter in wide.items():
        # Below half a step of bfloat16 for most weights: 4 steps of 1e-5 against 0.3 * 2^-9.
        assert not torch.equal(parameter.to(torch.float32), before[name].to(torch.float32))
        assert torch.equal(base.get_parameter(name), before[name])
    write_back(base, wide)
    for name, parameter in wide.items():
        assert torch.equal(base.get_parameter(name), parameter.to(torch.bfloat16))
