"""Optimizers besides torch's AdamW: transformers' former AdamW, and schedule-free AdamW, which averages weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grun.config.options import TrainConfig

BETAS = (0.9, 0.999)
"""Decay of the two moments, of every optimizer here."""
LEGACY_EPS = 1e-6
"""What `LegacyAdamW` adds to the root of the second moment."""
SCHEDULE_FREE_EPS = 1e-8
"""The same of schedule-free AdamW."""


class LegacyAdamW(Optimizer):
    """AdamW as transformers had it up to version 4: a step is far smaller than torch's where gradients are small.

    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, and at step t

        w = w - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), then w = w - lr * weight_decay * w

    so eps acts before the bias is corrected, where torch adds it after. The moments have the type of the parameter:
    in bfloat16 v * 0.999 rounds back to v, so that v never falls.

    Source: `transformers.AdamW` of version 4.38, with which RMU was published (Li et al. 2024, arXiv 2403.03218).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = LEGACY_EPS,
        weight_decay: float = 0.0,
    ) -> None:
        """Arguments as for `torch.optim.AdamW`."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # a tensor, as torch's own optimizers keep it
            state["first_moment"] = torch.zeros_like(parameter)
            state["second_moment"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first, second, step = state["first_moment"], state["second_moment"], float(state["step"])
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        parameter.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def optimizer_of(config: TrainConfig, warmup_steps: int) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """Class and arguments of the optimizer that `config` names; None: torch's AdamW, which Trainer makes itself.

    Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682) keeps the point y, where gradients are taken, in the
    parameters while it trains; its method `eval` puts the average x there. It raises the learning rate over
    `warmup_steps` by itself, where others leave that to the schedule.
    """
    if config.optimizer == "adamw":
        return None
    betas = (BETAS[0], config.beta2)
    arguments: dict[str, Any] = {"lr": config.lr, "betas": betas, "weight_decay": config.weight_decay}
    if config.optimizer == "legacy_adamw":
        return LegacyAdamW, {**arguments, "eps": LEGACY_EPS}
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree, {**arguments, "eps": SCHEDULE_FREE_EPS, "warmup_steps": warmup_steps}
