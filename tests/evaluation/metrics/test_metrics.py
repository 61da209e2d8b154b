"""Every metric against its definition, computed another way: literal numbers, brute force over tokens, scipy."""

from __future__ import annotations

import itertools
import math
import re
import zlib as compression
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from grun.errors import RunError
from grun.evaluation.measure import gate_table, measure
from grun.evaluation.metrics import (
    METRICS,
    auc,
    is_degenerate,
    metrics_of,
    overall_metrics,
    reference_metrics,
    set_metrics,
    truth_ratios,
)
from grun.evaluation.metrics.averages import harmonic_mean, log_sum_exp
from grun.evaluation.metrics.likelihood import among, below_one, log_truth_ratio, near_one
from grun.evaluation.metrics.memorization import membership_auc, membership_scores, min_k
from grun.evaluation.metrics.reference import LEAST_P, Comparison, compare, privleak
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table

EPSILON = ("ratio_epsilon",)
FLOOR = ("extraction_strength_floor",)
PARTS = list(itertools.product(("retain", "real_authors", "world_facts"), ("generations", "scores")))


def record(
    name: str, index: int, logp: list[float], kind: str = "answer", variant: int = 0, **fields: object
) -> ScoreRecord:
    length = len(logp)
    values = {"prompt_tokens": 3, "answer_tokens": length, "ended": True, "compressed_bytes": 10, "logp": logp}
    values |= {"hit": [False] * length, "vocabulary_mean": [-1.0] * length, "vocabulary_variance": [0.5] * length}
    return ScoreRecord(set=name, index=index, kind=kind, variant=variant, **{**values, **fields})  # type: ignore[arg-type]


def tokens(p: float) -> list[float]:
    """Three different log-probabilities whose geometric mean is p."""
    return [math.log(p) - 0.3, math.log(p) + 0.1, math.log(p) + 0.2]


def row(name: str, index: int, answer: float, paraphrase: float | None, *wrong: float) -> list[ScoreRecord]:
    """Records of one row by the probability of each continuation."""
    records = [record(name, index, tokens(answer))]
    if paraphrase is not None:
        records.append(record(name, index, tokens(paraphrase), "paraphrase"))
    return [*records, *(record(name, index, tokens(p), "perturbed", n) for n, p in enumerate(wrong))]


def answer(
    name: str, reference: str, text: str, index: int = 0, question: str = "q", fact: str | None = None
) -> GenerationRecord:
    return GenerationRecord(name, index, question, reference, fact, text)


def compute(name: str, table: Table, of: str, quirks: tuple[str, ...] = ()) -> float | None:
    return METRICS.get(name).compute(table, of, quirks)


# -- likelihood -------------------------------------------------------------------------------------------------------

# (answer, paraphrase, wrong answers) of two rows
ROWS = [(0.9, 0.5, (0.1, 0.4)), (0.8, 0.2, (0.9, 0.1))]


def taught(name: str, paraphrased: bool = True) -> Table:
    found = [row(name, n, a, b if paraphrased else None, *wrong) for n, (a, b, wrong) in enumerate(ROWS)]
    return Table(scores=[record for records in found for record in records])


def test_probability_counts_the_end_token_and_the_normalized_one_the_wrong_answers() -> None:
    table = taught("real_authors", paraphrased=False)
    assert compute("probability", table, "real_authors") == pytest.approx((0.9 + 0.8) / 2)
    expected = (0.9 / (0.9 + 0.1 + 0.4) + 0.8 / (0.8 + 0.9 + 0.1)) / 2
    assert compute("probability_normalized", table, "real_authors") == pytest.approx(expected)
    # the paraphrase is not the answer
    assert compute("probability_normalized", taught("forget"), "forget") == pytest.approx(expected)
    for ended in (True, False):
        one = Table(scores=[record("forget", 0, [math.log(0.2), math.log(0.8)], ended=ended)])
        assert compute("probability", one, "forget") == pytest.approx(0.4)


def test_truth_ratios_compare_with_the_paraphrase_where_there_is_one() -> None:
    geometric = {0: math.sqrt(0.1 * 0.4) / 0.5, 1: math.sqrt(0.9 * 0.1) / 0.2}  # 0.4, 1.5
    arithmetic = {0: 0.25 / 0.5, 1: 0.5 / 0.2}
    assert truth_ratios(taught("forget"), "forget") == pytest.approx(geometric)
    assert truth_ratios(taught("forget"), "forget", "arithmetic") == pytest.approx(arithmetic)
    plain = {0: math.sqrt(0.1 * 0.4) / 0.9, 1: math.sqrt(0.9 * 0.1) / 0.8}
    assert truth_ratios(taught("world_facts", paraphrased=False), "world_facts") == pytest.approx(plain)


@pytest.mark.parametrize(
    ("name", "metric", "expected"),
    [
        ("forget", "truth_ratio", (0.4 + 1 / 1.5) / 2),
        ("retain", "truth_ratio", (0.6 + 0) / 2),
        ("forget", "truth_ratio_arithmetic", (0.5 + 1 / 2.5) / 2),
        ("retain", "truth_ratio_arithmetic", (0.5 + 0) / 2),
        ("forget", "truth_ratio_grun_paper", (0.5 + 0) / 2),
        ("retain", "truth_ratio_grun_paper", (0.5 + 0) / 2),
        ("forget_other", "truth_ratio", (0.4 + 1 / 1.5) / 2),
        ("heldout", "truth_ratio", (0.6 + 0) / 2),
    ],
)
def test_truth_ratio_scores(name: str, metric: str, expected: float) -> None:
    assert compute(metric, taught(name), name) == pytest.approx(expected)


def test_a_ratio_of_one_scores_one_on_forget_and_zero_elsewhere() -> None:
    for name, expected in (("forget", 1.0), ("retain", 0.0)):
        same = Table(scores=row(name, 0, 0.9, 0.3, 0.3, 0.3))
        assert compute("truth_ratio", same, name) == pytest.approx(expected, abs=1e-12)
    assert math.copysign(1, below_one(0.0)) == 1.0


@pytest.mark.parametrize("kind", ["answer", "paraphrase", "perturbed"])
def test_one_row_without_a_continuation_leaves_out_what_needs_it(kind: str) -> None:
    table = taught("forget")
    table.scores = [one for one in table.scores if not (one.index == 1 and one.kind == kind)]
    found = set_metrics(table)["forget"]
    # the paraphrase is the right answer of the truth ratio here, the answer that of the probability
    truth = {"truth_ratio", "truth_ratio_arithmetic", "truth_ratio_grun_paper"}
    assert truth & found.keys() == (truth if kind == "answer" else set())
    assert len(truth_ratios(table, "forget")) == (2 if kind == "answer" else 0)
    assert ("probability_normalized" in found) == (kind == "paraphrase")


def test_a_wrong_answer_without_tokens_is_a_missing_one() -> None:
    table = taught("forget")
    table.scores.append(record("forget", 1, [], "perturbed", 2))
    assert truth_ratios(table, "forget") == {}


def test_sets_without_wrong_answers_have_no_truth_ratio() -> None:
    table = Table(scores=[record("unknown", 0, [-1.0, -2.0])])
    plain_text = {"probability", "extraction_strength", "exact_memorization", "perplexity"}
    assert set(set_metrics(table)["unknown"]) == plain_text
    assert all(compute(name, table, "forget") is None for name in metrics_of("set"))


def test_perplexity_is_of_all_tokens_of_sets_that_ask_nothing() -> None:
    records = [record("texts", 0, [-1.0, -2.0, -3.0]), record("texts", 1, [-6.0]), record("asked", 0, [-1.0])]
    table = Table(scores=records, generations=[GenerationRecord("asked", 0, "q", "a", None, "a")])
    assert set_metrics(table)["texts"]["perplexity"] == pytest.approx(math.exp(12 / 4))
    assert compute("perplexity", table, "asked") is None
    assert compute("perplexity", Table(scores=[record("texts", 0, [-1500.0])]), "texts") == math.inf


def test_extreme_likelihoods_neither_overflow_nor_vanish() -> None:
    assert log_truth_ratio(-2000.0, [-1.0, -1.0]) == pytest.approx(1999.0)
    assert log_truth_ratio(-1.0, [-2000.0, -2000.0], "arithmetic") == pytest.approx(-1999.0)
    assert (near_one(1999.0), near_one(-1999.0), below_one(1999.0), below_one(-1999.0)) == (0.0, 0.0, 0.0, 1.0)
    assert among(-2000.0, [-2000.0]) == pytest.approx(0.5)
    far = Table(scores=[record("forget", 0, [-1500.0]), record("forget", 0, [-1.0], "perturbed")])
    assert truth_ratios(far, "forget") == {0: math.inf}
    assert set_metrics(far)["forget"]["truth_ratio"] == 0.0
    assert log_sum_exp([]) == -math.inf
    with pytest.raises(ValueError, match="geometric, arithmetic"):
        log_truth_ratio(-1.0, [-1.0], "harmonic")


def test_the_epsilon_of_open_unlearning_stands_in_every_denominator() -> None:
    eps, correct, wrong = 1e-10, 3e-10, (2e-10, 8e-10)
    ratio = math.sqrt(wrong[0] * wrong[1]) / (correct + eps)
    found = truth_ratios(Table(scores=row("forget", 0, 0.5, correct, *wrong)), "forget", quirks=EPSILON)
    assert found == pytest.approx({0: ratio})
    scores = [row("forget", 0, correct, None, *wrong), row("forget", 1, 0.5, None, 1e-11, 1e-11)]
    table = Table(scores=[one for records in scores for one in records])
    small = 1e-11 / (0.5 + eps)
    assert compute("truth_ratio", table, "forget", EPSILON) == pytest.approx(
        np.mean([min(r, 1 / (r + eps)) for r in (ratio, small)])
    )
    shares = [correct / (correct + sum(wrong) + eps), 0.5 / (0.5 + 2e-11 + eps)]
    assert compute("probability_normalized", table, "forget", EPSILON) == pytest.approx(np.mean(shares))
    for quirked in ("truth_ratio", "probability_normalized"):
        assert compute(quirked, table, "forget") != pytest.approx(compute(quirked, table, "forget", EPSILON), rel=1e-3)
    faint = Table(scores=row("retain", 0, correct, None, 1e-10, 1e-10))  # R is 1/3, with the epsilon 1/4
    assert compute("truth_ratio", faint, "retain", EPSILON) == pytest.approx(3 / 4)
    assert compute("truth_ratio_arithmetic", faint, "retain", EPSILON) == pytest.approx(3 / 4)
    assert compute("truth_ratio_grun_paper", faint, "retain", EPSILON) == pytest.approx(2 / 3)


# -- memorization -----------------------------------------------------------------------------------------------------


def suffix_brute_force(hit: list[bool]) -> float:
    return next((1 - k / len(hit) for k in range(len(hit)) if all(hit[k:])), 0.0)


@pytest.mark.parametrize("hit", list(itertools.product([False, True], repeat=4)))
def test_memorization_of_every_pattern_of_hits(hit: tuple[bool, ...]) -> None:
    """The last of the five tokens is the end token, which is always hit and never counts."""
    table = Table(scores=[record("forget", 0, [-1.0] * 5, hit=[*hit, True])])
    assert compute("exact_memorization", table, "forget") == pytest.approx(sum(hit) / 4)
    expected = suffix_brute_force(list(hit))
    assert compute("extraction_strength", table, "forget") == pytest.approx(expected)
    assert compute("extraction_strength", table, "forget", FLOOR) == pytest.approx(max(expected, 1 / 4))
    cut = Table(scores=[record("forget", 0, [-1.0] * 4, hit=list(hit), ended=False)])
    assert compute("extraction_strength", cut, "forget") == pytest.approx(expected)


def test_an_answer_of_the_end_token_alone_counts_for_no_memorization() -> None:
    alone = record("forget", 0, [-1.0], hit=[True])
    assert compute("exact_memorization", Table(scores=[alone]), "forget") is None
    assert compute("extraction_strength", Table(scores=[alone]), "forget", FLOOR) is None
    table = Table(scores=[alone, record("forget", 1, [-1.0] * 3, hit=[False, True, True])])
    assert compute("exact_memorization", table, "forget") == 0.5
    assert compute("extraction_strength", table, "forget") == 0.5


# -- membership -------------------------------------------------------------------------------------------------------


def test_membership_scores_of_one_answer() -> None:
    logp, mean, variance = [-5.0, -1.0, -3.0, -2.0, -4.0, -0.5], [-2.0] * 6, [4.0, 1.0, 0.25, 0.0, 1.0, 1.0]
    size = len(compression.compress(b"an answer"))
    fields = {"vocabulary_mean": mean, "vocabulary_variance": variance, "compressed_bytes": size}
    table = Table(scores=[record("forget", 7, logp, **fields)])
    # 5 tokens without the end token, of which floor(0.4 * 5) = 2 are looked at
    expected = {
        "loss": 15.5 / 6,
        "zlib": 15.5 / 6 / size,
        "min_k": (5.0 + 4.0) / 2,
        "min_k_plus_plus": 2.0,  # -1.5, 1, -2, 0 / 0.001, -2: the lowest are -2 and -2
    }
    for attack, value in expected.items():
        assert membership_scores(table, "forget", attack) == pytest.approx({7: value}), attack
    uncut = Table(scores=[record("forget", 7, logp[:5], ended=False)])
    assert membership_scores(uncut, "forget", "min_k") == pytest.approx({7: 4.5})


def test_min_k_looks_at_one_token_at_least_and_its_variance_has_a_floor() -> None:
    assert min_k(record("forget", 0, [-3.0, -1.0], ended=False)) == 3.0
    assert min_k(record("forget", 0, [])) is None
    sure = record("forget", 0, [-1.0, 0.0], vocabulary_mean=[-0.5, 0.0], vocabulary_variance=[1e-12, 0.0])
    assert membership_scores(Table(scores=[sure]), "forget", "min_k_plus_plus") == pytest.approx({0: 0.5 / 1e-3})
    assert membership_scores(Table(scores=[record("forget", 0, [])]), "forget", "loss") == {}
    assert membership_scores(Table(scores=[record("forget", 0, [-1.0], compressed_bytes=0)]), "forget", "zlib") == {}


def test_an_auc_of_one_means_that_the_forget_set_looks_like_training_data() -> None:
    def table(forget: list[float], unknown: list[float]) -> Table:
        sets = {"forget": forget, "unknown": unknown}
        return Table(scores=[record(s, n, [logp, -9.0]) for s, logps in sets.items() for n, logp in enumerate(logps)])

    assert set(overall_metrics(table([-0.1, -0.2], [-3.0, -0.5]))) == {
        "mia_loss",
        "mia_zlib",
        "mia_min_k",
        "mia_min_k_plus_plus",
    }
    assert set(overall_metrics(table([-0.1, -0.2], [-3.0, -0.5])).values()) == {1.0}
    assert set(overall_metrics(table([-3.0], [-0.1, -0.2])).values()) == {0.0}
    forget, unknown = [-1.0, -2.0, -2.0, -4.0], [-2.0, -3.0, -1.0]
    pairs = [1.0 if u < f else 0.5 if u == f else 0.0 for f, u in itertools.product(forget, unknown)]
    assert membership_auc(table(forget, unknown), "min_k") == pytest.approx(sum(pairs) / len(pairs))
    assert overall_metrics(table(forget, [])) == {}


# -- answers and gates -------------------------------------------------------------------------------------------------


def gates(name: str, *values: float) -> list[GateRecord]:
    """Two blocks: 4 has the value, 5 one minus half of it."""
    return [GateRecord(name, index, {4: value, 5: 1 - value / 2}) for index, value in enumerate(values)]


def test_rouge_l_is_the_recall_of_the_stemmed_longest_common_subsequence() -> None:
    # "cats sitting" stems to "cat sit": 2 of the reference's 4 words stand in the answer in the same order
    table = Table(generations=[answer("forget", "the cat sits outside", "Cats sitting on a roof")])
    assert compute("rouge_l", table, "forget") == pytest.approx(2 / 4)
    table.generations.append(answer("forget", "the cat", ""))
    assert compute("rouge_l", table, "forget") == pytest.approx(1 / 4)


def test_fact_recall_ignores_case_and_white_space_and_needs_every_fact() -> None:
    table = Table(
        generations=[
            answer("forget", "x", "born in  new\nYORK.", fact="New York"),
            answer("forget", "x", "in Paris", fact="London"),
        ]
    )
    assert compute("fact_recall", table, "forget") == pytest.approx(0.5)
    table.generations.append(answer("forget", "x", "x"))
    assert compute("fact_recall", table, "forget") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", True), (" \n", True), ("a a a", False), ("a a a a", True), ("b a a a a b", True), ("a b a b a b a b", False)],
)
def test_degenerate_is_empty_or_one_word_more_than_three_times_running(text: str, expected: bool) -> None:
    assert is_degenerate(text) is expected
    assert compute("degenerate", Table(generations=[answer("forget", "x", text)]), "forget") == float(expected)


def test_auc_equals_brute_force_over_all_pairs_with_ties() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        positives, negatives = draw.integers(0, 5, 7).tolist(), draw.integers(0, 5, 11).tolist()
        pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positives, negatives)]
        assert auc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))
    assert auc([], [1.0]) is None
    assert auc([0.3, 0.3], [0.3]) == 0.5


def test_the_gate_table_by_block_and_over_blocks() -> None:
    table = Table(gates=gates("forget", 1.0, 0.8) + gates("retain", 0.0, 0.9) + gates("heldout", 0.2))
    found = gate_table(table)
    assert set(found["blocks"]) == {"4", "5"}
    block = found["blocks"]["4"]
    assert block["mean"] == pytest.approx({"forget": 0.9, "retain": 0.45, "heldout": 0.2})
    assert block["auc_heldout"] == 1.0
    assert block["auc_retain"] == pytest.approx(3 / 4)
    assert block["false_positive_rate"] == pytest.approx(1 / 3)
    assert block["open"] == {"forget": 1.0, "retain": 0.5, "heldout": 0.0}
    assert found["blocks"]["5"]["auc_heldout"] == 0.0
    # over blocks (v + 1 - v / 2) / 2: forget 0.75, 0.7; retain 0.5, 0.725; held-out 0.55; exactly 0.5 is not open
    assert found["mean"]["forget"] == pytest.approx(0.725)
    assert found["auc_retain"] == pytest.approx(3 / 4)
    assert found["false_positive_rate"] == pytest.approx(2 / 3)
    assert gate_table(Table()) == {}


def test_what_cannot_be_computed_is_left_out() -> None:
    measured = measure(Table([record("forget", 0, [-1.0, -2.0])], [answer("forget", "the cat sat", "x")]))
    found = set(measured["sets"]["forget"])
    assert {"rouge_l", "probability", "degenerate", "extraction_strength", "exact_memorization"} <= found
    assert not {"fact_recall", "probability_normalized", "truth_ratio", "truth_ratio_arithmetic"} & found
    assert "gate" not in measured
    assert measured["counts"] == {"forget": {"rows": 1, "answer_tokens": 2}}


# -- model utility ----------------------------------------------------------------------------------------------------


def useful() -> Table:
    """One row a set: P 0.5, paraphrase 0.4 on retain, wrong answers 0.1 and 0.2, two of four words recalled."""
    table = Table()
    for name in ("forget", "retain", "real_authors", "world_facts"):
        table.scores += row(name, 0, 0.5, 0.4 if name in ("forget", "retain") else None, 0.1, 0.2)
        table.generations.append(answer(name, "one two three four", "one two"))
    return table


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    wrong = math.sqrt(0.1 * 0.2)
    share = 0.5 / 0.8
    geometric = [0.5, 0.5, 1 - wrong / 0.4, *[share, 0.5, 1 - wrong / 0.5] * 2]
    arithmetic = [0.5, 0.5, 1 - 0.15 / 0.4, *[share, 0.5, 1 - 0.15 / 0.5] * 2]
    found = overall_metrics(useful())
    assert found["model_utility"] == pytest.approx(hmean(geometric))
    assert found["model_utility_arithmetic"] == pytest.approx(hmean(arithmetic))
    # what the model says on the forget set does not count
    table = useful()
    table.generations[0] = answer("forget", "one", "")
    assert overall_metrics(table) == found


def test_one_zero_makes_the_model_utility_exactly_zero() -> None:
    table = useful()
    table.generations[2] = answer("real_authors", "one two", "nothing")
    assert overall_metrics(table)["model_utility"] == 0.0
    certain = useful()  # R > 1: wrong answers are likelier
    certain.scores = [one for one in certain.scores if one.set != "retain"] + row("retain", 0, 0.5, 0.1, 0.9, 0.9)
    assert overall_metrics(certain)["model_utility"] == 0.0
    assert harmonic_mean([]) is None


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_one_missing_number_leaves_the_model_utility_out(name: str, part: str) -> None:
    table = useful()
    if part == "scores":
        table.scores = [one for one in table.scores if one.set != name or one.kind != "perturbed"]
    else:
        table.generations = [one for one in table.generations if one.set != name]
    assert not [key for key in overall_metrics(table) if key.startswith("model_utility")]


# -- against a retain-only model --------------------------------------------------------------------------------------


def random_table(seed: int, rows: int = 30, shift: float = 0.0, unknown: int = 20) -> Table:
    draw = np.random.default_rng(seed).uniform
    table = Table()
    for index in range(rows):
        wrong = draw(0.05, 0.6, 3) * math.exp(-shift)
        table.scores += row("forget", index, draw(0.1, 0.9), draw(0.1, 0.9), *wrong.tolist())
        table.generations.append(answer("forget", "x", "y", index, f"question {index}"))
    table.scores += [record("unknown", index, [draw(-3, 0), -1.0]) for index in range(unknown)]
    return table


def ratios(table: Table, over: str) -> list[float]:
    """Truth ratios from the records, probabilities first."""
    found = []
    for index in range(1 + max(one.index for one in table.scores_of("forget"))):
        right, *_ = (math.exp(np.mean(x.logp)) for x in table.scores_of("forget", "paraphrase") if x.index == index)
        wrong = [math.exp(np.mean(x.logp)) for x in table.scores_of("forget", "perturbed") if x.index == index]
        together = np.prod(wrong) ** (1 / len(wrong)) if over == "geometric" else np.mean(wrong)
        found.append(float(together) / right)
    return found


def test_forget_quality_is_the_ks_p_value_of_the_truth_ratios() -> None:
    table, reference = random_table(0, shift=0.5), random_table(1)
    found = reference_metrics(table, reference)
    geometric = ks_2samp(ratios(table, "geometric"), ratios(reference, "geometric")).pvalue
    arithmetic = ks_2samp(ratios(table, "arithmetic"), ratios(reference, "arithmetic")).pvalue
    assert 1e-6 < geometric < 0.9 and geometric != arithmetic
    assert found["forget_quality"] == pytest.approx(geometric)
    assert found["forget_quality_log10"] == pytest.approx(math.log10(geometric))
    assert found["forget_quality_arithmetic"] == pytest.approx(arithmetic)
    assert reference_metrics(table, table)["forget_quality"] == 1.0
    assert reference_metrics(table, table)["privleak"] == 0.0


def test_the_order_of_the_rows_does_not_matter() -> None:
    table, reference = random_table(0), random_table(1)
    turned = Table(table.scores[::-1], table.generations[::-1])
    assert reference_metrics(turned, reference) == pytest.approx(reference_metrics(table, reference))


def test_a_p_value_below_every_float_has_the_logarithm_of_the_smallest() -> None:
    assert Comparison(1.0, 0.0).log10 == pytest.approx(-323.306, abs=1e-3)
    assert LEAST_P > 0 and LEAST_P / 2 == 0
    assert Comparison(1.0, 1e-310).log10 > Comparison(1.0, 0.0).log10


def test_the_epsilon_ties_the_smallest_ratios_as_open_unlearning_does() -> None:
    ours, theirs = [1e-30, 2e-30, 3e-30, 1.0], [4e-30, 5e-30, 6e-30, 2.0]
    inverse = [[1 / (value + 1e-10) for value in sample] for sample in (ours, theirs)]
    logs = [[math.log(value) for value in sample] for sample in (ours, theirs)]
    assert compare(*logs, eps=1e-10).statistic == pytest.approx(ks_2samp(*inverse).statistic)
    assert compare(*logs).statistic == 0.75 != compare(*logs, eps=1e-10).statistic


def test_tables_of_different_splits_are_refused() -> None:
    other, moved, without = random_table(1), random_table(1, rows=31), random_table(1)
    other.generations[3] = answer("forget", "x", "y", 3, "Another question " * 10)
    moved.scores = [one for one in moved.scores if one.set != "forget" or one.index != 7]
    without.scores = [one for one in without.scores if one.kind != "paraphrase"]
    for reference, message in (
        (random_table(1, rows=40), "forget has 30 rows here, 40 in the reference.*same split"),
        (random_table(1, unknown=5), "unknown has 20 rows here, 5 in the reference"),
        (other, r"row 3 of forget asks something else here than in the reference"),
        (moved, "row 7 is in one of them alone"),
        (without, "30 paraphrased answers here, 0 in the reference"),
    ):
        with pytest.raises(RunError, match=message) as error:
            reference_metrics(random_table(0), reference)
        assert "\n" not in str(error.value)


def test_what_the_reference_lacks_is_absent() -> None:
    table, reference = random_table(0), random_table(1)
    reference.scores = [one for one in reference.scores if one.kind != "perturbed"]
    assert set(reference_metrics(table, reference)) == {"privleak"}
    assert reference_metrics(table, Table()) == {}
    table.scores = [one for one in table.scores if one.set != "unknown"]
    assert set(reference_metrics(table, random_table(1))) == {
        "forget_quality",
        "forget_quality_log10",
        "forget_quality_arithmetic",
    }


def test_privleak_is_the_change_of_one_minus_the_area_in_percent() -> None:
    assert privleak(0.9, 0.5) == pytest.approx(((1 - 0.9) - (1 - 0.5)) / (1 - 0.5) * 100)  # -80: still a member
    assert privleak(0.3, 0.5) == pytest.approx(40.0)
    assert privleak(0.9, 1.0) is None
    assert privleak(0.9, 1.0, 1e-10) == pytest.approx(1e11)
    assert privleak(None, 0.5) is None and privleak(0.5, None) is None
    table, reference = random_table(0), random_table(1)
    areas = [membership_auc(one, "min_k") for one in (table, reference)]
    assert areas[0] is not None and areas[1] is not None
    expected = ((1 - areas[0]) - (1 - areas[1])) / (1 - areas[1]) * 100
    assert reference_metrics(table, reference)["privleak"] == pytest.approx(expected)


# -- the registry and its page ----------------------------------------------------------------------------------------


def test_every_metric_says_its_range_and_which_way_is_good() -> None:
    assert {"rouge_l", "fact_recall", "probability", "degenerate", "gate_auc"} <= set(METRICS.names())
    for entry in METRICS:
        metric = METRICS.get(entry.name)
        assert metric.label and metric.help and "good" in metric.good
        assert entry.description.endswith(f"; {metric.range}, {metric.good}")


def test_gates_stay_out_of_the_metrics_of_a_set() -> None:
    table = Table([record("forget", 0, [-1.0, -1.0])], gates=[GateRecord("forget", 0, {1: 0.9})])
    assert not [name for name in set_metrics(table)["forget"] if name.startswith("gate")]
    assert compute("gate_mean", table, "forget") == 0.9


def test_the_page_of_metrics_names_none_that_is_not_there() -> None:
    """All of them stand on the page of names, which is made from the registry."""
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    tables = re.sub(r"\n## What comes back.*?(?=\n## )", "", text.split("## One number a set")[1], flags=re.DOTALL)
    documented = set(re.findall(r"^\| `(\w+)` \| ", tables, flags=re.MULTILINE))
    settings = {"max_new_tokens", "eos_masked_attention", *EPSILON, *FLOOR}
    assert settings < documented and documented - settings <= {*METRICS.names()}
