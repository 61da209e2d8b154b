"""What an evaluation has done so far, on disk, so that one that was cut off goes on where it was.

Each of several processes appends to a journal of its own and reads all in its folder, so that a run with another
number of processes goes on too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from grun.runtime import processes
from grun.runtime.files import append, write_bytes, writing

log = logging.getLogger(__name__)

T = TypeVar("T")


class Journal(Generic[T]):
    """Results by number, appended batch by batch: a digest and JSON in a line, so a batch is there whole or not at all.

    A line that was damaged is taken for none, and what it held is done again.
    """

    def __init__(self, folder: Path, name: str, from_json: Callable[[Any], T]) -> None:
        """Read what is there, of other processes too; what is not whole is taken out of this process's file.

        `from_json` makes a result of what JSON made of it.
        """
        self.known: dict[int, T] = {}
        """Results so far, by number."""
        path = self._path = folder / f"{name}{'' if processes.is_first() else f'-{processes.rank()}'}.jsonl"
        for other in sorted(folder.glob(f"{name}*.jsonl")):
            if other != path:
                self._read(other, from_json)
        whole = self._read(path, from_json)
        with writing(folder):
            if path.is_file() and path.stat().st_size != len(whole):
                write_bytes(path, whole)
            self._file = append(path)

    def _read(self, path: Path, from_json: Callable[[Any], T]) -> bytes:
        """Take up what a journal holds; its whole lines."""
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = []
        for line in lines:
            digest, _, text = line.partition(b" ")
            if line.endswith(b"\n") and digest == _digest(text.removesuffix(b"\n")):
                numbers, results = json.loads(text)
                self.known.update(zip(numbers, map(from_json, results), strict=True))
                whole.append(line)
        cut_off = bool(lines) and not lines[-1].endswith(b"\n")
        if damaged := len(lines) - len(whole) - cut_off:
            log.warning("%s: %d of its lines are damaged; what they held is done again", path, damaged)
        return b"".join(whole)

    def add(self, numbers: Sequence[int], results: Sequence[T]) -> None:
        """Append one batch; RunError if it cannot be written."""
        text = json.dumps([list(numbers), list(results)], ensure_ascii=False).encode()
        with writing(self._path.parent):
            self._file.write(_digest(text) + b" " + text + b"\n")
        self.known.update(zip(numbers, results, strict=True))

    def __enter__(self) -> Journal[T]:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; what it holds stays."""
        self._file.close()


def _digest(text: bytes) -> bytes:
    """Half of the SHA-256, in hex."""
    return hashlib.sha256(text).hexdigest()[:32].encode()
