"""The losses themselves: tensors in, one value a row or token out. They know nothing of models or trainers.

What a loss weights by or aims at is constant where the docstring says so: no gradient flows through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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


def dpo(win: Tensor, lose: Tensor, *, beta: float) -> Tensor:
    """Direct preference optimization of refusals over answers, for each row.

    -(2 / beta) * log sigmoid(beta * (win_i - lose_i)). The factor 2 / beta, which DPO itself has not, makes it NPO
    where the win is left out.

    Args:
        win: log-ratio of each refusal, that is its summed log-probability minus that under the untouched model, nats,
            shape [batch].
        lose: the same of each answer, shape [batch].
        beta: inverse temperature, > 0.

    Returns:
        Shape [batch].

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; for unlearning Zhang et al. 2024, arXiv 2404.05868.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(beta * (win - lose))


def simnpo(policy: Tensor, lengths: Tensor, *, beta: float, margin: float) -> Tensor:
    """NPO without a reference, on the mean over an answer's tokens, for each row.

    -(2 / beta) * log sigmoid(beta * (-policy_i / length_i - margin))

    Args:
        policy: summed answer log-probabilities, nats, shape [batch].
        lengths: answer tokens of each row, shape [batch].
        beta: inverse temperature, > 0.
        margin: negative log-likelihood a token beyond which a row counts as forgotten, nats. The paper's gamma is
            beta * margin; the published code multiplies as here, and uses 0.

    Returns:
        Shape [batch].

    Source: Fan et al. 2024, arXiv 2410.07163.
    """
    from torch.nn.functional import logsigmoid

    return -(2 / beta) * logsigmoid(beta * (-policy / lengths - margin))


def wga(logprobs: Tensor, *, beta: float) -> Tensor:
    """Weighted gradient ascent: p^beta * log p for each token, the weight p^beta constant.

    Args:
        logprobs: log-probabilities of answer tokens, nats, shape [tokens].
        beta: how much less an unlikely token counts, > 0; towards 0 it is plain ascent.

    Returns:
        Shape [tokens].

    Source: Wang et al. 2025, arXiv 2502.19301.
    """
    return (beta * logprobs.detach()).exp() * logprobs


def satimp(logprobs: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """Ascent weighted by saturation and importance: p^beta1 * (1 - p)^beta2 * log p for each token, weights constant.

    Args:
        logprobs: log-probabilities of answer tokens, nats, shape [tokens].
        beta1: saturation, >= 0: how much less an unlikely token, forgotten already, counts.
        beta2: importance, >= 0: how much less a token that the model is sure of counts.

    Returns:
        Shape [tokens].

    Source: Yang et al. 2025, arXiv 2505.11953.
    """
    fixed = logprobs.detach()
    return (beta1 * fixed).exp() * (-fixed.expm1()).clamp(min=0) ** beta2 * logprobs


def undial(policy: Tensor, reference: Tensor, tokens: Tensor, *, beta: float) -> Tensor:
    """Self-distillation from the untouched model with the true token's logit lowered, for each token.

    Cross-entropy of softmax(policy) under softmax(reference - beta * onehot(token)).

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        reference: the same under the untouched model.
        tokens: the answer tokens, int64, shape [tokens].
        beta: by how much the true token's logit is lowered, > 0.

    Returns:
        Nats, shape [tokens].

    Source: Dong et al. 2024, arXiv 2402.10052.
    """
    lowered = reference.scatter_add(1, tokens.unsqueeze(1), reference.new_full((len(tokens), 1), -beta))
    return -(lowered.softmax(dim=-1) * policy.log_softmax(dim=-1)).sum(dim=-1)


def ceu(policy: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the model under its own distribution without the true token, for each token.

    The target, softmax(policy with the true token's logit at -inf), is constant.

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        tokens: the answer tokens, int64, shape [tokens].

    Returns:
        Nats, shape [tokens].

    Source: Yang 2025, arXiv 2503.01224.
    """
    target = policy.detach().scatter(1, tokens.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return -(target * policy.log_softmax(dim=-1)).sum(dim=-1)


def pdu(policy: Tensor) -> Tensor:
    """Distance of the logits from a uniform prediction: (largest - mean)^2 for each token, 0 where all are equal.

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].

    Returns:
        Shape [tokens].

    Source: Entesari et al. 2025, arXiv 2506.05314.
    """
    return (policy.max(dim=-1).values - policy.mean(dim=-1)) ** 2


def dual_step(weight: float, retain: float, *, eta: float, epsilon: float) -> float:
    """Weight of the retain term for the next step: max(0, weight + eta * (retain - epsilon)).

    Args:
        weight: in this step, the dual variable of the constraint retain <= epsilon.
        retain: the retain term over the whole of this step.
        eta: step size, > 0.
        epsilon: value up to which the retain term is let rise, >= 0.

    Source: Entesari et al. 2025, arXiv 2506.05314.
    """
    return max(0.0, weight + eta * (retain - epsilon))


def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """Divergence of the model's next-token distribution from the untouched one's, at each position.

    KL(p_ref || p) = sum_v p_ref(v) * (log p_ref(v) - log p(v)), nats; 0 where the model is still the reference.

    Args:
        policy: logits under the model being changed, shape [positions, vocabulary].
        reference: the same under the untouched model.

    Returns:
        Shape [positions].

    Source: Maini et al. 2024 (TOFU), arXiv 2401.06121; there the mean is over all positions.
    """
    expected = reference.log_softmax(dim=-1)
    return (expected.exp() * (expected - policy.log_softmax(dim=-1))).sum(dim=-1)


def control_vector(size: int, coefficient: float, seed: int, number: int = 0) -> Tensor:
    """Fixed direction that RMU steers activations to: coefficient * u / ||u||, entries of u uniform on [0, 1).

    Drawn on the CPU in float32, so that it is the same on every device and for a model of every type.

    Args:
        size: hidden size.
        coefficient: norm of the vector.
        seed: of the stream it is drawn from.
        number: which vector of that stream, 0 the first; topics of one run take one after another.

    Returns:
        Float32, shape [size].

    Source: Li et al. 2024, arXiv 2403.03218, section 4; entries are not centered, so two vectors are alike (cosine
    about 0.75).
    """
    import torch

    drawn = torch.rand(number + 1, size, generator=torch.Generator().manual_seed(seed))[number]
    return coefficient * drawn / drawn.norm()


def steered(hidden: Tensor, target: Tensor) -> Tensor:
    """Mean over the hidden size of (hidden - target)^2 at each position: how far RMU's activations are from their aim.

    Args:
        hidden: block outputs of the model being changed, shape [..., size].
        target: a control vector [size] on the forget set; the untouched model's block outputs [..., size] on the
            retain set.

    Returns:
        At least float32, shape [...].

    Source: Li et al. 2024, arXiv 2403.03218, section 4, which sums over the hidden size; the published code takes the
    mean.
    """
    import torch

    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) - target.to(hidden.device, wide)).square().mean(dim=-1)


def max_entropy(policy: Tensor) -> Tensor:
    """Negative entropy of the next-token distribution at each position: sum_v p(v) log p(v).

    Between -ln V, where the prediction is uniform, and 0.

    Args:
        policy: logits, shape [positions, vocabulary].

    Returns:
        Nats, shape [positions].

    Source: Tamirisa et al. 2024 (TAR), arXiv 2408.00761; LLM360's Analysis360.
    """
    logprobs = policy.log_softmax(dim=-1)
    return (logprobs.exp() * logprobs).sum(dim=-1)


UNLIKELY = -15.0
"""Log-probability below which `min_posterior` counts a token as forgotten, nats."""


def min_posterior(policy: Tensor, tokens: Tensor) -> Tensor:
    """Likelihood that anything but the token is said: -log(1 - p) for each token, 0 where log p < UNLIKELY.

    log(1 - p) is the difference of two log-sums of exponentials, that of all logits but the token's and that of all,
    so that it is exact where p is near 1.

    Args:
        policy: logits that predict the answer tokens, shape [tokens, vocabulary].
        tokens: the answer tokens, int64, shape [tokens].

    Returns:
        Nats, >= 0, shape [tokens]; forgotten tokens are among them, without a slope.

    Source: Tamirisa et al. 2024 (TAR), arXiv 2408.00761; LLM360's Analysis360.
    """
    index = tokens.unsqueeze(1)
    every = policy.logsumexp(dim=-1)
    others = policy.scatter(1, index, float("-inf")).logsumexp(dim=-1)
    forgotten = policy.gather(1, index).squeeze(1) - every < UNLIKELY
    return (every - others).masked_fill(forgotten, 0.0)


def random_table(vocabulary: int, size: int, seed: int) -> Tensor:
    """Fixed random vector of every token, entries standard normal: float32, shape [vocabulary, size].

    Drawn on the CPU, so that it is the same on every device.
    """
    import torch

    return torch.randn(vocabulary, size, generator=torch.Generator().manual_seed(seed))


def random_mapping(hidden: Tensor, target: Tensor) -> Tensor:
    """Distance of states from a line through fixed random vectors: 1 - |cos(hidden, target)| at each position.

    A state that points away from its vector is as near as one that points along it.

    Args:
        hidden: states of the model being changed, shape [positions, size].
        target: the random vector of the token at each position, the same shape.

    Returns:
        At least float32, in [0, 1], shape [positions].

    Source: Tamirisa et al. 2024 (TAR), arXiv 2408.00761; LLM360's Analysis360, whose README calls it random matching.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    wide = torch.promote_types(hidden.dtype, torch.float32)
    return 1 - cosine_similarity(hidden.to(wide), target.to(hidden.device, wide), dim=-1).abs()
