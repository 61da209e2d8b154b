"""Preference: bounded losses on how much less likely a whole answer has become."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grun.objectives.terms import Continuation, Outputs, objective, term

if TYPE_CHECKING:
    from torch import Tensor


def _answers(outputs: Outputs) -> tuple[Tensor, Tensor]:
    return outputs.model["answer"].answer_logprobs, outputs.reference["answer"].answer_logprobs


@objective("manual_npo_grad_diff", forget="npo", retain="ce_sum", forget_weight=0.1375)
@objective("npo_kl", forget="npo", retain="kl")
@objective("npo_only", forget="npo")
@objective("npo", retain="ce")
@term("npo", per="row", inputs=_answers, reference="logprobs")
def npo(policy: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimization, the bounded form of gradient ascent.

    -(2 / beta) * log sigmoid(-beta * (policy_i - reference_i)) for each row, [batch]; equals (2 / beta) * ln 2 where
    the model is still the reference.

    Args:
        policy: summed answer log-probabilities under the model being changed, nats, shape [batch].
        reference: the same under the untouched model, shape [batch].
        beta: inverse temperature, > 0; towards 0 the gradient becomes plain ascent.

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(-beta * (policy - reference))


def _ratio(outputs: Outputs, name: Continuation) -> Tensor:
    return outputs.model[name].answer_logprobs - outputs.reference[name].answer_logprobs


def _refusals_and_answers(outputs: Outputs) -> tuple[Tensor, Tensor]:
    return _ratio(outputs, "refusal"), _ratio(outputs, "answer")


@objective("dpo_kl", forget="dpo", retain="kl")
@objective("dpo_only", forget="dpo")
@objective("dpo", retain="ce")
@term("dpo", per="row", continuations=("answer", "refusal"), inputs=_refusals_and_answers, reference="logprobs")
def dpo(win: Tensor, lose: Tensor, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimization of a refusal over the answer (bounded).

    -(2 / beta) * log sigmoid(beta * (win_i - lose_i)) for each row, [batch]. The factor 2 / beta, which DPO itself
    has not, makes it NPO where the win is left out.

    Args:
        win: log-ratio of each refusal, that is its summed log-probability minus that under the untouched model, nats,
            shape [batch].
        lose: the same of each answer, shape [batch].
        beta: inverse temperature, > 0.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; for unlearning Zhang et al. 2024, arXiv 2404.05868.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(beta * (win - lose))


def _alternates_and_answers(outputs: Outputs) -> tuple[Tensor, Tensor]:
    return _ratio(outputs, "alternate"), _ratio(outputs, "answer")


@objective("altpo", retain="ce")
@term("altpo", per="row", continuations=("answer", "alternate"), inputs=_alternates_and_answers, reference="logprobs")
def altpo(win: Tensor, lose: Tensor, *, beta: float = 0.1) -> Tensor:
    """Preference of other answers, drawn from the model itself, over the answer (bounded).

    `dpo` with an alternate in the place of the refusal, of each row another one in each epoch
    (`grun.evaluation.alternates`).

    Args:
        win: log-ratio of each alternate, nats, shape [batch].
        lose: the same of each answer, shape [batch].
        beta: inverse temperature, > 0.

    Source: Mekala et al. 2024, arXiv 2409.13474.
    """
    return dpo(win, lose, beta=beta)


def _answers_and_lengths(outputs: Outputs) -> tuple[Tensor, Tensor]:
    output = outputs.model["answer"]
    return output.answer_logprobs, output.answer_counts.clamp(min=1)


@objective("simnpo_only", forget="simnpo")
@objective("simnpo", retain="ce", forget_weight=0.1375)
@term("simnpo", per="row", inputs=_answers_and_lengths)
def simnpo(policy: Tensor, lengths: Tensor, *, beta: float = 2.5, margin: float = 0.0) -> Tensor:
    """NPO without a reference, on the mean over an answer's tokens (bounded).

    -(2 / beta) * log sigmoid(beta * (-policy_i / length_i - margin)) for each row: [batch].

    Args:
        policy: summed answer log-probabilities, nats, shape [batch].
        lengths: answer tokens of each row, shape [batch].
        beta: inverse temperature, > 0.
        margin: negative log-likelihood a token beyond which a row counts as forgotten, nats. The paper's gamma is
            beta * margin; the published code multiplies as here, and uses 0.

    Source: Fan et al. 2024, arXiv 2410.07163.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(beta * (-policy / lengths - margin))
