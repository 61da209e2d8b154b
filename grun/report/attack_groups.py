"""Attacks grouped by what the attacker has: of each method a line a group, which opens into the group's attacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from grun.evaluation.attacks.base import ATTACKS
from grun.report.attack_results import attack_label, attack_names, leak_key, number_at
from grun.report.result import Result, after, before_of, target_of
from grun.report.tables import Column, Folded, Line, Number, Table, with_numbers

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
    """A method under one attack, with the models that it is compared with."""

    attack: str
    method: Result
    target: Result | None
    before: Result | None

    def above(self) -> float:
        """How far the leak is above the floor: the retain-only model's, else that of rows never taught, else 0."""
        leak, *floors = (column.value(self) for column in COLUMNS[:3])
        return (leak or 0.0) - next((floor for floor in floors if floor is not None), 0.0)


def _leak(tried: Tried, of: str) -> Number | None:
    return number_at(getattr(tried, of), leak_key(tried.attack))


COLUMNS = (
    Column("leak", "leak", "low, as floor", partial(_leak, of="method")),
    Column("target", "retain only", "", partial(_leak, of="target")),
    Column("floor", "never taught", "", lambda tried: number_at(tried.method, f"attacks.{tried.attack}.floor.leak")),
    Column("before", "before", "", partial(_leak, of="before")),
)


def group_of(attack: str, access: str) -> str:
    """What somebody has who attacks so."""
    begins = attack in ATTACKS.names() and ATTACKS.get(attack).begins
    return GROUPS.get(BEGUN if begins else access, access)


def attack_groups(results: Sequence[Result]) -> list[Folded]:
    """A table a method: a line a group with its worst attack, which opens into all of them; the worst comes first.

    Worst is what is furthest above its floor.
    """
    found = []
    for method in after(results):
        target, before = target_of(method, results), before_of(method, results)
        every = [Tried(name, method, target, before) for name in attack_names([method])]
        groups: dict[str, list[Tried]] = {}
        for tried in sorted(every, key=Tried.above, reverse=True):
            access = str(method.evaluation["attacks"][tried.attack].get("access"))
            groups.setdefault(group_of(tried.attack, access), []).append(tried)
        columns = with_numbers(COLUMNS, every)
        headers = [column.header for column in columns]
        lines, inside = [], []
        for group, (worst, *others) in groups.items():
            cells = [column.text(worst, interval=column is COLUMNS[0]) for column in columns]
            lines.append(Line(group, [attack_label(worst.attack), *cells]))
            opened = [Line(attack_label(one.attack), [c.text(one, True) for c in columns]) for one in (worst, *others)]
            inside.append(Table(headers, [], opened))
        found.append(Folded(method.title, Table(["worst attack", *headers], [], lines), inside))
    return found
