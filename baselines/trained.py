"""The trained part of a model, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

from torch import nn


class Trained(nn.Module):
    """Holds the parameters that are trained and nothing else, so that optimizer and checkpoints see no others."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], followers: Iterable[nn.Module]) -> None:
        """`parameters` by dotted name; `followers` are the modules that go into training mode with this one."""
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)  # torch allows no dots
        self._followers = tuple(followers)  # in a tuple, so that they are no parts of this module

    def train(self, mode: bool = True) -> Self:
        """Training mode (dropout) of the followers."""
        for module in self._followers:
            module.train(mode)
        return super().train(mode)


class Stateless:
    """A task that keeps nothing from step to step but parameters and optimizer."""

    def stepped(self, parts: dict[str, float]) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, float]:
        """Nothing to keep."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing was kept."""
