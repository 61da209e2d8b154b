"""Folders of runs: one folder belongs to one resolved config, and is complete when its run.json is there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any, Literal

import grun
from grun import processes
from grun.errors import RunError
from grun.files import content_hash, read_json, write_json, writing

IDENTITY_FILE = "run_identity.json"
"""Marks a folder as a run's; config.json would be overwritten by a model that is saved there."""
RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "pyvene", "peft", "datasets", "accelerate", "safetensors", "omegaconf")

NOT_DECIDING = ("gradient_checkpointing", "monitor_epochs", "monitor_rows")
"""Options of training that change no result."""

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
    if isinstance(decides.get("model"), dict):  # a name alone where adapters are imported
        decides["model"] = {key: value for key, value in decides["model"].items() if key != "device_map"}
    return {"config": decides, **inputs}


def open_run(folder: Path, identity_of_run: dict[str, Any], *, overwrite: bool) -> State:
    """Look whether `folder` can hold a run; nothing is changed, so a run that fails to start loses nothing.

    Returns:
        "new" (`claim` the folder), "unfinished" (the same run was cut off: resume it) or "finished" (it is done).

    Raises:
        RunError: the folder holds another run and `overwrite` is not set, or it holds something else.
    """
    marker = folder / IDENTITY_FILE
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder as output_dir")
    if not marker.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no run of GRUN; choose another output_dir")
        return "new"
    if overwrite:
        return "new"
    try:
        there = read_json(marker)
    except ValueError as error:
        raise RunError(f"{marker} is damaged; choose another output_dir, or overwrite=true replaces the run") from error
    if content_hash(there) == content_hash(identity_of_run):
        return "finished" if (folder / RUN_FILE).exists() else "unfinished"
    raise RunError(
        f"{folder} holds another run ({first_difference(there, identity_of_run)}); choose another output_dir, "
        "or overwrite=true replaces it"
    )


def claim(folder: Path, identity_of_run: dict[str, Any]) -> None:
    """Make `folder`, which `open_run` found to be "new", the run's; a run that it held is removed."""
    with writing(folder):
        if (folder / IDENTITY_FILE).exists():
            shutil.rmtree(folder)
        write_json(folder / IDENTITY_FILE, identity_of_run)


def finish_run(folder: Path, values: dict[str, Any]) -> None:
    """Write run.json, which marks the run as complete; of several processes the first one writes."""

    def write() -> None:
        with writing(folder):
            write_json(folder / RUN_FILE, {**values, "versions": versions()})

    processes.of_first(write)


def versions() -> dict[str, str]:
    """Versions of GRUN, Python and the packages that decide results."""
    found = {"grun": grun.__version__, "python": platform.python_version()}
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
