"""What a model answered when it was asked what it knows: a file of lines that benchmarks read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from grun.errors import DataError

FILE = "answers.jsonl"


@dataclass(frozen=True)
class Answered:
    """One question and what the model answered."""

    question: str
    answer: str
    """Greedy, without special tokens and outer white space."""
    fact: str
    """What a right answer holds (`grun.data.rows.ALTERNATIVES`)."""
    right: bool
    """Whether the answer does."""

    def line(self) -> bytes:
        """A line of the file."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode()


def kept_answers(folder: Path) -> dict[str, Answered]:
    """Answers in a folder by question; none where there is no file. A line that is damaged or cut off is left out."""
    path = folder / FILE
    found: dict[str, Answered] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            one = Answered(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[one.question] = one
    return found


def read_answers(folder: Path, wanted: Mapping[str, str]) -> dict[str, Answered]:
    """Answers to all the questions of `wanted`, which maps each to its fact.

    Raises:
        DataError: there are none in the folder, or not to all of them.
    """
    found = kept_answers(folder)
    missing = [question for question, fact in wanted.items() if question not in found or found[question].fact != fact]
    if missing:
        raise DataError(
            f"{folder} lacks the model's answers to {len(missing)} of {len(wanted)} questions; ask it: "
            "python -m grun corpora source=countries model.path=MODEL output_dir=FOLDER (with the same data.countries "
            "options), or leave data.path out"
        )
    return {question: found[question] for question in wanted}
