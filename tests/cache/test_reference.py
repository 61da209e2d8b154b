"""References computed once: the values of the untouched model, wherever they lie, and no second model for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from tiny import ragged_rows, tiny
from torch import Tensor, nn
from watched import CutOff

from baselines.full import Full
from baselines.lora import Lora
from grun.cache.reference import ReferencedEngine, use_reference
from grun.cache.store import Completed
from grun.config.options import CacheConfig, FullConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.errors import ModelError
from grun.method.gated import Grun, Reft
from grun.method.parametrization import StepOutput
from grun.objectives.objective import build_objective
from grun.training.train import train
from grun.training.unlearning import UnlearnRows, UnlearnTask

KINDS = {
    "full": lambda: Full(MethodConfig()),
    "full with its head": lambda: Full(MethodConfig(full=FullConfig(freeze_head=False))),
    "lora": lambda: Lora(MethodConfig()),
    "reft": lambda: Reft(MethodConfig(blocks=[1, 3])),
    "grun": lambda: Grun(MethodConfig(blocks=[1, 3])),
}


DATA = UnlearnRows(ragged_rows(6, 1), ragged_rows(6, 2), ragged_rows(9, 3))


class Setting:
    """A task on the plain engine, and the options it has."""

    def __init__(self, kind: str, objective: str, base: Any, *, cache: CacheConfig | None = None) -> None:
        self.base = base
        self.parametrization: Any = KINDS[kind]()
        torch.manual_seed(0)
        self.parametrization.prepare(base, None)
        training = TrainConfig(epochs=2, batch_size=3, lr=0.01, save_steps=0, micro_batch_size=2)
        self.config = UnlearnConfig(objective=objective, train=training, cache=cache or CacheConfig(dir=None))
        self.objective = build_objective(objective, self.config.loss, gated=kind == "grun")
        self.task = UnlearnTask(self.parametrization, self.objective, DATA, self.config, pad_id=0, device=base.device)

    def use(self, needs: Any = None) -> Completed | None:
        return use_reference(self.task, self.base, needs or self.objective.reference, self.config, pad_id=0)

    def move(self) -> None:
        """Change what is trained, as training does."""
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for _, parameter in self.parametrization.trainable_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def references(self) -> Iterator[StepOutput]:
        """Of all batches of all steps."""
        for step in range(self.task.steps):
            for batch in self.task.data(step).micro_batches:
                wanted = {name: batch[name] for name in self.objective.reference_continuations}
                yield from self.task.engine.reference(wanted).values()

    def values(self) -> list[Tensor]:
        """Log-probabilities and logits at answers of all references."""
        found = list(self.references())
        return [one.token_logprobs for one in found] + [one.answer_logits() for one in found]


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, "llama") for kind in KINDS), *((kind, name) for kind in ("full", "lora") for name in ("gpt2", "gemma2"))],
)
def test_references_are_the_untouched_models_while_the_model_moves(kind: str, family: str) -> None:
    """In float64, so that only mistakes show, but for Gemma 2, which caps its logits and takes padding in float32."""
    dtype, tolerance = (torch.float32, 1e-4) if family == "gemma2" else (torch.float64, 1e-9)
    wanted = Setting(kind, "npo_kl", tiny(family, dtype=dtype)).values()
    kept = Setting(kind, "npo_kl", tiny(family, dtype=dtype))
    completed = kept.use()
    assert completed is not None and completed.rows == len(kept.task.reference_rows)
    assert isinstance(kept.task.engine, ReferencedEngine) and kept.task.engine.name == "plain"
    kept.move()
    for found, expected in zip(kept.values(), wanted, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["full", "full with its head", "lora"])
def test_before_the_first_step_every_log_ratio_is_0(kind: str) -> None:
    """In float32, with batches of other lengths than those in which references were computed."""
    kept = Setting(kind, "npo_kl", tiny("llama", dtype=torch.float32, initializer_range=0.1))
    kept.use()
    for batch in kept.task.data(0).micro_batches:
        policy, reference = kept.task.engine.run(batch), kept.task.engine.reference(batch)
        for name in kept.objective.reference_continuations:
            assert (policy[name].token_logprobs - reference[name].token_logprobs).abs().max() < 1e-6


def test_under_autocast_logits_are_those_of_the_whole_model() -> None:
    """bfloat16 weights are trained as float32 ones; the states kept are bfloat16, as the head reads them."""
    plain = Setting("full", "npo_kl", tiny("llama", dtype=torch.bfloat16))
    wanted = plain.values()
    kept = Setting("full", "npo_kl", tiny("llama", dtype=torch.bfloat16))
    completed = kept.use()
    assert completed is not None
    tokens = sum(len(row.answer_ids) for row in kept.task.reference_rows)
    assert completed.bytes == tokens * (32 * 2 + 4)  # hidden size 32; log-probabilities in float32
    for found, expected in zip(kept.values(), wanted, strict=True):
        # rounding of single values of 8 bits; rows are batched and padded otherwise
        assert float((found - expected).norm() / expected.norm()) < 0.02


def test_only_what_is_asked_for_is_kept() -> None:
    kept = Setting("lora", "npo", tiny("llama"))
    completed = kept.use()
    tokens = sum(len(row.answer_ids) for row in set(DATA.answers))
    assert completed is not None and (completed.rows, completed.bytes) == (6, tokens * 8)
    (batch,) = kept.task.data(0).micro_batches[:1]
    output = kept.task.engine.reference({"answer": batch["answer"]})["answer"]
    with pytest.raises(ModelError, match="reference='logits'"):
        output.answer_logits()
    none = Setting("lora", "gd", tiny("llama"))
    engine = none.task.engine
    assert none.use() is None and none.task.engine is engine


def test_logits_elsewhere_are_a_clear_error() -> None:
    kept = Setting("lora", "npo_kl", tiny("llama"))
    kept.use()
    (batch,) = kept.task.data(0).micro_batches[:1]
    output = kept.task.engine.reference({"retain": batch["retain"]})["retain"]
    some = output.answer.roll(-1, dims=1) & (torch.arange(output.answer.shape[1]) % 2 == 0)
    everywhere = Setting("lora", "npo_kl", tiny("llama")).task.engine.reference({"retain": batch["retain"]})["retain"]
    torch.testing.assert_close(output.logits(some), everywhere.logits(some), rtol=1e-10, atol=1e-10)
    with pytest.raises(ModelError, match="only where they predict an answer token"):
        output.logits(output.attended)


def test_a_model_with_dropout_is_asked_without_and_goes_on_in_training_mode() -> None:
    kept = Setting("full", "npo_kl", tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5))
    wanted = Setting("full", "npo_kl", tiny("gpt2")).values()
    kept.parametrization.module.train()
    before = torch.get_rng_state()
    kept.use()
    assert kept.base.training and torch.equal(torch.get_rng_state(), before)
    for found, expected in zip(kept.values(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["full", "full with its head", "lora"])
def test_over_its_budget_of_memory_it_lies_on_disk_and_another_run_finds_it(kind: str, tmp_path: Path) -> None:
    wanted = Setting(kind, "npo_kl", tiny("llama")).values()
    cache = CacheConfig(dir=str(tmp_path), memory_budget="1KiB", disk_budget="1MiB")
    kept = Setting(kind, "npo_kl", tiny("llama"), cache=cache)
    first = kept.use()
    assert first is not None and (first.where, first.built) == ("disk", first.rows)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > first.bytes
    kept.move()
    for found, expected in zip(kept.values(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    again = Setting(kind, "npo_kl", tiny("llama"), cache=cache).use()
    assert again is not None and (again.found, again.built) == (first.rows, 0)
    other = Setting(kind, "npo_kl", tiny("llama", seed=1), cache=cache).use()
    assert other is not None and other.found == 0  # other weights
    plenty = CacheConfig(dir=str(tmp_path / "unused"))
    in_memory = Setting(kind, "npo_kl", tiny("llama"), cache=plenty).use()
    assert in_memory is not None and in_memory.where == "memory"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("family", "cache", "reason"),
    [
        ("llama", CacheConfig(dir=None, memory_budget="1KiB"), "more than cache.memory_budget and cache.dir=null"),
        ("llama", CacheConfig(dir="x", memory_budget="1KiB", disk_budget="2KiB"), "and than cache.disk_budget"),
        ("odd", CacheConfig(dir=None), "the model's head cannot be run alone"),
    ],
)
@pytest.mark.parametrize("kind", ["full with its head", "lora", "grun"])
def test_where_it_cannot_be_kept_the_untouched_model_is_run_in_every_step_and_a_line_says_so(
    kind: str, family: str, cache: CacheConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = Setting(kind, "npo_kl", tiny(family)).values()
    run = Setting(kind, "npo_kl", tiny(family), cache=cache)
    with caplog.at_level(logging.INFO, logger="grun.cache.reference"):
        for needs, why in ((run.objective.reference, reason), ("all_logits", "logits at all positions")):
            caplog.clear()
            assert run.use(needs) is None
            (line,) = caplog.messages
            assert why in line
    assert ("a second copy of the trained weights is kept" in line) == (kind == "full with its head")
    assert ("the frozen base is run a second time" in line) == (kind != "full with its head")
    run.move()
    for found, expected in zip(run.values(), wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("objective", ["npo_kl", "undial"])
def test_full_fine_tuning_holds_no_second_model_while_what_it_compares_with_fits(
    objective: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counted over all tensors that are alive: the model, and what is kept of rows."""

    def refused(self: Full) -> str:
        raise AssertionError("a second copy was made")

    monkeypatch.setattr(Full, "keep_reference", refused)
    run = Setting("full", objective, tiny("llama", hidden_size=64, intermediate_size=256))
    completed = run.use()
    assert completed is not None
    assert run.parametrization._untouched is None
    model = sum(p.nbytes for p in run.base.parameters())
    head = run.task.engine._head  # type: ignore[attr-defined]
    own = {p.data_ptr() for p in run.base.parameters()}
    apart = sum(p.nbytes for p in head._alone.parameters() if p.data_ptr() not in own)
    assert apart == 0  # the frozen head is the model's own
    assert completed.bytes < model
    train(run.task, run.config.train, tmp_path, seed=0)
    whole = Setting("full with its head", objective, tiny("llama"))
    whole.use()
    copied = whole.task.engine._head._alone  # type: ignore[attr-defined]
    assert [name for name, _ in copied.named_parameters()] == ["lm_head.weight"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_compares_with_the_untouched_model_still(kind: str, tmp_path: Path) -> None:
    def run(folder: Path, cut_at: int | None = None) -> nn.Module:
        setting = Setting(kind, "npo_kl", tiny("llama"))
        setting.config.train.save_steps = 1
        setting.use()
        task = setting.task if cut_at is None else CutOff(setting.task, cut_at)
        train(task, setting.config.train, folder, seed=0)
        module: nn.Module = setting.parametrization.module
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", cut_at=2)
    resumed = run(tmp_path / "cut")
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_says_what_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.finetune(tmp_path / "taught") == 0
    monkeypatch.setattr(Full, "keep_reference", lambda self: pytest.fail("a second copy was made"))
    arguments = ["method.parametrization=full", "objective=npo_kl", "train.epochs=1", "train.lr=1e-4"]
    assert demo.unlearn(tmp_path / "taught", tmp_path / "run", *arguments) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["cache"]["where"] == "memory" and run["cache"]["built"] == run["cache"]["rows"] > 10
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["forget"] == pytest.approx(2 / 0.1 * 0.693147, rel=1e-5)  # the model is its reference
    assert first["retain"] == pytest.approx(0.0, abs=1e-6)
