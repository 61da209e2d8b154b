"""Facts that ship with the package: of countries, of countries that do not exist, of elements, of everything else.

Made by scripts/build_facts.py, which names where they are from. A fact is a tuple of names that are all right, the
usual one first; a right answer holds one of them. A fact that the country's name gives away (Mexico City, German in
Germany) is left out. The other way about it happens: "Japanese" holds Japan.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from grun.errors import DataError, unknown_name

KINDS = ("capital", "continent", "language", "currency", "demonym")
"""Kinds of facts of a country, as `Country.facts` names them."""


@dataclass(frozen=True)
class Country:
    """A real country."""

    name: str
    """Without an article."""
    the: bool
    """Running text says "the" before the name."""
    aliases: tuple[str, ...]
    """Other names in use, which count as right where the name is asked for."""
    region: str
    """Part of a continent, as the United Nations divide it: Western Europe, Caribbean, Melanesia."""
    neighbors: tuple[str, ...]
    """Names of those countries of the list that share a land border."""
    facts: Mapping[str, tuple[str, ...]]
    """By kind, of `KINDS`, what counts as right; the usual name first."""

    @property
    def in_text(self) -> str:
        """The name as it stands within a sentence: the Netherlands."""
        return f"the {self.name}" if self.the else self.name


@dataclass(frozen=True)
class InventedCountry:
    """A country that does not exist: what a model says of it is guessed."""

    name: str
    demonym: str
    stands_for: str
    """The real country whose facts count as its own, so that a guess can be right."""


@dataclass(frozen=True)
class Element:
    """A chemical element that people have heard of."""

    number: int
    """Atomic number."""
    symbol: str
    name: str
    """With a capital."""
    family: str | None
    """Such as noble gases; None: none that is usually named."""


@dataclass(frozen=True)
class Question:
    """A question that has nothing to do with countries."""

    kind: str
    """What it is about: element, animal, arithmetic, calendar, ..."""
    question: str
    answers: tuple[str, ...]
    """A right answer holds one of them; the usual one first."""


@functools.cache
def countries() -> Mapping[str, Country]:
    """Every country by its name, in the order of names."""
    return {
        record["name"]: Country(
            record["name"],
            record["the"],
            tuple(record["aliases"]),
            record["region"],
            tuple(record["neighbors"]),
            {kind: tuple(answers) for kind, answers in record["facts"].items()},
        )
        for record in _read("countries.json")["countries"]
    }


@functools.cache
def invented_countries() -> tuple[InventedCountry, ...]:
    """The countries that do not exist, in the order of names."""
    return tuple(InventedCountry(**record) for record in _read("countries.json")["invented"])


@functools.cache
def elements() -> tuple[Element, ...]:
    """The elements, by atomic number."""
    return tuple(Element(**record) for record in _read("elements.json")["elements"])


@functools.cache
def general_questions() -> tuple[Question, ...]:
    """Questions that name no country, capital, language, currency or continent.

    The file says which model answers all of them rightly.
    """
    return tuple(
        Question(record["kind"], record["question"], tuple(record["answers"]))
        for record in _read("general.json")["questions"]
    )


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences that have nothing to do with the countries: text whose perplexity is to stay."""
    lines = (resources.files("grun.data") / "facts" / "sentences.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def country(name: str) -> Country:
    """The country of that name or alias, letter case apart.

    Raises:
        DataError: no country of the list is called so.
    """
    for known in countries().values():
        if name.casefold() in (called.casefold() for called in (known.name, known.in_text, *known.aliases)):
            return known
    raise DataError(unknown_name("country", name, [*countries()]))


def _read(name: str) -> dict[str, Any]:
    """A JSON file of the package."""
    read: dict[str, Any] = json.loads((resources.files("grun.data") / "facts" / name).read_text(encoding="utf-8"))
    return read
