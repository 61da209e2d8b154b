"""Drawn answers that depend on the seed and the prompt alone, not on the batch or the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grun.runtime.files import content_hash

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""The next token of each row, int64 [rows], from its logits, float32 [rows, vocabulary], and the rows' numbers in the
batch; called once a step."""


def most_probable(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Greedy decoding."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Draw:
    """One answer drawn for each prompt."""

    seed: int
    number: int
    """Which of several draws this is, from 0."""
    temperature: float
    """What logits are divided by, > 0."""

    def chooser(self, prompts: Sequence[Sequence[int]], steps: int) -> Choose:
        """Draws tokens after `prompts`, the rows of a batch, for at most `steps` steps.

        A row has one uniform number a step: the token at which the running sum of probabilities passes it.
        """
        numbers = torch.stack([self._uniforms(prompt, steps) for prompt in prompts])  # [rows, steps]
        step = iter(range(steps))

        def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
            wanted = numbers[list(rows), next(step)].to(logits.device).unsqueeze(1)
            running = (logits / self.temperature).softmax(-1).cumsum(-1)
            passed = torch.searchsorted(running, wanted * running[:, -1:], right=True)
            return passed.squeeze(1).clamp_max(logits.shape[-1] - 1)  # where rounding puts the number at the very end

        return choose

    def _uniforms(self, prompt: Sequence[int], steps: int) -> Tensor:
        digest = content_hash([self.seed, self.number, list(prompt)])
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        return torch.rand(steps, generator=generator)
