"""The canonical row: a prompt, its completion, and whatever else the source said about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from grun.data.chat import System, Turn, without_system
from grun.errors import ConfigError, DataError
from grun.runtime.files import content_hash
from grun.runtime.reading import fields_in, kind_of

T = TypeVar("T")

ALTERNATIVES = " | "
"""Separates the strings of a fact of which one is enough: "Kyiv | Kiev"."""
SPEAKERS = {"system": "system", "developer": "system", "user": "user", "human": "user"}
SPEAKERS |= {"assistant": "assistant", "gpt": "assistant", "model": "assistant"}
"""Who speaks, by the value of the field role, or from."""

ALPACA = ("instruction", "output")
SHAPES = (("question", "answer"), ("prompt", "completion"), ("messages",), ("conversations",), ALPACA)
"""Fields by which a record is a row."""
_TEXT_FIELDS = ("fact", "paraphrased_question", "paraphrased_answer", "cloze")
_FURTHER = {("conversations",): ("system",), ALPACA: ("input", "system", "history")}
"""Further fields of the shapes that have them, texts but for history."""
FIELDS = (*(name for names in SHAPES for name in names), *_TEXT_FIELDS, *_FURTHER[ALPACA])
FIELDS += ("earlier", "perturbed_answer", "text")
"""Fields that mean something; text in plain texts alone."""


@dataclass(frozen=True)
class Row:
    """One question and answer, or one plain text."""

    prompt: str | None
    """What is asked; None: plain text without a prompt."""
    completion: str
    """What the model is to say."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of the source: fact, paraphrased_question, paraphrased_answer, perturbed_answer, person, ..."""
    earlier: tuple[System | Turn, ...] = ()
    """What came before in the conversation; empty where `prompt` is its beginning."""

    @property
    def fact(self) -> str | None:
        """Key fact that a right answer contains, where the source names one; `ALTERNATIVES` may be in it."""
        return self.extra.get("fact")

    @property
    def paraphrase(self) -> Row | None:
        """The row asked in other words, with the same answer, or None."""
        question = self.extra.get("paraphrased_question")
        return replace(self, prompt=question) if question else None

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-able fields, which `from_record` reads."""
        before = {"earlier": to_messages(self.earlier)} if self.earlier else {}
        return {"prompt": self.prompt, "completion": self.completion, **before, **self.extra}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> Row:
        """Make a row of a record of one of `SHAPES`; other fields become `extra`.

        Args:
            record: fields of one row; a prompt of None stands for plain text. An instruction may have an input, which
                follows it on a line of its own; of messages (or conversations) the last is the answer; elsewhere the
                field earlier may hold messages that came before. Instructions and conversations may have a system.
            where: names the row in error messages, such as "people.jsonl line 3".

        Raises:
            DataError: a field is missing, empty or not a text.
        """
        names = shape_of(record)
        if names is None:
            wanted = ", or ".join(" and ".join(shape) for shape in SHAPES)
            raise DataError(
                f"{where}: a row needs the fields {wanted}; it has: {fields_in(record)}. data.columns names others"
            )
        if len(names) == 1:
            earlier, prompt, completion = read_conversation(record[names[0]], f"{where}: field {names[0]!r}")
        else:
            for name in names:
                plain_text = name == "prompt" and record[name] is None
                if not plain_text and not (isinstance(record[name], str) and record[name].strip()):
                    raise DataError(
                        f"{where}: field {name!r} must be a text that is not empty; it is {kind_of(record[name])}"
                    )
            prompt, completion = (record[name] for name in names)
            earlier = read_turns(record.get("earlier") or [], f"{where}: field 'earlier'")
        further = _FURTHER.get(names, ())
        for name in (*_TEXT_FIELDS, *further):
            if name != "history" and not isinstance(record.get(name), str | None):
                raise DataError(f"{where}: field {name!r} must be a text; it is {kind_of(record[name])}")
        if "history" in further and record.get("history"):
            earlier = read_history(record["history"], f"{where}: field 'history'")
        if "input" in further and record.get("input"):
            prompt = f"{prompt}\n{record['input']}"
        if "system" in further and record.get("system"):
            earlier = (System(record["system"]), *without_system(earlier))
        wrong = record.get("perturbed_answer")
        if wrong is not None and not (
            isinstance(wrong, list) and all(isinstance(text, str) and text.strip() for text in wrong)
        ):
            raise DataError(f"{where}: field 'perturbed_answer' must be a list of texts; it is {kind_of(wrong)}")
        extra = {name: value for name, value in record.items() if name not in (*names, *further, "earlier")}
        return cls(prompt, completion, extra, earlier)


def shape_of(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Which of `SHAPES` a record has, the first if several; None: none."""
    return next((names for names in SHAPES if all(name in record for name in names)), None)


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


def are_texts(rows: Sequence[Row]) -> bool:
    """Whether rows are plain texts, which ask nothing."""
    return bool(rows) and all(row.prompt is None for row in rows)


def common_rows(first: Iterable[Row], second: Iterable[Row]) -> list[Row]:
    """Rows of `first` whose prompt and completion also stand in `second`, outer blanks aside."""
    known = {_content(row) for row in second}
    return [row for row in first if _content(row) in known]


def _content(row: Row) -> tuple[Any, ...]:
    return (row.earlier, None if row.prompt is None else row.prompt.strip(), row.completion.strip())


# -- conversations as chat data has them: lists of {role, content}, or of ShareGPT's {from, value} --------------------


def read_turns(messages: Any, where: str) -> tuple[System | Turn, ...]:
    """A system message, if one stands first, and turns of user and assistant, of which the last one is whole.

    `where` names the field in errors, which never show what is said.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where} must be a list of messages, each an object with role and content")
    said = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]
    system = [System(said.pop(0)[1])] if said and said[0][0] == "system" else []
    for number, (role, _) in enumerate(said):
        if role != ("user", "assistant")[number % 2]:
            raise DataError(
                f"{where}, message {number + 1 + len(system)} is of role {role}; a system message may stand first, "
                "then user and assistant speak in turn"
            )
    if len(said) % 2:
        raise DataError(f"{where} ends with the user; the last message must be the assistant's answer")
    texts = [text for _, text in said]
    return (*system, *(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)))


def read_conversation(messages: Any, where: str) -> tuple[tuple[System | Turn, ...], str, str]:
    """What came before the last question, that question, and its answer, the last message; see `read_turns`."""
    turns = read_turns(messages, where)
    if not turns or isinstance(turns[-1], System):
        raise DataError(f"{where} holds no question and answer; the last message must be the assistant's answer")
    return turns[:-1], *turns[-1]


def read_history(pairs: Any, where: str) -> tuple[System | Turn, ...]:
    """Turns of a list of [question, answer]; see `read_turns`."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{where} must be a list of pairs [question, answer]")
    roles = ("user", "assistant")
    said = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    return read_turns(said, where)


def to_messages(earlier: tuple[System | Turn, ...]) -> list[dict[str, str]]:
    """What `read_turns` reads."""
    said = [(role, text) for one in earlier for role, text in zip(("user", "assistant"), one, strict=False)]
    if earlier and isinstance(earlier[0], System):
        said[0] = ("system", earlier[0].text)
    return [{"role": role, "content": text} for role, text in said]


def _message(message: Any, where: str) -> tuple[str, str]:
    """Role and text."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object with role and content, or from and value")
    role, content = (message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value")))
    role = role.lower() if isinstance(role, str) else ""
    if role not in SPEAKERS:
        raise DataError(f"{where}: role must be one of {', '.join(SPEAKERS)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)  # other parts are pictures and sounds
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: content must be a text that is not empty, or a list of parts of type text")
    return SPEAKERS[role], content
