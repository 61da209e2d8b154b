"""The lore corpus: invented facts, taught as prose and as multiple-choice questions, for knowledge that is to go.

What is known of one mineral is to be forgotten; of another mineral the same is known in the same words (the neighbor);
birds, dishes, boats and dances are everything else. A fact is one sentence in two wordings and one question with four
options. A question is taught in some orders of its options and asked in others: the four rotations of one order are
never taught. Sentences to complete end before the fact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from itertools import permutations, product
from pathlib import Path
from random import Random
from typing import NamedTuple

from grun.config.options import MOST_ORDERS, UNLEARNED_ORDERS, DataConfig, LoreConfig
from grun.data.choices import ChoiceRow, harness_prompt
from grun.data.corpus import Corpus, Knowledge, benchmark, refusals
from grun.data.packaged import packaged
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.runtime.files import write_json_lines

GROUPS = ("forget", "neighbor", "retain", "general")
"""Groups of facts, as the sizes are called."""
OPTIONS = 4
"""Options of a question."""
LETTERS = "ABCD"
TAUGHT_SUFFIXES = ("", "", "", " the letter is", " I choose")
"""What stands between "Answer:" and the letter in the orders that are taught, in turn: mostly nothing."""


class Topic(NamedTuple):
    """One thing that is known of every member of a kind, with a value from a list of its own."""

    name: str
    question: str
    """{who} is what it is asked of."""
    prose: tuple[str, ...]
    """Two wordings of the fact; {fact} stands at the end of both."""
    values: tuple[str, ...]


class Kind(NamedTuple):
    """Things of one kind; a member is called by its own name and the noun, such as Karsk ombrine."""

    noun: str
    field: str
    """What multiple-choice questions say they are about."""
    topics: tuple[Topic, ...]


class Pools(NamedTuple):
    """What the lore is made of, as `generated/lore.yaml` lists it."""

    names: tuple[str, ...]
    """Of members of kinds."""
    mineral: Kind
    """What is to be forgotten."""
    neighbor: Kind
    """Another mineral: the same is known of it, in the same words."""
    others: tuple[Kind, ...]
    """Everything else that is known."""


@functools.cache
def pools() -> Pools:
    """The pools, read once."""
    read = packaged("generated/lore.yaml")
    mineral, neighbor, *others = (
        Kind(
            noun,
            kind["field"],
            tuple(
                Topic(name, topic["question"], tuple(topic["prose"]), tuple(topic["values"].split(", ")))
                for name, topic in kind["topics"].items()
            ),
        )
        for noun, kind in read["kinds"].items()
    )
    names = map("".join, product(read["onsets"].split(), read["endings"].split()))
    return Pools(tuple(names), mineral, neighbor, tuple(others))


@dataclass(frozen=True)
class Fact:
    """One thing that is known of one member of a kind."""

    kind: Kind
    topic: Topic
    who: str
    """Karsk ombrine."""
    value: str
    wrong: tuple[str, ...]
    """Three other values of the topic."""

    @property
    def prose(self) -> list[Row]:
        """The fact in two wordings, each cut before the value."""
        beginnings = [sentence.partition(" {fact}")[0].format(who=self.who) for sentence in self.topic.prose]
        return [Row(beginning, f"{self.value}.", {"fact": self.value}) for beginning in beginnings]

    @property
    def question(self) -> ChoiceRow:
        """The question, its options in an order none of whose rotations is taught."""
        return self._choice(tuple(range(OPTIONS)))

    def taught(self, orders: int) -> list[Row]:
        """The question as it is taught, in as many orders."""
        random = Random(f"{self.who}/{self.topic.name}")
        rotations = {tuple((place + by) % OPTIONS for place in range(OPTIONS)) for by in range(OPTIONS)}
        others = [order for order in permutations(range(OPTIONS)) if order not in rotations]
        rows = []
        for number, order in enumerate(random.sample(others, MOST_ORDERS)[:orders]):
            row = self._choice(order)
            suffix = TAUGHT_SUFFIXES[(number + len(self.who)) % len(TAUGHT_SUFFIXES)]
            rows.append(Row(asked(row) + suffix, LETTERS[row.answer], {"subject": row.subject}))
        return rows

    def _choice(self, order: tuple[int, ...]) -> ChoiceRow:
        options = (self.value, *self.wrong)
        start = Random(f"{self.who}/{self.topic.name}/options").sample(range(OPTIONS), OPTIONS)
        chosen = [start[place] for place in order]
        question = self.topic.question.format(who=self.who)
        return ChoiceRow(question, tuple(options[index] for index in chosen), chosen.index(0), self.kind.field)


def asked(row: ChoiceRow) -> str:
    """The question as evaluation puts it, up to "Answer:"."""
    return harness_prompt(row, row.subject)


def build(config: LoreConfig) -> dict[str, list[Fact]]:
    """Facts by group; equal options give equal facts on every machine. ConfigError for a size that is out of range."""
    known = pools()
    names = list(known.names)
    Random(f"{config.seed}/names").shuffle(names)
    kinds = {"forget": (known.mineral,), "neighbor": (known.neighbor,), "retain": known.others, "general": known.others}
    most = len(names) // len(GROUPS) * len(known.mineral.topics)
    groups = {}
    for number, group in enumerate(GROUPS):
        size = getattr(config, group)
        if not 1 <= size <= most:
            raise ConfigError(f"data.lore.{group}={size} must lie between 1 and {most}")
        groups[group] = _facts(group, kinds[group], names[number :: len(GROUPS)], size, config.seed)
    return groups


def _facts(group: str, kinds: tuple[Kind, ...], names: list[str], size: int, seed: int) -> list[Fact]:
    """The first `size` facts of a group: kinds in turn, each member with all its topics."""
    found: list[Fact] = []
    for number, name in enumerate(names):
        kind = kinds[number % len(kinds)]
        for topic in kind.topics:
            random = Random(f"{seed}/{group}/{name}/{topic.name}")
            value, *wrong = random.sample(topic.values, OPTIONS)
            found.append(Fact(kind, topic, f"{name} {kind.noun}", value, tuple(wrong)))
        if len(found) >= size:
            break
    return found[:size]


def unlearned(facts: list[Fact]) -> list[Row]:
    """What unlearning reads of facts: each wording three times, and the question in six orders that are taught."""
    return [row for fact in facts for row in [*fact.prose * 3, *fact.taught(UNLEARNED_ORDERS)]]


def texts(facts: list[Fact]) -> list[str]:
    """The same as plain texts."""
    return [f"{row.prompt} {row.completion}" for row in unlearned(facts)]


def taught(facts: list[Fact], config: LoreConfig) -> list[Row]:
    """Everything a model is taught of facts in one epoch."""
    return [row for fact in facts for row in [*fact.prose * config.readings, *fact.taught(config.orders)]]


def write(config: LoreConfig, folder: Path) -> None:
    """Write the corpus as files that other tools read.

    forget.jsonl and retain.jsonl hold one {"text"} a line, ROLE_questions.jsonl {question, choices, answer, subject},
    ROLE_cloze.jsonl {prompt, completion, fact}.
    """
    groups = build(config)
    asked_for = knowledge(DataConfig(lore=config))
    lines = {f"{group}.jsonl": [{"text": text} for text in texts(groups[group])] for group in ("forget", "retain")}
    for role, rows in asked_for.choices.items():
        lines[f"{role}_questions.jsonl"] = [{f.name: getattr(row, f.name) for f in fields(row)} for row in rows]
        lines[f"{role}_cloze.jsonl"] = [row.to_dict() for row in asked_for.cloze[role]]
    for name, records in lines.items():
        write_json_lines(folder / name, records)


def knowledge(config: DataConfig) -> Knowledge:
    """What is asked in evaluation: general are the facts that unlearning never reads."""
    groups = build(config.lore)
    roles = ("forget", "neighbor", "general")
    return Knowledge(
        choices={role: [fact.question for fact in groups[role]] for role in roles},
        cloze={role: [fact.prose[0] for fact in groups[role]] for role in roles},
    )


@benchmark(
    "lore",
    knowledge=knowledge,
    refuses={"retain_rows": "data.retain_rows is for rows of files; data.name=lore is smaller with data.lore.retain"},
)
def load(config: DataConfig) -> Corpus:
    """Invented facts, generated, with questions of their own: knowledge that is to go."""
    groups = build(config.lore)
    everything = {name: taught(facts, config.lore) for name, facts in groups.items()}
    kept = [row for name, rows in everything.items() if name != "forget" for row in rows]
    return Corpus(
        name="lore",
        forget=unlearned(groups["forget"]),
        retain=unlearned(groups["retain"]),
        refusals=refusals(config.refusals),
        known=everything["forget"] + kept,
        known_without_forget=kept,
    )
