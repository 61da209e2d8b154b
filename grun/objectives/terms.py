"""What a term of an objective is: a pure function of StepOutputs that returns a sum and the count it is over.

The trainer divides by the count of the whole global batch, so micro-batches, length buckets and processes cannot
change a loss. A term says what it counts, which continuations of a forget row it reads, what it must know of the
untouched model, and which options it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from grun.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from grun.data.encoding import Batch
    from grun.method.parametrization import StepOutput

Continuation = str
"""A pass over rows: of forget rows "answer" or "refusal", of retain rows "retain"."""
Options = Mapping[str, float]
"""What the options of a term are in a run, by name."""
Side = Literal["forget", "retain", "gate"]
Unit = Literal["token", "later_token", "row", "state", "position", "later_position"]
"""What a mean is over: answer tokens; rows; states from the last prompt token on; all columns of the padded batch.
Later: without each row's first."""
Reference = Literal["none", "logprobs", "logits", "all_logits", "hidden"]
"""What is read of the untouched model, each including those before it: answer log-probabilities; logits where answer
tokens are predicted; logits at every position, padding included; hidden states, those that the objective names."""


class TermValue(NamedTuple):
    """Value of a term on one batch: (sum, count)."""

    total: Tensor
    """Sum over what the term counts, a scalar with gradient."""
    number: int
    """How many were summed over."""


@dataclass
class Outputs:
    """Forward passes of one batch, those that the objective's terms asked for."""

    model: Mapping[Continuation, StepOutput]
    """Under the model being changed."""
    reference: Mapping[Continuation, StepOutput]
    """Under the untouched model, without gradients."""


@dataclass(frozen=True)
class Term:
    """One term and what the trainer must know about it."""

    side: Side
    per: Unit
    """What its count counts."""
    continuations: tuple[Continuation, ...]
    """Passes it reads. Counts of a token mean add up over them; a row mean over two passes is one over pairs."""
    function: Callable[[Outputs, Options], TermValue]
    reference: Reference = "none"
    """What it reads of the same passes under the untouched model."""
    hidden: Callable[[Options, int], tuple[int, ...]] = lambda options, depth: ()
    """Blocks whose hidden states it reads, of a model with `depth` blocks; EMBEDDINGS for the embeddings."""
    reads_head: bool = True
    """Whether it reads log-probabilities or logits, and not hidden states alone."""
    options: Mapping[str, float | None] = field(default_factory=dict)
    """Options, fields of `grun.config.options.LossConfig`, with their published defaults; None: must be set."""
    dual: Callable[[float, float, int, Options], float] | None = None
    """Of forget terms: (retain weight, retain term over the whole step, finished epochs, options) -> retain weight of
    the next step. None: weights are constant."""
    quirks: Mapping[str, Term] = field(default_factory=dict)
    """Published variants, by the name of the quirk that puts them in the place of this one."""


TERMS: Registry[Term] = Registry("term")

TermFunction = Callable[[Outputs, Options], TermValue]


def term(
    name: str,
    description: str,
    *,
    side: Side,
    per: Unit,
    continuations: tuple[Continuation, ...],
    reference: Reference = "none",
    hidden: Callable[[Options, int], tuple[int, ...]] = lambda options, depth: (),
    reads_head: bool = True,
    options: Mapping[str, float | None] | None = None,
    dual: Callable[[float, float, int, Options], float] | None = None,
    quirks: Mapping[str, Term] | None = None,
) -> Callable[[TermFunction], TermFunction]:
    """Return a decorator that registers a function as the term `name`; the other arguments are fields of `Term`."""

    def register(function: TermFunction) -> TermFunction:
        made = Term(
            side, per, continuations, function, reference, hidden, reads_head, options or {}, dual, quirks or {}
        )
        TERMS.add(name, made, f"{side}: {description}")
        return function

    return register


def number_of(per: Unit, batch: Batch) -> int:
    """How many of `per` a batch holds: the count that a term's function returns, known before any pass is run."""
    answer = batch.labels != -100
    if per == "token":
        return int(answer.sum())
    if per == "later_token":
        return int(answer.sum()) - int(answer.any(dim=1).sum())
    if per == "row":
        return batch.rows
    if per == "state":
        return int((answer | answer.roll(-1, dims=1)).sum())
    return answer.numel() - (batch.rows if per == "later_position" else 0)


def negative_log_likelihood(output: StepOutput) -> TermValue:
    """Sum over answer tokens of -log p, nats, and their count."""
    return TermValue(-output.token_logprobs.sum(), int(output.answer.sum()))


def summed(values: Tensor) -> TermValue:
    """Sum and number of the values of tokens or rows, shape [count]."""
    return TermValue(values.sum(), len(values))
