"""Evaluations of `suite=attacks` as rows of one report, and the numbers that are read from them.

A results folder holds `evaluation/before` (the model before unlearning: what an attack can reach),
`evaluation/retain_only` (never taught the forget set: the floor; may be absent) and `evaluation/METHOD` for each
method. Runs that differ in seed alone are one row, with means over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grun.errors import RunError
from grun.evaluation.attacks.base import ATTACKS
from grun.report.labels import label_runs, row_order
from grun.report.matrix import cells_of
from grun.report.result import Result, single_runs
from grun.report.results import evaluations, lines_in, number_at
from grun.runtime.records import ATTACKS_FILE, SUITE_FORMAT, Attempt

WRITING = ("prompt", "decoding")
"""Access of the attacks that make the model write without its weights; verdicts go by them."""
BEYOND = ("read_out", "weights")
"""Access of the attacks that verdicts leave out."""
ASKED = ("rows", "examples", "samples", "temperature", "seed", "max_new_tokens")
"""Settings of an evaluation that must be those of before."""
WORST = {"worst_of_prompts": "worst of prompts", "worst": "worst"}
"""Largest leak of each row, with the names that readers see."""


def find_attacked(results_dir: Path) -> list[Result]:
    """The evaluated models in the order of the rows: before, retain_only, then the methods, each with all its seeds.

    Raises:
        RunError: there is no before, a file is damaged, or an evaluation is of another base model or was asked
            otherwise than before.
    """
    results = evaluations(results_dir, ("settings", "attacks"), None, ASKED, "was asked other rows")
    for result in results:
        _refuse_other_attacks(result, results[0])
    rows = [result for result in results if result.stage != "after"]
    rows += [_mean(cell.results) for cell in cells_of(results)]
    label_runs(rows)  # the runs keep labels with their seeds
    return sorted(rows, key=row_order)


def _mean(runs: Sequence[Result]) -> Result:
    """One result for runs of several seeds, whose numbers `number_at` takes from all; a single run stays as it is.

    Its evaluation has every attack that one of the runs met; all else is that of the first.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    attacks = {name: found for run in reversed(runs) for name, found in run.evaluation["attacks"].items()}
    name = ", ".join(run.name for run in runs)
    return replace(first, name=name, runs=tuple(runs), evaluation={**first.evaluation, "attacks": attacks})


def _refuse_older(result: Result) -> None:
    """RunError where answers that older attacks could not read, those beyond ASCII, were counted as no leak."""
    written = result.evaluation.get("identity", {}).get("format", SUITE_FORMAT)
    lines = lines_in(result.folder / ATTACKS_FILE, Attempt) if written < SUITE_FORMAT else iter(())
    if any(not f"{line['prompt']}{line['text']}".isascii() for line in lines):
        raise RunError(
            f"{result.folder} was attacked when answers beyond ASCII could not be read, so its leaks may be too low; "
            "evaluate it again with overwrite=true"
        )


def _refuse_other_attacks(result: Result, before: Result) -> None:
    _refuse_older(result)
    attacks = set(writing_attacks(result)) ^ set(writing_attacks(before))
    if attacks:
        raise RunError(
            f"{result.folder} was attacked otherwise than {before.folder} (attacks in one alone: "
            f"{', '.join(sorted(attacks))}); evaluate both with the same attacks=[...]"
        )


# -- numbers ----------------------------------------------------------------------------------------------------------


def attack_names(results: Sequence[Result]) -> list[str]:
    """The attacks on the forget set that at least one model met, in the order of `list attacks`; others follow."""
    found = dict.fromkeys(name for result in results for name in result.evaluation["attacks"])
    known = [name for name in ATTACKS.names() if name in found]
    return [*known, *(name for name in found if name not in known)]


def shown_names(results: Sequence[Result]) -> list[str]:
    """Attacks and worst cases in the order in which they are shown: those that need less first, then `beyond`."""
    names, further = attack_names(results), beyond(results)
    return [*(name for name in names if name not in further), *WORST, *further]


def beyond(results: Sequence[Result]) -> list[str]:
    """The attacks of `attack_names` that need the weights, or read more of the model than its text."""
    access = {name: found.get("access") for one in results for name, found in one.evaluation["attacks"].items()}
    return [name for name in attack_names(results) if access[name] in BEYOND]


def writing_attacks(result: Result) -> list[str]:
    """The attacks on a model that make it write with access to the prompt or to decoding alone."""
    return [name for name, found in result.evaluation["attacks"].items() if found.get("access") in WRITING]


def attack_label(name: str) -> str:
    """What readers call an attack."""
    return WORST.get(name, name.replace("_", " "))


def leak_key(name: str) -> str:
    """Where the leak of an attack, or of a worst case, stands."""
    return f"{name}.leak" if name in WORST else f"attacks.{name}.leak"


def leak(result: Result | None, name: str) -> float | None:
    """The leak under an attack or in a worst case."""
    found = number_at(result, leak_key(name))
    return None if found is None else found.value


def kept_set(results: Sequence[Result]) -> str:
    """The set that retention is judged by: held-out rows, or retain rows where nothing is held out."""
    held = any("heldout" in sets for result in results for sets in result.evaluation.get("retention", {}).values())
    return "heldout" if held else "retain"


def gathered(results: Sequence[Result], key: str) -> dict[str, Any]:
    """What the evaluations have under `left_out` (attacks that the data does not allow, each with the reason) or
    `unread` (by set, rows that no attack could ask for, as neither a fact nor a word of the answer can be read).
    """
    return {name: value for result in results for name, value in result.evaluation.get(key, {}).items()}


# -- what came back ---------------------------------------------------------------------------------------------------


def leakiest(result: Result) -> Result | None:
    """The run whose answers are shown: of several seeds that with the most leaked; None without an attacks.jsonl."""
    runs = [run for run in single_runs([result]) if (run.folder / ATTACKS_FILE).is_file()]
    return max(runs, key=lambda run: leak(run, "worst") or 0.0, default=None)


def leaked_most(result: Result, count: int) -> list[dict[str, Any]]:
    """Lines of attacks.jsonl with the highest leaks on the forget set, each of another attack; fewer where less leaked.

    Of equal leaks the attack with the higher leak over all rows comes first. What was read out was not written, and is
    left out.
    """
    best: dict[str, dict[str, Any]] = {}
    read = {name for name, found in result.evaluation["attacks"].items() if found.get("access") == "read_out"}
    for line in lines_in(result.folder / ATTACKS_FILE, Attempt):
        if line["attack"] in read:
            continue
        if line.get("set") == "forget" and line.get("leak", 0) > best.get(line["attack"], {"leak": 0})["leak"]:
            best[line["attack"]] = line
    ordered = sorted(best.values(), key=lambda line: (line["leak"], leak(result, line["attack"]) or 0), reverse=True)
    return ordered[:count]
