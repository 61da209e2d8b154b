"""Facts that ship with the package: of countries, of countries that do not exist, of elements, of everything else.

Made by scripts/build_facts.py, which names where they are from. A fact is a tuple of names that are all right, the
usual one first; a right answer holds one of them. A fact that the country's name gives away (Mexico City, German in
Germany) is left out. The other way about it happens: "Japanese" holds Japan.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from grun.data.packaged import packaged
from grun.errors import DataError, unknown_name
from grun.runtime.reading import typed

T = TypeVar("T")

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
    facts: dict[str, tuple[str, ...]]
    """By kind, of `KINDS`, what counts as right; the usual name first."""
    names: dict[str, str] = field(default_factory=dict)
    """By language (de, es, fr) the name in it, without an article."""

    @property
    def in_text(self) -> str:
        """The name as it stands within a sentence: the Netherlands."""
        return f"the {self.name}" if self.the else self.name

    @property
    def named(self) -> tuple[str, ...]:
        """What is named in prompts about it: it, its capital and its people."""
        people = (f"the {demonym} people" for demonym in self.facts.get("demonym", ())[:1])
        return (self.in_text, *self.facts.get("capital", ())[:1], *people)


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
    return {one.name: one for one in _read(Country, "countries", "countries")}


@functools.cache
def invented_countries() -> tuple[InventedCountry, ...]:
    """The countries that do not exist, in the order of names."""
    return tuple(_read(InventedCountry, "countries", "invented"))


@functools.cache
def elements() -> tuple[Element, ...]:
    """The elements, by atomic number."""
    return tuple(_read(Element, "elements", "elements"))


@functools.cache
def general_questions() -> tuple[Question, ...]:
    """Questions that name no country, capital, language, currency or continent.

    The file says which model answers all of them rightly.
    """
    return tuple(_read(Question, "general", "questions"))


def _read(kind: type[T], file: str, key: str) -> list[T]:
    return [typed(kind, one, f"{file}.json: {key}") for one in packaged(f"facts/{file}.json")[key]]


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences that have nothing to do with the countries: text whose perplexity is to stay."""
    return tuple(line for line in packaged("facts/sentences.txt") if not line.startswith("#"))


def country(name: str) -> Country:
    """The country of that name or alias, letter case apart.

    Raises:
        DataError: no country of the list is called so.
    """
    for known in countries().values():
        if name.casefold() in (called.casefold() for called in (known.name, known.in_text, *known.aliases)):
            return known
    raise DataError(unknown_name("country", name, [*countries()]))
