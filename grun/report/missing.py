"""What a matrix lacks: cells and seeds without an evaluation, and why, as far as the results folders have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grun.report.result import Result
from grun.runtime.files import read_json
from grun.runtime.runs import IDENTITY_FILE, RUN_FILE

OUTCOME = ".outcome.json"
"""How a sweep ends the name of the file in RESULTS/cells, in which is how far a cell came."""


def failures(results: Sequence[Result]) -> dict[tuple[str, str, int], str]:
    """Cells that failed in a sweep, by objective, parametrization and seed, with its error."""
    found = {}
    for path in sorted(path for folder in _folders(results) for path in folder.glob(f"cells/*{OUTCOME}")):
        outcome = _object(path)
        options = _object(path.with_name(path.name.removesuffix(OUTCOME) + ".json")).get("unlearn")
        key = _key(options)
        if outcome.get("state") == "failed" and key is not None:
            found[key] = f"failed: {outcome.get('error') or 'no reason given'}"
    return found


def unevaluated(results: Sequence[Result]) -> dict[tuple[str, str, int], str]:
    """Runs that were begun in the results folders and have no evaluation, by objective, parametrization and seed."""
    evaluated = {result.run.resolve() for result in results if result.run}
    found = {}
    for path in sorted(path for folder in _folders(results) for path in folder.glob(f"*/{IDENTITY_FILE}")):
        key = _key(_object(path).get("config"))
        if path.parent.resolve() not in evaluated and key is not None:
            found[key] = "trained, not evaluated" if (path.parent / RUN_FILE).is_file() else "did not finish"
    return found


def _folders(results: Sequence[Result]) -> set[Path]:
    """The results folders."""
    return {result.folder.resolve().parent.parent for result in results}


def _key(options: Any) -> tuple[str, str, int] | None:
    """Objective, parametrization and seed of an unlearning run's options."""
    if not isinstance(options, dict) or not isinstance(options.get("method"), dict):
        return None
    objective, seed = options.get("objective"), options.get("seed")
    parametrization = options["method"].get("parametrization")
    if isinstance(objective, str) and isinstance(parametrization, str) and isinstance(seed, int):
        return objective, parametrization, seed
    return None


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}  # a damaged or missing file has nothing on its run
    return value if isinstance(value, dict) else {}
