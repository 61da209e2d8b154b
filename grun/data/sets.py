"""The evaluation sets: what each holds, and what should become of it in unlearning.

Options, tables, pictures and legends read them here. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from grun.registry import Registry

Good = Literal["low", "high", "same"]
"""What a model should recall of a set after unlearning: little, as much as before, or what it did before (nothing)."""


@dataclass(frozen=True)
class EvaluationSet:
    """Questions that every evaluated model is asked."""

    name: str
    """In options, files and keys."""
    label: str
    """In tables and pictures."""
    meaning: str
    """What it holds, in a legend."""
    good: Good
    metrics: tuple[str, ...] = ("fact_recall", "rouge_l", "probability")
    """Columns of a report, as far as they can be computed."""
    in_files: tuple[str, ...] = ("truth_ratio",)
    """Further columns, in a report's files alone."""
    for_tuning: bool = False
    """Settings are chosen by it, so results are not shown on it."""
    general: bool = False
    """General knowledge: it enters the model utility, which short tables show in its place."""
    color: str = "#8C6D46"
    """In pictures."""
    longest_answer: int | None = None
    """Tokens after which an answer is cut; None: those of the evaluation."""
    longest_reference: int | None = None
    """Tokens, the tokenizer's start token counted, after which what an answer is compared with is cut; None: none."""
    stops: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""

    @property
    def is_result(self) -> bool:
        """Whether forgetting or damage is read from it."""
        return self.good != "same" and not self.for_tuning


FIRST = (
    EvaluationSet(
        "forget",
        "forget",
        "what is to be forgotten",
        "low",
        ("fact_recall", "rouge_l", "probability", "truth_ratio", "extraction_strength"),
        ("truth_ratio_arithmetic", "truth_ratio_grun_paper", "exact_memorization"),
        color="#D55E00",
    ),
    EvaluationSet(
        "forget_paraphrase",
        "paraphrase",
        "the same questions in other words",
        "low",
        ("fact_recall", "rouge_l"),
        ("probability",),
        color="#B87A00",
    ),
    EvaluationSet("retain", "retain", "known before; used in unlearning as what must stay", "high", color="#0072B2"),
)
LAST = (
    EvaluationSet(
        "validation",
        "validation",
        "known before, set aside from unlearning: settings were chosen by it",
        "high",
        (),
        ("fact_recall", "rouge_l", "probability"),
        for_tuning=True,
        color="#7C6BC4",
    ),
    EvaluationSet(
        "heldout",
        "held-out",
        "known before, and never used in unlearning: what must stay too",
        "high",
        in_files=(),
        color="#009E73",
    ),
    EvaluationSet(
        "unknown",
        "unknown",
        "not known before: what a model says of it is guessed",
        "same",
        ("rouge_l",),
        (),
        color="#B5588B",
    ),
)


SETS_OF_BENCHMARKS: Registry[EvaluationSet] = Registry("evaluation set", "grun.data.benchmarks")
"""Sets that some benchmark declares as its own."""


def evaluation_sets() -> dict[str, EvaluationSet]:
    """Every set by name, in the order of tables: what is to be forgotten first."""
    own = [SETS_OF_BENCHMARKS.get(name) for name in SETS_OF_BENCHMARKS.names()]
    first = sorted((*FIRST, *own), key=lambda one: one.good != "low")
    return {one.name: one for one in (*first, *LAST)}


def in_order(names: Iterable[str]) -> list[EvaluationSet]:
    """The sets that are named, in the order of tables; one of an unknown name stands last, under that name."""
    order = list(evaluation_sets())
    found = sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order))
    return [find_set(name) for name in found]


def find_set(name: str) -> EvaluationSet:
    """The set of a name; a plain one, such as of a package that is not installed here, if there is none."""
    return evaluation_sets().get(name) or EvaluationSet(name, name.replace("_", " "), "", "high")


def set_label(name: str) -> str:
    """What readers call a set."""
    return find_set(name).label
