"""The verdict on evaluated answers: has a run forgotten as far as the target, and kept what the model knew before."""

from __future__ import annotations

from collections.abc import Sequence

from grun.data.sets import evaluation_sets, set_label
from grun.report.result import (
    DISTINGUISHABLE,
    EXACT,
    Judgement,
    Outcome,
    Result,
    before_of,
    main_metric,
    target_of,
    unread_words,
)
from grun.report.tables import p_value, shown

KNOWN_BEFORE = 0.95
"""Fact recall on forget below which the taught model did not know what is to be forgotten."""
ABOVE = 0.05
"""How far forget may lie above the target's and still count as forgotten."""
LEAST = {"retain": 0.95, "heldout": 0.90, "neighbor": 0.90, "general": 0.95}
"""Share of before that is to be kept, by set."""
STATEMENT = (
    "The base weights still contain the data; the effect exists where the adapter is loaded. "
    "It controls the model's output and is not erasure of weights."
)


def judge(result: Result, results: Sequence[Result]) -> Judgement:
    """Whether a run has forgotten and kept enough.

    Forgotten: fact recall on forget at most max(0.05, target + 0.05), and ROUGE-L at most target + 0.05. Where no
    retain-only model was evaluated, the model's own recall of what it cannot know (the set unknown) stands for the
    target, and every set of what is to be forgotten counts. Kept: at least 95 % of before on retain and on general
    questions, 90 % on held-out and on neighbors. Without facts ROUGE-L stands for fact recall. A model is not called
    one that has forgotten where the model before did not know the forget facts, no answer of a set can be read, or
    nothing else was measured. Forget quality and model utility are given but not judged; where forget quality
    distinguishes the model from the target, only its answers are called forgotten.
    """
    metric, metric_name = main_metric(results)
    before, target = before_of(result, results), target_of(result, results)
    now = result.metric("forget", metric)
    unread = [text.removesuffix(".") for text in unread_words([result], ("forget", *LEAST))]
    if now is None:
        why = "".join(f", {text}" for text in unread) or ", the forget set was not evaluated"
        return Judgement(result.label, "open", "no verdict", f"{why}.")
    taught, wanted = (one.metric("forget", metric) if one else None for one in (before, target))
    failures = _above_target(result, target)
    if target is None and before is not None and (wanted := before.metric("unknown", metric)) is not None:
        failures = _above_guessing(result, metric, wanted)
    if metric == "fact_recall" and taught is not None and taught < KNOWN_BEFORE:
        failures.append(f"the model itself knew only {taught:.2f} of the forget facts")
    elif taught is not None and wanted is not None and taught <= wanted + ABOVE + EXACT:
        failures.append("the model itself answers no more of them than the target")
    kept, lost = _kept(result, before, metric)
    failures += lost
    blind = [name for name in LEAST if result.unread(name) and result.metric(name, metric) is None]
    outcome: Outcome = "missed" if failures else "open"
    if not failures and wanted is not None and taught is not None and kept and not blind:
        outcome = "reached"
    forgotten = "answers forgotten" if _differs(result) else "forgotten"
    words = {"reached": f"{forgotten}, the rest kept", "missed": "NOT reached", "open": "no verdict"}[outcome]
    aim = f"target {shown(wanted)}" if target else f"guessing gives {shown(wanted)}"
    if target is None and wanted is None:
        aim = "no target to compare with: evaluate a retain-only model"
    facts = f" ({'; '.join(failures)})" if failures else ""
    facts += f": {metric_name} on forget {shown(taught)} -> {now:.2f} ({aim})"
    facts += f"; keeps {', '.join(kept)}" if kept else "; what else it keeps was not measured"
    facts += "".join(f"; {text}" for text in [*_broken(result), *_tofu(result, before), *unread])
    return Judgement(result.label, outcome, words, f"{facts}.")


def _above_target(result: Result, target: Result | None) -> list[str]:
    """Metrics in which more of the forget set is left than the target has."""
    failures = []
    for name, text, least in (("fact_recall", "fact recall", ABOVE), ("rouge_l", "ROUGE-L", 0.0)):
        value, goal = result.metric("forget", name), target.metric("forget", name) if target else None
        if value is not None and goal is not None and value > max(least, goal + ABOVE) + EXACT:
            failures.append(f"{text} on forget {value:.2f} is more than {ABOVE} above the target's {goal:.2f}")
    return failures


def _above_guessing(result: Result, metric: str, floor: float) -> list[str]:
    """Sets of what is to be forgotten of which more is left than guessing gives."""
    failures = []
    for name in (one.name for one in evaluation_sets().values() if one.good == "low"):
        value = result.metric(name, metric)
        if value is not None and value > max(ABOVE, floor + ABOVE) + EXACT:
            failures.append(f"{set_label(name)} {value:.2f} is more than {ABOVE} above guessing, {floor:.2f}")
    return failures


def _kept(result: Result, before: Result | None, metric: str) -> tuple[list[str], list[str]]:
    """What is kept of the other sets, and where that is too little."""
    kept, lost = [], []
    for name, share in LEAST.items():
        value, known = result.metric(name, metric), before.metric(name, metric) if before else None
        if value is not None and known:
            kept.append(f"{value / known:.0%} of before on {set_label(name)}")
            lost += [f"keeps less than {share:.0%} on {set_label(name)}"] if value < share * known - EXACT else []
    return kept, lost


def _differs(result: Result) -> bool:
    """Whether forget quality distinguishes the model from a retain-only one; where TOFU's metrics are shown alone."""
    quality = result.reference.get("forget_quality")
    return "model_utility" in result.overall and quality is not None and quality < DISTINGUISHABLE


def _broken(result: Result) -> list[str]:
    """That forgotten questions are answered by no language, where many are."""
    share = result.metric("forget", "degenerate") or 0.0
    return [f"{share:.0%} of its answers on forget are no language"] if share > ABOVE else []


def _tofu(result: Result, before: Result | None) -> list[str]:
    quality, utility = result.reference.get("forget_quality"), result.overall.get("model_utility")
    if utility is None:
        return []
    was = before.overall.get("model_utility") if before else None
    differs = " (the scores of its answers still differ from the target's)" if _differs(result) else ""
    texts = [] if quality is None else [f"forget quality p = {p_value(quality)}{differs}"]
    return [*texts, f"model utility {utility:.2f}" + ("" if was is None else f" ({was:.2f} before)")]
