"""Checkpoints on disk: one is used only whole, which a list of its files with their digests shows."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from grun.runtime.files import content_hash, file_hash, read_json, remove
from grun.runtime.ownership import IDENTITY_FILE
from grun.runtime.reading import DamagedFile
from grun.runtime.sealed import read_sealed, write_sealed

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within that of the run."""
MANIFEST_FILE = "checkpoint.json"
"""File of a checkpoint that names its step, its run, and size and SHA-256 of every other file."""
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def seal(checkpoint: Path, name: str, run: Path) -> None:
    """Write the list of a checkpoint's files, once all processes have written theirs, and flush them to disk.

    `checkpoint` is its folder, still under another name than `name`, and `run` that of its run.
    """
    files = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        files[file.relative_to(checkpoint).as_posix()] = {"bytes": file.stat().st_size, "sha256": file_hash(file)}
    write_sealed(checkpoint / MANIFEST_FILE, {"name": name, "run": _run_of(run), "files": files})


def damage(checkpoint: Path, run: Path) -> str | None:
    """What is wrong with a checkpoint of the run in the folder `run`; None: it is whole."""
    try:
        values = read_sealed(checkpoint / MANIFEST_FILE)
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, DamagedFile):
        return f"{MANIFEST_FILE} is damaged"
    if values["name"] != checkpoint.name:
        return f"it was written as {values['name']}"
    if values["run"] != _run_of(run):
        return "it is of another run"
    for name, expected in values["files"].items():
        file = checkpoint / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes in place of {expected['bytes']}"
            if file_hash(file) != expected["sha256"]:
                return f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest_whole(folder: Path, run: Path) -> Path | None:
    """The whole checkpoint with the most steps; newer ones, which are damaged, are said and removed."""
    passed_over = False
    for checkpoint in checkpoints_in(folder):
        wrong = damage(checkpoint, run)
        if wrong is None:
            return checkpoint
        log.warning("%s is passed over and removed: %s", checkpoint, wrong)
        remove(checkpoint)
        passed_over = True
    if passed_over:
        log.warning("no checkpoint in %s is whole: training starts from the beginning", folder)
    return None


def _run_of(folder: Path) -> str | None:
    """What identifies the run in a folder; None where nothing does."""
    try:
        return content_hash(read_json(folder / IDENTITY_FILE))
    except (OSError, ValueError):
        return None
