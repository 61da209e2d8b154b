"""The registry of metrics of one set.

To add one, write a function `(table, name of the set, quirks) -> float | None` in a module of this package and decorate
it with `metric`; `evaluation.json`, `summary.json` and `python -m grun list metrics` then have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from grun.evaluation.table import Table
from grun.registry import Registry, summary

Part = Literal["scores", "generations", "gates"]

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


@dataclass(frozen=True)
class Metric:
    """How a number is computed, and what readers are told about it wherever it is shown."""

    compute: Compute
    reads: Part
    """The part of the table that it is computed from."""
    label: str
    """Its name in tables and legends, such as ROUGE-L."""
    help: str
    """What it measures: the first paragraph of its function's docstring."""
    good: str
    """Which way is good."""
    range: str
    """Values that it takes."""


METRICS: Registry[Metric] = Registry("metric", "grun.evaluation.metrics")


def metric(
    name: str, label: str, *, reads: Part, good: str = FORGOTTEN, range: str = "0 to 1"
) -> Callable[[Compute], Compute]:
    """Return a decorator that registers a function as the metric `name`; fields as in `Metric`."""

    def decorate(compute: Compute) -> Compute:
        made = Metric(compute, reads, label, summary(compute), good, range)
        METRICS.add(name, made, f"{made.help}; {made.range}, {made.good}")
        return compute

    return decorate


def set_metrics(table: Table, quirks: Collection[str] = NO_QUIRKS) -> dict[str, dict[str, float]]:
    """Every metric of scores and answers, by set and name; what cannot be computed is absent."""
    metrics = [(entry.name, METRICS.get(entry.name)) for entry in METRICS]
    return {
        set_name: present(
            {name: metric.compute(table, set_name, quirks) for name, metric in metrics if metric.reads != "gates"}
        )
        for set_name in table.sets()
    }


def present(values: dict[str, float | None]) -> dict[str, float]:
    """Without what is None or not finite."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
