"""Forget terms: what is to be unlearned, read from forget rows with answers or with refusals. `none` is no term."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from grun.method.parametrization import EMBEDDINGS
from grun.objectives.losses import (
    ceu,
    control_vector,
    dpo,
    dual_step,
    max_entropy,
    min_posterior,
    npo,
    pdu,
    random_mapping,
    random_table,
    satimp,
    simnpo,
    steered,
    undial,
    wga,
)
from grun.objectives.terms import TERMS, Options, Outputs, Term, TermValue, Unit, negative_log_likelihood, summed, term

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grun.method.parametrization import StepOutput


@term(
    "ga",
    "gradient ascent on the answer, -CE (unbounded; loss.ascent_cap bounds each row)",
    side="forget",
    per="token",
    continuations=("answer",),
    options={"ascent_cap": math.inf},
)
def _ga(outputs: Outputs, options: Options) -> TermValue:
    """With a cap, a row adds -min(its mean CE, cap) * its tokens: above the cap it has no gradient."""
    output = outputs.model["answer"]
    total, count = negative_log_likelihood(output)
    if math.isinf(options["ascent_cap"]):
        return TermValue(-total, count)
    lengths = output.answer_counts
    mean = -output.answer_logprobs / lengths.clamp(min=1)  # nats a token, [batch]
    return TermValue(-(mean.clamp(max=options["ascent_cap"]) * lengths).sum(), count)


@term(
    "ga_sum",
    "gradient ascent on the summed CE of each answer, mean over rows (unbounded)",
    side="forget",
    per="row",
    continuations=("answer",),
)
def _ga_sum(outputs: Outputs, _: Options) -> TermValue:
    return summed(outputs.model["answer"].answer_logprobs)


@term("idk", "CE of a refusal in place of the answer", side="forget", per="token", continuations=("refusal",))
def _idk(outputs: Outputs, _: Options) -> TermValue:
    return negative_log_likelihood(outputs.model["refusal"])


@term(
    "idk_concat",
    "CE of refusals and of retain answers in one token mean (holds its own retain part)",
    side="forget",
    per="token",
    continuations=("refusal", "retain"),
)
def _idk_concat(outputs: Outputs, _: Options) -> TermValue:
    refused, kept = (negative_log_likelihood(outputs.model[name]) for name in ("refusal", "retain"))
    return TermValue(refused.total + kept.total, refused.number + kept.number)


@term(
    "npo",
    "negative preference optimization (bounded)",
    side="forget",
    per="row",
    continuations=("answer",),
    reference="logprobs",
    options={"beta": 0.1},
)
def _npo(outputs: Outputs, options: Options) -> TermValue:
    policy, reference = outputs.model["answer"].answer_logprobs, outputs.reference["answer"].answer_logprobs
    return summed(npo(policy, reference, beta=options["beta"]))


@term(
    "dpo",
    "prefer a refusal to the answer, by direct preference optimization (bounded)",
    side="forget",
    per="row",
    continuations=("answer", "refusal"),
    reference="logprobs",
    options={"beta": 0.1},
)
def _dpo(outputs: Outputs, options: Options) -> TermValue:
    lose, win = (
        outputs.model[name].answer_logprobs - outputs.reference[name].answer_logprobs for name in ("answer", "refusal")
    )
    return summed(dpo(win, lose, beta=options["beta"]))


@term(
    "simnpo",
    "NPO without a reference, on the mean over an answer's tokens (bounded)",
    side="forget",
    per="row",
    continuations=("answer",),
    options={"beta": 2.5, "margin": 0.0},
)
def _simnpo(outputs: Outputs, options: Options) -> TermValue:
    output = outputs.model["answer"]
    lengths = output.answer_counts.clamp(min=1)
    return summed(simnpo(output.answer_logprobs, lengths, beta=options["beta"], margin=options["margin"]))


@term(
    "wga",
    "gradient ascent, each token weighted by p^beta",
    side="forget",
    per="token",
    continuations=("answer",),
    options={"beta": 1.0},
)
def _wga(outputs: Outputs, options: Options) -> TermValue:
    return summed(wga(_answer_token_logprobs(outputs), beta=options["beta"]))


@term(
    "satimp",
    "gradient ascent, each token weighted by p^beta1 * (1 - p)^beta2",
    side="forget",
    per="token",
    continuations=("answer",),
    options={"beta1": 5.0, "beta2": 1.0},
)
def _satimp(outputs: Outputs, options: Options) -> TermValue:
    return summed(satimp(_answer_token_logprobs(outputs), beta1=options["beta1"], beta2=options["beta2"]))


def _undial_all_positions(outputs: Outputs, options: Options) -> TermValue:
    """As open-unlearning: over prompt and padding too, where the ignored label -100 names a token from the end."""
    policy, reference = outputs.model["answer"], outputs.reference["answer"]
    predicting = policy.answer.new_ones(policy.answer.shape)
    predicting[:, -1] = False
    logits = policy.logits(predicting)
    tokens = policy.input_ids.where(policy.answer, policy.input_ids.new_tensor(-100 % logits.shape[1]))
    return summed(undial(logits, reference.logits(predicting), tokens[:, 1:].reshape(-1), beta=options["beta"]))


UNDIAL_BETA = 10.0
UNDIAL_ALL_POSITIONS = Term(
    "forget",
    "later_position",
    ("answer",),
    _undial_all_positions,
    reference="all_logits",
    options={"beta": UNDIAL_BETA},
)


@term(
    "undial",
    "distillation from the untouched model with the true token's logit lowered by beta",
    side="forget",
    per="token",
    continuations=("answer",),
    reference="logits",
    options={"beta": UNDIAL_BETA},
    quirks={"undial_all_positions": UNDIAL_ALL_POSITIONS},
)
def _undial(outputs: Outputs, options: Options) -> TermValue:
    policy, reference = outputs.model["answer"], outputs.reference["answer"]
    values = undial(policy.answer_logits(), reference.answer_logits(), policy.answer_tokens, beta=options["beta"])
    return summed(values)


@term(
    "ceu",
    "CE under the model's own distribution without the true token, but for each answer's first token",
    side="forget",
    per="later_token",
    continuations=("answer",),
)
def _ceu(outputs: Outputs, _: Options) -> TermValue:
    output = outputs.model["answer"]
    later = (output.answer & (output.answer.cumsum(dim=1) > 1))[output.answer]  # [answer tokens]
    return summed(ceu(output.answer_logits()[later], output.answer_tokens[later]))


def _pdu_dual(weight: float, retain: float, epochs: int, options: Options) -> float:
    if epochs < options["dual_warmup_epochs"]:
        return weight
    return dual_step(weight, retain, eta=options["eta"], epsilon=options["epsilon"])


@term(
    "pdu",
    "(largest logit - mean logit)^2, the retain weight a dual variable that holds the retain term at epsilon",
    side="forget",
    per="token",
    continuations=("answer",),
    options={"eta": 1.0, "epsilon": None, "dual_warmup_epochs": 5.0},
    dual=_pdu_dual,
)
def _pdu(outputs: Outputs, _: Options) -> TermValue:
    return summed(pdu(outputs.model["answer"].answer_logits()))


def _rmu_at(columns: str) -> Callable[[Outputs, Options], TermValue]:
    """The term rmu at the columns that the field `columns` of a StepOutput names."""

    def function(outputs: Outputs, options: Options) -> TermValue:
        output = outputs.model["answer"]
        states = output.hidden(int(options["rmu_block"]))[getattr(output, columns)]  # [states, hidden size]
        return summed(steered(states, _control_vector(states.shape[1], options["steering"], options["control_seed"])))

    return function


@functools.lru_cache(maxsize=4)
def _control_vector(size: int, coefficient: float, seed: float) -> Tensor:
    return control_vector(size, coefficient, int(seed))


def _rmu(per: Unit, columns: str, quirks: Mapping[str, Term] | None = None) -> Term:
    return Term(
        "forget",
        per,
        ("answer",),
        _rmu_at(columns),
        hidden=lambda options, _: (int(options["rmu_block"]),),
        reads_head=False,
        options={"rmu_block": None, "steering": None, "control_seed": 42.0},
        quirks=quirks or {},
    )


TERMS.add(
    "rmu",
    _rmu("state", "states", {"rmu_answer_states": _rmu("token", "answer")}),
    "forget: steer a block's output to a fixed random vector (representation misdirection)",
)


def _max_entropy_all_positions(outputs: Outputs, _: Options) -> TermValue:
    """As LLM360: prompt and padding are positions like any other, and so is the last column."""
    output = outputs.model["answer"]
    return summed(max_entropy(output.logits(output.answer.new_ones(output.answer.shape))))


@term(
    "max_entropy",
    "negative entropy of the predictions of answer tokens (bounded below by -ln V)",
    side="forget",
    per="token",
    continuations=("answer",),
    quirks={"max_entropy_all_positions": Term("forget", "position", ("answer",), _max_entropy_all_positions)},
)
def _max_entropy(outputs: Outputs, _: Options) -> TermValue:
    return summed(max_entropy(outputs.model["answer"].answer_logits()))


@term(
    "min_posterior",
    "-log(1 - p), 0 once log p < -15 (bounded below by 0)",
    side="forget",
    per="token",
    continuations=("answer",),
)
def _min_posterior(outputs: Outputs, _: Options) -> TermValue:
    output = outputs.model["answer"]
    return summed(min_posterior(output.answer_logits(), output.answer_tokens))


@functools.lru_cache(maxsize=1)
def _random_table(vocabulary: int, size: int, seed: int, device: torch.device) -> Tensor:
    return random_table(vocabulary, size, seed).to(device)


def _random_mapping_of(output: StepOutput, where: Tensor, options: Options) -> TermValue:
    """Mean over the embeddings and the output of every block, at the columns `where`, a mask [batch, length]."""
    vocabulary = output.logits(where.new_zeros(where.shape)).shape[1]
    states = list(output.hidden_states.values())
    table = _random_table(vocabulary, states[0].shape[-1], int(options["control_seed"]), states[0].device)
    target = table[output.input_ids[where]]  # [positions, hidden size]
    total = sum((random_mapping(state[where], target).sum() for state in states), states[0].new_zeros(()))
    return TermValue(total / len(states), len(target))


def _random_mapping(per: Unit, quirks: Mapping[str, Term] | None = None) -> Term:
    """Published, the last state is taken behind the final norm; here before it, as every hidden state."""

    def function(outputs: Outputs, options: Options) -> TermValue:
        output = outputs.model["answer"]
        where = output.states if per == "state" else output.answer.new_ones(output.answer.shape)
        return _random_mapping_of(output, where, options)

    return Term(
        "forget",
        per,
        ("answer",),
        function,
        hidden=lambda _, depth: (EMBEDDINGS, *range(depth)),
        options={"control_seed": 42.0},
        quirks=quirks or {},
    )


TERMS.add(
    "random_mapping",
    _random_mapping("state", {"random_mapping_all_positions": _random_mapping("position")}),
    "forget: turn the states of every block towards a fixed random vector of the token, 1 - |cos|",
)


def _answer_token_logprobs(outputs: Outputs) -> Tensor:
    """Log-probabilities of the answer tokens of forget rows, [answer tokens]."""
    output = outputs.model["answer"]
    return output.token_logprobs[output.answer]
