"""The canonical row: a prompt, its completion, and whatever else the source said about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grun.errors import ConfigError, DataError
from grun.files import content_hash
from grun.reading import fields_in, kind_of

T = TypeVar("T")

_TEXT_FIELDS = ("fact", "paraphrased_question", "paraphrased_answer", "cloze")


@dataclass(frozen=True)
class Row:
    """One question and answer, or one plain text."""

    prompt: str | None
    """What is asked; None: plain text without a prompt."""
    completion: str
    """What the model is to say."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of the source: fact, paraphrased_question, paraphrased_answer, perturbed_answer, person, ..."""

    @property
    def fact(self) -> str | None:
        """Key fact that a right answer contains, where the source names one."""
        return self.extra.get("fact")

    @property
    def paraphrase(self) -> Row | None:
        """The row asked in other words, with the same answer, or None."""
        question = self.extra.get("paraphrased_question")
        return Row(question, self.completion, self.extra) if question else None

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-able fields."""
        return {"prompt": self.prompt, "completion": self.completion, **self.extra}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> Row:
        """Make a row of {question, answer} or {prompt, completion}; other fields become `extra`.

        Args:
            record: fields of one row; a prompt of None stands for plain text.
            where: names the row in error messages, such as "people.jsonl line 3".

        Raises:
            DataError: a field is missing, empty or not a text.
        """
        for names in (("question", "answer"), ("prompt", "completion")):
            if all(name in record for name in names):
                break
        else:
            raise DataError(
                f"{where}: a row needs the fields question and answer, or prompt and completion; it has: "
                f"{fields_in(record)}"
            )
        for name in names:
            plain_text = name == "prompt" and record[name] is None
            if not plain_text and not (isinstance(record[name], str) and record[name].strip()):
                raise DataError(
                    f"{where}: field {name!r} must be a text that is not empty; it is {kind_of(record[name])}"
                )
        for name in _TEXT_FIELDS:
            if not isinstance(record.get(name), str | None):
                raise DataError(f"{where}: field {name!r} must be a text; it is {kind_of(record[name])}")
        wrong = record.get("perturbed_answer")
        if wrong is not None and not (
            isinstance(wrong, list) and all(isinstance(text, str) and text.strip() for text in wrong)
        ):
            raise DataError(f"{where}: field 'perturbed_answer' must be a list of texts; it is {kind_of(wrong)}")
        extra = {name: value for name, value in record.items() if name not in names}
        return cls(record[names[0]], record[names[1]], extra)


def hash_rows(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) of the rows in their order; equal rows give an equal hash on every machine."""
    return content_hash([row.to_dict() for row in rows])


def evenly_spaced(rows: Sequence[T], count: int | None) -> list[T]:
    """At most `count` of the rows, evenly spaced so that every part of the list is there; None: all of them."""
    if count is None or count >= len(rows):
        return list(rows)
    if count < 1:
        raise ConfigError(f"a number of rows must be at least 1, not {count}")
    return [rows[index * len(rows) // count] for index in range(count)]


def count_overlap(first: Iterable[Row], second: Iterable[Row]) -> int:
    """Number of rows of `first` whose prompt and completion also stand in `second`, outer blanks aside."""
    return len(common_rows(first, second))


def common_rows(first: Iterable[Row], second: Iterable[Row]) -> list[Row]:
    """Rows of `first` whose prompt and completion also stand in `second`, outer blanks aside."""
    known = {_content(row) for row in second}
    return [row for row in first if _content(row) in known]


def _content(row: Row) -> tuple[str | None, str]:
    return (None if row.prompt is None else row.prompt.strip(), row.completion.strip())
