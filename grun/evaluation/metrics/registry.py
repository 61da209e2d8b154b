"""The registry of metrics: what each measures, and which way is good.

To add one, write a function `(table, name of the set, quirks) -> float | None` in a module of this package and decorate
it with `metric`; `evaluation.json`, `summary.json` and `python -m grun list metrics` then have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from grun.evaluation.table import Table
from grun.registry import Registry, summary

F = TypeVar("F")

Part = Literal["scores", "generations", "gates"]
Of = Literal["set", "overall", "reference"]

NO_QUIRKS: tuple[str, ...] = ()
EXTRACTION_FLOOR = "extraction_strength_floor"
"""Quirk: the extraction strength of an answer of L tokens is at least 1/L."""
RATIO_EPSILON = "ratio_epsilon"
"""Quirk: EPSILON is added to denominators."""
EPSILON = 1e-10


def epsilon(quirks: Collection[str]) -> float:
    """What is added to denominators: 0 unless the quirk is in force."""
    return EPSILON if RATIO_EPSILON in quirks else 0.0


class Compute(Protocol):
    """One number for one set of a table; None where it cannot be computed."""

    def __call__(self, table: Table, name: str, quirks: Collection[str] = NO_QUIRKS) -> float | None:
        """Args: the table, the name of the set, published quirks in force."""


LOW, HIGH = "low is good everywhere", "high is good"
FORGOTTEN, OPEN_ON_FORGET = "low is good on forget, high elsewhere", "high is good on forget, low elsewhere"
AS_RETAIN_ONLY = "good is as the retain-only model"


@dataclass(frozen=True)
class Metric:
    """How a number is computed, and what lists, reports and docs show of it."""

    compute: Callable[..., float | None]
    """Of (table, set, quirks), (table, quirks) or (table, reference table, quirks), by `of`."""
    label: str
    """Its name in tables and legends, such as ROUGE-L."""
    help: str
    """What it measures: the first paragraph of its function's docstring."""
    good: str
    """Which way is good."""
    range: str
    """Values that it takes."""
    of: Of = "set"
    """What it is a number of: one set, the overall evaluation, the evaluation against a reference's."""
    reads: Part = "scores"
    """The part of the table that it is computed from."""


METRICS: Registry[Metric] = Registry("metric", "grun.evaluation.metrics")


def metric(
    name: str, label: str, *, reads: Part, good: str = FORGOTTEN, range: str = "0 to 1"
) -> Callable[[Compute], Compute]:
    """Return a decorator that registers a `Compute` as the metric `name` of each set; fields as in `Metric`."""
    return _register(name, label, "set", reads, good, range)


def whole_metric(name: str, label: str, of: Of, *, good: str, range: str = "0 to 1") -> Callable[[F], F]:
    """Return a decorator that registers a function of a whole table (`of` "overall"), or of two ("reference")."""
    return _register(name, label, of, "scores", good, range)


def _register(name: str, label: str, of: Of, reads: Part, good: str, range: str) -> Callable[[F], F]:
    def decorate(compute: F) -> F:
        made = Metric(compute, label, summary(compute), good, range, of, reads)  # type: ignore[arg-type]
        METRICS.add(name, made, f"{made.help}; {range}, {good}")
        return compute

    return decorate


def metrics_of(of: Of) -> dict[str, Metric]:
    """The metrics of a kind by name."""
    return {entry.name: found for entry in METRICS if (found := METRICS.get(entry.name)).of == of}


def set_metrics(table: Table, quirks: Collection[str] = NO_QUIRKS) -> dict[str, dict[str, float]]:
    """Every metric of scores and answers, by set and name; what cannot be computed is absent."""
    metrics = {name: metric for name, metric in metrics_of("set").items() if metric.reads != "gates"}
    return {
        set_name: present({name: metric.compute(table, set_name, quirks) for name, metric in metrics.items()})
        for set_name in table.sets()
    }


def present(values: dict[str, float | None]) -> dict[str, float]:
    """Without what is None or not finite."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
