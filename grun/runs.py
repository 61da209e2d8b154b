"""Folders of runs: one folder belongs to one resolved config, and is complete when its run.json is there."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any, Literal

import grun
from grun.errors import RunError
from grun.files import content_hash, read_json, write_json

CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "pyvene", "peft", "datasets", "accelerate", "safetensors", "omegaconf")

State = Literal["new", "unfinished", "finished"]


def identity(config: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """What makes a run that run: its options but for where results go, and hashes of its inputs."""
    left_out = ("output_dir", "overwrite")
    return {"config": {key: value for key, value in config.items() if key not in left_out}, **inputs}


def open_run(folder: Path, identity_of_run: dict[str, Any], *, overwrite: bool) -> State:
    """Claim `folder` for a run.

    Returns:
        "new", "unfinished" (the same run was cut off: resume it) or "finished" (the same run is done).

    Raises:
        RunError: the folder holds another run and `overwrite` is not set, or it holds something else.
    """
    marker = folder / CONFIG_FILE
    wanted = content_hash(identity_of_run)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; name a folder as output_dir")
    if marker.exists():
        there = read_json(marker)
        if overwrite:
            shutil.rmtree(folder)
        elif content_hash(there) == wanted:
            return "finished" if (folder / RUN_FILE).exists() else "unfinished"
        else:
            raise RunError(
                f"{folder} holds another run ({first_difference(there, identity_of_run)}); choose another output_dir, "
                "or overwrite=true replaces it"
            )
    elif folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run of GRUN; choose another output_dir")
    write_json(marker, identity_of_run)
    return "new"


def finish_run(folder: Path, values: dict[str, Any]) -> None:
    """Write run.json, which marks the run as complete."""
    write_json(folder / RUN_FILE, {**values, "versions": versions()})


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
