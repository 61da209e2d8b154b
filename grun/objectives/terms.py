"""Terms of an objective: pure functions of StepOutputs that return a sum and the count it is over.

The trainer divides by the count of the whole global batch, so micro-batches, length buckets and processes cannot
change a loss. A term says whether its count is tokens or rows, which continuations of a forget row it needs, and
whether it needs what the untouched model says of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from grun.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from grun.config import LossConfig
    from grun.parametrization import StepOutput

Continuation = str
"""A pass over rows: of forget rows "answer" or "refusal", of retain rows "retain"."""


class TermValue(NamedTuple):
    """Value of a term on one batch: (sum, count)."""

    total: Tensor
    """Sum over tokens or rows, a scalar with gradient."""
    number: int
    """Tokens or rows summed over."""


@dataclass
class Outputs:
    """Forward passes of one batch, those that the objective's terms asked for."""

    model: dict[Continuation, StepOutput]
    """Under the model being changed."""
    reference: dict[Continuation, StepOutput]
    """Under the untouched model, without gradients."""


@dataclass(frozen=True)
class Term:
    """One term and what the trainer must know about it."""

    side: Literal["forget", "retain", "gate"]
    per: Literal["token", "row"]
    """What its count counts."""
    continuations: tuple[Continuation, ...]
    """Passes it reads."""
    function: Callable[[Outputs, LossConfig], TermValue]
    reference: bool = False
    """Whether it reads the same passes under the untouched model too."""
    hidden: Callable[[LossConfig], tuple[int, ...]] = lambda _: ()
    """Blocks whose hidden states it reads."""


TERMS: Registry[Term] = Registry("term")


def negative_log_likelihood(output: StepOutput) -> TermValue:
    """Sum over answer tokens of -log p, nats, and their count."""
    return TermValue(-output.token_logprobs.sum(), int(output.answer.sum()))


def npo(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Negative preference optimization, the bounded form of gradient ascent, for each row.

    -(2 / beta) * log sigmoid(-beta * (policy_i - reference_i)); equals (2 / beta) * ln 2 where the model is still the
    reference.

    Args:
        policy: summed answer log-probabilities under the model being changed, nats, shape [batch].
        reference: the same under the untouched model, shape [batch].
        beta: inverse temperature, > 0; towards 0 the gradient becomes plain ascent.

    Returns:
        Shape [batch].

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(-beta * (policy - reference))


def _ga(outputs: Outputs, _: LossConfig) -> TermValue:
    total, count = negative_log_likelihood(outputs.model["answer"])
    return TermValue(-total, count)


def _idk(outputs: Outputs, _: LossConfig) -> TermValue:
    return negative_log_likelihood(outputs.model["refusal"])


def _npo(outputs: Outputs, options: LossConfig) -> TermValue:
    policy = outputs.model["answer"].answer_logprobs
    reference = outputs.reference["answer"].answer_logprobs
    rows = npo(policy, reference, beta=options.beta)
    return TermValue(rows.sum(), len(rows))


def _ce(outputs: Outputs, _: LossConfig) -> TermValue:
    return negative_log_likelihood(outputs.model["retain"])


def _bce_row(outputs: Outputs, _: LossConfig) -> TermValue:
    import torch

    rows = []
    for continuation, output in outputs.model.items():
        if output.gate_logits is None or output.gate_mask is None:
            continue
        logits = torch.stack(list(output.gate_logits.values()))  # [blocks, batch, positions read]
        target = torch.full_like(logits, 0.0 if continuation == "retain" else 1.0)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        counted = output.gate_mask.to(loss.dtype)  # [batch, positions read]
        rows.append((loss * counted).sum(dim=2).div(counted.sum(dim=1).clamp(min=1)).mean(dim=0))
    if not rows:
        return TermValue(torch.zeros(()), 0)
    values = torch.cat(rows)  # [rows]
    return TermValue(values.sum(), len(values))


TERMS.add("ga", Term("forget", "token", ("answer",), _ga), "forget: gradient ascent on the answer, -CE (unbounded)")
TERMS.add("idk", Term("forget", "token", ("refusal",), _idk), "forget: CE of a refusal in place of the answer")
TERMS.add(
    "npo",
    Term("forget", "row", ("answer",), _npo, reference=True),
    "forget: negative preference optimization (bounded)",
)
TERMS.add("ce", Term("retain", "token", ("retain",), _ce), "retain: CE of the answer")
TERMS.add(
    "bce_row",
    Term("gate", "row", (), _bce_row),
    "gate: BCE on gate logits, forget rows 1, retain rows 0, mean over blocks",
)
