"""What an evaluation has done so far, on disk, so that one that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from grun.files import writing

T = TypeVar("T")


class Journal(Generic[T]):
    """Results by number, appended batch by batch: one JSON line a batch, so a batch is there whole or not at all."""

    def __init__(self, path: Path, *, to_json: Callable[[T], Any], from_json: Callable[[Any], T]) -> None:
        """Read what is there; a last line that was cut off is taken out of the file."""
        self.known: dict[int, T] = {}
        """Results so far, by number."""
        self._path = path
        self._to_json = to_json
        whole = 0
        if path.is_file():
            data = path.read_bytes()
            for line in data.splitlines(keepends=True):
                try:
                    numbers, results = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.known.update(zip(numbers, map(from_json, results), strict=True))
                whole += len(line)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")
            self._file.truncate(whole)

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
