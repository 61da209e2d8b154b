"""What a matrix lacks: cells and seeds without an evaluation, as far as the results folders say why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grun.report.matrix import Matrix
from grun.report.results import Result, unread_words
from grun.runtime.files import read_json
from grun.runtime.runs import IDENTITY_FILE, RUN_FILE

OUTCOME = ".outcome.json"
"""How a sweep ends the name of the file in RESULTS/cells that says how far a cell came."""


def notes(matrix: Matrix) -> list[str]:
    """What a reader must know of the runs: cells and seeds that are missing and why, times that are not whole, and rows
    that no metric can read.
    """
    unlearned = [row for row in matrix.cells if row.objective is not None]
    seeds = sorted({seed for row in unlearned for seed in row.seeds})
    states = {**_unevaluated(matrix), **failures(matrix.results)}
    lines = []
    for row in unlearned:
        missing = [seed for seed in seeds if seed not in row.seeds] if row.seeds or not row.results else []
        why = {seed: states.get((str(row.objective), row.parametrization, seed), "not run") for seed in missing}
        if not row.results:
            reasons = "; ".join(f"seed {seed} {text}" for seed, text in why.items()) or "not run"
            lines.append(f"{row.label}: no evaluated run ({reasons}).")
        elif missing:
            reasons = "; ".join(f"seed {seed} {text}" for seed, text in why.items())
            lines.append(f"{row.label}: {len(row.seeds)} of {len(seeds)} seeds ({reasons}).")
    lent = {
        row.label: sum(bool((result.record.get("cache") or {}).get("found")) for result in row.results)
        for row in unlearned
    }
    found = [f"{row.label} {lent[row.label]} of {len(row.results)}" for row in unlearned if lent[row.label]]
    if found:
        lines.append(
            "Runs that found frozen states in the cache, computed by an earlier run, which their seconds leave out: "
            f"{', '.join(found)}."
        )
    return lines + unread_words(matrix.results)


def failures(results: Sequence[Result]) -> dict[tuple[str, str, int], str]:
    """Cells of which a sweep says that they failed, by objective, parametrization and seed, with its error."""
    found = {}
    for path in sorted(path for folder in _folders(results) for path in folder.glob(f"cells/*{OUTCOME}")):
        outcome = _object(path)
        options = _object(path.with_name(path.name.removesuffix(OUTCOME) + ".json")).get("unlearn")
        key = _key(options)
        if outcome.get("state") == "failed" and key is not None:
            found[key] = f"failed: {outcome.get('error') or 'no reason given'}"
    return found


def _unevaluated(matrix: Matrix) -> dict[tuple[str, str, int], str]:
    """Runs that were begun in the results folders and have no evaluation, by objective, parametrization and seed."""
    evaluated = {result.run.resolve() for result in matrix.results if result.run}
    found = {}
    for path in sorted(path for folder in _folders(matrix.results) for path in folder.glob(f"*/{IDENTITY_FILE}")):
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
        return {}  # a damaged or missing file says nothing of its run
    return value if isinstance(value, dict) else {}
