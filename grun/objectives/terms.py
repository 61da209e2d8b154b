"""What a term of an objective is, and the two decorators that add one: `term` and `objective`.

A term is a pure function of forward passes (StepOutputs) that returns a sum and the count it is over. The trainer
divides by the count over the whole global batch, so micro-batches, length buckets and processes cannot change a loss.

A new objective is one file in this package: a loss formula, decorated with what it reads.

    @objective("mine", retain="ce")
    @term("mine", per="token", inputs=token_logprobs)
    def mine(logprobs, *, beta: float = 0.1):
        \"\"\"What `python -m grun list terms` prints. ...\"\"\"
        return ...  # one value an answer token

Keyword-only arguments are the term's options: fields of `grun.config.options.LossConfig`, whose published defaults
stand in the signature; one without a default must be set by the user.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from grun.registry import Registry, summary

if TYPE_CHECKING:
    from torch import Tensor

    from grun.data.encoding import Batch
    from grun.method.parametrization import StepOutput

Continuation = str
"""A pass over rows: of forget rows "answer", "refusal" or "alternate", of retain rows "retain"."""
Options = Mapping[str, float]
"""Values of a term's options in a run, by name."""
Side = Literal["forget", "retain", "gate"]
Unit = Literal["token", "later_token", "row", "state", "position", "later_position"]
"""What a term is a mean over.

token: answer tokens. later_token: answer tokens but the first of each row. row: rows. state: columns of the hidden
states from the last prompt token to the last answer token. position: all columns of the padded batch. later_position:
all columns but the first.
"""
Reference = Literal["none", "logprobs", "logits", "all_logits", "hidden"]
"""What a term reads of the untouched model; each includes those before it.

logprobs: log-probabilities of the answer tokens. logits: logits that predict them. all_logits: logits at every
position, padding included. hidden: outputs of the blocks that the term names in `hidden`.
"""
F = TypeVar("F", bound=Callable[..., Any])


class TermValue(NamedTuple):
    """Value of a term on one batch: (sum, count)."""

    total: Tensor
    """Sum over what the term counts, a scalar with gradient."""
    number: int | Tensor
    """How many were summed over; a tensor without dimensions where a mask tells, so that nobody waits."""


@dataclass
class Outputs:
    """Forward passes of one batch, those that the objective's terms asked for."""

    model: Mapping[Continuation, StepOutput]
    """Under the model being changed."""
    reference: Mapping[Continuation, StepOutput]
    """Under the untouched model, without gradients; of a term with a teacher, what that is asked instead."""


def no_blocks(options: Options, depth: int) -> tuple[int, ...]:
    """For terms that read no hidden states."""
    return ()


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
    hidden: Callable[[Options, int], tuple[int, ...]] = no_blocks
    """Blocks whose hidden states it reads, of a model with `depth` blocks; EMBEDDINGS for the embeddings."""
    reads_head: bool = True
    """Whether it reads log-probabilities or logits, and not hidden states alone."""
    teacher: bool = False
    """Whether what it reads of the untouched model is asked about others (`grun.training.teacher`); forget terms."""
    options: Mapping[str, float | None] = field(default_factory=dict)
    """Options with their published defaults; None: must be set."""
    dual: Callable[[float, float, int, Options], float] | None = None
    """Of forget terms: (retain weight, retain term over the whole step, finished epochs, options) -> retain weight of
    the next step. None: weights are constant."""
    quirks: Mapping[str, Term] = field(default_factory=dict)
    """Published variants, by the name of the quirk that puts them in the place of this one."""


Inputs = Callable[[Outputs], tuple[Any, ...]]
"""From Outputs to the arguments of a loss."""


@dataclass(frozen=True)
class Variant:
    """How a term differs under a published quirk."""

    per: Unit
    function: Callable[..., Any] | None = None
    """In the place of the term's own function, and `inputs` in the place of its inputs; None: the term's own."""
    inputs: Inputs | None = None
    reference: Reference | None = None


@dataclass(frozen=True)
class Preset:
    """A published pair of terms, by name; weights that are unset in the options are these."""

    forget: str
    retain: str
    forget_weight: float = 1.0
    retain_weight: float = 1.0


TERMS: Registry[Term] = Registry("term", "grun.objectives")
OBJECTIVES: Registry[Preset] = Registry("objective", "grun.objectives")


def term(
    name: str,
    *,
    per: Unit,
    side: Side = "forget",
    continuations: tuple[Continuation, ...] = ("answer",),
    inputs: Inputs | None = None,
    reference: Reference = "none",
    hidden: Callable[[Options, int], tuple[int, ...]] = no_blocks,
    reads_head: bool = True,
    teacher: bool = False,
    dual: Callable[..., float] | None = None,
    quirks: Mapping[str, Variant] | None = None,
) -> Callable[[F], F]:
    """Return a decorator that registers a loss as the term `name`, and gives it back as it is.

    Args:
        name: what `loss.forget`, `loss.retain` or `loss.gate` calls it.
        per: see `Term`, as for `side`, `continuations`, `reference`, `hidden`, `reads_head`, `teacher`.
        inputs: from Outputs to the arguments of the loss, which gives a value for each of `per`. None: the loss takes
            the Outputs themselves, and gives a TermValue.
        dual: (retain weight, retain term, finished epochs) -> next retain weight, its keyword-only arguments options.
        quirks: by the quirk's name, how the term differs under it.
    """

    def register(function: F) -> F:
        options = {**_options_of(function), **(_options_of(dual) if dual else {})}
        stepped = None if dual is None else _with_own_options(dual)
        value = _value_of(function, inputs)
        made = Term(side, per, continuations, value, reference, hidden, reads_head, teacher, options, stepped)
        variants = {
            quirk: replace(
                made,
                per=variant.per,
                function=_value_of(variant.function or function, variant.inputs),
                reference=variant.reference or reference,
            )
            for quirk, variant in (quirks or {}).items()
        }
        TERMS.add(name, replace(made, quirks=variants), f"{side}: {summary(function)}")
        return function

    return register


def objective(
    name: str, *, forget: str | None = None, retain: str = "none", forget_weight: float = 1.0
) -> Callable[[F], F]:
    """Return a decorator, for above `term`, that makes a preset of a forget term and a retain term of weight 1.

    A name never changes its meaning. `forget` is `name` where it is not given.
    """
    preset = Preset(forget or name, retain, forget_weight)

    def register(function: F) -> F:
        weighed = preset.forget if forget_weight == 1 else f"{forget_weight:g} {preset.forget}"
        terms = weighed if retain == "none" else f"{weighed} + {retain}"
        OBJECTIVES.add(name, preset, f"{terms}: {summary(function)}")
        return function

    return register


def _options_of(function: Callable[..., Any]) -> dict[str, float | None]:
    """Keyword-only arguments of a function with their defaults, None where they have none."""
    found = inspect.signature(function).parameters.values()
    return {
        one.name: None if one.default is one.empty else one.default for one in found if one.kind is one.KEYWORD_ONLY
    }


def _with_own_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with all options as its last argument, of which it is given its own."""
    own = _options_of(function)
    return lambda *arguments: function(*arguments[:-1], **{name: arguments[-1][name] for name in own})


def _value_of(function: Callable[..., Any], inputs: Inputs | None) -> Callable[[Outputs, Options], TermValue]:
    """A term's function of its loss and what that reads."""
    loss = _with_own_options(function)
    if inputs is None:
        return loss
    return lambda outputs, options: summed(loss(*inputs(outputs), options))


# -- what losses read -------------------------------------------------------------------------------------------------


def token_logprobs(outputs: Outputs) -> tuple[Tensor]:
    """Log-probabilities of the answer tokens of forget rows, nats, [answer tokens]."""
    output = outputs.model["answer"]
    return (output.token_logprobs[output.answer],)


def answer_logits(outputs: Outputs) -> tuple[Tensor]:
    """Logits that predict the answer tokens of forget rows, [answer tokens, vocabulary]."""
    return (outputs.model["answer"].answer_logits(),)


def answer_logits_and_tokens(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The same, and the tokens, [answer tokens]."""
    output = outputs.model["answer"]
    return output.answer_logits(), output.answer_tokens


def negative_log_likelihood(output: StepOutput) -> TermValue:
    """Sum over answer tokens of -log p, nats, and their count."""
    return TermValue(-output.token_logprobs.sum(), output.answer.sum())


def summed(values: Tensor) -> TermValue:
    """Sum and number of the values of tokens or rows, shape [count]."""
    return TermValue(values.sum(), len(values))


def number_of(per: Unit, batch: Batch) -> int:
    """How many of `per` a batch holds: the count that a term's function returns, known before any pass is run.

    Rows that are no tensors yet become none.
    """
    from grun.data.encoding import RowsAlone

    if isinstance(batch, RowsAlone):
        answers, length = [len(row.answer_ids) for row in batch.encoded], max(map(len, batch.encoded))
    else:
        answers, length = (batch.labels != -100).sum(dim=1).tolist(), batch.labels.shape[1]
    counts = {
        "token": sum(answers),
        "later_token": sum(max(0, count - 1) for count in answers),
        "row": len(answers),
        "state": sum(count + 1 for count in answers if count),  # the token before each answer too
    }
    return counts.get(per, len(answers) * (length - (per == "later_position")))
