"""The scored table of one evaluation: what the model said, once, from which every metric is computed.

Three JSON-lines files lie next to `evaluation.json`; each line is one record, its keys the fields of the dataclasses
below. Numbers carry nine significant digits, which identify a float32 exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from grun.runtime.files import write_text
from grun.runtime.reading import AGAIN, DamagedFile, read_json_lines

T = TypeVar("T")

SCORES_FILE = "scores.jsonl"
GENERATIONS_FILE = "generations.jsonl"
GATES_FILE = "gates.jsonl"


@dataclass(frozen=True)
class ScoreRecord:
    """What the model thinks of one given continuation, token by token."""

    set: str
    """Evaluation set, such as forget."""
    index: int
    """Position of the row in its set, from 0."""
    kind: str
    """Which continuation was scored: answer, paraphrase (the answer in other words) or perturbed (a wrong answer)."""
    variant: int
    """Which of the row's wrong answers, from 0; 0 for the other kinds."""
    prompt_tokens: int
    """Tokens of the prompt."""
    answer_tokens: int
    """Tokens of the continuation, its end-of-sequence token included."""
    ended: bool
    """Whether the last token is the end-of-sequence token; False where the answer was cut to fit the model."""
    compressed_bytes: int
    """Length of the continuation's text (UTF-8) after zlib."""
    logp: list[float]
    """log p of each scored token, nats. One shorter than answer_tokens where there is no prompt at all."""
    hit: list[bool]
    """Whether the token is the most probable one at its place."""
    vocabulary_mean: list[float]
    """E_v[log p_v], v drawn from the model's own p: minus the entropy, nats (the mu of Min-K%++)."""
    vocabulary_variance: list[float]
    """Var_v[log p_v], v drawn from the model's own p, nats squared (the sigma^2 of Min-K%++)."""


@dataclass(frozen=True)
class GenerationRecord:
    """One question, what it should be answered with, and the greedy answer."""

    set: str
    index: int
    question: str
    reference: str
    fact: str | None
    """The key fact a right answer contains; None where the corpus names none."""
    text: str


@dataclass(frozen=True)
class GateRecord:
    """How far each gate opened at one prompt."""

    set: str
    index: int
    gates: dict[int, float]
    """Gate probability by edited block, 0-based."""

    @property
    def mean(self) -> float:
        """Mean over the blocks."""
        return sum(self.gates.values()) / len(self.gates)


@dataclass
class Table:
    """All records of one evaluation."""

    scores: list[ScoreRecord] = field(default_factory=list)
    generations: list[GenerationRecord] = field(default_factory=list)
    gates: list[GateRecord] = field(default_factory=list)

    def sets(self) -> list[str]:
        """Names of the sets in the order in which they were evaluated."""
        return list(dict.fromkeys(record.set for part in (self.scores, self.generations) for record in part))

    def scores_of(self, name: str, kind: str = "answer") -> list[ScoreRecord]:
        """Scores of one kind of continuation of one set, by row and variant."""
        return [record for record in self.scores if record.set == name and record.kind == kind]

    def generations_of(self, name: str) -> list[GenerationRecord]:
        """Answers of one set."""
        return [record for record in self.generations if record.set == name]

    def gates_of(self, name: str) -> list[GateRecord]:
        """Gates of one set."""
        return [record for record in self.gates if record.set == name]

    def blocks(self) -> list[int]:
        """Blocks that have a gate, ascending; empty for a model without gates."""
        return sorted({block for record in self.gates for block in record.gates})

    def at_block(self, block: int) -> Table:
        """The same table with the gate of one block only."""
        return replace(self, gates=[replace(record, gates={block: record.gates[block]}) for record in self.gates])

    def write(self, folder: Path) -> None:
        """Write the three files; `gates.jsonl` is there, and empty, for a model without gates."""
        write_text(folder / SCORES_FILE, lines_of(map(asdict, self.scores)))
        write_text(folder / GENERATIONS_FILE, lines_of(map(asdict, self.generations)))
        write_text(folder / GATES_FILE, lines_of(map(asdict, self.gates)))

    @classmethod
    def read(cls, folder: Path) -> Table:
        """Read what `write` wrote; RunError names the file and line that is missing or damaged."""
        scores, gates = _read(folder / SCORES_FILE, ScoreRecord), _read(folder / GATES_FILE, GateRecord)
        for where, score in scores:
            lengths = {len(part) for part in (score.logp, score.hit, score.vocabulary_mean, score.vocabulary_variance)}
            if len(lengths) > 1 or score.answer_tokens - max(lengths) not in (0, 1) or score.compressed_bytes < 1:
                raise DamagedFile(f"{where}: as many values as answer_tokens says are expected of each kind; {AGAIN}")
        for where, gate in gates:
            if not gate.gates or gate.gates.keys() != gates[0][1].gates.keys():
                raise DamagedFile(f"{where}: expected a gate for each block, the same ones in every line; {AGAIN}")
        return cls(
            [score for _, score in scores],
            [said for _, said in _read(folder / GENERATIONS_FILE, GenerationRecord)],
            [gate for _, gate in gates],
        )


def lines_of(records: Iterable[dict[str, Any]]) -> str:
    """Records as JSON lines, their numbers shortened."""
    return "".join(json.dumps(shorten(record), ensure_ascii=False) + "\n" for record in records)


def shorten(value: Any) -> Any:
    """Nine significant digits for every float: enough for float32, half the bytes."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return value


def _read(path: Path, kind: type[T]) -> list[tuple[str, T]]:
    return list(read_json_lines(path, kind))
