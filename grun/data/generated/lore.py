"""The lore corpus: invented facts, taught as prose and as multiple-choice questions, for knowledge that is to go.

What is known of one mineral is to be forgotten; of another mineral the same is known in the same words (the neighbor);
birds, dishes, boats and dances are everything else. A fact is one sentence in two wordings and one question with four
options. A question is taught in some orders of its options and asked in others: the four rotations of one order are
never taught. Sentences to complete end before the fact.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from itertools import permutations, product
from pathlib import Path
from random import Random

from grun.config.options import LoreConfig
from grun.data.choices import ChoiceRow, harness_prompt
from grun.data.generated.lore_pools import ENDINGS, MINERAL, ONSETS, OTHER_KINDS, OTHER_MINERAL, Kind, Topic
from grun.data.knowledge import Knowledge
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.runtime.files import write_text

GROUPS = ("forget", "neighbor", "retain", "general")
"""Groups of facts, as the sizes are called."""
OPTIONS = 4
"""Options of a question."""
LETTERS = "ABCD"
TAUGHT_SUFFIXES = ("", "", "", " the letter is", " I choose")
"""What stands between "Answer:" and the letter in the orders that are taught, in turn: mostly nothing."""
UNLEARNED_ORDERS = 6
"""Orders of a question that unlearning reads, of those that are taught."""
MOST_ORDERS = 20
"""Orders of four options without the rotations of one."""


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
    names = [onset + ending for onset, ending in product(ONSETS, ENDINGS)]
    Random(f"{config.seed}/names").shuffle(names)
    if not UNLEARNED_ORDERS <= config.orders <= MOST_ORDERS:
        raise ConfigError(f"data.lore.orders={config.orders} must lie between {UNLEARNED_ORDERS} and {MOST_ORDERS}")
    if config.readings < 1:
        raise ConfigError(f"data.lore.readings={config.readings} must be at least 1")
    kinds = {"forget": (MINERAL,), "neighbor": (OTHER_MINERAL,), "retain": OTHER_KINDS, "general": OTHER_KINDS}
    most = len(names) // len(GROUPS) * len(MINERAL.topics)
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


def knowledge(config: LoreConfig) -> Knowledge:
    """What is asked in evaluation: general are the facts that unlearning never reads."""
    groups = build(config)
    roles = ("forget", "neighbor", "general")
    return Knowledge(
        choices={role: [fact.question for fact in groups[role]] for role in roles},
        cloze={role: [fact.prose[0] for fact in groups[role]] for role in roles},
    )


def write(config: LoreConfig, folder: Path) -> None:
    """Write the corpus as files that other tools read.

    forget.jsonl and retain.jsonl hold one {"text"} a line, ROLE_questions.jsonl {question, choices, answer, subject},
    ROLE_cloze.jsonl {prompt, completion, fact}.
    """
    groups = build(config)
    asked_for = knowledge(config)
    lines = {f"{group}.jsonl": [{"text": text} for text in texts(groups[group])] for group in ("forget", "retain")}
    for role, rows in asked_for.choices.items():
        lines[f"{role}_questions.jsonl"] = [{f.name: getattr(row, f.name) for f in fields(row)} for row in rows]
        lines[f"{role}_cloze.jsonl"] = [row.to_dict() for row in asked_for.cloze[role]]
    for name, records in lines.items():
        write_text(folder / name, "".join(json.dumps(record) + "\n" for record in records))
