"""Writing, replacing and removing files: nothing else in GRUN does so, and only what its lists name is touched.

A folder that a command writes into is *taken* for that time, under a lock, and what is written below it is noted in its
list first (`grun.runtime.ownership`). `.grun/` within it is private: the list, locks, and what is not whole yet
(`new-*`, moved into place once it is; `unfinished-*`, kept until the folder is complete). The next command that takes
the folder clears what a dead one left there. Files get mode 0600 and folders 0700, since they hold text to be
forgotten; what the user made keeps its mode.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from grun.errors import ConfigError, RunError
from grun.runtime.ownership import (
    COMPLETE,
    IDENTITY_FILE,
    LIST_FILE,
    PRIVATE,
    PRIVATE_NAME,
    Taken,
    below,
    check_private,
    held,
    listed,
    missing,
    names_in,
    note,
    opened,
    own_list,
    place_of,
    refuse_foreign,
    root_of,
    through_link,
)
from grun.runtime.reading import first_line
from grun.runtime.reading import read_json as read_json  # stands next to write_json for those who import it

_LATE = ("adapter_config.json", "config.json", IDENTITY_FILE, *COMPLETE)
"""Come after all others, so that nothing is loaded before it is whole."""
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
    for special, kept in (("the home folder", Path.home().resolve()), ("the current folder", Path.cwd().resolve())):
        if resolved == kept or resolved in kept.parents:
            what = special if resolved == kept else f"a folder that holds {special}"
            raise ConfigError(f"{option}={folder} is {what}; name a folder of its own, such as {kept / 'results'}")
    if is_other:
        raise RunError(f"{path} is a file; name a folder as {option}")
    return path


# -- taking a folder --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Folders that are taken within the block are let go at its end, however it ends. Also a decorator."""
    before = {root: set(of.locks) for root, of in held.items()}
    try:
        yield
    finally:
        for root in list(reversed(held)):
            if root not in before:
                _let_go(root)
            else:
                _unlock(held[root], held[root].locks.keys() - before[root])


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
        ConfigError, RunError: the folder cannot be a target; see `target`.
    """
    root = target(folder, "folder").resolve()
    if root in held and lock in held[root].locks:
        return
    made: list[Path] = []
    handle = None
    if (parent := root_of(root.parent)) is not None:  # before it is made: a kill leaves none that is on no list
        note(parent, "+", missing(parent, root.relative_to(parent).as_posix(), folder=True))
    for left in reversed(range(100)):
        try:
            made += _make(root)
            check_private(root)
            _make(root / PRIVATE)
            handle = _locked(root / PRIVATE / f"{lock}.lock", wait)
            break
        except FileNotFoundError:  # another process let the folder go and removed its private one
            if not left:
                raise
        except BusyError as error:
            raise BusyError(
                f"another process is writing to {folder}; try again when it is done, or choose another folder"
            ) from error
    held.setdefault(root, Taken(root, made)).locks[lock] = handle
    if lock == _FOLDER_LOCK:
        _tidy(root)
    if not (root / PRIVATE / LIST_FILE).exists() and (names := listed(root) or set(adopt)):
        note(root, "+", names)
    if parent is not None:
        within = [path for path in (*made, root) if parent in path.parents and path.name != PRIVATE]
        note(parent, "+", [f"{path.relative_to(parent).as_posix()}/" for path in within])


def settle(folder: Path) -> None:
    """Finish or clear what a dead process left in `folder`; BusyError where a living one is writing there."""
    root = folder.resolve()
    if root not in held and (root / PRIVATE).is_dir():
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
        os.close(handle)  # the folder was let go meanwhile


def _let_go(root: Path) -> None:
    of = held[root]
    try:
        if _FOLDER_LOCK in of.locks:
            with contextlib.suppress(OSError, RunError):
                complete, names = _tidy(root), listed(root)
                if complete and names and (above := root_of(root.parent)) is not None:
                    note(above, "+", [f"{root.relative_to(above).as_posix()}/{name}" for name in names])
                if complete or not (names or any((root / PRIVATE).glob("unfinished-*"))):
                    _drop(root)
                if not names:  # nothing came of it
                    for folder in reversed(of.made):
                        folder.rmdir()
    finally:
        del held[root]
        _unlock(of, set(of.locks))


def _unlock(of: Taken, names: Collection[str]) -> None:
    for name in names:
        if (handle := of.locks.pop(name)) is not None:
            os.close(handle)


def _tidy(root: Path) -> bool:
    """Finish moves that were begun, remove what is not whole, and of a complete folder all that its list leaves out.

    Returns whether the folder is complete, and needs no list but that in its own files.
    """
    with contextlib.ExitStack() as stack, contextlib.suppress(BusyError):  # of another one at work on a part
        for path in (root / PRIVATE).glob("*.lock"):
            if path.stem not in held[root].locks and (handle := _locked(path, wait=False)) is not None:
                stack.callback(os.close, handle)
        _roll_forward(root)
        for leftover in (root / PRIVATE).glob("new-*"):
            _erase(leftover)
    whole = [names for name in COMPLETE if (names := names_in(root / name)) is not None]
    if not whole:
        return False
    _delete(root, (listed(root) or set()).difference(*whole))
    for leftover in (root / PRIVATE).glob("unfinished-*"):
        _erase(leftover)
    if not set().union(*whole) - {*COMPLETE, IDENTITY_FILE} <= (listed(root) or set()):
        return False  # some of it was removed, which the list alone knows
    _erase(root / PRIVATE / LIST_FILE)
    return True


def _drop(root: Path) -> None:
    """Remove the private folder, the lock last."""
    private = root / PRIVATE
    entries = [entry for entry in private.glob("*") if PRIVATE_NAME.fullmatch(entry.name)]
    for entry in sorted(entries, key=lambda entry: (entry.suffix == ".lock", entry.name == LIST_FILE)):
        _erase(entry)
    with contextlib.suppress(OSError):
        private.rmdir()


# -- writing ----------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it into place.

    RunError where that name, in a folder that is taken, is that of a file which GRUN did not write.
    """
    root, token = _listed_in(path), uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.name}.{token}.tmp") if root is None else root / PRIVATE / f"new-{token}"
    try:
        with opened(temporary, "xb") as file:
            file.write(data)
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


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """`write_text` of JSON, a record a line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append(path: Path) -> IO[bytes]:
    """Open a file for appending, unbuffered, and make it if need be; RunError as in `write_bytes`."""
    _listed_in(path)
    return opened(path, "ab", buffering=0)


def adopt(paths: Iterable[Path]) -> None:
    """List files in a taken folder that a library has just made under names that could not be known before."""
    for where in filter(None, map(place_of, paths)):
        note(where[0], "+", [where[1]])


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there, and those above it."""
    if (where := place_of(folder)) is not None:
        note(where[0], "+", missing(*where, folder=True))
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
    root = root_of(folder)
    if root is None:
        raise RuntimeError(f"{folder} is not taken")
    new = root / PRIVATE / f"new-{name}"
    _erase(new)
    new.mkdir(mode=0o700)
    return new


def place(new: Path, folder: Path, *, whole: bool = False) -> None:
    """Move the content of `new`, which `staging` made, into `folder`; arguments and errors are those of `staged`."""
    root = root_of(folder)
    assert root is not None
    names = below(new)
    for path in (new / name for name in names):
        path.chmod(0o700 if path.is_dir() else 0o600)
        sync(path)
    if folder.resolve() == root:
        refuse_foreign(root, names)
        os.replace(new, root / PRIVATE / ("replace" if whole else "commit"))
        _roll_forward(root)
        return
    make_folder(folder.parent)
    where = place_of(folder)
    assert where is not None
    names = [f"{where[1]}/{name}" for name in ("", *names)]
    refuse_foreign(root, names)
    note(root, "+", names)
    sync(new)
    if not (root / where[1]).exists():
        os.replace(new, root / where[1])
    else:  # with something of the user's in it
        _move(new, root / where[1])
    sync((root / where[1]).parent)


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
    line = first_line(error)
    return line if isinstance(error, ValueError) or "home" in line else f"is the disk full? {line}"


def _roll_forward(root: Path) -> None:
    """Carry out, or carry on with, the move of a placed folder's content into `root`."""
    replace, commit = root / PRIVATE / "replace", root / PRIVATE / "commit"
    if replace.is_dir():
        old = listed(root) or set()
        _delete(root, old - {*below(replace)} | old & {*COMPLETE})
        os.replace(replace, commit)
    if commit.is_dir():
        names = below(commit)
        refuse_foreign(root, names)
        note(root, "+", names)
        _move(commit, root)
        sync(root)
        _erase(commit)


def _move(new: Path, folder: Path) -> None:
    """Move all that is in `new`, one by one, those in _LATE last."""
    for name in sorted(below(new), key=lambda name: _LATE.index(name) if name in _LATE else -1):
        if name.endswith("/"):
            _make(folder / name)
        else:
            _make((folder / name).parent)
            os.replace(new / name, folder / name)


def _listed_in(path: Path) -> Path | None:
    """List a file that is about to be written, and make its folder; returns the taken folder that lists it, if any."""
    where = place_of(path)
    if where is not None:
        refuse_foreign(where[0], [where[1]])
        note(where[0], "+", [*missing(*where), where[1]])
    _make(path.parent)
    return where and where[0]


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


# -- removing ---------------------------------------------------------------------------------------------------------


def clear(folder: Path) -> None:
    """Remove what the list of a taken folder names, and nothing else; the folder stays."""
    root = folder.resolve()
    _delete(root, listed(root) or set())


def remove(path: Path) -> bool:
    """Remove a file or a folder as far as GRUN wrote it; whether it is gone.

    A folder with a list of its own loses what that list names, any other one what the list of a folder above names.
    """
    path = path.parent.resolve() / path.name
    has_list = path.is_dir() and not path.is_symlink() and own_list(path) is not None
    if has_list:
        with taken(path):
            clear(path)
        with contextlib.suppress(OSError):
            path.rmdir()
    root = next((parent for parent in path.parents if parent in held or own_list(parent) is not None), None)
    if root is not None:
        name = path.relative_to(root).as_posix()
        with contextlib.nullcontext() if root in held else taken(root):
            names = {one for one in listed(root) or () if one == name or one.startswith(f"{name}/")}
            if has_list:
                note(root, "-", names)
            else:
                _delete(root, names)
    return not os.path.lexists(path)


def _delete(root: Path, names: Collection[str]) -> None:
    """Remove listed files, then listed folders that are empty; of a folder with a list of its own what that names."""
    note(root, "+", names)
    order = {name: 0 for name in COMPLETE} | {IDENTITY_FILE: 2}
    apart = tuple(name for name in names if name.endswith("/") and own_list(root / name) is not None)
    files = [name for name in names if not name.endswith("/") and not name.startswith(apart)]
    for path in (root / name for name in sorted(files, key=lambda name: order.get(name, 1))):
        if not through_link(root, path) and (path.is_symlink() or not path.is_dir()):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
    for name in sorted((name for name in names if name.endswith("/")), key=len, reverse=True):
        path = root / name
        if path.is_symlink() or through_link(root, path):
            continue
        if name in apart:
            with taken(path):
                clear(path)
        with contextlib.suppress(OSError):
            path.rmdir()
    note(root, "-", names)


def _erase(path: Path) -> None:
    """Remove something private."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
