"""Distillation: towards a distribution in which the true token is less likely, or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grun.objectives.terms import Outputs, Variant, objective, term

if TYPE_CHECKING:
    from torch import Tensor


def _of_both(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    policy, reference = outputs.model["answer"], outputs.reference["answer"]
    return policy.answer_logits(), reference.answer_logits(), policy.answer_tokens


def _of_both_everywhere(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """As open-unlearning: over prompt and padding too, where the ignored label -100 names a token from the end."""
    policy, reference = outputs.model["answer"], outputs.reference["answer"]
    predicting = policy.answer.new_ones(policy.answer.shape)
    predicting[:, -1] = False
    logits = policy.logits(predicting)
    tokens = policy.input_ids.where(policy.answer, policy.input_ids.new_tensor(-100 % logits.shape[1]))
    return logits, reference.logits(predicting), tokens[:, 1:].reshape(-1)


def _with_teacher(outputs: Outputs) -> tuple[Tensor, Tensor]:
    return _of_both(outputs)[:2]


@objective("undial")
@term(
    "undial",
    per="token",
    inputs=_of_both,
    reference="logits",
    quirks={"undial_all_positions": Variant("later_position", inputs=_of_both_everywhere, reference="all_logits")},
)
def undial(policy: Tensor, reference: Tensor, tokens: Tensor, *, beta: float = 10.0) -> Tensor:
    """Distillation from the untouched model with the true token's logit lowered by beta.

    Cross-entropy of softmax(policy) under softmax(reference - beta * onehot(token)) for each token, nats: [tokens].

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        reference: the same under the untouched model.
        tokens: the answer tokens, int64, shape [tokens].
        beta: by how much the true token's logit is lowered, > 0.

    Source: Dong et al. 2024, arXiv 2402.10052.
    """
    lowered = reference.scatter_add(1, tokens.unsqueeze(1), reference.new_full((len(tokens), 1), -beta))
    return -(lowered.softmax(dim=-1) * policy.log_softmax(dim=-1)).sum(dim=-1)


@objective("counterfactual_ce", forget="counterfactual", retain="ce")
@objective("counterfactual")
@term("counterfactual", per="token", inputs=_with_teacher, reference="logits", teacher=True)
def counterfactual(policy: Tensor, teacher: Tensor) -> Tensor:
    """KL from what the untouched model says of others under other names, averaged.

    KL(q || p) for each answer token, nats: [tokens]. q is the mean over K others of the untouched model's prediction
    where prompt and answer hold the other's name, the probability of that name given to the subject's
    (`grun.training.teacher`).

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        teacher: log q, the same shape.

    Source: Liu et al. 2024 ("Revisiting Who's Harry Potter"), arXiv 2407.16997.
    """
    from grun.objectives.retain import kl

    return kl(policy, teacher)


def _later_tokens(outputs: Outputs) -> tuple[Tensor, Tensor]:
    output = outputs.model["answer"]
    later = (output.answer & (output.answer.cumsum(dim=1) > 1))[output.answer]  # [answer tokens]
    return output.answer_logits()[later], output.answer_tokens[later]


@objective("ceu")
@term("ceu", per="later_token", inputs=_later_tokens)
def ceu(policy: Tensor, tokens: Tensor) -> Tensor:
    """CE under the model's own distribution without the true token, but for each answer's first token.

    The target, softmax(policy with the true token's logit at -inf), is constant. Nats: [tokens].

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        tokens: the answer tokens, int64, shape [tokens].

    Source: Yang 2025, arXiv 2503.01224.
    """
    target = policy.detach().scatter(1, tokens.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return -(target * policy.log_softmax(dim=-1)).sum(dim=-1)
