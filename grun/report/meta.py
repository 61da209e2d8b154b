"""How well each metric tells models that know from models that never did, damaged or not.

Source: Dorna et al. 2025, "OpenUnlearning", arXiv 2506.12618: faithfulness and robustness of metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grun.config.options import MetaConfig
from grun.data.sets import in_order
from grun.errors import ConfigError, RunError
from grun.evaluation.metrics import auc
from grun.evaluation.metrics.averages import harmonic_mean, mean
from grun.evaluation.metrics.registry import AS_RETAIN_ONLY, FORGOTTEN, HIGH, metrics_of
from grun.report.result import Result
from grun.report.results import EVALUATION_FILE, read_evaluation, refuse_other_rows, refuse_other_settings
from grun.report.tables import Column, Line, Table, markdown_points, to_csv, to_markdown, to_terminal, with_numbers
from grun.report.terminal import WIDTH, print_line
from grun.runtime.files import taken, target, write_text

DAMAGES = ("relearned", "quantized")
GROUPS = ("knows", "never", "unlearned")
FEWEST = 2
"""Models of a group, below which nothing is separated."""
SETTINGS = ("sets", "limit", "continuations", "max_length", "max_new_tokens", "quirks")
"""Settings of an evaluation that all must share."""
NOTES = (
    "AUC (faithfulness): how often a model that knows has the higher number than one that never did; .5 is chance. "
    "AUC relearned, AUC quantized: the same of the damaged models.",
    "moved: mean change by the damage, as a share of the distance between the means of both groups.",
    "R, Q: robustness to relearning and to quantization of the unlearned models; robust: their harmonic mean; overall: "
    "the harmonic mean of that and AUC. Source: arXiv 2506.12618.",
)


@dataclass(frozen=True)
class Reading:
    """One metric of all models."""

    metric: str
    """Set (or `overall`) and metric, such as forget.rouge_l."""
    label: str
    falls: bool
    """Whether it falls as a model knows more."""
    values: Mapping[str, Mapping[str, list[float]]]
    """By group, then `intact` or the damage: m of each model in order, larger as it knows more. Empty: not there."""

    def of(self, group: str, damage: str = "intact") -> list[float]:
        """m of a group's models; empty where they were not evaluated so."""
        return list(self.values[group].get(damage, []))

    def shown_mean(self, group: str) -> float | None:
        """Mean of the metric as it is defined."""
        found = mean(self.of(group))
        return 1 - found if self.falls and found is not None else found

    def faithfulness(self, damage: str = "intact") -> float | None:
        """How often a model that knows has a larger m than one that never did (area under the ROC curve)."""
        return auc(self.of("knows", damage), self.of("never", damage))

    def moved(self, damage: str) -> float | None:
        """Mean of |m after - m before| over both groups, by the distance of their means; None where that is 0."""
        pairs = [pair for group in GROUPS[:2] for pair in zip(self.of(group), self.of(group, damage), strict=False)]
        distance = abs((mean(self.of("knows")) or 0.0) - (mean(self.of("never")) or 0.0))
        moved = mean([abs(after - before) for before, after in pairs])
        return None if moved is None or distance == 0 else moved / distance

    def relearning(self) -> float | None:
        """Robustness to relearning of the unlearned models, see `relearning_robustness`."""
        states = [self.of(group, state) for group in ("never", "unlearned") for state in ("intact", "relearned")]
        return relearning_robustness(*states) if all(states) else None

    def quantization(self) -> float | None:
        """Robustness to quantization of the unlearned models, see `quantization_robustness`."""
        before, after = self.of("unlearned"), self.of("unlearned", "quantized")
        return quantization_robustness(before, after) if after else None

    def robustness(self) -> float | None:
        """Harmonic mean of both; None where one is missing."""
        return _harmonic(self.relearning(), self.quantization())

    def overall(self) -> float | None:
        """Harmonic mean of faithfulness and robustness."""
        return _harmonic(self.faithfulness(), self.robustness())

    def rank(self) -> tuple[float, float]:
        """Smaller for a metric to believe more: by the overall number, else by faithfulness; then by how it moves."""
        overall = self.overall()
        found = self.faithfulness() if overall is None else overall
        return -round(found or 0.0, 9), self.moved("quantized") or 0.0


def relearning_robustness(
    never: Sequence[float], never_after: Sequence[float], unlearned: Sequence[float], unlearned_after: Sequence[float]
) -> float:
    """Mean over unlearned models of R = min(r, 1), r = gain of a model that never knew / gain of the unlearned one.

    A gain is m after relearning - m before; that of models that never knew is the mean of theirs. R is 1 where the
    unlearned model gains nothing, and 0 where only it gains.

    Args:
        never: m of models that never knew, larger as they know more.
        never_after: the same after relearning, in the same order.
        unlearned: m of unlearned models.
        unlearned_after: the same after relearning, in the same order.

    Source: Dorna et al. 2025, arXiv 2506.12618, robustness to relearning.
    """
    gain = (mean(never_after) or 0.0) - (mean(never) or 0.0)
    gains = [after - before for before, after in zip(unlearned, unlearned_after, strict=True)]
    return mean([1.0 if own <= 0 else min(max(gain / own, 0.0), 1.0) for own in gains]) or 0.0


def quantization_robustness(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean over unlearned models of Q = min(q, 1), q = m before quantization / m after; 1 where m after is 0.

    Source: Dorna et al. 2025, arXiv 2506.12618, robustness to quantization.
    """
    pairs = zip(before, after, strict=True)
    return mean([1.0 if now <= 0 else min(max(was / now, 0.0), 1.0) for was, now in pairs]) or 0.0


def _harmonic(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return harmonic_mean(known) if len(known) == len(values) else None


# -- what there is to read --------------------------------------------------------------------------------------------

Models = dict[str, dict[str, list[Result]]]
"""Evaluations by group, then `intact` or damage."""


def find_models(config: MetaConfig) -> Models:
    """The evaluations that `config` names, and those of the same models after damage.

    Raises:
        ConfigError: a group has too few models, or a folder is named twice.
        RunError: there is no evaluation, some of a group lack the damaged one, or settings, rows or models forbid it.
    """
    named = {group: [Path(folder).expanduser() for folder in getattr(config, group)] for group in GROUPS}
    for group in GROUPS[:2]:
        if len(named[group]) < FEWEST:
            raise ConfigError(
                f"{group} names {len(named[group])} evaluation folders, and {FEWEST} or more are needed; the command "
                "is: meta knows=[FOLDER,FOLDER,...] never=[FOLDER,FOLDER,...], or meta models=N, which makes them"
            )
    found: Models = {}
    for group, folders in named.items():
        found[group] = {"intact": [_evaluation(folder) for folder in folders]}
        for damage in DAMAGES:
            damaged = [
                folder.resolve().with_name(f"{folder.resolve().name}-{getattr(config, damage)}") for folder in folders
            ]
            there = [folder for folder in damaged if (folder / EVALUATION_FILE).is_file()]
            if there and there != damaged:
                missing = next(folder for folder in damaged if folder not in there)
                raise RunError(
                    f"{there[0]} is there and {missing} is not; evaluate all of {group} when {damage}, or none"
                )
            if there:
                found[group][damage] = [_evaluation(folder) for folder in there]
    _refuse_mixed([result for states in found.values() for results in states.values() for result in results])
    return found


def _evaluation(folder: Path) -> Result:
    return read_evaluation(folder, ("sets", "settings"), methods={})


def _refuse_mixed(results: Sequence[Result]) -> None:
    """RunError unless all are different models, evaluated on the same rows in the same way."""
    seen: dict[str, Path] = {}
    for result in results:
        for key in (str(result.folder.resolve()), result.evaluation.get("key")):
            if key in seen:
                raise RunError(
                    f"{result.folder} and {seen[key]} are one evaluation of one model, which would count twice; "
                    "name each model once"
                )
            if key is not None:
                seen[key] = result.folder
        refuse_other_settings(result, results[0], SETTINGS, "was evaluated on other sets, or with other answers,")
    refuse_other_rows(results)


def readings(models: Models) -> list[Reading]:
    """Every metric of what is to be forgotten that all the models have, the one to believe most first.

    These are the metrics of sets that should be low after unlearning, as far as they have a direction there, and the
    membership inferences.
    """
    every = [result for states in models.values() for results in states.values() for result in results]
    found = []
    for column in _asked(every[0]):
        if all(column.value(result) is not None for result in every):
            falls = column.good == HIGH
            values = {
                group: {
                    state: [_m(column.value(result), falls) for result in results] for state, results in states.items()
                }
                for group, states in models.items()
            }
            found.append(Reading(column.key, column.header, falls, values))
    if not found:
        raise RunError(
            f"the evaluations share no metric of what is to be forgotten, beginning with {every[0].folder}; evaluate "
            "all with the set forget"
        )
    return sorted(found, key=Reading.rank)


def _asked(result: Result) -> list[Column]:
    """The metrics; those that are high after unlearning fall as a model knows more."""
    columns = []
    for one in (one for one in in_order(result.evaluation["sets"]) if one.good == "low"):
        for name, metric in metrics_of("set").items():
            if metric.good in (FORGOTTEN, HIGH):
                read = partial(Result.metric, set_name=one.name, metric=name)
                columns.append(Column(f"{one.name}.{name}", f"{metric.label}, {one.label}", metric.good, read))
    for name, metric in metrics_of("overall").items():
        if metric.good == AS_RETAIN_ONLY:
            columns.append(Column(f"overall.{name}", metric.label, metric.good, partial(_overall, name=name)))
    return columns


def _overall(result: Result, name: str) -> float | None:
    return result.overall.get(name)


def _m(value: float | None, falls: bool) -> float:
    return 1 - float(value or 0.0) if falls else float(value or 0.0)


# -- the table --------------------------------------------------------------------------------------------------------


COLUMNS = [
    Column("knows", "mean knows", "", partial(Reading.shown_mean, group="knows")),
    Column("never", "mean never", "", partial(Reading.shown_mean, group="never")),
    Column("faithfulness", "AUC", "high", Reading.faithfulness, "auc"),
    *(
        Column(f"faithfulness_{damage}", f"AUC {damage}", "high", partial(Reading.faithfulness, damage=damage), "auc")
        for damage in DAMAGES
    ),
    Column("moved_relearned", "moved relearned", "", partial(Reading.moved, damage="relearned")),
    Column("moved_quantized", "moved quantized", "low", partial(Reading.moved, damage="quantized")),
    Column("relearning", "R", "high", Reading.relearning),
    Column("quantization", "Q", "high", Reading.quantization),
    Column("robustness", "robust", "high", Reading.robustness),
    Column("overall", "overall", "high", Reading.overall),
]
"""The numbers of a metric."""


def verdict(rows: Sequence[Reading]) -> str:
    """Which metric to believe first; several where they are equal in everything that decides."""
    best = [row for row in rows if row.rank() == rows[0].rank()]
    overall = rows[0].overall()
    number = f"AUC {rows[0].faithfulness():.3f}" if overall is None else f"overall {overall:.2f}"
    return f"Believe first: {'; '.join(row.label for row in best)} ({number})."


def judge_metrics(config: MetaConfig) -> Path:
    """Print the table of all metrics, and write it as meta.md and meta.csv; their folder.

    Raises:
        ConfigError: as `find_models`.
        RunError: as `find_models` and `readings`.
    """
    from rich.console import Console

    folder = target(config.results_dir, "results_dir")
    models = find_models(config)
    rows = readings(models)
    shown = with_numbers(COLUMNS, rows)
    counts = ", ".join(f"{len(models[group]['intact'])} {group}" for group in GROUPS if models[group]["intact"])
    title = f"Do the metrics tell? {counts}"
    lines = [Line(row.label, [column.text(row) for column in shown]) for row in rows]
    table = Table([column.header for column in shown], [column.good for column in shown], lines)
    with taken(folder):
        write_text(
            folder / "meta.md", f"# {title}\n\n{verdict(rows)}\n\n{to_markdown(table)}\n{markdown_points(NOTES)}"
        )
        write_text(folder / "meta.csv", to_csv(shown, rows, "metric"))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(to_terminal(table.narrow(), title, "metric"))
    print_line(console, verdict(rows), "bold")
    console.print(
        f"written: {folder / 'meta.md'}, {folder / 'meta.csv'}", markup=False, highlight=False, soft_wrap=True
    )
    return folder
