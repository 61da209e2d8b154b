"""What a report is about: the evaluated models of one results folder, or of several side by side.

A results folder holds `evaluation/before` (the taught model), `evaluation/retain_only` (the target: a model never
taught the forget rows) and, for each run NAME, `NAME/run.json`, `NAME/log.jsonl` and `evaluation/NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grun.errors import RunError
from grun.evaluation.measure import METRICS_FORMAT, measure
from grun.evaluation.metrics import reference_metrics, unread
from grun.evaluation.table import Table
from grun.loading.hashing import adapter_hash
from grun.report.labels import PARAMETRIZATIONS, label_runs, place_in, row_order
from grun.report.result import STAGES, Result, finite, target_of
from grun.report.tables import Number
from grun.runtime.reading import read_json_lines, typed
from grun.runtime.records import Evaluation, Run, read_record

EVALUATION_FILE = "evaluation.json"
WITH_INTERVAL = ("leak", "kept", "accuracy", "fact_recall", "perplexity")
"""Numbers that the interval in the same place belongs to."""


def find_results(results_dir: Path) -> list[Result]:
    """The evaluated models in the order of the table: before, retain_only, then the runs by objective.

    An evaluation that is neither before nor retain_only belongs to the run of its name next to `evaluation`, or to the
    run of its adapter; where there is neither, such as for a LoRA from elsewhere, it stands by its own name.

    Raises:
        RunError: there is no before, a file is damaged, or an evaluation is of another base model or of other rows.
    """
    results = evaluations(results_dir)
    refuse_other_rows(results)
    measure_against_targets(results)
    return results


def evaluations(
    results_dir: Path,
    keys: tuple[str, ...] = ("sets",),
    methods: Mapping[str, str] | None = None,
    asked: Sequence[str] = (),
    what: str = "",
) -> list[Result]:
    """The evaluations of a results folder, labeled and in the order of the rows.

    Args:
        results_dir: holds `evaluation`.
        keys: as of `read_evaluation`.
        methods: as of `read_evaluation`; the runs that it names come first, in its order.
        asked: settings that must be those of before, as of `refuse_other_settings`, with `what`.

    Raises:
        RunError: there is no before, a file is damaged, or an evaluation is of another base model or other settings.
    """
    results = [read_evaluation(folder, keys, methods) for folder in evaluation_folders(results_dir)]
    if methods is None:
        label_runs(results)
        results.sort(key=row_order)
    else:
        results.sort(key=lambda one: (STAGES.index(one.stage), *place_in(methods, one.name)))
    refuse_other_models(results)
    for result in results if asked else ():
        refuse_other_settings(result, results[0], asked, what)
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
    """RunError where the settings named in `keys` are not those of `before`; `what` is then the matter."""
    settings, expected = result.evaluation["settings"], before.evaluation["settings"]
    other = [key for key in keys if settings.get(key) != expected.get(key)]
    if other:
        raise RunError(
            f"{result.folder} {what} than {before.folder}, or otherwise (settings: {', '.join(other)}); "
            "evaluate both with the same data and evaluation options"
        )


def read_evaluation(
    folder: Path, keys: tuple[str, ...] = ("sets",), methods: Mapping[str, str] | None = None
) -> Result:
    """One evaluation folder by itself; its run is looked for next to `evaluation`, then in the folder of its adapter.

    Args:
        folder: holds evaluation.json.
        keys: must be in evaluation.json.
        methods: labels of runs by their names. With it a run goes by its name, may lack an objective, and is also
            looked for in the folder of its model.
    """
    evaluation = measured_today(folder, read_record(folder / EVALUATION_FILE, Evaluation, keys))
    quantization = evaluation.get("identity", {}).get("quantization")
    name, ending = folder.name.removesuffix(f"-{quantization}"), f" {quantization}" if quantization else ""
    if name in ("before", "retain_only"):
        label = name.replace("_", " ") + ending
        return Result(folder.name, name, None, "none", folder, None, evaluation, label)
    adapter, model = evaluation.get("adapter"), evaluation.get("model") if methods is not None else None
    places = [folder.resolve().parent.parent / name, *(Path(path) for path in (adapter, model) if path)]
    run = next((place for place in places if (place / "run.json").is_file()), None)
    none = "adapter" if adapter and methods is None else "none"
    result = Result(folder.name, "after", None, none, folder, run, evaluation, folder.name)
    if run:
        record = read_record(run / "run.json", Run, ("objective", "parametrization") if methods is None else ())
        result.objective, result.parametrization = record.get("objective"), str(record.get("parametrization", "none"))
    if methods is not None:
        result.label = f"{methods[name]}{ending}" if name in methods else folder.name
    elif run:
        what = result.objective and result.objective.upper()  # None: nothing was trained
        result.label = f"{what or PARAMETRIZATIONS.get(result.parametrization, result.parametrization)}{ending}"
    return result


def measured_today(folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation with numbers of today's metrics, from its stored answers, if it is older and they change it.

    They do where a text is not ASCII, which older metrics could not read, or a reference has no word.
    """
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
    evaluated = result.evaluation.get("identity", {}).get("adapter")
    folder = result.run or Path(result.evaluation["adapter"] or "")
    is_there = any(folder.glob("adapter_model.*"))  # a sweep may have removed the weights since
    if evaluated and is_there and (folder / "adapter_config.json").is_file() and adapter_hash(folder) != evaluated:
        raise RunError(
            f"{result.folder} is the evaluation of an earlier adapter than {folder} holds now; evaluate it again with "
            "overwrite=true"
        )


def refuse_other_rows(results: Sequence[Result]) -> None:
    """RunError if the evaluations are not all of the same forget rows; the error names those that differ."""
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


def measure_against_targets(results: Sequence[Result]) -> None:
    """Fill in `reference` of every model but the retain-only ones."""
    for result in results:
        target = target_of(result, results)
        if target is not None and result.stage != "retain_only":
            try:
                result.reference = finite(reference_metrics(result.table, target.table, result.quirks))
            except RunError as error:
                raise RunError(f"{result.folder} against {target.folder}: {error}") from error


# -- comparison -------------------------------------------------------------------------------------------------------


def find_comparison(runs: Sequence[str]) -> list[Result]:
    """The evaluated models of all folders: every before, every retain_only, then the runs, each in the order given.

    Names and labels begin with the folder's name. An evaluation that several folders hold (the same key) is one row.

    Raises:
        RunError: a folder holds no evaluation, or they are not all of the same forget rows.
    """
    found: list[Result] = []
    names = folder_names(runs)
    for run, name in zip(runs, names, strict=True):
        folder = Path(run).expanduser()
        single = (folder / EVALUATION_FILE).is_file()
        if not single and not (folder / "evaluation").is_dir():
            raise RunError(
                f"{folder} holds no evaluation/NAME folders and no {EVALUATION_FILE}; name a folder that does"
            )
        for result in [read_evaluation(folder)] if single else find_results(folder):
            result.groups = (name,)
            same = next((other for other in found if _same(other, result)), None)
            if same is None:
                found.append(result)
                if single:
                    result.label = name
            else:
                same.groups += (name,)
    for result in found:
        folders = ", ".join(result.groups)
        if len(result.groups) > 1 and len(result.groups) == len(names):
            continue  # what all share needs no name
        if result.label == folders:
            result.name = folders
        else:
            result.label = f"{folders}: {result.label}"
            result.name = f"{result.groups[0]}/{result.name}"
    refuse_other_rows(found)
    found.sort(key=lambda result: STAGES.index(result.stage))
    measure_against_targets(found)
    return found


def _same(first: Result, second: Result) -> bool:
    key = first.evaluation.get("key")
    return key is not None and key == second.evaluation.get("key") and second.groups[0] not in first.groups


def folder_names(runs: Sequence[str]) -> list[str]:
    """What the folders are called; the paths as they were given where two folders have the same name."""
    names = [Path(run).expanduser().resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    if len(set(runs)) < len(runs):
        raise RunError("runs names a folder twice; name each once")
    return [str(run) for run in runs]


# -- parts of evaluations ---------------------------------------------------------------------------------------------


def number_at(result: Result | None, key: str | Sequence[Any]) -> Number | None:
    """A number by its place in evaluation.json, such as attacks.plain.leak; None where it, or the model, is missing.

    Where a name in it may hold a dot, the place is a list of names.

    Of a mean over seeds it is the mean of those that have it, with the lowest and the highest as its interval.
    """
    if result is None:
        return None
    if result.runs:
        numbers = [number for run in result.runs if (number := number_at(run, key)) is not None]
        values = [number.value for number in numbers]
        return Number(fmean(values), (min(values), max(values))) if len(values) > 1 else next(iter(numbers), None)
    parts: list[Any] = key.split(".") if isinstance(key, str) else list(key)
    *places, name = parts
    found: dict[Any, Any] = result.evaluation
    for place in places:
        found = found.get(place, {})
    if found.get(name) is None:
        return None
    interval = found.get("interval") if name in WITH_INTERVAL else None
    return Number(float(found[name]), (interval[0], interval[1]) if interval and len(interval) == 2 else None)


def lines_in(path: Path, *kinds: Any) -> Iterator[dict[str, Any]]:
    """Records of a file of lines; none where there is no file, RunError where it is damaged.

    `kinds` are what they may be; of several, the one after the first is that of lines on sentences to complete.
    """
    for where, line in read_json_lines(path, dict[str, Any]) if path.is_file() else ():
        yield typed(kinds[line.get("kind") == "cloze"], line, where)
