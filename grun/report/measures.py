"""The numbers of the matrix: which they are, where they stand, and how they are told over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grun.data.sets import evaluation_sets
from grun.report.results import Result, has_facts, main_metric
from grun.report.tables import columns_by_key, number

Kind = Literal["share", "auc", "p", "count", "seconds", "memory", "size"]
MEGABYTE, MEBIBYTE = 10**6, 2**20


@dataclass(frozen=True)
class Measure:
    """One number of every run, and how it is told over seeds."""

    key: str
    header: str
    good: str
    """Which way is good."""
    kind: Kind
    """p: a p-value, told by median and range; all others by mean and standard deviation."""
    value: Callable[[Result], float | None]
    is_cost: bool = False


@dataclass(frozen=True)
class Spread:
    """One measure over the seeds of a cell."""

    values: tuple[float, ...]
    """By seed, in the order of the cell's runs; without those that lack the number."""

    @property
    def n(self) -> int:
        """Runs that have the number."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without a run."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1 below the fraction); None with fewer than two runs."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def median(self) -> float | None:
        """Median over seeds; None without a run."""
        return statistics.median(self.values) if self.values else None

    def text(self, kind: Kind) -> str:
        """As readers see it: 0.12 ± 0.03, one seed without a spread, p as median with its range, - for nothing."""
        if self.mean is None or self.median is None:
            return "-"
        if kind == "p":
            lowest, highest = number(min(self.values), "p"), number(max(self.values), "p")
            return number(self.median, "p") + (f" ({lowest} to {highest})" if self.n > 1 else "")
        if self.deviation is None:
            return shown(self.mean, kind)
        if kind in ("count", "size") and not self.deviation:
            return shown(self.mean, kind)  # counted, not measured
        return f"{shown(self.mean, kind)} ± {shown(self.deviation, kind, like=self.mean)}"


def shown(value: float, kind: Kind, like: float | None = None) -> str:
    """A number with as many decimals as `like`, its mean, has; memory in MiB, sizes in MB (10^6 bytes)."""
    if kind in ("share", "auc"):
        return number(value, "auc" if kind == "auc" else "share")
    unit = {"memory": MEBIBYTE, "size": MEGABYTE}.get(kind, 1)
    size = (value if like is None else like) / unit
    decimals = {"count": 0, "memory": 0, "seconds": 1 if size < 100 else 0}.get(kind)
    if decimals is None:
        decimals = 3 if size < 1 else 2 if size < 100 else 0
    return f"{value / unit:,.{decimals}f}"


def measures_of(results: Sequence[Result]) -> list[Measure]:
    """The numbers of the matrix: what is forgotten and kept, by the corpus's main metric, then what it costs."""
    main, known = main_metric(results)[0], columns_by_key()
    # The model utility stands for general knowledge.
    kept = [name for name, one in evaluation_sets().items() if one.is_result and not one.general and name != "forget"]
    wanted: tuple[tuple[str, Kind], ...] = (
        (f"forget.{main}", "share"),
        *((("forget.rouge_l", "share"),) if has_facts(results) else ()),
        *((f"{name}.{main}", "share") for name in kept),
        ("overall.model_utility", "share"),
        ("reference.forget_quality", "p"),
        ("forget.degenerate", "share"),
        ("gate.auc", "auc"),
    )
    columns = [(known[key], kind) for key, kind in wanted if key in known]
    quality = [Measure(column.key, column.header, column.good, kind, column.value) for column, kind in columns]
    return [
        *quality,
        Measure("cost.parameters", "trained parameters", "low", "count", trained_parameters, is_cost=True),
        Measure("cost.seconds", "seconds", "low", "seconds", unlearning_seconds, is_cost=True),
        Measure("cost.memory_bytes", "peak memory (MiB)", "low", "memory", peak_memory, is_cost=True),
        Measure("cost.saved_bytes", "size on disk (MB)", "low", "size", saved_bytes, is_cost=True),
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def trained_parameters(result: Result) -> float | None:
    """Parameters that unlearning trained."""
    parameters = result.record.get("parameters") if result.run else None
    return _number(parameters.get("trained")) if isinstance(parameters, dict) else None


def unlearning_seconds(result: Result) -> float | None:
    """Seconds of unlearning."""
    return _number(result.record.get("seconds")) if result.run else None


def peak_memory(result: Result) -> float | None:
    """Peak memory of unlearning, bytes."""
    return _number(result.record.get("peak_memory_bytes")) if result.run else None


def saved_bytes(result: Result) -> float | None:
    """Bytes of the saved adapter or model: as run.json says, else of the weights in the run's folder."""
    if result.run is None:
        return None
    said = _number(result.record.get("saved_bytes"))
    if said is not None:
        return said
    files = [*result.run.glob("adapter_model.safetensors")] or [*result.run.glob("model*.safetensors")]
    return float(sum(path.stat().st_size for path in files)) if files else None
