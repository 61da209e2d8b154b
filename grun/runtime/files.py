"""What may be written, replaced and removed on disk: nothing else in GRUN replaces, moves or removes a file.

A folder that a command writes into is *taken* for that time. What is written below it is listed, by relative name:
while it is worked on in `.grun/files` within it, once it is complete in its run.json or evaluation.json (`files`).
Only what the list names is ever replaced or removed; whatever else lies there belongs to the user and stays as it
is; where its name is needed, that is an error.

`.grun/` is private: the list, locks, and what is not whole yet (`new-*`, moved into place once it is; `unfinished-*`,
kept until the folder is complete). The next command that takes the folder clears what a dead one left there. Files get
mode 0600 and folders 0700, since they hold text to be forgotten; what the user made keeps its mode.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from grun.errors import ConfigError, RunError
from grun.runtime.reading import read_json as read_json  # beside write_json

PRIVATE = ".grun"
LIST_FILE = "files"
LISTED = "files"
"""Key of run.json and evaluation.json: names without the file's own; or, of corpora, rows by name of their files."""
COMPLETE = ("run.json", "evaluation.json")
"""Files that say that their folder is complete: the first to go and the last to come."""
IDENTITY_FILE = "run_identity.json"
"""Marks a folder as a run's; config.json would be overwritten by a model that is saved there."""
_LATE = ("adapter_config.json", "config.json", IDENTITY_FILE, *COMPLETE)
"""Come after all others, so that nothing is loaded before it is whole."""
_PRIVATE_NAME = re.compile(r"files|[^/]+\.lock|(new|unfinished)-[^/]+|replace|commit")
_FOLDER_LOCK = "folder"


class BusyError(RunError):
    """Another process is writing to the folder."""


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`; equal content gives an equal hash on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- which folders ----------------------------------------------------------------------------------------------------


def target(folder: str | Path, option: str = "output_dir") -> Path:
    """A folder that a command is to write into, as it was given, `~` expanded; nothing is changed.

    Raises:
        ConfigError: it cannot be a folder, or is `/`, the home folder, the current folder, or holds one of these.
        RunError: it is a file.
    """
    try:
        path = Path(folder).expanduser()
        resolved = path.resolve()
        is_other = resolved.exists() and not resolved.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{option}={str(folder)!r} can be no folder ({_reason(error)}); name another one") from error
    for special in ("the home folder", "the current folder"):
        kept = (Path.home() if special == "the home folder" else Path.cwd()).resolve()
        if resolved == kept or resolved in kept.parents:
            what = special if resolved == kept else f"a folder that holds {special}"
            raise ConfigError(f"{option}={folder} is {what}; name a folder of its own, such as {kept / 'results'}")
    if is_other:
        raise RunError(f"{path} is a file; name a folder as {option}")
    return path


def foreign(folder: Path) -> list[str]:
    """Names of what lies directly in `folder` and is not listed as written by GRUN, hidden ones too, sorted."""
    root = folder.resolve()
    if not root.is_dir():
        return []
    known = listed(root) or set()
    first = {PurePosixPath(name).parts[0] for name in known}
    _check_private(root)
    return sorted(entry.name for entry in root.iterdir() if entry.name != PRIVATE and entry.name not in first)


def listed(folder: Path) -> set[str] | None:
    """Relative names of what GRUN wrote in `folder`, folders with a `/` behind; None where no list says.

    An unreadable list names nothing, so nothing is removed by it.
    """
    found = _own_list(folder)
    if found is None and (above := _root_of(folder.parent)) is not None:  # that of the folder it was made in
        start = f"{folder.resolve().relative_to(above).as_posix()}/" if above in folder.resolve().parents else "/"
        found = {name.removeprefix(start) for name in listed(above) or () if name.startswith(start)} - {""} or None
    return found


def _own_list(folder: Path) -> set[str] | None:
    found: set[str] | None = None
    for name in COMPLETE:
        if (names := _names_in(folder / name)) is not None:
            found = (found or set()) | names
    return _in_list(folder, found)


def _in_list(folder: Path, found: set[str] | None = None) -> set[str] | None:
    """`found` as the list in `.grun` changes it, if there is one; a last line that was cut off changes nothing."""
    try:
        lines = (folder / PRIVATE / LIST_FILE).read_bytes().splitlines()
    except OSError:
        return found
    found = set() if found is None else found
    for sign, name in filter(None, map(_entry, lines)):
        (found.add if sign == "+" else found.discard)(name)
    return found


def _names_in(path: Path) -> set[str] | None:
    """The list in a run.json or evaluation.json; None where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        values = read_json(path)[LISTED]
        if isinstance(values, list | dict):
            names = {value for value in values if isinstance(value, str) and _is_inside(value)}
            return names | {path.name} | ({IDENTITY_FILE} if isinstance(values, dict) else set())
    return None


def listing(folder: Path, *, without: str | None = None) -> list[str]:
    """What a complete `folder`, or one made by `staged`, is to hold as LISTED; not what is in a folder `without`."""
    found = set(_below(folder)) if folder.parent.name == PRIVATE else listed(folder) or set()
    return sorted(name for name in found if without is None or not name.startswith(f"{without}/"))


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and parts[0] != PRIVATE and "\0" not in name


def _check_private(root: Path) -> None:
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
    ours = all(map(_PRIVATE_NAME.fullmatch, names)) and (not names or any(name.endswith(".lock") for name in names))
    if not ours or None in map(_entry, lines):
        raise RunError(f"{private} holds what GRUN did not write, which needs that name; move it away")


def _entry(line: bytes) -> tuple[str, str] | None:
    """Sign and name of a line of the list."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        sign, name = json.loads(line)
        if sign in ("+", "-") and isinstance(name, str) and _is_inside(name):
            return sign, name
    return None


# -- taking a folder --------------------------------------------------------------------------------------------------


@dataclass
class _Taken:
    """A folder that this process writes into."""

    root: Path
    made: list[Path]
    """What was not there before, the deepest last."""
    locks: dict[str, int | None] = field(default_factory=dict)
    """Open lock files by name; None on a file system without locks."""


_taken: dict[Path, _Taken] = {}
"""By resolved path, in the order of taking."""


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Folders that are taken within the block are let go at its end, however it ends. Also a decorator."""
    before = {root: set(of.locks) for root, of in _taken.items()}
    try:
        yield
    finally:
        for root in list(reversed(_taken)):
            if root not in before:
                _let_go(root)
            else:
                _unlock(_taken[root], _taken[root].locks.keys() - before[root])


@contextlib.contextmanager
def taken(folder: Path, *, lock: str = _FOLDER_LOCK, wait: bool = False, adopt: Iterable[str] = ()) -> Iterator[None]:
    """`take` for the length of a block; a folder that is taken already stays so."""
    with holding():
        take(folder, lock=lock, wait=wait, adopt=adopt)
        yield


def take(folder: Path, *, lock: str = _FOLDER_LOCK, wait: bool = False, adopt: Iterable[str] = ()) -> None:
    """Make `folder`, if need be, and let this process write into it, until the surrounding `holding` ends.

    Whoever holds the lock is the only one; what a dead process left half done is finished or cleared. That it may be
    used at all (new, empty, a run of its own, ...) is the caller's to look at, again once it is taken.

    Args:
        folder: a link is followed.
        lock: another name: of something in the folder that this process alone works on, while others may elsewhere.
        wait: for another process that holds the lock, instead of an error.
        adopt: names to be listed where there is no list yet, of a version of GRUN that kept none.

    Raises:
        BusyError: another process holds the lock.
        ConfigError, RunError: the folder cannot be a target, as of `target`.
    """
    root = target(folder, "folder").resolve()
    of = _taken.get(root)
    if of is not None and lock in of.locks:
        return
    made: list[Path] = []
    handle = None
    if (parent := _root_of(root.parent)) is not None:  # before it is made: a kill leaves none that is on no list
        _note(parent, "+", _missing(parent, root.relative_to(parent).as_posix(), folder=True))
    for left in reversed(range(100)):
        try:
            made += _make(root)
            _check_private(root)
            _make(root / PRIVATE)
            handle = _locked(root / PRIVATE / f"{lock}.lock", wait)
            break
        except FileNotFoundError:  # another process let it go, and its private folder with it
            if not left:
                raise
        except BusyError as error:
            raise BusyError(
                f"another process is writing to {folder}; try again when it is done, or choose another folder"
            ) from error
    if of is None:
        of = _taken[root] = _Taken(root, made)
    of.locks[lock] = handle
    if lock == _FOLDER_LOCK:
        _clear(root)
    if not (root / PRIVATE / LIST_FILE).exists() and (names := listed(root) or set(adopt)):
        _note(root, "+", names)
    if parent is not None:
        below = [path for path in (*made, root) if parent in path.parents and path.name != PRIVATE]
        _note(parent, "+", [f"{path.relative_to(parent).as_posix()}/" for path in below])


def settle(folder: Path) -> None:
    """Finish or clear what a dead process left in `folder`; BusyError where a living one is writing there."""
    root = folder.resolve()
    if root not in _taken and (root / PRIVATE).is_dir():
        with contextlib.suppress(OSError), taken(folder):  # one that may only be read is as good as settled
            pass


def _locked(path: Path, wait: bool) -> int | None:
    """An open, locked file; None on a system or file system without locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (ImportError, OSError) as error:
            os.close(handle)
            if isinstance(error, OSError) and error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise BusyError(str(path)) from error
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # that of a folder which was let go meanwhile


def _let_go(root: Path) -> None:
    of = _taken[root]
    try:
        if _FOLDER_LOCK in of.locks:
            with contextlib.suppress(OSError, RunError):
                complete, names = _clear(root), listed(root)
                if complete and names and (above := _root_of(root.parent)) is not None:
                    _note(above, "+", [f"{root.relative_to(above).as_posix()}/{name}" for name in names])
                if complete or not (names or any((root / PRIVATE).glob("unfinished-*"))):
                    _drop(root)
                if not names:  # nothing came of it
                    for folder in reversed(of.made):
                        folder.rmdir()
    finally:
        del _taken[root]
        _unlock(of, set(of.locks))


def _unlock(of: _Taken, names: Collection[str]) -> None:
    for name in names:
        if (handle := of.locks.pop(name)) is not None:
            os.close(handle)


def _clear(root: Path) -> bool:
    """Finish what was decided, remove what is not whole, and of a complete folder all that its list leaves out.

    Returns whether the folder is complete, and needs no list but that in its own files.
    """
    with contextlib.ExitStack() as stack, contextlib.suppress(BusyError):  # of another one at work on a part
        for path in (root / PRIVATE).glob("*.lock"):
            if path.stem not in _taken[root].locks and (handle := _locked(path, wait=False)) is not None:
                stack.callback(os.close, handle)
        _roll_forward(root)
        for leftover in (root / PRIVATE).glob("new-*"):
            _erase(leftover)
    whole = [names for name in COMPLETE if (names := _names_in(root / name)) is not None]
    if not whole:
        return False
    _delete(root, (listed(root) or set()).difference(*whole))
    for leftover in (root / PRIVATE).glob("unfinished-*"):
        _erase(leftover)
    if not set().union(*whole) - {*COMPLETE, IDENTITY_FILE} <= (listed(root) or set()):
        return False  # some of it was removed, which the list alone says
    _erase(root / PRIVATE / LIST_FILE)
    return True


def _drop(root: Path) -> None:
    """Remove the private folder, the lock last."""
    private = root / PRIVATE
    entries = [entry for entry in private.glob("*") if _PRIVATE_NAME.fullmatch(entry.name)]
    for entry in sorted(entries, key=lambda entry: (entry.suffix == ".lock", entry.name == LIST_FILE)):
        _erase(entry)
    with contextlib.suppress(OSError):
        private.rmdir()


def _root_of(folder: Path) -> Path | None:
    """The nearest taken folder that is or holds `folder`."""
    for ancestor in (folder, *folder.absolute().parents):
        if (root := ancestor.resolve()) in _taken:
            return root
    return None


def _through_link(root: Path, path: Path) -> bool:
    """Whether a folder between `root` and `path` is a link."""
    return any(parent.is_symlink() for parent in path.parents if root in parent.parents)


def _note(root: Path, sign: str, names: Iterable[str]) -> None:
    """Append to the list, what is newly there (`+`) before it is written, what is gone (`-`) afterwards."""
    known = (_in_list(root) if sign == "+" else listed(root)) or set()
    if changed := [name for name in names if (name in known) != (sign == "+")]:
        path = root / PRIVATE / LIST_FILE
        with _opened(path, "a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut off by a kill
                    file.write(b"\n")
            file.write("".join(json.dumps([sign, name]) + "\n" for name in changed).encode())


# -- writing ----------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place.

    RunError where that name, in a folder that is taken, is that of a file which GRUN did not write.
    """
    with _new(path) as file:
        file.write(data)


@contextlib.contextmanager
def _new(path: Path) -> Iterator[IO[bytes]]:
    root = _listed_in(path)
    token = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.name}.{token}.tmp") if root is None else root / PRIVATE / f"new-{token}"
    try:
        with _opened(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append(path: Path) -> IO[bytes]:
    """Open a file for appending, unbuffered, and make it if need be; RunError as of `write_bytes`."""
    _listed_in(path)
    return _opened(path, "ab", buffering=0)


def adopt(paths: Iterable[Path]) -> None:
    """List files in a taken folder that a library has just made under names that could not be known before."""
    for path in paths:
        if (place := _place(path)) is not None:
            _note(place[0], "+", [place[1]])


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's content, piece by piece; errors as of `write_bytes`."""
    with _new(path) as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there, and those above it."""
    if (place := _place(folder)) is not None:
        _note(place[0], "+", _missing(*place, folder=True))
    _make(folder)


@contextlib.contextmanager
def staged(folder: Path, *, whole: bool = False) -> Iterator[Path]:
    """Yield a private folder whose content is moved into `folder` if the block ends without an exception.

    For what libraries write by themselves, and for several files that belong together. A process that is killed leaves
    the old content, or the next one that takes the folder finds the new one.

    Args:
        folder: one that is taken; or a new one below such a one, which then appears at once.
        whole: what was listed there before and is not among the new goes.

    Raises:
        RunError: a name is that of a file which GRUN did not write; nothing is moved then.
    """
    new = staging(folder, uuid.uuid4().hex[:8])
    try:
        yield new
        place(new, folder, whole=whole)
    finally:
        _erase(new)


def staging(folder: Path, name: str) -> Path:
    """A new, empty, private folder for what is to be moved into `folder` by `place`; the next process removes it."""
    root = _root_of(folder)
    if root is None:
        raise RuntimeError(f"{folder} is not taken")
    new = root / PRIVATE / f"new-{name}"
    _erase(new)
    new.mkdir(mode=0o700)
    return new


def place(new: Path, folder: Path, *, whole: bool = False) -> None:
    """Move the content of `new`, as of `staging`, into `folder`; arguments and errors as of `staged`."""
    root = _root_of(folder)
    assert root is not None
    names = _below(new)
    for name in names:
        path = new / name
        path.chmod(0o700 if path.is_dir() else 0o600)
        sync(path)
    if folder.resolve() == root:
        _refuse_foreign(root, names)
        os.replace(new, root / PRIVATE / ("replace" if whole else "commit"))
        _roll_forward(root)
        return
    make_folder(folder.parent)
    where = _place(folder)
    assert where is not None
    prefix, below = where[1], root / where[1]
    names = [f"{prefix}/", *(f"{prefix}/{name}" for name in names)]
    _refuse_foreign(root, names)
    _note(root, "+", names)
    sync(new)
    if not below.exists():
        os.replace(new, below)
    else:  # with something of the user's in it
        _move(new, below)
    sync(below.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the block, which only writes, a failure of Python, safetensors or torch to do so is a RunError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        other = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
        cure = "make it writable, or name another folder," if other else "free space there"
        raise RunError(
            f"writing to {folder} failed ({_reason(error)}); {cure} and run the same command again, which "
            "goes on from the newest checkpoint, if there is one"
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, ValueError) or "home" in line else f"is the disk full? {line}"


def _roll_forward(root: Path) -> None:
    """Carry out, or carry on with, the move of a placed folder's content into `root`."""
    replace, commit = root / PRIVATE / "replace", root / PRIVATE / "commit"
    if replace.is_dir():
        new = set(_below(replace))
        _delete(root, (listed(root) or set()) - new | set(COMPLETE) & (listed(root) or set()))
        os.replace(replace, commit)
    if commit.is_dir():
        names = _below(commit)
        _refuse_foreign(root, names)
        _note(root, "+", names)
        _move(commit, root)
        sync(root)
        _erase(commit)


def _move(new: Path, folder: Path) -> None:
    """Move all that is in `new`, one by one, those in _LATE last."""
    for name in sorted(_below(new), key=lambda name: _LATE.index(name) if name in _LATE else -1):
        if name.endswith("/"):
            _make(folder / name)
        else:
            _make((folder / name).parent)
            os.replace(new / name, folder / name)


def _place(path: Path) -> tuple[Path, str] | None:
    """The taken folder that `path` lies in, and its name there; None where there is none, or it is private.

    RunError where it lies behind a link.
    """
    absolute = Path(path).absolute()
    if not _taken:
        return None
    for folder in absolute.parents:
        if (root := folder.resolve()) in _taken:
            if absolute.relative_to(folder).parts[0] == PRIVATE:
                return None
            if _through_link(folder, absolute):
                raise RunError(f"{path.parent} is or lies behind a link, in a folder of GRUN's; put a folder there")
            return root, absolute.relative_to(folder).as_posix()
    return None


def _listed_in(path: Path) -> Path | None:
    """The taken folder in whose list a file now stands that is about to be written; its own folder is made."""
    place = _place(path)
    if place is not None:
        root, name = place
        _refuse_foreign(root, [name])
        _note(root, "+", [*_missing(root, name), name])
    _make(path.parent)
    return None if place is None else place[0]


def _refuse_foreign(root: Path, names: Collection[str]) -> None:
    """RunError for the first name that something which GRUN did not write has."""
    known = listed(root) or set()
    for name in names:
        path = root / name
        if not _through_link(root, path) and (
            name in known
            or not os.path.lexists(path)
            or (name.endswith("/") and path.is_dir() and not path.is_symlink())
        ):
            continue
        raise RunError(
            f"{path} is there already and no list says that GRUN wrote it, so it is not replaced; move it away, or "
            "choose another folder"
        )


def _missing(root: Path, name: str, *, folder: bool = False) -> list[str]:
    """Folders above `name` that are not there yet, and itself if it is to be a `folder`."""
    path = PurePosixPath(name)
    names = [f"{one}/" for one in (path, *path.parents) if str(one) != "."]
    return [one for one in reversed(names if folder else names[1:]) if not (root / one).exists()]


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it, readable by the user alone; those that were not there, the deepest last."""
    made = []
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
                made.append(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return made


def _opened(path: Path, mode: str, buffering: int = -1) -> IO[bytes]:
    return open(path, mode, buffering, opener=lambda name, flags: os.open(name, flags, 0o600))


def _below(folder: Path) -> list[str]:
    """Relative names of all files and folders in `folder`, folders with a `/` behind."""
    return sorted(
        path.relative_to(folder).as_posix() + ("/" if path.is_dir() and not path.is_symlink() else "")
        for path in folder.rglob("*")
    )


# -- removing ---------------------------------------------------------------------------------------------------------


def clear(folder: Path) -> None:
    """Remove what the list of a taken folder names, and nothing else; the folder stays."""
    root = folder.resolve()
    _delete(root, listed(root) or set())


def remove(path: Path) -> bool:
    """Remove a file or a folder as far as GRUN wrote it; whether it is gone.

    A folder with a list of its own loses what that names; else what the list of the folder above names of it goes.
    """
    path = path.parent.resolve() / path.name
    has_list = path.is_dir() and not path.is_symlink() and _own_list(path) is not None
    if has_list:
        with taken(path):
            clear(path)
        with contextlib.suppress(OSError):
            path.rmdir()
    root = next((parent for parent in path.parents if parent in _taken or _own_list(parent) is not None), None)
    if root is not None:
        name = path.relative_to(root).as_posix()
        with contextlib.nullcontext() if root in _taken else taken(root):
            names = {one for one in listed(root) or () if one == name or one.startswith(f"{name}/")}
            if has_list:
                _note(root, "-", names)
            else:
                _delete(root, names)
    return not os.path.lexists(path)


def _delete(root: Path, names: Collection[str]) -> None:
    """Remove listed files, then listed folders that are empty; of a folder with a list of its own what that names."""
    _note(root, "+", names)
    order = {name: 0 for name in COMPLETE} | {IDENTITY_FILE: 2}
    apart = tuple(name for name in names if name.endswith("/") and _own_list(root / name) is not None)
    for name in sorted(names, key=lambda name: order.get(name, 1)):
        path = root / name
        if not (
            name.startswith(apart)
            or name.endswith("/")
            or _through_link(root, path)
            or (path.is_dir() and not path.is_symlink())
        ):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
    for name in sorted((name for name in names if name.endswith("/")), key=len, reverse=True):
        path = root / name
        if path.is_symlink() or _through_link(root, path):
            continue
        if name in apart:
            with taken(path):
                clear(path)
        with contextlib.suppress(OSError):
            path.rmdir()
    _note(root, "-", names)


def _erase(path: Path) -> None:
    """Remove something private."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
