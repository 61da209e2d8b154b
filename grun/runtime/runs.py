"""Folders of runs: one folder belongs to one resolved config, and is complete when its run.json is there."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from grun.errors import RunError
from grun.runtime import processes
from grun.runtime.files import (
    clear,
    content_hash,
    holding,
    read_json,
    settle,
    staged,
    take,
    target,
    write_json,
    writing,
)
from grun.runtime.ownership import IDENTITY_FILE, LISTED, foreign, listed, listing
from grun.runtime.reading import DamagedFile
from grun.version import __version__

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "pyvene", "peft", "datasets", "accelerate", "safetensors", "omegaconf")

NOT_DECIDING = ("gradient_checkpointing", "monitor_epochs", "monitor_rows", "report_to")
"""Options of training that change no result."""

LATER: dict[str, tuple[tuple[str, Any], ...]] = {
    "method": (
        *(("edit", "loreft"), ("gate_blocks", None), ("gate_pool", "last")),
        *(("gate_fit", "joint"), ("false_positives", None), ("action", "edit"), ("gate_keywords", [])),
        ("steer_strength", 1.0),
        *(("guardrail", {"text": None, "examples": 8}), ("task_vector", {"scale": 1.0})),
    ),
    "data": (
        *(("group", None), ("gate_prompts", None), ("gate_negatives", None)),
        *(("subjects", []), ("subject_kind", "any"), ("gate_copies", [])),
        *(("counterfactuals", 20), ("alternates", 5)),
    ),
}
"""Options, with their defaults, that came later than runs which have none of them."""

State = Literal["new", "unfinished", "finished"]


def identity(config: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """What makes a run that run: options that decide its result, and hashes of its inputs.

    Left out are where results and caches go, gradient checkpointing, which changes memory alone, looks at the model
    while it is trained, the spreading of a model over GPUs, and a precision of auto, which follows the model's type.
    """
    left_out = ("output_dir", "overwrite", "cache", "sources")
    decides = {key: value for key, value in config.items() if key not in left_out}
    if "train" in decides:
        decides["train"] = {
            key: value
            for key, value in decides["train"].items()
            if key not in NOT_DECIDING and (key, value) != ("precision", "auto")
        }
    for section, later in LATER.items():
        if isinstance(decides.get(section), dict):
            decides[section] = {k: v for k, v in decides[section].items() if (k, v) not in later}
    if isinstance(decides.get("model"), dict):  # a name alone where adapters are imported
        decides["model"] = {key: value for key, value in decides["model"].items() if key != "device_map"}
    return {"config": decides, **inputs}


def open_run(folder: Path, identity_of_run: dict[str, Any], *, overwrite: bool) -> State:
    """Look whether `folder` can hold a run, once what a dead process left there is settled; a run there stays.

    Returns:
        "new" (`claim` the folder), "unfinished" (the same run was cut off: `claim` and resume it) or "finished".

    Raises:
        ConfigError: the folder can be no result's; see `files.target`.
        RunError: the folder holds another run and `overwrite` is not set, or it holds something else, or a process is
            writing there.
    """
    target(folder)
    settle(folder)
    marker = folder / IDENTITY_FILE
    if not marker.exists():
        if names := foreign(folder):
            raise RunError(
                f"{folder} is not empty and holds no run of GRUN (but {names[0]}); choose another output_dir"
            )
        return "new"
    if listed(folder) is None and (overwrite or not (folder / RUN_FILE).exists()):
        raise RunError(
            f"{folder} holds a run without a readable list of its files (of an older version, or {RUN_FILE} is "
            "damaged), so it is not replaced; remove it yourself, or choose another output_dir"
        )
    if overwrite:
        return "new"
    there = read_object(marker, "choose another output_dir, or overwrite=true replaces the run")
    if content_hash(there) != content_hash(identity_of_run):
        raise RunError(
            f"{folder} holds another run ({first_difference(there, identity_of_run)}); choose another output_dir, "
            "or overwrite=true replaces it"
        )
    if not (folder / RUN_FILE).exists():
        return "unfinished"
    read_object(folder / RUN_FILE, "choose another output_dir, or remove the folder yourself")
    return "finished"


def is_finished(folder: Path, identity_of_run: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether `open_run` finds this very run in `folder`, whole, which a line says; errors are those of it."""
    found = open_run(folder, identity_of_run, overwrite=overwrite) == "finished"
    if found:
        log.info("%s holds this very run, finished: nothing to do (overwrite=true makes it again)", folder)
    return found


def write_whole(
    folder: Path, identity_of_run: dict[str, Any], write: Callable[[Path], dict[str, Any]], *, overwrite: bool
) -> None:
    """Have `write` fill `folder`, which appears whole or not at all, with what it returns as run.json.

    Nothing is done where this very run is there; errors are those of `open_run`.
    """
    if is_finished(folder, identity_of_run, overwrite=overwrite):
        return
    with holding():
        hold(folder, identity_of_run, overwrite=overwrite)
        with writing(folder), staged(folder, whole=True) as new:
            values = write(new)
            write_json(new / IDENTITY_FILE, identity_of_run)
            finish_run(new, values)


def hold(folder: Path, identity_of_run: dict[str, Any], *, overwrite: bool) -> State:
    """`files.take` the folder and `open_run` it again; "finished" is an error too."""
    with writing(folder):
        take(folder)
    state = open_run(folder, identity_of_run, overwrite=overwrite)
    if state == "finished":
        raise RunError(f"another process has just finished this very run in {folder}; the same command finds it")
    return state


def claim(folder: Path, identity_of_run: dict[str, Any], *, overwrite: bool) -> None:
    """`hold` the folder; if it is new for this run, what its list names goes, and the run's identity is written."""
    if hold(folder, identity_of_run, overwrite=overwrite) == "new":
        with writing(folder):
            clear(folder)
            write_json(folder / IDENTITY_FILE, identity_of_run)


def finish_run(folder: Path, values: dict[str, Any], *, without: str | None = None) -> None:
    """Write run.json, which marks the run as complete and lists its files; of several processes the first one writes.

    What lies in the sub-folder `without`, such as checkpoints, is no part of it and goes when the folder is let go.
    """

    def write() -> None:
        with writing(folder):
            files = [name for name in listing(folder, without=without) if name != RUN_FILE]  # noted before a kill
            write_json(folder / RUN_FILE, {LISTED: files, **values, "versions": versions()})

    processes.of_first(write)


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object; RunError, with `advice`, if the file holds anything else."""
    try:
        values: dict[str, Any] = read_json(path, expect=dict)
    except (OSError, DamagedFile) as error:
        raise RunError(f"{path} is damaged; {advice}") from error
    return values


def versions() -> dict[str, str]:
    """Versions of GRUN, Python and the packages that decide results."""
    found = {"grun": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def first_difference(there: Any, wanted: Any, path: str = "") -> str:
    """First place where two nested dicts differ, as `a.b: x there, y asked for`."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*there, *wanted]):
            if there.get(key) != wanted.get(key):
                return first_difference(there.get(key), wanted.get(key), f"{path}.{key}" if path else str(key))
    return f"{path.removeprefix('config.')}: {there} there, {wanted} asked for"
