"""Hidden states: steer those of forget rows to random vectors, and hold those of retain rows."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from grun.method.parametrization import EMBEDDINGS
from grun.objectives.terms import Options, Outputs, TermValue, Variant, objective, summed, term

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grun.method.parametrization import StepOutput


def control_vector(size: int, coefficient: float, seed: int, number: int = 0) -> Tensor:
    """Fixed direction that RMU steers activations to: coefficient * u / ||u||, entries of u uniform on [0, 1).

    Drawn on the CPU in float32, so that it is the same on every device and for a model of every type: [size].

    Args:
        size: hidden size.
        coefficient: norm of the vector.
        seed: of the stream it is drawn from.
        number: which vector of that stream, 0 the first; topics of one run take one after another.

    Source: Li et al. 2024, arXiv 2403.03218, section 4; entries are not centered, so two vectors are alike (cosine
    about 0.75).
    """
    import torch

    drawn = torch.rand(number + 1, size, generator=torch.Generator().manual_seed(seed))[number]
    return coefficient * drawn / drawn.norm()


def steered(hidden: Tensor, target: Tensor) -> Tensor:
    """Mean over the hidden size of (hidden - target)^2 at each position: how far RMU's activations are from their aim.

    At least float32, [...].

    Args:
        hidden: block outputs of the model being changed, shape [..., size].
        target: a control vector [size] on the forget set; the untouched model's block outputs [..., size] on the
            retain set.

    Source: Li et al. 2024, arXiv 2403.03218, section 4, which sums over the hidden size; the published code takes the
    mean.
    """
    import torch

    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) - target.to(hidden.device, wide)).square().mean(dim=-1)


_control = functools.lru_cache(maxsize=4)(control_vector)


def _block(options: Options, _: int) -> tuple[int, ...]:
    return (int(options["rmu_block"]),)


def _states(output: StepOutput, block: float, columns: str) -> Tensor:
    """Outputs of a block at the columns that the field `columns` of a StepOutput names, [states, hidden size]."""
    states: Tensor = output.hidden(int(block))[getattr(output, columns)]
    return states


def _steer(columns: str, outputs: Outputs, *, rmu_block: int, steering: float, control_seed: int = 42) -> TermValue:
    states = _states(outputs.model["answer"], rmu_block, columns)
    return summed(steered(states, _control(states.shape[1], steering, int(control_seed))))


@objective("rmu_ce", forget="rmu", retain="ce")
@objective("rmu_kl", forget="rmu", retain="kl")
@objective("rmu", retain="activation_mse")
@term(
    "rmu",
    per="state",
    hidden=_block,
    reads_head=False,
    quirks={"rmu_answer_states": Variant("token", functools.partial(_steer, "answer"))},
)
def rmu(outputs: Outputs, *, rmu_block: int, steering: float, control_seed: int = 42) -> TermValue:
    """Steer a block's output to a fixed random vector (representation misdirection).

    See `steered`.
    """
    return _steer("states", outputs, rmu_block=rmu_block, steering=steering, control_seed=control_seed)


def _hold(columns: str, outputs: Outputs, *, rmu_block: int) -> TermValue:
    """Columns of both passes are in one order, however wide each was padded."""
    both = (outputs.model["retain"], outputs.reference["retain"])
    return summed(steered(*(_states(output, rmu_block, columns) for output in both)))


@term(
    "activation_mse",
    side="retain",
    per="state",
    continuations=("retain",),
    reference="hidden",
    hidden=_block,
    reads_head=False,
    quirks={"rmu_answer_states": Variant("token", functools.partial(_hold, "answer"))},
)
def activation_mse(outputs: Outputs, *, rmu_block: int) -> TermValue:
    """Hold a block's output where the untouched model has it.

    See `steered`.
    """
    return _hold("states", outputs, rmu_block=rmu_block)


def random_table(vocabulary: int, size: int, seed: int) -> Tensor:
    """Fixed random vector of every token, entries standard normal: float32, shape [vocabulary, size].

    Drawn on the CPU, so that it is the same on every device.
    """
    import torch

    return torch.randn(vocabulary, size, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=1)
def _table(vocabulary: int, size: int, seed: int, device: torch.device) -> Tensor:
    return random_table(vocabulary, size, seed).to(device)


def random_mapping(hidden: Tensor, target: Tensor) -> Tensor:
    """Distance of states from a line through fixed random vectors: 1 - |cos(hidden, target)| at each position.

    A state that points away from its vector is as near as one that points along it. At least float32, in [0, 1]:
    [positions].

    Args:
        hidden: states of the model being changed, shape [positions, size].
        target: the random vector of the token at each position, the same shape.

    Source: Tamirisa et al. 2024 (TAR), arXiv 2408.00761; LLM360's Analysis360, whose README calls it random matching.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    wide = torch.promote_types(hidden.dtype, torch.float32)
    return 1 - cosine_similarity(hidden.to(wide), target.to(hidden.device, wide), dim=-1).abs()


def _mapped_at(where: Tensor, output: StepOutput, seed: float) -> TermValue:
    """Mean over the embeddings and the output of every block, at the columns `where`, a mask [batch, length]."""
    vocabulary = output.logits(where.new_zeros(where.shape)).shape[1]
    states = list(output.hidden_states.values())
    table = _table(vocabulary, states[0].shape[-1], int(seed), states[0].device)
    target = table[output.input_ids[where]]  # [positions, hidden size]
    total = sum((random_mapping(state[where], target).sum() for state in states), states[0].new_zeros(()))
    return TermValue(total / len(states), len(target))


def _mapped_everywhere(outputs: Outputs, *, control_seed: int = 42) -> TermValue:
    output = outputs.model["answer"]
    return _mapped_at(output.answer.new_ones(output.answer.shape), output, control_seed)


@objective("random_matching", forget="random_mapping", retain="ce")
@objective("random_mapping", retain="ce")
@term(
    "random_mapping",
    per="state",
    hidden=lambda _, depth: (EMBEDDINGS, *range(depth)),
    quirks={"random_mapping_all_positions": Variant("position", _mapped_everywhere)},
)
def mapped(outputs: Outputs, *, control_seed: int = 42) -> TermValue:
    """Turn the states of every block towards a fixed random vector of the token, 1 - |cos|.

    See `random_mapping`. Published, the last state is the one after the final norm; here the one before it, as every
    hidden state.
    """
    output = outputs.model["answer"]
    return _mapped_at(output.states, output, control_seed)
