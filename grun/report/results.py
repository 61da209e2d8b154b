"""What a report is about: the evaluated models of one results folder, or of several side by side.

A results folder holds `evaluation/before` (the taught model), `evaluation/retain_only` (the target: a model never
taught the forget rows) and, for each run NAME, `NAME/run.json`, `NAME/log.jsonl` and `evaluation/NAME`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grun.data.sets import evaluation_sets, set_label
from grun.errors import RunError
from grun.evaluation.table import Table
from grun.method.parametrization import PARAMETRIZATIONS
from grun.report.labels import design_of, label_runs, order_of
from grun.runtime.records import Evaluation, Run, read_record

EVALUATION_FILE = "evaluation.json"
DISTINGUISHABLE = 0.05
"""p below which forget quality counts as different from a retain-only model's."""
STAGES = ("before", "retain_only", "after")
"""Order of the rows."""
METRIC_NAMES = {"fact_recall": "fact recall", "rouge_l": "ROUGE-L"}
"""Metrics of what is said, with the names that readers see."""


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
        if "overall" in self.evaluation:
            return finite(self.evaluation["overall"])
        from grun.evaluation.metrics import overall_metrics

        return finite(overall_metrics(self.table, self.quirks))

    @property
    def seed(self) -> int | None:
        """Seed of the unlearning run, where its run.json says so; None of a mean over seeds."""
        seed = self._options.get("seed") if not self.runs else None
        return seed if isinstance(seed, int) else None

    @property
    def design(self) -> str:
        """What readers call where GRUN's gates read and edits write; empty: as published, or it is not GRUN."""
        method = self._options.get("method")
        return (
            design_of(method)
            if PARAMETRIZATIONS.traits(self.parametrization).gated and isinstance(method, dict)
            else ""
        )

    @property
    def _options(self) -> dict[str, Any]:
        """The options of the unlearning run, where its run.json says them."""
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
        counts: dict[str, Any] = self.evaluation.get("counts", {}).get(set_name, {})
        return dict(counts.get("unread", {}))

    def metric(self, set_name: str, metric: str) -> float | None:
        """One number, None if the corpus or the model does not give it."""
        value = self.evaluation["sets"].get(set_name, {}).get(metric)
        return None if value is None else float(value)


def finite(values: dict[str, Any]) -> dict[str, float]:
    """The values that are numbers, which JSON can hold."""
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def find_results(results_dir: Path) -> list[Result]:
    """The evaluated models in the order of the table: before, retain_only, then the runs by objective.

    An evaluation that is neither before nor retain_only belongs to the run of its name beside `evaluation`, or to the
    run of its adapter; where there is neither, such as for a LoRA from elsewhere, it stands by its own name.

    Raises:
        RunError: there is no before, a file is damaged, or an evaluation is of another base model or of other rows.
    """
    results = [read_evaluation(folder) for folder in evaluation_folders(results_dir)]
    label_runs(results)
    results.sort(key=lambda result: (STAGES.index(result.stage), *order_of(result), result.name))
    refuse_other_models(results)
    refuse_other_rows(results)
    measure_against_targets(results)
    return results


def evaluation_folders(results_dir: Path) -> list[Path]:
    """Folders of a results folder's evaluations, by name; RunError where there is no before."""
    folder = results_dir / "evaluation"
    if not any(folder.glob(f"before*/{EVALUATION_FILE}")):  # quantized weights: before-8bit
        raise RunError(
            f"{folder / 'before' / EVALUATION_FILE} is missing, so there is nothing to compare with; "
            "evaluate the taught model with output_dir set to that folder first"
        )
    found = sorted(path.parent for path in folder.glob(f"*/{EVALUATION_FILE}"))
    return [path for path in found if not path.name.startswith(".")]  # which an interrupted evaluation left


def refuse_other_settings(result: Result, before: Result, keys: Sequence[str], what: str) -> None:
    """RunError where the settings named in `keys` are not those of `before`; `what` says what is then the matter."""
    settings, expected = result.evaluation["settings"], before.evaluation["settings"]
    other = [key for key in keys if settings.get(key) != expected.get(key)]
    if other:
        raise RunError(
            f"{result.folder} {what} than {before.folder}, or otherwise (settings: {', '.join(other)}); "
            "evaluate both with the same data and evaluation options"
        )


def read_evaluation(folder: Path, keys: tuple[str, ...] = ("sets",)) -> Result:
    """One evaluation folder by itself; its run is looked for beside `evaluation`, then in the folder of its adapter.

    `keys` must be in evaluation.json.
    """
    name, evaluation = folder.name, measured_today(folder, read_record(folder / EVALUATION_FILE, Evaluation, keys))
    quantization = evaluation.get("identity", {}).get("quantization")
    plain = name.removesuffix(f"-{quantization}")
    ending = f" {quantization}" if quantization else ""
    if plain in ("before", "retain_only"):
        return Result(name, plain, None, "none", folder, None, evaluation, plain.replace("_", " ") + ending)
    adapter = evaluation.get("adapter")
    for run in (folder.resolve().parent.parent / plain, *([Path(adapter)] if adapter else [])):
        if (run / "run.json").is_file():
            record = read_record(run / "run.json", Run, ("objective", "parametrization"))
            objective, parametrization = str(record["objective"]), str(record["parametrization"])
            label = objective.upper() + ending
            return Result(name, "after", objective, parametrization, folder, run, evaluation, label)
    return Result(name, "after", None, "adapter" if adapter else "none", folder, None, evaluation, name)


def measured_today(folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with numbers of today's metrics, from its stored answers, if it is older and they change it.

    They do where a text is not ASCII, which older metrics could not read, or a reference has no word.
    """
    from grun.evaluation.measure import METRICS_FORMAT, measure
    from grun.evaluation.metrics import unread

    if "sets" not in evaluation or evaluation.get("metrics_format") == METRICS_FORMAT:
        return evaluation
    table = Table.read(folder)
    read = all(f"{row.reference}{row.text}{row.fact}".isascii() for row in table.generations)
    if read and not any(unread(table, name) for name in table.sets()):
        return evaluation
    return evaluation | measure(table, evaluation.get("settings", {}).get("quirks") or ())


# -- what must not stand in one table ---------------------------------------------------------------------------------


def refuse_other_models(results: Sequence[Result]) -> None:
    """RunError if a run was evaluated on, or trained from, other base weights than those of `before`.

    An adapter is evaluated on its base, whose fingerprint the evaluation holds. A run without an adapter has weights
    of its own, so there the base is the one named in its run.json. Quantized weights have a fingerprint of their own:
    they are compared with those of another evaluation with the same quantization, if there is one.
    """
    befores = {result.quantization: result for result in results if result.stage == "before"}
    for result in results:
        adapted = result.evaluation.get("adapter") is not None
        before = befores.get(result.quantization if adapted else None)
        if result.stage != "after" or before is None or not (adapted or result.run):
            continue
        if adapted:
            _refuse_other_adapter(result)
        elif result.run and "adapter" in result.evaluation and (result.run / "adapter_config.json").is_file():
            raise RunError(
                f"{result.folder} was evaluated without the adapter {result.run}; "
                f"evaluate it again with adapter={result.run} and overwrite=true"
            )
        base = result.base if adapted else result.record.get("base_fingerprint")
        if None not in (base, before.base) and base != before.base:
            what = f"{result.folder} was evaluated on" if adapted else f"{result.run} was trained from"
            raise RunError(
                f"{what} another base model ({base}) than {before.folder} ({before.base}); make it again from "
                "the same model.path with overwrite=true, or report it in a results folder of its own"
            )


def _refuse_other_adapter(result: Result) -> None:
    """RunError if the adapter was trained again after it was evaluated."""
    from grun.loading.hashing import adapter_hash

    evaluated = result.evaluation.get("identity", {}).get("adapter")
    folder = result.run or Path(result.evaluation["adapter"] or "")
    is_there = any(folder.glob("adapter_model.*"))  # a sweep may have removed the weights since
    if evaluated and is_there and (folder / "adapter_config.json").is_file() and adapter_hash(folder) != evaluated:
        raise RunError(
            f"{result.folder} is the evaluation of an earlier adapter than {folder} holds now; evaluate it again with "
            "overwrite=true"
        )


def refuse_other_rows(results: Sequence[Result]) -> None:
    """RunError if the evaluations are not all of the same forget rows; it says which differ."""
    found: dict[tuple[int, str], list[str]] = {}
    for result in results:
        rows = result.evaluation.get("counts", {}).get("forget", {}).get("rows")
        if rows is not None:
            forget = str(result.evaluation.get("data", {}).get("forget", "unknown"))
            place = result.groups[0] or str(result.folder)
            folders = found.setdefault((rows, forget), [])
            folders += [place] if place not in folders else []
    if len(found) > 1:
        listed = "; ".join(
            f"{', '.join(folders)}: {rows} rows, hash {forget[:8]}" for (rows, forget), folders in found.items()
        )
        raise RunError(
            f"the forget sets differ, so the numbers cannot be compared ({listed}); "
            "evaluate all with the same data options, or report them apart"
        )


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


def measure_against_targets(results: Sequence[Result]) -> None:
    """Fill in `reference` of every model but the retain-only ones."""
    for result in results:
        target = target_of(result, results)
        if target is not None and result.stage != "retain_only":
            from grun.evaluation.metrics import reference_metrics

            try:
                result.reference = finite(reference_metrics(result.table, target.table, result.quirks))
            except RunError as error:
                raise RunError(f"{result.folder} against {target.folder}: {error}") from error


def unread_words(results: Sequence[Result], sets: Sequence[str] | None = None) -> list[str]:
    """Which rows of the sets (None: of all) a metric cannot read, a sentence each; all models got the same rows."""
    found = {}
    for result in results:
        for name in evaluation_sets() if sets is None else sets:
            rows = result.evaluation.get("counts", {}).get(name, {}).get("rows")
            for metric, count in result.unread(name).items():
                found[name, metric] = (
                    f"{count} of {rows} rows of {set_label(name)} cannot be read by {METRIC_NAMES[metric]}."
                )
    return list(found.values())


def has_facts(results: Sequence[Result]) -> bool:
    """Whether the corpus names a key fact for each forget row."""
    return any(result.metric("forget", "fact_recall") is not None for result in results)


def has_utility(results: Sequence[Result]) -> bool:
    """Whether TOFU's model utility is known, so that its columns and pictures are shown."""
    return any("model_utility" in result.overall for result in results)


def main_metric(results: Sequence[Result]) -> tuple[str, str]:
    """The metric that verdicts and pictures go by, and its name: fact recall, or ROUGE-L where there are no facts."""
    metric = "fact_recall" if has_facts(results) else "rouge_l"
    return metric, METRIC_NAMES[metric]
