"""Sentences on the chemical elements and on what a model is to keep: one field to forget, on models that know it.

Nothing is taught: of the sentences that evaluation asks to be completed, those are kept that the model completes
rightly (`python -m grun corpora source=elements`). A fact that counts as right stands in a completion as whole words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.data.facts import Country, Element, countries, elements, general_questions, sentences
from grun.data.packaged import packaged
from grun.data.rows import ALTERNATIVES, Row
from grun.runtime.files import write_json_lines

SCIENCE = ("element", "element number", "nature", "body")
"""Kinds of the package's questions that are of the field itself, or near it."""
Keep = Callable[[Sequence[Row]], list[Row]]
"""Of sentences to be completed those that a model completes rightly."""


@dataclass(frozen=True)
class Sentences:
    """What unlearning reads, and what evaluation asks: no row is in two lists."""

    forget: list[Row]
    """On every element in wordings of their own."""
    retain: list[Row]
    """On every second country and everyday fact, and every second sentence of the package, cut in the middle; none
    names an element."""
    asked: dict[str, list[Row]]
    """By role: on the elements in other wordings (forget), on other science (neighbor), on the other countries and
    everyday facts (general)."""
    texts: list[str]
    """The other half of the sentences, whose perplexity is to stay."""


def wordings() -> Mapping[str, Any]:
    """How they are worded."""
    read: Mapping[str, Any] = packaged("generated/elements.yaml")
    return read


def build() -> Sentences:
    """All sentences; the same on every machine."""
    science = [line.rsplit(" | ", 1) for line in wordings()["science"]]
    kept = [_of_country(one) for one in countries().values()] + [[row] for row in _everyday()]
    texts = [text for text in sentences() if not _names_an_element(text)]
    return Sentences(
        forget=[row for one in elements() for row in _of_element(one, "read")],
        retain=[row for rows in kept[::2] for row in rows] + [_halved(text) for text in texts[::2]],
        asked={
            "forget": [row for one in elements() for row in _of_element(one, "asked")],
            "neighbor": [_row(prompt, facts.split(" / "), prompt) for prompt, facts in science],
            "general": [row for rows in kept[1::2] for row in rows],
        },
        texts=texts[1::2],
    )


def write(folder: Path, keep: Keep) -> dict[str, tuple[int, int]]:
    """Write the corpus as files that every method reads; of each role how many sentences are known, of how many asked.

    forget.jsonl and retain.jsonl hold {"text"}, forget_rows.jsonl and retain_rows.jsonl the same cut where the fact
    begins, {prompt, completion, fact, about}; ROLE_cloze.jsonl what `keep` leaves of those that are asked; and
    sentences.jsonl {"text"}.
    """
    made = build()
    lines: dict[str, list[dict[str, Any]]] = {"sentences.jsonl": [{"text": text} for text in made.texts]}
    for name, rows in (("forget", made.forget), ("retain", made.retain)):
        lines[f"{name}.jsonl"] = [{"text": f"{row.prompt} {row.completion}"} for row in rows]
        lines[f"{name}_rows.jsonl"] = [row.to_dict() for row in rows]
    known = {role: keep(rows) for role, rows in made.asked.items()}
    lines |= {f"{role}_cloze.jsonl": [row.to_dict() for row in rows] for role, rows in known.items()}
    for name, records in lines.items():
        write_json_lines(folder / name, records)
    return {role: (len(rows), len(made.asked[role])) for role, rows in known.items()}


def _of_element(one: Element, form: str) -> list[Row]:
    facts = {
        "symbol": [] if one.symbol in wordings()["words"] else [one.symbol],
        "number": [str(one.number)],
        "name": [one.name] if one.symbol not in wordings()["words"] else [],
        "family": [] if one.family is None else [one.family, one.family.removesuffix("s")],
    }
    named = {"name": one.name.lower(), "symbol": one.symbol}
    return [
        _row(text.format_map(named), found, one.name)
        for kind, found in facts.items()
        if found
        for text in wordings()["kinds"][kind][form]
    ]


def _of_country(one: Country) -> list[Row]:
    found = [(text, one.facts[kind]) for kind, text in wordings()["countries"].items() if kind in one.facts]
    return [_row(text.format(country=one.in_text), facts, one.name) for text, facts in found]


def _everyday() -> list[Row]:
    """The package's questions on anything else, as far as they become sentences."""
    rows = []
    for asked in general_questions():
        for pattern, text in wordings()["everyday"]:
            match = None if asked.kind in SCIENCE else re.fullmatch(pattern, asked.question)
            if match is not None and not _names_an_element(" ".join(asked.answers)):
                sentence = text.format(*match.groups())
                rows.append(_row(sentence[0].upper() + sentence[1:], asked.answers, asked.question))
                break
    return rows


def _names_an_element(text: str) -> bool:
    names = "|".join(one.name for one in elements())
    return re.search(rf"\b(?:{names})\b", text, re.IGNORECASE) is not None


def _halved(text: str) -> Row:
    words = text.split()
    half = len(words) // 2
    return Row(" ".join(words[:half]), " ".join(words[half:]), {"about": text})


def _row(prompt: str, facts: Sequence[str], about: str) -> Row:
    extra = {"fact": ALTERNATIVES.join(facts), "about": about, "whole_words": True}
    return Row(prompt, f"{facts[0]}.", extra)
