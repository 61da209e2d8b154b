"""Which files in a folder are GRUN's: the list of what it wrote there. Whatever else lies there is the user's.

The list holds relative names, those of folders with a final `/`. While a folder is worked on, it grows line by line in
`.grun/files` within the folder; once the folder is complete, it stands in its run.json or evaluation.json (`files`).
Only what a list names is ever replaced or removed. Where a name on it is needed that something else has, that is an
error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from grun.errors import RunError
from grun.runtime.reading import read_json

PRIVATE = ".grun"
LIST_FILE = "files"
LISTED = "files"
"""Key of run.json and evaluation.json: names without the file's own; or, of corpora, rows by name of their files."""
COMPLETE = ("run.json", "evaluation.json")
"""Files that mark their folder as complete: the first to go and the last to come."""
IDENTITY_FILE = "run_identity.json"
"""Marks a folder as a run's; config.json would be overwritten by a model that is saved there."""
PRIVATE_NAME = re.compile(r"files|[^/]+\.lock|(new|unfinished)-[^/]+|replace|commit")


@dataclass
class Taken:
    """A folder that this process writes into."""

    root: Path
    made: list[Path]
    """What was not there before, the deepest last."""
    locks: dict[str, int | None] = field(default_factory=dict)
    """Open lock files by name; None on a file system without locks."""


held: dict[Path, Taken] = {}
"""Taken folders by resolved path, in the order of taking."""


def root_of(folder: Path) -> Path | None:
    """The nearest taken folder that is or holds `folder`."""
    for ancestor in (folder, *folder.absolute().parents):
        if (root := ancestor.resolve()) in held:
            return root
    return None


def place_of(path: Path) -> tuple[Path, str] | None:
    """The taken folder that `path` lies in, and its name there; None where there is none, or it is private.

    RunError where a folder between the two is a link.
    """
    absolute = Path(path).absolute()
    for folder in absolute.parents if held else ():
        if (root := folder.resolve()) in held:
            name = absolute.relative_to(folder)
            if name.parts[0] == PRIVATE:
                return None
            if through_link(folder, absolute):
                raise RunError(f"{path.parent} is or lies behind a link, in a folder of GRUN's; put a folder there")
            return root, name.as_posix()
    return None


def through_link(root: Path, path: Path) -> bool:
    """Whether a folder between `root` and `path` is a link."""
    return any(parent.is_symlink() for parent in path.parents if root in parent.parents)


# -- reading the list -------------------------------------------------------------------------------------------------


def listed(folder: Path) -> set[str] | None:
    """Relative names of what GRUN wrote in `folder`, folders with a final `/`; None where there is no list.

    An unreadable list names nothing, so nothing is removed by it.
    """
    found = own_list(folder)
    if found is None and (above := root_of(folder.parent)) is not None:  # the list of the folder it was made in
        start = f"{folder.resolve().relative_to(above).as_posix()}/" if above in folder.resolve().parents else "/"
        found = {name.removeprefix(start) for name in listed(above) or () if name.startswith(start)} - {""} or None
    return found


def own_list(folder: Path) -> set[str] | None:
    """The same by the folder's own list alone."""
    complete = [names for name in COMPLETE if (names := names_in(folder / name)) is not None]
    return _private_list(folder, set().union(*complete) if complete else None)


def names_in(path: Path) -> set[str] | None:
    """The list in a run.json or evaluation.json; None where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        values = read_json(path)[LISTED]
        if isinstance(values, list | dict):
            names = {value for value in values if isinstance(value, str) and _is_inside(value)}
            return names | {path.name} | ({IDENTITY_FILE} if isinstance(values, dict) else set())
    return None


def _private_list(folder: Path, found: set[str] | None = None) -> set[str] | None:
    """`found` as the list in `.grun` changes it, if there is one; a last line that was cut off changes nothing."""
    try:
        lines = (folder / PRIVATE / LIST_FILE).read_bytes().splitlines()
    except OSError:
        return found
    found = set() if found is None else found
    for sign, name in filter(None, map(_entry, lines)):
        (found.add if sign == "+" else found.discard)(name)
    return found


def _entry(line: bytes) -> tuple[str, str] | None:
    """Sign and name of a line of the list."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        sign, name = json.loads(line)
        if sign in ("+", "-") and isinstance(name, str) and _is_inside(name):
            return sign, name
    return None


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and parts[0] != PRIVATE and "\0" not in name


def listing(folder: Path, *, without: str | None = None) -> list[str]:
    """What a complete `folder`, or one made by `staged`, is to hold as LISTED; not what is in a folder `without`."""
    found = set(below(folder)) if folder.parent.name == PRIVATE else listed(folder) or set()
    return sorted(name for name in found if without is None or not name.startswith(f"{without}/"))


def below(folder: Path) -> list[str]:
    """Relative names of all files and folders in `folder`, folders with a final `/`."""
    return sorted(
        path.relative_to(folder).as_posix() + ("/" if path.is_dir() and not path.is_symlink() else "")
        for path in folder.rglob("*")
    )


def missing(root: Path, name: str, *, folder: bool = False) -> list[str]:
    """Folders above `name` that are not there yet, and itself if it is to be a `folder`."""
    path = PurePosixPath(name)
    names = [f"{one}/" for one in (path, *path.parents) if str(one) != "."]
    return [one for one in reversed(names if folder else names[1:]) if not (root / one).exists()]


# -- what is the user's -----------------------------------------------------------------------------------------------


def foreign(folder: Path) -> list[str]:
    """Names of what lies directly in `folder` and is not listed as written by GRUN, hidden ones too, sorted."""
    root = folder.resolve()
    if not root.is_dir():
        return []
    ours = {PRIVATE, *(PurePosixPath(name).parts[0] for name in listed(root) or ())}
    check_private(root)
    return sorted(entry.name for entry in root.iterdir() if entry.name not in ours)


def check_private(root: Path) -> None:
    """RunError where `.grun` is something that GRUN did not make."""
    private = root / PRIVATE
    if not os.path.lexists(private):
        return
    if private.is_symlink() or not private.is_dir():
        raise RunError(f"{private} is not GRUN's, which needs that name; move it away, or choose another folder")
    names = [entry.name for entry in os.scandir(private)]
    lines = []
    with contextlib.suppress(FileNotFoundError):
        lines = (private / LIST_FILE).read_bytes().split(b"\n")[:-1]
    ours = all(map(PRIVATE_NAME.fullmatch, names)) and (not names or any(name.endswith(".lock") for name in names))
    if not ours or None in map(_entry, lines):
        raise RunError(f"{private} holds what GRUN did not write, which needs that name; move it away")


def refuse_foreign(root: Path, names: Collection[str]) -> None:
    """RunError for the first name that something which GRUN did not write has."""
    known = listed(root) or set()
    for name in names:
        path = root / name
        is_folder = name.endswith("/") and path.is_dir() and not path.is_symlink()
        if through_link(root, path) or not (name in known or is_folder or not os.path.lexists(path)):
            raise RunError(
                f"{path} is there already and no list says that GRUN wrote it, so it is not replaced; move it away, or "
                "choose another folder"
            )


# -- writing the list -------------------------------------------------------------------------------------------------


def note(root: Path, sign: str, names: Iterable[str]) -> None:
    """Append to the list of a taken folder, what is new (`+`) before it is written, what is gone (`-`) afterwards."""
    known = (_private_list(root) if sign == "+" else listed(root)) or set()
    if changed := [name for name in names if (name in known) != (sign == "+")]:
        with opened(root / PRIVATE / LIST_FILE, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # drops a line that was cut off by a kill
            file.write("".join(json.dumps([sign, name]) + "\n" for name in changed).encode())


def opened(path: Path, mode: str, **options: Any) -> IO[bytes]:
    """`open`; a file that this makes can be read by the user alone."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600), **options)
