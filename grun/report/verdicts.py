"""What the numbers mean: has a run forgotten as far as the target, and kept what the model knew before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grun.data.sets import set_label
from grun.report.results import DISTINGUISHABLE, Result, before_of, main_metric, target_of, unread_words
from grun.report.tables import number, p_value

KNOWN_BEFORE = 0.95
"""Fact recall on forget below which the taught model did not know what is to be forgotten."""
STATEMENT = (
    "The base weights still contain the data; the effect exists where the adapter is loaded. "
    "It controls the model's output and is not erasure of weights."
)


@dataclass(frozen=True)
class Judgement:
    """A verdict, and whether it is good."""

    outcome: Literal["reached", "missed", "open"]
    """open: there is no target, no before, or no forget set to judge by, or a set of which no answer can be read."""
    words: str
    """The outcome as the sentence says it, first after the label."""
    sentence: str


def verdict(result: Result, results: Sequence[Result]) -> str:
    """`judge` as one sentence."""
    return judge(result, results).sentence


def judge(result: Result, results: Sequence[Result]) -> Judgement:
    """Whether a run has forgotten and kept enough.

    Forgotten: fact recall on forget at most max(0.05, target + 0.05), and ROUGE-L at most target + 0.05. Kept: at
    least 95 % of before on retain and 90 % on held-out. Without facts ROUGE-L stands for fact recall. Where the taught
    model did not know the forget facts, no answer of a set can be read, or nothing else was measured, nothing is said
    to be forgotten. Forget
    quality and model utility are told; where forget quality tells the model from the target, only its answers are said
    to be forgotten.
    """
    metric, metric_name = main_metric(results)
    before, target = before_of(result, results), target_of(result, results)
    now = result.metric("forget", metric)
    unread = [text.removesuffix(".") for text in unread_words([result], ("forget", "retain", "heldout"))]
    if now is None:
        why = "".join(f", {text}" for text in unread) or ", the forget set was not evaluated"
        return Judgement("open", "no verdict", f"{result.label}: no verdict{why}.")
    taught, wanted = (one.metric("forget", metric) if one else None for one in (before, target))
    facts = f"{metric_name} on forget {number(taught)} -> {now:.2f}"
    failures = []
    if target is None:
        facts += " (no target to compare with: evaluate a retain-only model)"
    else:
        facts += f" (target {number(wanted)})"
        for name, text, least in (("fact_recall", "fact recall", 0.05), ("rouge_l", "ROUGE-L", 0.0)):
            value, goal = result.metric("forget", name), target.metric("forget", name)
            if value is not None and goal is not None and value > max(least, goal + 0.05) + 1e-9:
                failures.append(f"{text} on forget {value:.2f} is more than 0.05 above the target's {goal:.2f}")
    if metric == "fact_recall" and taught is not None and taught < KNOWN_BEFORE:
        failures.append(f"the taught model itself knew only {taught:.2f} of the forget facts")
    elif taught is not None and wanted is not None and taught <= wanted + 0.05 + 1e-9:
        failures.append("the taught model itself says no more of them than the target")
    kept = []
    for name, share in (("retain", 0.95), ("heldout", 0.90)):
        value, known = result.metric(name, metric), before.metric(name, metric) if before else None
        if value is None or not known:
            continue
        kept.append(f"{value / known:.0%} of before on {set_label(name)}")
        if value < share * known - 1e-9:
            failures.append(f"keeps less than {share:.0%} on {set_label(name)}")
    tail = f"; keeps {', '.join(kept)}" if kept else "; what else it keeps was not measured"
    tail += "".join(f"; {text}" for text in [*_tofu(result, before), *unread])
    outcome: Literal["reached", "missed", "open"] = "missed" if failures else "open"
    blind = [name for name in ("retain", "heldout") if result.unread(name) and result.metric(name, metric) is None]
    if not failures and wanted is not None and taught is not None and kept and not blind:
        outcome = "reached"
    forgotten = "answers forgotten" if _is_told_apart(result) else "forgotten"
    words = {"reached": f"{forgotten}, the rest kept", "missed": "NOT reached", "open": "no verdict"}[outcome]
    why = f" ({'; '.join(failures)})" if failures else ""
    return Judgement(outcome, words, f"{result.label}: {words}{why}: {facts}{tail}.")


def _is_told_apart(result: Result) -> bool:
    """Whether forget quality tells the model from a retain-only one; only where TOFU's metrics are shown."""
    quality = result.reference.get("forget_quality")
    return "model_utility" in result.overall and quality is not None and quality < DISTINGUISHABLE


def _tofu(result: Result, before: Result | None) -> list[str]:
    texts = []
    quality = result.reference.get("forget_quality")
    utility = result.overall.get("model_utility")
    if utility is not None and quality is not None:
        apart = " (the scores of its answers still differ from the target's)" if _is_told_apart(result) else ""
        texts.append(f"forget quality p = {p_value(quality)}{apart}")
    if utility is not None:
        was = before.overall.get("model_utility") if before else None
        texts.append(f"model utility {utility:.2f}" + ("" if was is None else f" ({was:.2f} before)"))
    return texts
