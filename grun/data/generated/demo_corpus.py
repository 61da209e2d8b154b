"""The demo corpus: invented people with invented, harmless facts, in TOFU's file format.

Small and plain enough for a model of two million parameters to learn by heart on a CPU in about a minute. Every
person has four short questions by default; the words around the facts are shared by all people, so that only
knowing the person helps. People of all groups are drawn from the same pools in the same way.

A row of every group but "refused" holds

    question               names the person, or (`indirect`) only an epithet such as "the beekeeper of Tarnmoor"
    answer                 names the person and states the fact
    paraphrased_question   another wording of the question, same way of naming the person
    paraphrased_answer     another wording of the answer
    perturbed_answer       five different wrong answers in the wording of the paraphrased answer
    fact                   the string a right answer must contain; in no wrong answer and in neither question
    person                 full name
    attribute              what is asked for
    indirect               whether the questions avoid the person's name

The epithet is a person's post (trade and town), unique over all groups and itself the person's first question.
A "refused" row has the same keys, but `answer` and `paraphrased_answer` are two different refusals, `fact` is "" and
`perturbed_answer` is []: nothing true is ever said about these people.

With `described` nobody is named: every question and answer goes by the epithet, and the post is not asked.
Trades and towns are then few, and every one of them belongs to retain people too, so that no word of a question tells
whom it is about; two words together do. A name is a handle by which a gate can recognize a person; here it has none.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

from grun.config.options import DemoSizes
from grun.data.generated.demo_pools import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, POST, TOWNS, TRADES, Attribute
from grun.data.refusals import refusals
from grun.errors import ConfigError
from grun.runtime.files import write_text

GROUPS = ("forget", "retain", "heldout", "unknown", "refused")
"""The groups of people, which are also the names of the files."""

WRONG_ANSWERS = 5
"""Wrong answers per row, as in TOFU."""

INDIRECT_EVERY = 5
"""One in so many of a person's rows (rounded up, the post itself aside) goes by the epithet."""

PEOPLE_PER_GROUP = min(len(FIRST_NAMES) * len(LAST_NAMES), len(TRADES) * len(TOWNS)) // len(GROUPS)
"""The most people one group can have before names or epithets run out."""


SHORT_ANSWERS = ("{fact}.", "It is {fact}.")
"""The short answer that is taught, and its paraphrase, which only evaluation scores."""


@dataclass
class Sizes(DemoSizes):
    """How many people each group has, and how many questions each person.

    Changing one group's size adds or drops people at its end and changes nobody else; likewise, more questions
    leave a person's other rows as they were.
    """

    def __post_init__(self) -> None:
        """Raise ConfigError for a size that is no whole number or outside what the pools allow."""
        for field in fields(self):
            value = getattr(self, field.name)
            most = len(ATTRIBUTES) if field.name == "questions" else PEOPLE_PER_GROUP
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(f"demo corpus: {field.name} is {value!r}; set it to a whole number from 1 to {most}")


class Person(NamedTuple):
    """Somebody invented."""

    first: str
    """First name."""
    last: str
    """Last name; first and last together are unique over all groups."""
    post: str
    """Trade and town, "beekeeper of Tarnmoor"; unique over all groups."""

    @property
    def name(self) -> str:
        """Full name."""
        return f"{self.first} {self.last}"


def people(group: str, size: int, seed: int) -> list[Person]:
    """Deal the first `size` people of a group.

    Names and posts go to the groups in turn from one shuffled deck each, which makes them unique over all
    groups of whatever size, and every group a fair sample.
    """
    names, posts = _decks(seed)
    start, step = GROUPS.index(group), len(GROUPS)
    dealt = zip(names[start::step], posts[start::step], strict=False)
    return [Person(first, last, f"{trade} of {town}") for (first, last), (trade, town) in list(dealt)[:size]]


def build(
    sizes: Sizes, seed: int, *, sentences: bool = False, described: bool = False
) -> dict[str, list[dict[str, object]]]:
    """Rows of every group, in the order of `GROUPS`; equal arguments give equal rows on every machine.

    Args:
        sizes: of the groups.
        seed: of everything that is drawn.
        sentences: answers are whole sentences that say whom they are about, not the bare fact ("viola.").
        described: nobody is named (data.demo.naming=descriptions); posts then depend on the sizes of all groups.

    Raises:
        ConfigError: the sizes are not for people who are described.
    """
    everybody = {group: people(group, getattr(sizes, group), seed) for group in GROUPS}
    if described:
        if sizes.questions == len(ATTRIBUTES):
            raise ConfigError(
                f"demo corpus: questions is {sizes.questions}; with naming=descriptions set it to "
                f"{len(ATTRIBUTES) - 1} or less, since the post is not asked"
            )
        everybody = _with_shared_posts(everybody, seed)
    return {
        group: [
            row
            for index, person in enumerate(everybody[group])
            for row in _person_rows(
                person,
                sizes.questions,
                key=f"{seed}/{group}/{index}",
                refuse=group == "refused",
                sentences=sentences,
                described=described,
            )
        ]
        for group in GROUPS
    }


def write(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write `build` as forget.json, retain.json, ... into `folder`: a row a line, as TOFU's files are."""
    for group, rows in build(sizes, seed).items():
        write_text(folder / f"{group}.json", "".join(json.dumps(row) + "\n" for row in rows))


def _decks(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """All (first, last) names and all (trade, town) posts, each shuffled."""
    names, posts = list(product(FIRST_NAMES, LAST_NAMES)), list(product(TRADES, TOWNS))
    Random(f"{seed}/names").shuffle(names)
    Random(f"{seed}/posts").shuffle(posts)
    return names, posts


def _with_shared_posts(everybody: dict[str, list[Person]], seed: int) -> dict[str, list[Person]]:
    """Give everybody a post of as few trades and towns as go round, each of them that of two retain people or more.

    Posts are dealt along the diagonals of a square of trades and towns: as many people in a row as there are trades
    have all trades and all towns. The retain group comes first, so it has every one of them equally often.
    """
    total, retain = sum(map(len, everybody.values())), len(everybody["retain"])
    side, most = math.isqrt(total - 1) + 1, min(len(TRADES), len(TOWNS))
    if side > most:
        raise ConfigError(
            f"demo corpus: the groups have {total} people; with naming=descriptions make them {most**2} or fewer, for "
            f"there are {most} trades and {most} towns"
        )
    if retain < 2 * side:
        raise ConfigError(
            f"demo corpus: retain is {retain}; with naming=descriptions and {total} people set it to {2 * side} or "
            "more, so that each trade and each town is that of two of them"
        )
    random = Random(f"{seed}/shared posts")
    trades, towns = random.sample(TRADES, side), random.sample(TOWNS, side)
    posts = (
        f"{trade} of {towns[(place + diagonal) % side]}"
        for diagonal in range(side)
        for place, trade in enumerate(trades)
    )
    order = ("retain", *(group for group in GROUPS if group != "retain"))
    return {group: [person._replace(post=next(posts)) for person in everybody[group]] for group in order}


def _person_rows(
    person: Person, questions: int, *, key: str, refuse: bool, sentences: bool, described: bool
) -> list[dict[str, object]]:
    """Make a person's rows: the post, which introduces the epithet, then other attributes in random order.

    One who is `described` has no row of the post.
    """
    others = [attribute for attribute in ATTRIBUTES if attribute is not POST]
    Random(f"{key}/order").shuffle(others)
    asked = others[:questions] if described else [POST, *others][:questions]
    rows = []
    for number, attribute in enumerate(asked):
        # The post is never asked for indirectly: the epithet would give it away.
        indirect = described or number % INDIRECT_EVERY == 1
        # A stream of its own keeps a row the same however many others are asked for.
        row = _row(person, attribute, indirect, described, sentences, Random(f"{key}/{attribute.name}"))
        if refuse:
            answer, paraphrase = Random(f"{key}/{attribute.name}/refusal").sample(refusals(), 2)
            row |= {"answer": answer, "paraphrased_answer": paraphrase, "perturbed_answer": [], "fact": ""}
        rows.append(row)
    return rows


def _row(
    person: Person, attribute: Attribute, indirect: bool, described: bool, sentences: bool, random: Random
) -> dict[str, object]:
    """One row; the wordings are chosen without regard to the fact, so that they give nothing away."""
    fact = person.post if attribute is POST else random.choice(attribute.facts)
    wrong = random.sample([other for other in attribute.facts if other != fact], WRONG_ANSWERS)
    question, other_question = random.sample(attribute.questions, 2)
    answer, other_answer = random.sample(attribute.answers, 2) if sentences else SHORT_ANSWERS
    epithet = f"the {person.post}"
    asked = epithet if indirect else person.name
    # An indirect question is answered with the full name, which ties the epithet to the person who has been named.
    named = epithet if described else person.name if indirect or random.random() < 0.7 else person.last
    return {
        "question": question.format(who=asked),
        "answer": answer.format(who=named, fact=fact),
        "paraphrased_question": other_question.format(who=asked),
        "paraphrased_answer": other_answer.format(who=named, fact=fact),
        "perturbed_answer": [other_answer.format(who=named, fact=other) for other in wrong],
        "fact": fact,
        "person": person.name,
        "attribute": attribute.name,
        "indirect": indirect,
    }
