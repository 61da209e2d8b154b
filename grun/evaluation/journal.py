"""What an evaluation has done so far, on disk, so that one that was cut off goes on where it was.

Each of several processes appends to a journal of its own and reads all that lie beside it, so that a run with another
number of processes goes on too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from grun import processes
from grun.files import writing

T = TypeVar("T")


def journal_file(name: str) -> str:
    """File name of this process's journal."""
    return f"{name}.jsonl" if processes.is_first() else f"{name}-{processes.rank()}.jsonl"


class Journal(Generic[T]):
    """Results by number, appended batch by batch: one JSON line a batch, so a batch is there whole or not at all."""

    def __init__(self, path: Path, *, to_json: Callable[[T], Any], from_json: Callable[[Any], T]) -> None:
        """Read what is there and in the journals beside it; a last line that was cut off is taken out of the file."""
        self.known: dict[int, T] = {}
        """Results so far, by number."""
        self._path = path
        self._to_json = to_json
        for beside in sorted(path.parent.glob(f"{path.stem.partition('-')[0]}*{path.suffix}")):
            if beside != path:
                self._read(beside, from_json)
        whole = self._read(path, from_json)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")
            self._file.truncate(whole)

    def _read(self, path: Path, from_json: Callable[[Any], T]) -> int:
        """Take up what a journal holds; the number of its bytes that are whole lines."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            try:
                numbers, results = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.known.update(zip(numbers, map(from_json, results), strict=True))
            whole += len(line)
        return whole

    def add(self, numbers: Sequence[int], results: Sequence[T]) -> None:
        """Append one batch; RunError if it cannot be written."""
        line = json.dumps([list(numbers), [self._to_json(result) for result in results]], ensure_ascii=False) + "\n"
        with writing(self._path.parent):
            self._file.write(line.encode())
            self._file.flush()
        self.known.update(zip(numbers, results, strict=True))

    def close(self) -> None:
        """Close the file; what it holds stays."""
        self._file.close()
