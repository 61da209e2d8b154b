"""How probable the right answer is: alone, among wrong answers, and against them (TOFU's truth ratio).

All arithmetic is on mean log-probabilities per token, the end token included, so that nothing under- or overflows.
Source: Maini et al. 2024, arXiv 2401.06121, section 2.2; the two forms of the truth ratio are those of its code.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from grun.evaluation.metrics.averages import exp, log_sum_exp, mean
from grun.evaluation.metrics.registry import HIGH, NO_QUIRKS, epsilon, metric
from grun.evaluation.table import ScoreRecord, Table

MEANS = ("geometric", "arithmetic")
"""Over a row's wrong answers: of their log-probabilities, or of their probabilities."""


def among(correct: float, wrong: Sequence[float], eps: float = 0.0) -> float:
    """P / (P + sum of the wrong answers' P + eps), of mean log-probabilities; the correct answer's share."""
    return math.exp(correct - log_sum_exp([correct, *wrong, *_log(eps)]))


def log_truth_ratio(correct: float, wrong: Sequence[float], over: str = "geometric", eps: float = 0.0) -> float:
    """log of R = P_wrong / (P_correct + eps), of mean log-probabilities per token, nats; at least one wrong answer.

    `over` is how the wrong ones become one, "geometric" (exp of the mean of logs) or "arithmetic" (mean of P).
    """
    if over == "geometric":
        together = math.fsum(wrong) / len(wrong)
    elif over == "arithmetic":
        together = log_sum_exp(wrong) - math.log(len(wrong))
    else:
        raise ValueError(f"over={over!r}: expected one of {', '.join(MEANS)}")
    return together - log_sum_exp([correct, *_log(eps)])


def near_one(log_ratio: float) -> float:
    """min(R, 1 / R): 1 where right and wrong answers are equally probable, 0 where one is certain."""
    return math.exp(-abs(log_ratio))


def below_one(log_ratio: float) -> float:
    """max(0, 1 - R): 1 where the right answer is certain, 0 where the wrong ones are as probable or more."""
    return -math.expm1(min(log_ratio, 0.0)) or 0.0  # not -0.0


def truth_score(name: str, log_ratios: Sequence[float]) -> float | None:
    """Mean of near_one over the rows of a set whose name starts with forget, of below_one over those of another."""
    if name.startswith("forget"):
        return mean([near_one(log_ratio) for log_ratio in log_ratios])
    return mean([below_one(log_ratio) for log_ratio in log_ratios])


def _log(eps: float) -> list[float]:
    return [math.log(eps)] if eps else []


def log_truth_ratios(
    table: Table, name: str, mean: str = "geometric", quirks: Collection[str] = NO_QUIRKS
) -> dict[int, float]:
    """Logarithms of `truth_ratios`."""
    pairs = _pairs(table, name, paraphrase=True)
    return {index: log_truth_ratio(*pair, over=mean, eps=epsilon(quirks)) for index, pair in pairs.items()}


def truth_ratios(
    table: Table, name: str, mean: str = "geometric", quirks: Collection[str] = NO_QUIRKS
) -> dict[int, float]:
    """R by row: P of the wrong answers over P of the correct one; empty unless every row of the set has both.

    The correct answer is the paraphrase in a set that has paraphrases, else the answer. `mean` is one of MEANS.
    """
    return {index: exp(log) for index, log in log_truth_ratios(table, name, mean, quirks).items()}


def _pairs(table: Table, name: str, paraphrase: bool) -> dict[int, tuple[float, list[float]]]:
    """By row, mean log p of the correct answer and of each wrong one; empty unless every row has them, and tokens."""
    answers, rephrased = table.scores_of(name), table.scores_of(name, "paraphrase")
    perturbed = table.scores_of(name, "perturbed")
    correct = _token_means(rephrased if paraphrase and rephrased else answers)
    wrong: dict[int, list[float]] = {}
    for record in perturbed:
        if record.logp:
            wrong.setdefault(record.index, []).append(math.fsum(record.logp) / len(record.logp))
    rows = {record.index for part in (answers, rephrased, perturbed) for record in part}
    whole = all(record.logp for record in perturbed) and rows == correct.keys() == wrong.keys()
    return {index: (correct[index], wrong[index]) for index in sorted(rows)} if whole else {}


def _token_means(records: Sequence[ScoreRecord]) -> dict[int, float]:
    return {record.index: math.fsum(record.logp) / len(record.logp) for record in records if record.logp}


@metric("probability", "probability", reads="scores")
def probability(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Probability per token of the reference answer, exp(mean log p) with the end token, mean over rows.

    Over the rows that have a token to score.
    """
    return mean([math.exp(log) for log in _token_means(table.scores_of(name)).values()])


@metric("perplexity", "perplexity", reads="scores", good="as before is good", range="1 and above")
def perplexity(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """exp of the mean negative log-likelihood of the tokens of plain texts, each text by itself.

    None for a set that asks something.
    """
    records = table.scores_of(name)
    losses = [-logp for record in records for logp in record.logp]
    return exp(math.fsum(losses) / len(losses)) if losses and not table.generations_of(name) else None


@metric("probability_normalized", "probability among choices", reads="scores")
def probability_normalized(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Probability of the reference answer as a share of its own and the wrong answers' (P as in probability), mean
    over rows.

    P / (P + sum of P_wrong), averaged; None unless every row has wrong answers.
    """
    pairs = _pairs(table, name, paraphrase=False)
    return mean([among(correct, wrong, epsilon(quirks)) for correct, wrong in pairs.values()])


@metric("truth_ratio", "truth ratio", reads="scores", good=HIGH)
def truth_ratio(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """R = P of wrong answers (geometric mean) / P of the right one: mean of min(R, 1/R) on forget, of max(0, 1 - R)
    elsewhere.

    TOFU's own aggregate.
    """
    return truth_score(name, list(log_truth_ratios(table, name, "geometric", quirks).values()))


@metric("truth_ratio_arithmetic", "truth ratio, arithmetic", reads="scores", good=HIGH)
def truth_ratio_arithmetic(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """truth_ratio with the arithmetic mean of the wrong answers' P, as TOFU's code during training.

    As printed in the TOFU paper, and as its evaluation during training computes it.
    """
    return truth_score(name, list(log_truth_ratios(table, name, "arithmetic", quirks).values()))


@metric("truth_ratio_grun_paper", "truth ratio, GRUN's paper", reads="scores")
def truth_ratio_grun_paper(table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
    """Mean of max(0, 1 - R) on every set, forget included, R arithmetic, as the GRUN paper reports it.

    The truth ratio of arXiv 2502.17823's code; no epsilon under any quirk.
    """
    return mean([below_one(log) for log in log_truth_ratios(table, name, "arithmetic").values()])
