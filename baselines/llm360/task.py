"""Forget and retain batches side by side, one of each in a micro-batch: the loop of LLM360's unlearning tool."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from grun.data.encoding import Batch
from grun.method.parametrization import StepOutput
from grun.objectives.objective import Objective
from grun.objectives.terms import Outputs
from grun.training.task import MicroBatch, Stateless, StepData

Run = Callable[[Batch, Collection[int]], StepOutput]
"""A forward pass: batch, and blocks whose hidden states are read."""


class PairedTask(Stateless):
    """An objective of a forget and a retain term on fixed batches, once through, as a `grun.training.train.Task`."""

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        objective: Objective,
        forget: Sequence[Batch],
        retain: Sequence[Batch],
        *,
        device: torch.device,
        depth: int,
        accumulation: int,
        published: bool = False,
    ) -> None:
        """Pair the batches in order; what is left over, of a kind or of a step, is dropped.

        Args:
            module: what is trained.
            run: a forward pass of the model that `module` belongs to, which has `depth` blocks.
            objective: of terms that read the passes `answer` and `retain`, without a reference.
            forget, retain: batches of the two passes.
            device: where batches go.
            accumulation: micro-batches of a step.
            published: take the mean of the micro-batches' means, and divide it by their number once more, as LLM360's
                loop does: gradients are that much smaller, which an optimizer of Adam's kind hardly sees. Else a
                term's mean is over the whole step.
        """
        self.module = module
        self.device = device
        self._run = run
        self._objective = objective
        self._pairs = list(zip(forget, retain, strict=False))
        self._hidden = objective.hidden(depth)
        self._accumulation = accumulation
        self._published = published

    @property
    def steps(self) -> int:
        """Whole steps that there are batches for."""
        return len(self._pairs) // self._accumulation

    def data(self, step: int) -> StepData:
        """The next pairs of batches."""
        first = step * self._accumulation
        pairs = self._pairs[first : first + self._accumulation]
        micro_batches: list[MicroBatch] = [{"answer": forget, "retain": retain} for forget, retain in pairs]
        counts = self._objective.counts(micro_batches) | {"micro_batches": len(micro_batches)}
        return StepData(micro_batches, counts, (step + 1) / self.steps)

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the terms' shares of this micro-batch; the shares in the log are not divided twice."""
        objective = self._objective
        passes = {name: self._run(one, self._hidden if name == "answer" else ()) for name, one in batch.items()}
        total = torch.zeros((), device=self.device)
        parts: dict[str, float] = {}
        for side, term in objective.terms.items():
            value = term.function(Outputs(passes, {}), objective.options[side])
            count = value.number * counts["micro_batches"] if self._published else counts[side]
            share = value.total / max(1, count)
            total = total + objective.weights[side] * share
            parts[side] = float(share.detach())
        return (total / counts["micro_batches"] if self._published else total), parts
