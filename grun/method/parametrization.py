"""The seam between what may change in a model and what is minimized: Parametrization, StepOutput, and their registry.

Objectives see StepOutputs and nothing else. A parametrization turns a batch into one, whatever engine runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from grun.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from grun.config.options import MethodConfig, UnlearnConfig
    from grun.data.encoding import Batch
    from grun.data.templates import Template


EMBEDDINGS = -1
"""Stands for the token embeddings where blocks are named whose states are read."""


@dataclass
class StepOutput:
    """Everything an objective may look at after one forward pass.

    `length` is that of the whole rows, or of what an engine runs of each: last prompt token and answer.
    """

    input_ids: Tensor
    """Tokens, int64, shape [batch, length]."""
    attended: Tensor
    """Tokens that count, bool, shape [batch, length]."""
    answer: Tensor
    """Answer tokens, that is the ones predicted, bool, shape [batch, length]; never True in column 0."""
    token_logprobs: Tensor
    """Log-probability of each answer token given what precedes it, nats, 0 elsewhere, shape [batch, length]."""
    logits_at: Callable[[Tensor], Tensor] = field(repr=False)
    """Positions, a bool mask [batch, length], -> logits there [positions, vocabulary]; computed only when asked."""
    hidden_states: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Captured block outputs; read them through `hidden`."""
    gate_logits: dict[int, Tensor] | None = None
    """By block, shape [batch, positions read]; None for parametrizations without a gate."""
    gate_mask: Tensor | None = None
    """Which gate positions count, bool, shape [batch, positions read]."""
    gate_prompt: Tensor | None = None
    """Which gate positions lie in the prompt, bool, shape [batch, positions read]; None: all."""

    @property
    def answer_logprobs(self) -> Tensor:
        """Summed log-probability of each row's answer, nats, shape [batch]."""
        return self.token_logprobs.sum(dim=1)

    @property
    def states(self) -> Tensor:
        """Columns from the last prompt token on: those that predict answer tokens, and the answer: as `answer`."""
        return self.answer | self.answer.roll(-1, dims=1)

    @property
    def answer_counts(self) -> Tensor:
        """Answer tokens of each row, int64, shape [batch]."""
        return self.answer.sum(dim=1)

    @property
    def answer_tokens(self) -> Tensor:
        """The answer tokens, row by row, int64, shape [answer tokens]."""
        return self.input_ids[self.answer]

    def answer_logits(self) -> Tensor:
        """Logits that predict the answer tokens, each one column before it: as `logits`, [answer tokens, vocabulary].

        Their order is that of `answer_tokens`, in every engine.
        """
        return self.logits(self.answer.roll(-1, dims=1))

    def logits(self, positions: Tensor) -> Tensor:
        """Next-token logits at `positions`, a bool mask [batch, length]: [count of True, vocabulary].

        In float32 or wider: no loss is computed in a narrower type.
        """
        import torch

        found = self.logits_at(positions)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def hidden(self, block: int) -> Tensor:
        """Residual stream after block `block` (0-based), edit included, before the final norm: [batch, length, width].

        EMBEDDINGS names the token embeddings. KeyError for a block that the objective did not name in `Term.hidden`.
        """
        return self.hidden_states[block]


def at_answers(answer: Tensor, values: Tensor) -> Tensor:
    """A value for each answer token, [answer tokens], in its place in the rows: 0 elsewhere, shape as `answer`."""
    return values.new_zeros(answer.shape).masked_scatter(answer, values)


class Engine(Protocol):
    """How forward passes of a parametrization are run; which one changes no result beyond rounding."""

    name: str
    """plain (the model itself, whole rows) or cached (see `grun.cache.cached`)."""

    def lay_out(self, batches: Sequence[Mapping[str, Batch]]) -> None:
        """Prepare for what `run` is going to be given; nothing depends on it but time."""

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """A StepOutput for each batch; `hidden` names the blocks whose output the objective will read."""

    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """The same under the untouched model, without gradients."""


class Parametrization(Protocol):
    """What may change in a model, and how a forward pass through it is run."""

    module: nn.Module
    """Once prepared: holds exactly the trained parameters, and its mode is training's; checkpoints keep its state."""
    model: Any
    """Once prepared: what is asked for scores and answers, as `grun.evaluation` asks any model."""

    @classmethod
    def make(cls, config: UnlearnConfig, quirks: Sequence[str]) -> Self:
        """Made from the options of a run and the published quirks in force; no model is touched yet."""

    def prepare(self, base: PreTrainedModel, template: Template | None, *, turn_ids: Sequence[int] = ()) -> None:
        """Put the parametrization on `base`, newly initialized; `turn_ids` begin a user's turn (`user_turn_ids`)."""

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained."""

    def reference(self) -> AbstractContextManager[object]:
        """A context in which `run` runs the untouched model, without gradients and without dropout.

        Once training has begun only if `keep_reference` was called before.
        """

    def keep_reference(self) -> str:
        """See that `reference` works throughout training, whatever it takes; what that is, for the log."""

    def run(self, batch: Batch, hidden: Collection[int] = ()) -> StepOutput:
        """One forward pass; `hidden` names the blocks whose output the objective will read."""

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""

    def load(self, folder: Path, base: PreTrainedModel) -> None:
        """Put what `save` wrote on `base`."""


class Learner(Parametrization, Protocol):
    """Learns the forget set, and takes away what it learned."""

    def take_away(self) -> None:
        """Called once after training: from then on it is the result."""


@dataclass(frozen=True)
class Traits:
    """What other code needs to know of a parametrization before it is imported."""

    gated: bool = False
    """Takes the gate that `method.gate` names, so that designs and an objective's gate term apply."""
    edits_blocks: bool = False
    """Edits the outputs of the blocks `method.blocks` on a frozen model, so that `method.beside` applies too."""
    changes_weights: bool = False
    """Trains the model's own weights: the untouched model exists only as a copy."""
    learns: bool = False
    """A `Learner`: the objective of the run is not read."""
    untrained: bool = False
    """A `grun.method.guardrail.Guard`: nothing is trained, so that objective and seed change nothing."""


class Parametrizations(Registry[type[Parametrization]]):
    """Parametrizations by name, each with its traits."""

    def __init__(self) -> None:
        super().__init__("parametrization")
        self._traits: dict[str, Traits] = {}

    def add(  # type: ignore[override]
        self, name: str, value: type[Parametrization] | str, description: str, traits: Traits | None = None
    ) -> None:
        """As `Registry.add`; no traits: none of them holds."""
        super().add(name, value, description)
        self._traits[name] = traits or Traits()

    def traits(self, name: str) -> Traits:
        """Traits of a parametrization; none holds of an unknown one, whose package may be missing here."""
        return self._traits.get(name, Traits())


PARAMETRIZATIONS = Parametrizations()
PARAMETRIZATIONS.add(
    "grun",
    "grun.method.gated:Grun",
    "gated low-rank edit at the last prompt token",
    Traits(gated=True, edits_blocks=True),
)
PARAMETRIZATIONS.add(
    "reft", "grun.method.gated:Reft", "the same edit without a gate (plain LoReFT)", Traits(edits_blocks=True)
)
PARAMETRIZATIONS.add("full", "baselines.full:Full", "all weights of the model", Traits(changes_weights=True))
PARAMETRIZATIONS.add(
    "task_vector",
    "baselines.task_vector:TaskVector",
    "all weights, minus what learning the forget set adds to them",
    Traits(changes_weights=True, learns=True),
)
PARAMETRIZATIONS.add("lora", "baselines.lora:Lora", "low-rank changes of the blocks' linear layers (LoRA)")
for _name, _class, _description in (
    ("system_prompt", "SystemPrompt", "a system message that forbids to answer (nothing is trained)"),
    (
        "in_context",
        "InContext",
        "refused forget questions and answered retain questions before it (nothing is trained)",
    ),
    ("output_filter", "WithheldAnswers", "answers that hold a forget answer are replaced (nothing is trained)"),
):
    PARAMETRIZATIONS.add(_name, f"grun.method.guardrail:{_class}", _description, Traits(untrained=True))


def traits_of(method: MethodConfig) -> Traits:
    """Traits of what `method` asks for; without a gate (`method.gate=none`) it is not gated."""
    traits = PARAMETRIZATIONS.traits(method.parametrization)
    return replace(traits, gated=traits.gated and method.gate != "none")
