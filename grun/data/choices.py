"""Multiple-choice questions: from WMDP, MMLU and files of several shapes."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.data.jsonl import ENDINGS, hub_rows, read_records
from grun.data.texts import find_file
from grun.errors import DataError, unknown_name
from grun.runtime.reading import kind_of, read_fields

RIGHT_OPTION = "corrtect"
"""Field that repeats the right option in the files of GRUN's published code, which spell it so."""
MMLU = "mmlu"

LOCAL_FILES: dict[str, tuple[str, ...]] = {
    "wmdp_bio": ("bio_test",),
    "wmdp_cyber": ("cyber_test",),
    "wmdp_chem": (),
    MMLU: ("merged_mmlu_text",),
}
"""Sets that are known by name, and how GRUN's published files of them are called. `mmlu:SUBJECT` is known too."""


@dataclass(frozen=True)
class ChoiceRow:
    """One question and its options."""

    question: str
    """What is asked, without its options."""
    choices: tuple[str, ...]
    """Options in the order of the source, at least two."""
    answer: int
    """Index of the right option, from 0."""
    subject: str
    """What the question belongs to, such as biology or virology: a line of the table."""

    def rotated(self, by: int) -> ChoiceRow:
        """The same question, its options moved on by `by` places."""
        count = len(self.choices)
        order = [(place - by) % count for place in range(count)]
        return ChoiceRow(
            self.question, tuple(self.choices[old] for old in order), order.index(self.answer), self.subject
        )


def harness_prompt(row: ChoiceRow, subject: str) -> str:
    """A question up to "Answer:", in lm-evaluation-harness's zero-shot wording of WMDP and MMLU.

    Its options are lettered from A on, 26 at most; `subject` is what the questions are said to be about.
    """
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return f"{head}{row.question.strip()}\n{lettered(row)}Answer:"


def lettered(row: ChoiceRow) -> str:
    """The options, a line each, with their letters."""
    return "".join(f"{letter}. {text}\n" for letter, text in zip(string.ascii_uppercase, row.choices, strict=False))


def load_choices(name: str, folder: str | None = None) -> list[ChoiceRow]:
    """Questions of one set, in order.

    Args:
        name: wmdp_bio, wmdp_cyber, wmdp_chem (`cais/wmdp` on the hub), mmlu, mmlu:SUBJECT (`cais/mmlu`); a file ending
            in .jsonl or .json; or `NAME` for a file NAME.jsonl or NAME.json in the folder, which also wins over the
            hub. For mmlu:SUBJECT the file is mmlu_SUBJECT.
        folder: where files are looked for; names without ending are looked for in `data` too.

    Raises:
        DataError: the name is unknown, the set cannot be had, or a row is malformed.
    """
    set_name, _, subject = name.partition(":") if name.startswith(f"{MMLU}:") else (name, "", "")
    stem = f"{MMLU}_{subject}" if subject else name
    path = find_file(stem, folder, LOCAL_FILES.get(name, ()), ENDINGS)
    if path is not None:
        return read_choices(path, subject or name)
    if set_name not in LOCAL_FILES:
        known = unknown_name("multiple-choice set", name, [*LOCAL_FILES, f"{MMLU}:SUBJECT"])
        raise DataError(f"{known}; or a file ending in .jsonl or .json")
    if set_name == MMLU:
        repository, config = "cais/mmlu", subject or "all"
    else:
        repository, config = "cais/wmdp", set_name.replace("_", "-")
    instead = f"a folder (data.path) that holds {stem}.jsonl"
    rows = hub_rows(repository, config, "test", called=f"{repository} {config}", instead=instead)
    return [choice_row(row, where, subject or name) for where, row in rows]


def read_choices(path: Path, subject: str | None = None) -> list[ChoiceRow]:
    """Questions of a file with one of `ENDINGS`, a record each.

    A row is {question, choices, answer}, with the answer as an index from 0 or as a letter, and perhaps {subject}, else
    `subject`, or the file's name without ending. Of GRUN's published files {question, choices, answer, corrtect,
    in_correct_choices} the index must agree with the right option that they repeat.

    Raises:
        DataError: the file is missing, or a row is malformed (named by its number, counted from 1).
    """
    stem = Path(path.name.removesuffix(".gz")).stem
    return [choice_row(record, where, subject or stem) for where, record in read_records(path)]


def choice_row(record: Any, where: str, subject: str) -> ChoiceRow:
    """The question of a record, as `read_choices` takes it; `where` names it in errors (DataError)."""
    question, choices, right = read_fields(record, where, dict.fromkeys(("question", "choices", "answer"), object))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: field 'question' must be a text that is not empty; it is {kind_of(question)}")
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: field 'choices' must be a list of texts; it is {kind_of(choices)}")
    if len(choices) < 2:
        raise DataError(f"{where}: a question needs at least 2 options; it has {len(choices)}")
    answer = _answer(right, len(choices), where)
    if record.get(RIGHT_OPTION) not in (None, choices[answer]):
        raise DataError(
            f"{where}: field 'answer' names option {answer} (from 0), and {RIGHT_OPTION!r} another; correct one of them"
        )
    named = record.get("subject")
    return ChoiceRow(question, tuple(choices), answer, named if isinstance(named, str) and named else subject)


def _answer(value: Any, count: int, where: str) -> int:
    """Index of the right option among `count`, of an index or a letter."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    index = value
    if isinstance(value, str):
        text = value.strip().upper()
        numbers = {str(number): number for number in range(count)}
        index = letters.find(text) if len(text) == 1 and text.isalpha() else numbers.get(text, -1)
    shown = value if type(value) is int else f"({kind_of(value)})"
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise DataError(
            f"{where}: answer {shown} is none of the {count} options; expected 0 to {count - 1} or {letters[0]} to "
            f"{letters[-1]}"
        )
    return index
