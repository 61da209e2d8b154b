"""Attacks grouped by what the attacker has: of each method a line a group, which opens into the group's attacks."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from grun.evaluation.attacks.base import ATTACKS
from grun.report.attack_results import attack_label, attack_names, leak_key
from grun.report.result import Result, after, before_of, target_of
from grun.report.results import number_at
from grun.report.tables import Column, Line, Number, Table, with_numbers

BEGUN = "begun"
GROUPS = {
    "prompt": "who writes the prompt",
    BEGUN: "who begins the answer",
    "decoding": "who draws many answers",
    "search": "who asks again and again",
    "read_out": "who reads scores or hidden states",
    "weights": "who has the weights",
}
"""What an attacker has, as readers see it, by access; begun: the prompt, and the start of the answer after it."""


class Tried(NamedTuple):
    """The leak of a method under one attack, or in a worst case, and what it is compared with."""

    attack: str
    leak: Number | None
    target: Number | None
    """Of the retain-only model."""
    unknown: Number | None
    """Of rows that were never taught."""
    before: Number | None

    @property
    def floor(self) -> float:
        """The retain-only model's leak, else that of rows never taught, else 0."""
        return next((one.value for one in (self.target, self.unknown) if one is not None), 0.0)

    @property
    def above(self) -> float:
        """How far the leak is above the floor."""
        return (self.leak.value if self.leak else 0.0) - self.floor


HEADERS = {"leak": "leak", "target": "retain only", "unknown": "never taught", "before": "before"}
COLUMNS = [Column(key, header, "", attrgetter(key)) for key, header in HEADERS.items()]


def tried(attack: str, method: Result, results: Sequence[Result]) -> Tried:
    """A method under an attack."""
    models = method, target_of(method, results), before_of(method, results)
    leak, target, before = (number_at(model, leak_key(attack)) for model in models)
    return Tried(attack, leak, target, number_at(method, f"attacks.{attack}.floor.leak"), before)


def group_of(attack: str, access: str) -> str:
    """What somebody has who attacks so."""
    begins = attack in ATTACKS.names() and ATTACKS.get(attack).begins
    return GROUPS.get(BEGUN if begins else access, access)


def attack_groups(results: Sequence[Result]) -> list[tuple[str, Table]]:
    """A table a method, by its title: a line a group with its worst attack, which opens into all of them.

    The worst comes first: what is furthest above its floor.
    """
    found = []
    for method in after(results):
        every = [tried(name, method, results) for name in attack_names([method])]
        groups: dict[str, list[Tried]] = {}
        for one in sorted(every, key=lambda one: one.above, reverse=True):
            access = str(method.evaluation["attacks"][one.attack].get("access"))
            groups.setdefault(group_of(one.attack, access), []).append(one)
        columns = with_numbers(COLUMNS, every)
        headers = [column.header for column in columns]
        lines, inside = [], []
        for group, (worst, *others) in groups.items():
            cells = [column.text(worst, interval=column is COLUMNS[0]) for column in columns]
            lines.append(Line(group, [attack_label(worst.attack), *cells]))
            opened = [Line(attack_label(one.attack), [c.text(one, True) for c in columns]) for one in (worst, *others)]
            inside.append(Table(headers, [], opened))
        found.append((method.title, Table(["worst attack", *headers], [], lines, inside)))
    return found
