"""Several results folders, or single evaluations, as rows of one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grun.errors import RunError
from grun.report.results import (
    EVALUATION_FILE,
    STAGES,
    Result,
    find_results,
    measure_against_targets,
    read_evaluation,
    refuse_other_rows,
)


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
