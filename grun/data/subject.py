"""What a model is asked about a subject that is only a name, and how sentences, names and lists are read from answers.

The questions are packaged, in English: `generated/subject.yaml`. Nothing here asks a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grun.config.checks import one_of
from grun.data.packaged import packaged
from grun.errors import ConfigError
from grun.runtime.reading import typed

QUESTIONS = "generated/subject.yaml"
KINDS = ("person", "place", "work", "organization", "topic")
"""Kinds of subjects that there are questions about."""
BLANK = "___"
"""What stands for the words that are asked for in a sentence."""
LONGEST_NAME = 6
"""Words of a name in a list; a longer line is a sentence."""
_ABBREVIATED = {"mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "no", "prof", "gen", "c", "ca", "approx", "e.g", "i.e"}
_END = re.compile(r"[.!?][\"'\N{RIGHT DOUBLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK})\]]*(?=\s|$)|\n")
_ITEM = re.compile(r"\s*(?:\d+\s*[.):]|[-*\u2022])\s*(.+)")
_NAME = re.compile(r"(?:[A-Z\d][\w'.-]*)(?:\s+(?:of|the|de|von|van|and|du|la|[A-Z\d][\w'.-]*))*")


_CAPITALS = re.compile(
    r"(?<!\w)[^\W\d_a-z][\w'-]*(?: (?:(?:al|bin|de|del|den|der|di|du|ibn|la|van|von) )*[^\W\d_a-z][\w'-]*)+"
)


@dataclass(frozen=True)
class Kind:
    """A kind of subjects, and what is asked about one."""

    plural: str
    """What several of them are called."""
    neighbors: str
    """Asks a model for names of others; {subject} stands for the name."""
    others: tuple[str, ...]
    """Well-known names of the kind."""
    questions: tuple[tuple[str, ...], ...]
    """Each question in its wordings, two or more; the last one is kept from unlearning."""


@dataclass(frozen=True)
class Wordings:
    """What is asked besides the questions of a kind, each in its wordings; {sentence} stands for a statement."""

    facts: tuple[str, ...]
    """Ask for a list of facts about {subject}."""
    blanks: tuple[str, ...]
    """Ask for the words that are left out in a sentence."""
    question: str
    """Asks for a question that a sentence answers."""


def find_kind(name: str) -> Kind:
    """The questions of a kind; ConfigError for one that is not in `KINDS`."""
    one_of("kind", name, KINDS)
    kind: Kind = typed(Kind, packaged(QUESTIONS)[name], QUESTIONS)
    return kind


def find_wordings() -> Wordings:
    """What is asked about subjects of any kind."""
    wordings: Wordings = typed(Wordings, packaged(QUESTIONS)["any"], QUESTIONS)
    return wordings


def check(subject: str, neighbors: Sequence[str]) -> None:
    """ConfigError for a subject without a name, and for neighbors of which fewer than two differ from it."""
    if not re.search(r"\w", subject):
        raise ConfigError('subject is empty; name what is to be forgotten, such as subject="Marie Curie"')
    left = sum(is_other(name, subject) for name in dict.fromkeys(neighbors))
    if neighbors and left < 2:
        raise ConfigError(
            f"neighbors: {left} of {len(neighbors)} differ from {subject!r}; name two or more (every second one "
            "is for evaluation), or none, and the model is asked for some"
        )


def first_sentence(text: str) -> str | None:
    """The first sentence of an answer; None where it does not end: it was cut off, or a list begins."""
    for end in _END.finditer(text):
        if end[0] == "\n":
            return None
        before = text[: end.start()].split()[-1:] or [""]
        if end[0] == "." and (before[0].lower().strip("(\"'") in _ABBREVIATED or re.fullmatch("[A-Z]", before[0])):
            continue
        return text[: end.end()].strip()
    return None


def items(text: str) -> list[str]:
    """What stands on the lines of a list, without numbers and marks; the last line, if it was cut off, is left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [item[1].strip().strip("*").strip() for line in lines if (item := _ITEM.match(line))]
    return found or lines


def names(text: str) -> list[str]:
    """Names in a list, one a line or separated by commas; what follows a name on its line is left out."""
    listed = items(text)
    if len(listed) == 1:
        listed = re.split(r",\s*(?:and\s+)?", listed[0].rstrip("."))
    found = []
    for line in listed:
        head = re.split(r"\s*[:(,\u2013\u2014]|\s+-\s+|\.\s", line.strip("\"' "), maxsplit=1)[0].strip(" .*\"'")
        if _NAME.fullmatch(head) and len(head.split()) <= LONGEST_NAME and len(head) > 2:
            found.append(head)
    return list(dict.fromkeys(found))


def aliases(name: str, kind: str, others: Sequence[str]) -> list[str]:
    """What the subject is called: by the name, and a person by the last name too, if none of `others` has it."""
    last = name.split()[-1]
    own = kind == "person" and len(last) > 3 and not any(mentions(other, [last]) for other in others)
    return [name, last] if own else [name]


def mentions(text: str, called: Sequence[str]) -> bool:
    """Whether one of the names stands in a text, letter case apart; within a word it does not count."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) for name in called)


def shared_name(texts: Sequence[str]) -> str | None:
    """The name that most of `texts` about one subject hold: words in capitals, two or more, the longest if several.

    None where fewer than half of them hold one.
    """
    held: Counter[str] = Counter()
    for text in texts:
        straight = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        found = {
            " ".join(run[start:end])
            for match in _CAPITALS.finditer(straight)
            for run in [re.sub(r"'s?(?= |$)", "", match[0]).split()]
            for start in range(len(run))
            for end in range(start + 2, min(len(run), start + LONGEST_NAME) + 1)
            if run[start][0].isupper() and run[end - 1][0].isupper()
        }
        held.update(found)
    best = max(held, key=lambda name: (held[name], len(name)), default=None)
    return best if best is not None and 2 * held[best] >= len(texts) else None


class Swap:
    """Puts others' names in the place of subjects'."""

    def __init__(self, subjects: Sequence[Sequence[str]]) -> None:
        """Of each subject its names; an alias gives way to the other's alias of the same place, or its last one."""
        self._place: dict[str, int] = {}
        for names in subjects:
            for number, name in enumerate(names):
                self._place.setdefault(name.casefold(), number)
        longest = sorted(self._place, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:the )?({'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)

    def concerns(self, text: str) -> bool:
        """Whether a subject is named in a text."""
        return self._pattern.search(text) is not None

    def __call__(self, text: str, other: Sequence[str]) -> str:
        """The text about another, whose names are `other`."""

        def instead(found: re.Match[str]) -> str:
            name = other[min(self._place[found[1].casefold()], len(other) - 1)]
            return name.lower() if found[0].islower() else name

        return self._pattern.sub(instead, text)


def is_other(name: str, subject: str) -> bool:
    """Whether a name is neither the subject's nor part of it, nor has it as a part."""
    one, other = (" ".join(re.findall(r"\w+", text.casefold())).removeprefix("the ") for text in (name, subject))
    return bool(one) and f" {one} " not in f" {other} " and f" {other} " not in f" {one} "


def statements(text: str, subject: str) -> Iterator[str]:
    """Sentences of a list of facts that name the subject, by themselves or in place of a pronoun at their beginning."""
    for line in items(text):
        sentence = first_sentence(line if re.search(r"[.!?]$", line) else f"{line}.")
        if sentence is None:
            continue
        sentence = re.sub(r"^(He|She|It|They|This \w+|The \w+)(?= (is|was|has|had|are|were)\b)", subject, sentence)
        if subject.casefold() in sentence.casefold() and not sentence.endswith("?"):
            yield sentence


def with_blank(sentence: str, subject: str) -> str | None:
    """The sentence with its last name or number left out, else its last long word; None where it has neither.

    What stands before the subject, and the subject, stay.
    """
    start = sentence.casefold().find(subject.casefold()) + len(subject)
    for pattern in (r"[A-Z\d][\w'-]*(?:(?: of| the)? [A-Z\d][\w'-]*)*", r"\w{5,}"):
        if spans := [*re.finditer(pattern, sentence[start:])]:
            left, right = (start + place for place in spans[-1].span())
            return f"{sentence[:left]}{BLANK}{sentence[right:]}"
    return None
