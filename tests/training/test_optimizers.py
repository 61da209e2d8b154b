"""Optimizers beside torch's AdamW: the legacy rule in closed form, averaging, and what a killed run keeps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ragged_rows, tiny
from torch import nn
from watched import CutOff, assert_equal, parameters

from grun.commands.finetune import FinetuneTask
from grun.config.checks import check_train
from grun.config.options import FinetuneConfig, TrainConfig
from grun.errors import ConfigError
from grun.training.optimizers import LegacyAdamW
from grun.training.train import train

F64 = torch.float64


# -- transformers' former AdamW ---------------------------------------------------------------------------------------


def moved(gradient: float, steps: int, dtype: torch.dtype = F64, lr: float = 5e-5, **options: float) -> list[float]:
    """|change of a weight that starts at 0| / lr in each step, the gradient being constant."""
    weight = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = LegacyAdamW([weight], lr=lr, **options)  # type: ignore[arg-type]
    found = []
    for _ in range(steps):
        before = float(weight.detach())
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        found.append(abs(float(weight.detach()) - before) / lr)
    return found


@pytest.mark.parametrize("gradient", [1e-7, 1e-6, 1e-5, 1e-4, -3e-5])
def test_under_a_constant_gradient_a_step_is_its_closed_form(gradient: float) -> None:
    """m = (1 - b1^t) g and v = (1 - b2^t) g^2, so a step is lr sqrt(c) |g| / (sqrt(c) |g| + eps), c = 1 - b2^t."""
    for number, found in enumerate(moved(gradient, steps=150), start=1):
        root = math.sqrt(1 - 0.999**number) * abs(gradient)
        assert found == pytest.approx(root / (root + 1e-6), rel=1e-9)  # float64 over 150 sums


@pytest.mark.parametrize(
    ("gradient", "published"),
    [
        (1e-7, ("0.003", "0.010", "0.036")),
        (1e-6, ("0.03", "0.09", "0.27")),
        (1e-5, ("0.24", "0.50", "0.79")),
        (1e-4, ("0.76", "0.91", "0.97")),
    ],
)
def test_steps_are_those_measured_of_the_published_optimizer(gradient: float, published: tuple[str, ...]) -> None:
    """Figures of transformers 4.38.2 at steps 1, 10 and 150, to the digits they were written down with."""
    steps = moved(gradient, steps=150)
    assert tuple(f"{steps[at]:.{len(text) - 2}f}" for at, text in zip((0, 9, 149), published, strict=True)) == published


def test_weight_decay_acts_after_the_step_and_not_through_the_gradient() -> None:
    start = torch.tensor([2.0, -3.0], dtype=F64)
    ends = []
    for decay in (0.0, 0.1):
        weight = nn.Parameter(start.clone())
        weight.grad = torch.tensor([1.0, -2.0], dtype=F64)
        LegacyAdamW([weight], lr=0.5, weight_decay=decay).step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[1], ends[0] * (1 - 0.5 * 0.1))


def test_moments_have_the_type_of_the_weight_so_that_in_bfloat16_the_second_never_falls() -> None:
    weight = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = LegacyAdamW([weight], lr=1e-3)
    weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer.step()
    state = optimizer.state[weight]
    assert state["first_moment"].dtype == state["second_moment"].dtype == torch.bfloat16
    second = state["second_moment"].clone()
    weight.grad = torch.zeros_like(weight)
    for _ in range(20):
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["second_moment"], second)  # v * 0.999 rounds back to v


def test_a_weight_without_a_gradient_stays() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    weights[0].grad = torch.ones(2)
    LegacyAdamW(weights, lr=0.1, weight_decay=0.1).step()
    assert float(weights[0].detach()[0]) < 1 and torch.equal(weights[1].detach(), torch.ones(2))


# -- in training ------------------------------------------------------------------------------------------------------


def config_of(optimizer: str, **changes: Any) -> TrainConfig:
    options = {"epochs": 4, "batch_size": 5, "lr": 0.01, "optimizer": optimizer, "save_steps": 5, "warmup": 3.0}
    options["schedule"] = "constant" if optimizer == "schedule_free" else "linear"
    return TrainConfig(**{**options, **changes})


def task_of(config: TrainConfig) -> FinetuneTask:
    """Twelve steps on a float64 Llama."""
    return FinetuneTask(tiny("llama"), ragged_rows(13, seed=1), FinetuneConfig(train=config, seed=3), pad_id=0)


@pytest.mark.parametrize("optimizer", ["legacy_adamw", "schedule_free"])
def test_a_run_that_is_cut_off_and_resumed_is_the_run_that_was_not(optimizer: str, tmp_path: Path) -> None:
    """In float64, to the last bit: a checkpoint holds the weights that are trained, not their average."""
    config = config_of(optimizer)
    whole = task_of(config)
    start = parameters(whole.module)
    assert train(whole, config, tmp_path / "whole", seed=0).steps == 12
    with pytest.raises(KeyboardInterrupt):
        train(CutOff(task_of(config), at=8), config, tmp_path / "cut", seed=0)
    resumed = task_of(config)
    assert train(resumed, config, tmp_path / "cut", seed=0).resumed_from == 5
    assert_equal(parameters(resumed.module), parameters(whole.module))
    assert any(not torch.equal(start[name], value) for name, value in parameters(whole.module).items())
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (tmp_path / "cut" / "log.jsonl").read_bytes()


def test_a_run_killed_between_its_last_step_and_saving_is_averaged_once(tmp_path: Path) -> None:
    config = config_of("schedule_free", save_steps=4)  # the last checkpoint is that of the last step
    found = []
    for _ in range(2):
        task = task_of(config)
        result = train(task, config, tmp_path, seed=0)
        found.append(parameters(task.module))
    assert result.resumed_from == 12
    assert_equal(found[0], found[1])


def test_schedule_free_training_leaves_the_average_of_the_points_it_went_through(tmp_path: Path) -> None:
    """z_t = z_{t-1} - lr g / (sqrt(v) + eps), x the mean of all z, gradients at y = 0.9 x + 0.1 z; by hand here."""
    config = config_of("schedule_free", warmup=0.0, max_grad_norm=0.0, save_steps=0)
    averaged, last = task_of(config), task_of(config)
    train(averaged, config, tmp_path / "averaged", seed=0)
    train(last, config, tmp_path / "last", seed=0, averaged=False)

    by_hand = task_of(config)
    trained = dict(by_hand.module.named_parameters())
    z = {name: parameter.detach().clone() for name, parameter in trained.items()}
    x = {name: value.clone() for name, value in z.items()}
    v = {name: torch.zeros_like(value) for name, value in z.items()}
    for step in range(by_hand.steps):
        by_hand.module.zero_grad()
        data = by_hand.data(step)
        by_hand.loss(data.micro_batches[0], data.counts, step)[0].backward()
        for name, parameter in trained.items():
            gradient = parameter.grad
            assert gradient is not None
            v[name] = 0.999 * v[name] + 0.001 * gradient**2
            z[name] = z[name] - 0.01 * gradient / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            x[name] = x[name] + (z[name] - x[name]) / (step + 1)
            parameter.data = 0.9 * x[name] + 0.1 * z[name]
    for name, parameter in trained.items():  # rounding of x from y and z, 1e-16 times 10, over 12 steps
        torch.testing.assert_close(parameters(averaged.module)[name], x[name], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(parameters(last.module)[name], parameter.detach(), rtol=1e-7, atol=1e-9)
    assert any(not torch.allclose(x[name], trained[name].detach(), atol=1e-5) for name in x)


def test_schedule_free_needs_a_constant_schedule() -> None:
    with pytest.raises(ConfigError, match="set train.schedule=constant") as caught:
        check_train(config_of("schedule_free", schedule="linear"))
    assert "\n" not in str(caught.value)
    check_train(config_of("schedule_free"))


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'grun-unlearning\[optimizers\]'"):
        check_train(config_of("schedule_free"))
    check_train(config_of("legacy_adamw"))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        check_train(TrainConfig(optimizer="adam"))
