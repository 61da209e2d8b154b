"""The numbers of evaluated answers: their columns, what these mean, and summary.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from grun.data.sets import evaluation_sets, in_order
from grun.evaluation.metrics import METRICS
from grun.report.result import Result, compared_terms, has_facts, has_utility, main_metric, metric_label, sets_of
from grun.report.tables import Column, Style, with_numbers

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
"""What comes first where the corpus has facts; the columns of the printed table there."""
SHOWN = ("forget.rouge_l", "retain.rouge_l", "heldout.rouge_l", "unknown.rouge_l", "forget.degenerate", "gate.auc")
"""Columns of the printed table without facts."""
SHOWN_WITH_UTILITY = {
    "reference.forget_quality": "forget\nquality",
    "overall.model_utility": "model\nutility",
    "forget.rouge_l": "forget\nROUGE-L",
    "forget.probability": "forget\nprob.",
    "forget.truth_ratio": "forget\ntruth\nratio",
    "forget.extraction_strength": "extr.\nstr.",
    "retain.rouge_l": "retain\nROUGE-L",
    "real_authors.rouge_l": "authors\nROUGE-L",
    "world_facts.rouge_l": "facts\nROUGE-L",
    "heldout.rouge_l": "held-out\nROUGE-L",
    "gate.auc": "gate\nAUC",
}
"""The same where TOFU's model utility is known, with headers that fit."""


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


def columns_of(results: Sequence[Result], *, everything: bool = False) -> list[Column]:
    """The columns that at least one model has a number for: the main ones, or `everything`."""
    first, known = WITH_FACTS if has_facts(results) else (), columns_by_key()
    columns = [known[key] for key in dict.fromkeys((*first, *known))]
    for one in evaluation_sets().values():
        for metric in READ:
            header, read = f"{one.label} rows not read by {metric_label(metric)}", partial(_unread, one.name, metric)
            columns.append(Column(f"{one.name}.{metric}_unread", header, "0", read, "count", main=False))
    return with_numbers((column for column in columns if column.main or everything), results)


def _open(name: str, result: Result) -> float | None:
    return result.evaluation.get("gate", {}).get("open", {}).get(name)


def _unread(name: str, metric: str, result: Result) -> float | None:
    return result.unread(name).get(metric)


def narrow_columns(results: Sequence[Result]) -> list[tuple[Column, str]]:
    """Columns of the printed table with headers that fit."""
    facts, utility = has_facts(results), has_utility(results) and not has_facts(results)
    known, named = columns_by_key(), {key.split(".")[0] for key in (*WITH_FACTS, *SHOWN_WITH_UTILITY)}
    further = [one for name, one in evaluation_sets().items() if one.is_result and name not in named]
    main = main_metric(results)[0]
    low, high = ([f"{one.name}.{main}" for one in further if one.good == good] for good in ("low", "high"))
    first, *rest = SHOWN_WITH_UTILITY if utility else WITH_FACTS if facts else SHOWN
    if facts and any(name in sets_of(results) for name in (one.name for one in further)):
        rest = [key for key in rest if key not in ("forget.rouge_l", "unknown.rouge_l")]  # there would be no room
    keys = [first, *low, *rest, *high]
    headers = SHOWN_WITH_UTILITY if utility else {}
    columns = with_numbers((known[key] for key in keys if key in known), results)
    return [(column, headers.get(column.key, column.header.replace(" ", "\n"))) for column in columns]


def legend(results: Sequence[Result], columns: Sequence[Column]) -> list[tuple[str, str]]:
    """What the rows, the sets and the numbers of these columns mean."""
    target = "a model never taught the forget set: the target for forgetting"
    rows = compared_terms(results, "the model before unlearning", target)
    rows.append(("the others", "the model after unlearning"))
    for one in in_order(sets_of(results)):
        rows.append((f"{one.label} set", f"{one.meaning}; good is {GOOD[one.good]['']}".removeprefix("; ")))
    metrics = {column.key.partition(".")[2] for column in columns}
    metrics |= {f"gate_{column.key[5:].partition('_')[0]}" for column in columns if column.key.startswith("gate.")}
    explained = [METRICS.get(name) for name in METRICS.names() if name in metrics]
    return rows + [(metric.label, metric.help) for metric in explained]


# -- summary.json -----------------------------------------------------------------------------------------------------


def summarize(results: Sequence[Result], profile: str) -> dict[str, Any]:
    """Contents of summary.json. "gate" is keyed by objective, or by run where two runs share an objective."""
    objectives = [result.objective for result in results]
    gate = {}
    for result in results:
        if result.stage == "after" and "gate" in result.evaluation:
            alone = result.objective is not None and objectives.count(result.objective) == 1
            gate[result.objective if alone else result.name] = result.evaluation["gate"]
    rows = [
        {
            "name": result.name,
            "objective": result.objective,
            "parametrization": result.parametrization,
            "stage": result.stage,
            "metrics": result.evaluation["sets"],
            "overall": result.overall,
            "reference": result.reference,
            "unread": {name: rows for name in result.evaluation["sets"] if (rows := result.unread(name))},
        }
        for result in results
    ]
    return {"profile": profile, "rows": rows, "gate": gate, "seconds": seconds(results)}


def seconds(results: Sequence[Result]) -> dict[str, float]:
    """Seconds by stage: finetune/NAME where the model's own folder has them, unlearn/NAME, evaluate/NAME."""
    found = {f"{'unlearn' if one.run else 'finetune'}/{one.name}": one.record.get("seconds") for one in results}
    found |= {f"evaluate/{one.name}": one.evaluation.get("seconds", {}).get("total") for one in results}
    return {stage: float(spent) for stage, spent in found.items() if isinstance(spent, int | float)}
