"""Frozen rows that lie in main memory, on their way to the device while it computes the step before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Gathered = tuple[Tensor, Tensor | None]
"""States of a step's rows, [tokens, width], and their prompts, padded on the left; None: there are none."""


class Ahead:
    """Copies of coming steps: on a GPU from pinned memory, on a stream of their own; elsewhere when they are taken."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where steps are computed."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: dict[Hashable, Gathered] = {}

    def start(self, key: Hashable, gather: Callable[[bool], Gathered]) -> None:
        """Begin to copy what `gather` gives; it is told whether to put it in pinned memory."""
        if key in self._coming:
            return
        states, prompts = gather(self._stream is not None)
        within: Any = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with within:
            there = states.to(self._device, non_blocking=True)
            self._coming[key] = there, None if prompts is None else prompts.to(self._device, non_blocking=True)

    def take(self, key: Hashable, gather: Callable[[bool], Gathered]) -> Gathered:
        """What was begun, or is begun now; what is computed from it waits for the copy."""
        self.start(key, gather)
        found = self._coming.pop(key)
        self._coming.clear()  # what was begun and never taken
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            for tensor in found:
                if tensor is not None:
                    tensor.record_stream(here)
        return found
