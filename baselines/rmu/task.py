"""RMU: activations on the forget set are steered to a fixed vector, those on the retain set kept where they were.

Li et al. 2024, arXiv 2403.03218. One model is in memory: only the chosen tensors carry gradients, the forward ends at
the block whose output is steered, and what that output was on the retain set is computed once, before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from baselines.tensors import Trained, check_tensors
from grun.data.encoding import Batch
from grun.errors import ConfigError
from grun.objectives.rmu import steered
from grun.runtime.devices import input_device
from grun.runtime.progress import progress
from grun.training.task import MicroBatch, Stateless, StepData
from pyvene_custom import find_blocks

LOSS_MASKS = ("all", "attended", "attended_no_bos")
"""Positions that a loss counts: all, padding included; tokens; tokens but for the first one of each row."""


@dataclass
class Topic:
    """One subject to forget, and what is kept meanwhile."""

    name: str
    forget: list[Batch]
    """In the order they are used."""
    retain: list[Batch]
    """As many; not used where alpha is 0."""
    alpha: float
    """Weight of the retain loss."""
    control: Tensor
    """What forget activations are steered to, shape [hidden size]; see `grun.objectives.rmu.control_vector`."""


@dataclass(kw_only=True)
class Aimed(Batch):
    """A batch, and where its activations are to be."""

    target: Tensor = field(default_factory=lambda: torch.empty(0))
    """Shape [hidden size], or [batch, length, hidden size]."""
    weight: float = 1.0
    """Of its loss."""
    frozen: Tensor | None = None
    """Its activations under the untouched model, [batch, length, hidden size], where they are compared with."""


class _Reached(Exception):
    """Carries the block's output out of the model's own forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Truncated:
    """The output of one block of any decoder, computed by the model's own forward up to there.

    Nothing stays on the model between calls. Activations and gradients are those of a whole pass.
    """

    def __init__(self, base: PreTrainedModel, block: int) -> None:
        """`block`, 0-based, is one that `base` has."""
        self._base = base
        self._block = find_blocks(base)[1][block]

    def __call__(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states after the block, [batch, length, hidden size], in the model's type, padding included.

        `weights`, by full parameter name, stand in for the model's own in this pass.
        """
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        handle = self._block.register_forward_hook(_stop)
        try:
            if weights:
                functional_call(self._base, dict(weights), (), inputs)
            else:
                self._base(**inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("the model's forward ended without running the block")


def _stop(module: nn.Module, arguments: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


class RmuTask(Stateless):
    """Steering of one block's output, topics in turn, as a `grun.training.train.Task`.

    The loss of a batch is the mean over the positions that `loss_mask` counts of `steered`, times alpha on the retain
    set; the loss of a step the mean over its batches. Batch m of the run, counted over all steps, is batch m // K of
    topic m % K of K.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tensors: Mapping[str, nn.Parameter],
        topics: Sequence[Topic],
        *,
        block: int,
        steps: int,
        loss_mask: str = "attended",
        verbose: bool = False,
        accumulation: int = 1,
    ) -> None:
        """Freeze `base` but for the tensors, and run it over the retain batches in use.

        Args:
            base: the model to change, in evaluation mode.
            tensors: what is trained, by full parameter name: parameters of `base`, or copies in a wider type
                (`baselines.tensors.in_float32`) that are cast to the model's type in every pass.
            topics, block, steps: at least one, and the 0-based block that is steered in so many steps over all of them.
            loss_mask: one of LOSS_MASKS.
            verbose: log cosines and norms of the activations too, which keeps those of the forget batches as well.
            accumulation: batches of a step.

        ConfigError where one of them does not fit, or all tensors lie above the block.
        """
        check_tensors(base, tensors, block)
        if loss_mask not in LOSS_MASKS:
            raise ConfigError(f"loss mask {loss_mask!r} is unknown; expected {', '.join(LOSS_MASKS)}")
        base.requires_grad_(False)
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        self.module: nn.Module = Trained(tensors, [])
        self._base = base
        self._tensors = dict(tensors)
        self._wide = {name: tensor for name, tensor in tensors.items() if tensor is not base.get_parameter(name)}
        self._forward = Truncated(base, block)
        self._topics = topics
        self._steps = steps
        self._mask = loss_mask
        self._verbose = verbose
        self._accumulation = accumulation
        self._check_batches()
        self._frozen = self._freeze()

    @property
    def steps(self) -> int:
        """Of the whole run, over all topics."""
        return self._steps

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self._base)

    def data(self, step: int) -> StepData:
        """The next batches of the topics whose turn it is."""
        first = step * self._accumulation
        micro_batches = [self._aimed(number) for number in range(first, first + self._accumulation)]
        counts = {
            "batches": len(micro_batches),
            "forget": len(micro_batches),
            "retain": sum("retain" in batch for batch in micro_batches),
        }
        return StepData(micro_batches, counts, (step + 1) / self._steps)

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Shares of forget and retain loss, the latter times alpha; 0 where alpha is 0."""
        total = torch.zeros((), device=self.device)
        parts = {"forget": 0.0, "retain": 0.0}
        for side, aimed in batch.items():
            assert isinstance(aimed, Aimed)
            hidden = self._hidden(aimed)
            value = aimed.weight * self._mean(steered(hidden, aimed.target), aimed) / counts["batches"]
            total = total + value.to(total.device)
            parts[side] = float(value.detach())
            if aimed.frozen is not None:
                seen = _compared(hidden.detach(), aimed)
                parts |= {f"{side}_{name}": value / counts[side] for name, value in seen.items()}
        return total, parts

    def stepped(self, parts: dict[str, float]) -> None:
        """Add the mean absolute gradient of the first tensor to the log, if verbose."""
        if self._verbose:
            gradient = next(iter(self._tensors.values())).grad
            parts["gradient"] = 0.0 if gradient is None else float(gradient.abs().mean())

    @property
    def frozen_bytes(self) -> int:
        """Size of the untouched model's activations, which are kept on the CPU."""
        return sum(states.nbytes for states in self._frozen.values())

    def _turn(self, number: int) -> tuple[Topic, int]:
        """Topic of a batch of the run, and which of the topic's it is."""
        place, topic = divmod(number, len(self._topics))
        return self._topics[topic], place

    def _aimed(self, number: int) -> MicroBatch:
        topic, place = self._turn(number)
        forget = topic.forget[place]
        seen = self._frozen[_content(forget)] if self._verbose else None
        batches: MicroBatch = {"forget": Aimed(**vars(forget), target=topic.control, frozen=seen)}
        if topic.alpha:
            retain = topic.retain[place]
            frozen = self._frozen[_content(retain)]
            seen = frozen if self._verbose else None
            batches["retain"] = Aimed(**vars(retain), target=frozen, weight=topic.alpha, frozen=seen)
        return batches

    def _check_batches(self) -> None:
        count = self._steps * self._accumulation
        for number, topic in enumerate(self._topics):
            needed = len(range(number, count, len(self._topics)))
            for side, there in (("forget", topic.forget), ("retain", topic.retain)):
                if len(there) < needed and (side == "forget" or topic.alpha):
                    raise ConfigError(
                        f"{topic.name}: {len(there)} {side} batches, but {self._steps} steps take {needed}; "
                        "give more texts or take fewer steps"
                    )

    @torch.no_grad()
    def _freeze(self) -> dict[bytes, Tensor]:
        """Activations of the untouched model by content of the batch, each distinct batch once, on the CPU."""
        wanted: dict[bytes, Batch] = {}
        for number in range(self._steps * self._accumulation):
            topic, place = self._turn(number)
            used = ([topic.retain[place]] if topic.alpha else []) + ([topic.forget[place]] if self._verbose else [])
            wanted |= {_content(batch): batch for batch in used}
        frozen: dict[bytes, Tensor] = {}
        with progress("activations of the untouched model", len(wanted), shown=bool(wanted)) as advance:
            for content, batch in wanted.items():
                frozen[content] = self._hidden(batch.to(self.device)).cpu()
                advance(1)
        return frozen

    def _hidden(self, batch: Batch) -> Tensor:
        weights = {name: tensor.to(self._base.get_parameter(name).dtype) for name, tensor in self._wide.items()}
        return self._forward(batch, weights)

    def _mean(self, values: Tensor, batch: Batch) -> Tensor:
        """Mean of `values` [batch, length] over the positions that count."""
        counted = _counted(batch.attention_mask, self._mask).to(values.device)
        return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def _counted(attention_mask: Tensor, loss_mask: str) -> Tensor:
    """Positions [batch, length] that the loss counts."""
    if loss_mask == "all":
        return torch.ones_like(attention_mask, dtype=torch.bool)
    attended = attention_mask != 0
    return attended if loss_mask == "attended" else attended & (attended.cumsum(dim=1) > 1)


def _compared(hidden: Tensor, batch: Aimed) -> dict[str, float]:
    """Means over the tokens: cosine between updated and untouched activations, and the norms of both."""
    assert batch.frozen is not None
    attended = batch.attention_mask.to(hidden.device) != 0
    wide = torch.promote_types(hidden.dtype, torch.float32)
    updated, frozen = hidden[attended].to(wide), batch.frozen.to(hidden.device, wide)[attended]
    return {
        "cosine": float(cosine_similarity(updated, frozen, dim=-1).mean()),
        "norm": float(updated.norm(dim=-1).mean()),
        "frozen_norm": float(frozen.norm(dim=-1).mean()),
    }


def _content(batch: Batch) -> bytes:
    """Equal for batches of the same ids and padding."""
    parts = (torch.tensor(batch.input_ids.shape), batch.input_ids, batch.attention_mask)
    return b"".join(part.cpu().numpy().tobytes() for part in parts)
