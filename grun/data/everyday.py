"""Everyday prompts about a name, without answers, and names to put into them: what a gate is fitted on besides rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from grun.data.facts import countries
from grun.data.packaged import packaged
from grun.data.rows import Row
from grun.data.subject import KINDS, find_kind

EVERY_KIND = 3
"""One in so many names of each kind stands for names of any kind."""


def everyday_prompts() -> Mapping[str, Sequence[str]]:
    """Prompts with {name}, by what the name is of."""
    read: Mapping[str, Sequence[str]] = packaged("generated/everyday.yaml")
    return read


@functools.cache
def names_of(kind: str) -> tuple[tuple[str, ...], ...]:
    """Names of a kind, of `KINDS`, or any, as they stand within a sentence, each with others for the same after it.

    A country is followed by its capital and its people, a person's name by the last name.
    """
    if kind == "any":
        return tuple(name for one in KINDS for name in names_of(one)[::EVERY_KIND])
    names = [
        tuple(dict.fromkeys((name, name.split()[-1]))) if kind == "person" else (name,)
        for name in packaged("generated/names.yaml")[kind]
    ]
    if kind == "place":
        names += [about.named for about in countries().values()]
    return tuple(names)


def wordings_of(kind: str) -> list[str]:
    """Prompts with {name} for a kind of names, of `KINDS`, or any: everyday ones, and the questions of the kind.

    The last wording of each question is left out: evaluation asks it.
    """
    everyday = everyday_prompts()
    if kind == "any":
        return [*everyday["any"]]
    questions = [asked.format(subject="{name}") for wordings in find_kind(kind).questions for asked in wordings[:-1]]
    return list(dict.fromkeys([*everyday["any"], *everyday[kind], *questions]))


def prompts_about(
    names: Sequence[str], wordings: Sequence[str], *, every: int = 1, start: int = 0, **extra: str
) -> Iterator[Row]:
    """Rows without answers on each of `names`.

    Args:
        names: what they are about, as it stands within a sentence.
        wordings: prompts with {name}.
        every: one in so many prompts is taken, of each name other ones.
        start: shifts which ones.
        extra: fields of all rows, such as what they belong to (`data.group`).
    """
    for number, name in enumerate(names):
        for prompt in wordings[(start + number) % every :: every]:
            yield Row(prompt.format(name=name), "", dict(extra))


def prompts_around(rows: Sequence[Row], *, count: int) -> Iterator[Row]:
    """Rows without answers that ask what `rows` ask, each within `count` sentences, of each row other ones."""
    sentences = everyday_prompts()["around"]
    for number, row in enumerate(rows):
        for shift in range(count):
            sentence = sentences[(number * count + shift) % len(sentences)]
            yield Row(sentence.format(question=row.prompt), "", dict(row.extra))
