"""The folder of a store of requests: its manifest, the adapters in force, and whether their files are as they were."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from grun.data.rows import Row
from grun.errors import AdapterError
from grun.method.adapter import read_regular
from grun.method.stack.manifest import ADAPTER_FILES, MANIFEST_FILE, TEXT_FILE, Base, Manifest, Problem, Request
from grun.method.validation import Adapter, is_real, validate
from grun.runtime.files import staged, write_bytes

T = TypeVar("T")


class StoredRequests:
    """Requests to forget of one base model. Any number of processes may read it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        """As it was read last; read again when this process begins to write."""

    def adapter_folder(self, request_id: str) -> Path:
        """Folder of a request's adapter; ConfigError if there is no such request."""
        return self.folder / "requests" / self.manifest.request(request_id).folder

    def check_manifest(self) -> None:
        """AdapterError unless the manifest is as it was written last: what reads adapters asks before it does."""
        problems = [str(problem) for problem in self.manifest.problems()]
        if (self.folder / "requests").is_symlink():
            problems.append("requests is a symbolic link")
        if problems:
            raise AdapterError(f"{self.folder}: {problems[0]}; see `requests verify`; restore it from a copy")

    def in_force(self, shape: tuple[int, int, int]) -> dict[str, Adapter]:
        """Adapters of the requests in force, for a base of that shape.

        AdapterError if the manifest or one of their files is not as it was written, or an adapter does not fit.
        """

        def read() -> dict[str, Adapter]:
            self.check_manifest()
            in_force = [request for request in self.manifest.requests if request.state == "active"]
            return {one.id: validate(self.adapter_folder(one.id), shape, digests=one.files) for one in in_force}

        return self.while_nobody_writes(read)

    def while_nobody_writes(self, read: Callable[[], T]) -> T:
        """What `read` gives of the store as it is now; again if a writer, who deletes files, changed it meanwhile."""
        while True:
            before = self._stamp()
            self.manifest = Manifest.read(self.folder)
            try:
                found = read()
            except AdapterError:
                if before == self._stamp():
                    raise
            else:
                if before == self._stamp():
                    return found

    def _stamp(self) -> tuple[int, int] | None:
        """Differs between a manifest and the one that replaces it; None: there is none."""
        with contextlib.suppress(OSError):
            status = (self.folder / MANIFEST_FILE).lstat()
            return status.st_ino, status.st_mtime_ns
        return None


def request_problems(request: Request, folder: Path, base: Base | None) -> list[Problem]:
    """What is wrong with a request's `folder`: files missing, changed or unknown, links, an adapter not for `base`."""
    if os.path.lexists(folder) and not is_real(folder, stat.S_ISDIR):
        return [Problem(request.id, f"{folder.name} is a link, or no folder; it is not followed")]
    there = sorted(os.listdir(folder)) if folder.exists() else []
    texts = [f"{name} is not a file of the manifest" for name in there if name not in request.files]
    links = False
    for name, expected in request.files.items():
        try:
            if hashlib.sha256(read_regular(folder / name)).hexdigest() != expected:
                texts.append(f"{name} was changed: its SHA-256 is not the manifest's")
        except FileNotFoundError:
            texts.append(f"{name} is missing")
        except AdapterError as error:
            links = True
            texts.append(str(error))
    if not links:
        try:
            found, expected_base = validate(folder).config.base_fingerprint, None if base is None else base.fingerprint
            if found != expected_base:
                texts.append(f"made on another base: fingerprint {found}, the store's is {expected_base}")
        except AdapterError as error:
            texts.append(f"the adapter cannot be read: {error}")
    return [Problem(request.id, text) for text in texts]


def copy_files(
    source: Path, folder: Path, *, names: Sequence[str] = ADAPTER_FILES, text: Sequence[Row] | None = None
) -> None:
    """Copy an adapter's files to `folder`, which is not there yet and appears whole.

    Args:
        source: folder of the adapter.
        folder: new folder, in one that is taken.
        names: files to copy, as far as they are there; whatever else lies there is left.
        text: rows to write too, one a line; None: none.

    Raises:
        AdapterError: one of them is a link, or no regular file. Nothing is written then.
    """
    contents = {name: read_regular(source / name) for name in names if os.path.lexists(source / name)}
    if text is not None:
        lines = [json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in text]
        contents[TEXT_FILE] = "".join(lines).encode()
    with staged(folder) as new:
        for name, data in contents.items():
            write_bytes(new / name, data)
