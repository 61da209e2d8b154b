"""The numbers of evaluated answers: their columns, and what these mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from grun.data.sets import evaluation_sets, in_order
from grun.evaluation.metrics import METRICS
from grun.report.result import Result, compared_terms, has_facts, metric_label, sets_of
from grun.report.tables import Column, Style, shown_columns, with_numbers

LOW, HIGH, TARGET = "low, as retain only", "high, as before", "as retain only"
OF_SETS = (
    *("fact_recall", "rouge_l", "probability", "probability_normalized", "truth_ratio", "truth_ratio_arithmetic"),
    *("truth_ratio_grun_paper", "extraction_strength", "exact_memorization", "perplexity"),
)
"""Metrics of a set, in their order."""
NAMES = {"probability_normalized": "probability"}
"""Shorter than the label of the metric."""
RATIOS = dict.fromkeys(("truth_ratio", "truth_ratio_arithmetic"), "high, as retain only")
GOOD = {
    "low": {"truth_ratio_grun_paper": "low"} | RATIOS | {"": LOW},
    "high": {"": HIGH},
    "same": {"": "as before"},
}
"""Which way is good, by what should become of a set and by metric; "": every other metric."""
READ = ("fact_recall", "rouge_l")
"""Metrics that cannot read some rows."""
WITH_FACTS = (
    *("forget.fact_recall", "forget.rouge_l", "forget_paraphrase.fact_recall", "retain.fact_recall"),
    *("heldout.fact_recall", "unknown.rouge_l", "forget.degenerate", "gate.auc"),
)
"""What comes first where the corpus has facts."""


def gate_auc(result: Result) -> float | None:
    """Forget against held-out; against retain where nothing is held out."""
    gate = result.evaluation.get("gate", {})
    value = gate.get("auc_heldout", gate.get("auc_retain"))
    return None if value is None else float(value)


def columns_by_key() -> dict[str, Column]:
    """Every column, in TOFU's order."""
    columns = []

    def add(place: str, metric: str, good: str, style: Style = "share", header: str = "", main: bool = True) -> None:
        reads: dict[str, Callable[[Result], float | None]] = {
            "overall": lambda result: result.overall.get(metric),
            "reference": lambda result: result.reference.get(metric),
            "gate": gate_auc,
        }
        read = reads.get(place) or (lambda result: result.metric(place, metric))
        columns.append(Column(f"{place}.{metric}", header or metric_label(metric), good, read, style, main))

    apart = "high; above 0.05 as retain only"
    add("reference", "forget_quality", apart, "p")
    add("reference", "forget_quality_log10", "high, near 0", "log10")
    add("reference", "forget_quality_arithmetic", apart, "p", main=False)
    add("overall", "model_utility", HIGH)
    add("overall", "model_utility_arithmetic", HIGH, main=False)
    for one in evaluation_sets().values():
        for metric in OF_SETS:
            if metric in (*one.metrics, *one.in_files):
                good = GOOD[one.good].get(metric, GOOD[one.good][""])
                header = f"{one.label} {NAMES.get(metric) or metric_label(metric)}"
                style: Style = "perplexity" if metric == "perplexity" else "share"
                add(one.name, metric, good, style, header, metric in one.metrics)
    add("forget", "degenerate", "low", header="forget degenerate")
    add("gate", "auc", "high, near 1", "auc", "gate AUC")
    for one in evaluation_sets().values():
        if one.good == "high":
            header, read = f"{one.label} {metric_label('gate_open')}", partial(_open, one.name)
            columns.append(Column(f"gate.open_{one.name}", header, "low", read, main=not one.for_tuning))
    for metric in ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"):
        add("overall", metric, TARGET)
    add("reference", "privleak", "near 0", "decimal")
    return {column.key: column for column in columns}


def columns_of(results: Sequence[Result]) -> list[Column]:
    """The columns that at least one model has a number for."""
    first, known = WITH_FACTS if has_facts(results) else (), columns_by_key()
    columns = [known[key] for key in dict.fromkeys((*first, *known))]
    for one in evaluation_sets().values():
        for metric in READ:
            header, read = f"{one.label} rows not read by {metric_label(metric)}", partial(_unread, one.name, metric)
            columns.append(Column(f"{one.name}.{metric}_unread", header, "0", read, "count", main=False))
    return with_numbers(columns, results)


def _open(name: str, result: Result) -> float | None:
    return result.evaluation.get("gate", {}).get("open", {}).get(name)


def _unread(name: str, metric: str, result: Result) -> float | None:
    return result.unread(name).get(metric)


def legend(results: Sequence[Result]) -> list[tuple[str, str]]:
    """What the rows, the sets and the numbers that are shown mean."""
    target = "a model never taught the forget set: the target for forgetting"
    rows = compared_terms(results, "the model before unlearning", target)
    rows.append(("the others", "the model after unlearning"))
    for one in in_order(sets_of(results)):
        rows.append((f"{one.label} set", f"{one.meaning}; good is {GOOD[one.good]['']}".removeprefix("; ")))
    keys = [column.key for column in shown_columns(columns_of(results))]
    metrics = {key.partition(".")[2] for key in keys}
    metrics |= {f"gate_{key[5:].partition('_')[0]}" for key in keys if key.startswith("gate.")}
    explained = [METRICS.get(name) for name in METRICS.names() if name in metrics]
    return rows + [(metric.label, metric.help) for metric in explained]
