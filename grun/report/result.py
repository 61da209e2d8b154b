"""One evaluated model, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from grun.data.sets import evaluation_sets, set_label
from grun.evaluation.metrics import METRICS, overall_metrics
from grun.evaluation.table import Table
from grun.runtime.records import Run, read_record

DISTINGUISHABLE = 0.05
"""p below which forget quality counts as different from a retain-only model's."""
STAGES = ("before", "retain_only", "after")
"""Order of the rows."""
PUBLISHED = "last_prompt"
"""Where GRUN's published design reads and writes."""
EXACT = 1e-9
"""Allowance for rounding at each limit of a verdict."""
Outcome = Literal["reached", "missed", "open"]


@dataclass
class Result:
    """One evaluated model."""

    name: str
    """Folder under `evaluation/`; in a comparison with the results folder before it."""
    stage: str
    """before, retain_only or after."""
    objective: str | None
    parametrization: str
    folder: Path
    """Folder of the evaluation."""
    run: Path | None
    """Folder of the unlearning run; None for before and retain_only."""
    evaluation: dict[str, Any]
    label: str
    """Name in tables and pictures."""
    groups: tuple[str, ...] = ("",)
    """Results folders that hold it; several where a comparison found the same evaluation in each."""
    reference: dict[str, float] = field(default_factory=dict)
    """Metrics against the retain-only model, such as forget_quality; empty where there is none."""
    runs: tuple[Result, ...] = ()
    """The runs that it is the mean of, where it stands for several that differ in seed alone."""

    @cached_property
    def table(self) -> Table:
        """The scored table, read once."""
        return Table.read(self.folder)

    @cached_property
    def overall(self) -> dict[str, float]:
        """Metrics of the whole table, such as model_utility."""
        found = self.evaluation.get("overall")
        return finite(overall_metrics(self.table, self.quirks) if found is None else found)

    @property
    def seed(self) -> int | None:
        """Seed of the unlearning run, where its run.json has it; None of a mean over seeds."""
        seed = self._options.get("seed") if not self.runs else None
        return seed if isinstance(seed, int) else None

    @property
    def design(self) -> str:
        """What readers call where GRUN's gates read and edits write; empty: as published, or it is not GRUN."""
        method = self._options.get("method")
        return design_of(method) if self.parametrization == "grun" and isinstance(method, dict) else ""

    @property
    def _options(self) -> dict[str, Any]:
        config = self.record.get("config")
        return config if self.run and isinstance(config, dict) else {}

    @property
    def quirks(self) -> tuple[str, ...]:
        """Published quirks that were in force when it was evaluated."""
        return tuple(self.evaluation.get("settings", {}).get("quirks") or ())

    @property
    def quantization(self) -> str | None:
        """How its weights were quantized; None: not at all."""
        return self.evaluation.get("identity", {}).get("quantization")

    @property
    def base(self) -> str | None:
        """Fingerprint of the weights under the adapter; of all weights where there is none."""
        return self.evaluation.get("identity", {}).get("base")

    @property
    def title(self) -> str:
        """First cell of its row: the label, and what it is compared with."""
        if self.stage == "retain_only":  # what methods should reach; under attack, what no method can go below
            return f"{self.label} ({'floor' if self.evaluation.get('suite') == 'attacks' else 'target'})"
        return self.label + (" (adapter)" if self.parametrization == "adapter" else "")

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run.json of the unlearning run; of the taught model's own folder where nothing was unlearned."""
        model = self.evaluation.get("model")
        source = self.run or (Path(model) if model else None)
        if source is None or not (source / "run.json").is_file():
            return {}
        return read_record(source / "run.json", Run)

    def unread(self, set_name: str) -> dict[str, int]:
        """Rows of a set that a metric of the answers cannot read and leaves out, by metric."""
        return dict(self.evaluation.get("counts", {}).get(set_name, {}).get("unread", {}))

    def metric(self, set_name: str, metric: str) -> float | None:
        """One number, None if the corpus or the model does not give it."""
        value = self.evaluation["sets"].get(set_name, {}).get(metric)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Judgement:
    """A verdict on one model, and whether it is good."""

    label: str
    outcome: Outcome
    """open: what it takes to judge was not measured, or has no number."""
    words: str
    """The outcome in a few words."""
    facts: str
    """The numbers that it comes from, with what joins them to the words."""

    @property
    def sentence(self) -> str:
        """All of it."""
        return f"{self.label}: {self.words}{self.facts}"

    def as_json(self) -> dict[str, str]:
        """Its entry in summary.json."""
        return {"outcome": self.outcome, "words": self.words, "sentence": self.sentence}


def design_of(method: Mapping[str, Any]) -> str:
    """What readers call a GRUN run's design by its options `method`: every token, sticky; empty: the published one.

    One gate for all edits is called pooled. Else it goes by where the edit writes, and by where the gate reads if the
    edit writes as published; options that an older run does not have are the published ones.
    """
    if method.get("gate_blocks"):
        return "pooled"
    write, read = (str(method.get(option, PUBLISHED)) for option in ("edit_write", "gate_read"))
    if write != PUBLISHED:
        return write.replace("_", " ")
    return "" if read == PUBLISHED else f"gate {read.replace('_', ' ')}"


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, which JSON can hold."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


# -- before and target of a run ---------------------------------------------------------------------------------------


def before_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The taught model that a run started from: its own results folder's, else one with the same base weights."""
    befores = [other for other in results if other.stage == "before"]
    own = [other for other in befores if set(other.groups) & set(result.groups)]
    same = [other for other in befores if other.base is not None and other.base == result.base]
    return next(iter(own or same), None)


def target_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The retain-only model of the same results folder, else the only one there is."""
    targets = [other for other in results if other.stage == "retain_only"]
    own = [other for other in targets if set(other.groups) & set(result.groups)]
    return own[0] if own else targets[0] if len(targets) == 1 else None


def after(results: Sequence[Result]) -> list[Result]:
    """The models that something was unlearned from."""
    return [result for result in results if result.stage == "after"]


def single_runs(results: Sequence[Result]) -> list[Result]:
    """Every evaluation by itself: of a mean over seeds each of its runs."""
    return [run for result in results for run in result.runs or (result,)]


def compared_terms(results: Sequence[Result], before: str, target: str) -> list[tuple[str, str]]:
    """Legend of the models to compare with, as far as there are such."""
    terms = {"before": before, "retain_only": target}
    there = {result.stage for result in results}
    return [(stage.replace("_", " "), text) for stage, text in terms.items() if stage in there]


# -- what the corpus allows -------------------------------------------------------------------------------------------


def has_facts(results: Sequence[Result]) -> bool:
    """Whether the corpus names a key fact for each forget row."""
    return any(result.metric("forget", "fact_recall") is not None for result in results)


def has_utility(results: Sequence[Result]) -> bool:
    """Whether TOFU's model utility is known, so that its columns and pictures are shown."""
    return any("model_utility" in result.overall for result in results)


def main_metric(results: Sequence[Result]) -> tuple[str, str]:
    """The metric that verdicts and pictures go by, and its label: fact recall, or ROUGE-L where there are no facts."""
    metric = "fact_recall" if has_facts(results) else "rouge_l"
    return metric, metric_label(metric)


def metric_label(metric: str) -> str:
    """What readers call a metric of a set."""
    return METRICS.get(metric).label


def sets_of(results: Sequence[Result]) -> set[str]:
    """Names of the sets that at least one model was evaluated on."""
    return {name for result in results for name in result.evaluation["sets"]}


def behind_filters(results: Sequence[Result]) -> list[str]:
    """A sentence on likelihoods of models whose answers are filtered, where there are such."""
    labels = [result.label for result in results if result.parametrization == "output_filter"]
    if not labels:
        return []
    return [
        f"{', '.join(labels)}: an output filter reads what is written, so likelihoods of given answers, and what is "
        "computed from them, are those of the model without it."
    ]


def unread_words(results: Sequence[Result], sets: Sequence[str] | None = None) -> list[str]:
    """Which rows of the sets (None: of all) a metric cannot read, a sentence each; all models got the same rows."""
    found = {}
    for result in results:
        for name in evaluation_sets() if sets is None else sets:
            rows = result.evaluation.get("counts", {}).get(name, {}).get("rows")
            for metric, count in result.unread(name).items():
                text = f"{count} of {rows} rows of {set_label(name)} cannot be read by {metric_label(metric)}."
                found[name, metric] = text
    return list(found.values())
