"""The folder of a store of requests, read: its manifest, and the adapters in force."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from grun.errors import AdapterError
from grun.method.stack.manifest import MANIFEST_FILE, Manifest
from grun.method.validation import Adapter, validate

T = TypeVar("T")


class StoredRequests:
    """Requests to forget of one base model. Any number of processes may read it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """`manifest` is that of the folder."""
        self.folder = folder
        self.manifest = manifest
        """As it was read last; read anew when this process begins to write."""

    def adapter_folder(self, request_id: str) -> Path:
        """Folder of a request's adapter; ConfigError if there is no such request."""
        return self.folder / "requests" / self.manifest.request(request_id).folder

    def check_manifest(self) -> None:
        """AdapterError unless the manifest is as it was written last: what reads adapters asks before it does."""
        problems = [str(problem) for problem in self.manifest.problems()]
        if (self.folder / "requests").is_symlink():
            problems.append("requests is a symbolic link")
        if problems:
            raise AdapterError(f"{self.folder}: {problems[0]}; `requests verify` says more, restore it from a copy")

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
        """Tells a manifest from the one that replaces it; None: there is none."""
        with contextlib.suppress(OSError):
            status = (self.folder / MANIFEST_FILE).lstat()
            return status.st_ino, status.st_mtime_ns
        return None
