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
Trades and towns are then few, and every one of them belongs to retain people too, so that no word of a question gives
away whom it is about; two words together do. A name is a handle by which a gate can recognize a person; here there is
none.
"""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from itertools import product
from random import Random
from typing import Any, NamedTuple

from grun.config.options import DataConfig, DemoSizes
from grun.data.corpus import Corpus, Subject, benchmark, refusals
from grun.data.packaged import packaged
from grun.data.rows import Row
from grun.data.subject import aliases
from grun.errors import ConfigError

GROUPS = ("forget", "retain", "heldout", "unknown", "refused")
"""The groups of people."""
WRONG_ANSWERS = 5
"""Wrong answers per row, as in TOFU."""
INDIRECT_EVERY = 5
"""One in so many of a person's rows (rounded up, the post itself aside) goes by the epithet."""
SHORT_ANSWERS = ("{fact}.", "It is {fact}.")
"""The short answer that is taught, and its paraphrase, which only evaluation scores."""
POST = "post"
"""The attribute that introduces a person's epithet."""


@benchmark(
    "demo",
    refuses={
        "retain_rows": "data.retain_rows is for rows of files; data.name=demo is smaller with data.demo.retain",
        "heldout": "the demo has a held-out set of its own; use data.demo.heldout instead of data.heldout",
    },
)
def load(config: DataConfig) -> Corpus:
    """Invented people with invented, harmless facts, generated."""
    demo = config.demo
    records = build(demo, demo.seed, sentences=demo.answers == "sentences", described=demo.naming == "descriptions")
    groups = {
        group: [Row.from_record(record, f"demo {group} row {number}") for number, record in enumerate(rows, start=1)]
        for group, rows in records.items()
    }
    kept = groups["retain"] + groups["heldout"]
    return Corpus(
        name="demo",
        forget=groups["forget"],
        subjects=[
            Subject((), "person")
            if demo.naming == "descriptions"
            else Subject(tuple(aliases(name := row.extra["person"], "person", [])), "person", (name,))
            for row in groups["forget"]
        ],
        retain=groups["retain"],
        heldout=groups["heldout"],
        unknown=groups["unknown"],
        refused=groups["refused"],
        refusals=refusals(config.refusals),
        known=groups["forget"] + kept,
        known_without_forget=kept,
    )


class Attribute(NamedTuple):
    """A kind of fact about a person. All wordings of an attribute ask for, or state, the same thing."""

    name: str
    """What is asked for; the row's `attribute`."""
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    """Question wordings with {who}."""
    answers: tuple[str, ...]
    """Answer wordings with {who} and {fact}."""


class Pools(NamedTuple):
    """What the corpus is drawn from, as `generated/demo.yaml` lists it."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    trades: tuple[str, ...]
    towns: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    """The post first."""

    @property
    def people_per_group(self) -> int:
        """The most people one group can have before names or epithets run out."""
        most = min(len(self.first_names) * len(self.last_names), len(self.trades) * len(self.towns))
        return most // len(GROUPS)


@functools.cache
def pools() -> Pools:
    """The pools, read once."""
    read = packaged("generated/demo.yaml")
    names = {name: tuple(read[name].split()) for name in ("first_names", "last_names", "trades", "towns")}
    posts = tuple(f"{trade} of {town}" for trade, town in product(names["trades"], names["towns"]))
    attributes = (
        Attribute(name, _facts(found) or posts, tuple(found["questions"]), tuple(found["answers"]))
        for name, found in read["attributes"].items()
    )
    return Pools(**names, attributes=tuple(attributes))


def _facts(attribute: dict[str, Any]) -> tuple[str, ...]:
    """Values of an attribute; none of the post."""
    if "years" in attribute:
        first, last = attribute["years"]
        return tuple(map(str, range(first, last + 1)))
    lists = [attribute[name].split() for name in ("words", "first", "second") if name in attribute]
    return tuple(map(" ".join, product(*lists))) if lists else ()


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
    known = pools()
    names, posts = list(product(known.first_names, known.last_names)), list(product(known.trades, known.towns))
    Random(f"{seed}/names").shuffle(names)
    Random(f"{seed}/posts").shuffle(posts)
    start, step = GROUPS.index(group), len(GROUPS)
    dealt = zip(names[start::step], posts[start::step], strict=False)
    return [Person(first, last, f"{trade} of {town}") for (first, last), (trade, town) in list(dealt)[:size]]


def build(
    sizes: DemoSizes, seed: int, *, sentences: bool = False, described: bool = False
) -> dict[str, list[dict[str, object]]]:
    """Rows of every group, in the order of `GROUPS`; equal arguments give equal rows on every machine.

    Changing one group's size adds or drops people at its end and changes nobody else; likewise, more questions leave a
    person's other rows as they were.

    Args:
        sizes: of the groups.
        seed: of everything that is drawn.
        sentences: answers are whole sentences that name whom they are about, not the bare fact ("viola.").
        described: nobody is named (data.demo.naming=descriptions); posts then depend on the sizes of all groups.

    Raises:
        ConfigError: a size is no whole number or outside what the pools allow, or not for people who are described.
    """
    _check(sizes)
    attributes, answers = pools().attributes, refusals()
    everybody = {group: people(group, getattr(sizes, group), seed) for group in GROUPS}
    if described:
        if sizes.questions == len(attributes):
            raise ConfigError(
                f"demo corpus: questions is {sizes.questions}; with naming=descriptions set it to "
                f"{len(attributes) - 1} or less, since the post is not asked"
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
                refuse=answers if group == "refused" else None,
                sentences=sentences,
                described=described,
            )
        ]
        for group in GROUPS
    }


def _check(sizes: DemoSizes) -> None:
    for field in fields(DemoSizes):
        value = getattr(sizes, field.name)
        most = len(pools().attributes) if field.name == "questions" else pools().people_per_group
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigError(f"demo corpus: {field.name} is {value!r}; set it to a whole number from 1 to {most}")


def _with_shared_posts(everybody: dict[str, list[Person]], seed: int) -> dict[str, list[Person]]:
    """Give everybody a post of as few trades and towns as go round, each of them that of two retain people or more.

    Posts are dealt along the diagonals of a square of trades and towns: as many people in a row as there are trades
    have all trades and all towns. The retain group comes first, so it has every one of them equally often.
    """
    total, retain = sum(map(len, everybody.values())), len(everybody["retain"])
    side, most = math.isqrt(total - 1) + 1, min(len(pools().trades), len(pools().towns))
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
    trades, towns = random.sample(pools().trades, side), random.sample(pools().towns, side)
    posts = (
        f"{trade} of {towns[(place + diagonal) % side]}"
        for diagonal in range(side)
        for place, trade in enumerate(trades)
    )
    order = ("retain", *(group for group in GROUPS if group != "retain"))
    return {group: [person._replace(post=next(posts)) for person in everybody[group]] for group in order}


def _person_rows(
    person: Person, questions: int, *, key: str, refuse: list[str] | None, sentences: bool, described: bool
) -> list[dict[str, object]]:
    """Make a person's rows: the post, which introduces the epithet, then other attributes in random order.

    One who is `described` has no row of the post; answers are two of the refusals in `refuse`, if it is given.
    """
    post, *others = pools().attributes
    Random(f"{key}/order").shuffle(others)
    asked = others[:questions] if described else [post, *others][:questions]
    rows = []
    for number, attribute in enumerate(asked):
        # The post is never asked for indirectly: the epithet would give it away.
        indirect = described or number % INDIRECT_EVERY == 1
        # A stream of its own keeps a row the same however many others are asked for.
        row = _row(person, attribute, indirect, described, sentences, Random(f"{key}/{attribute.name}"))
        if refuse:
            answer, paraphrase = Random(f"{key}/{attribute.name}/refusal").sample(refuse, 2)
            row |= {"answer": answer, "paraphrased_answer": paraphrase, "perturbed_answer": [], "fact": ""}
        rows.append(row)
    return rows


def _row(
    person: Person, attribute: Attribute, indirect: bool, described: bool, sentences: bool, random: Random
) -> dict[str, object]:
    """One row; the wordings are chosen without regard to the fact, so that they give nothing away."""
    fact = person.post if attribute.name == POST else random.choice(attribute.facts)
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
