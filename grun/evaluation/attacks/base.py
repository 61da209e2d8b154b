"""What an attack is: three hooks, of which most attacks fill one; and the registry of all of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from grun.data.chat import Turn
from grun.data.rows import Row
from grun.data.templates import Template, encode_prompt
from grun.data.words import plain
from grun.evaluation.metrics.answers import says
from grun.evaluation.metrics.words import rouge_recall, words
from grun.registry import Registry

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.evaluation.generation import Answer
    from grun.loading.adapters import Loaded

F = TypeVar("F", bound="type[Attack] | Ask")

Advance = Callable[[int], None]
"""Called with the number of answers done since the last call."""

Access = Literal["prompt", "decoding", "search", "context", "weights", "read_out"]
"""What an attacker needs: to write the prompt (or the start of the answer), to draw answers, to ask again and again, to
have written earlier in the conversation, to have the weights, or to read what the model computes (scores of given
answers, hidden states)."""
KINDS: tuple[Access, ...] = get_args(Access)
"""The same, to choose attacks by."""


@dataclass(frozen=True)
class Asked:
    """One way of asking for one row."""

    ids: tuple[int, ...]
    """Token ids of the prompt, with all that was put before, after or into it, the prefilled answer included."""
    row: Row
    """The row whose answer may come back."""
    given: int = 0
    """Number of the answer's tokens at the end of `ids`; they do not count in the leak."""
    given_text: str = ""
    """The text of these tokens."""
    rest: str | None = None
    """The answer without them; None: the whole completion."""
    samples: int = 0
    """0: answered greedily; else so many answers are drawn."""
    temperature: float | None = None
    """At which they are drawn; None: the config's attack_temperature."""
    variant: str = ""
    """Which of an attack's several ways this is, such as the suffix."""
    reads: Callable[[str], str] | None = None
    """How the attacker reads an answer back that he asked for in a cipher."""


class Place(NamedTuple):
    """One way of asking for one row, and where the row stands."""

    set: str
    number: int
    """Position of the row among those of its set that are attacked, from 0."""
    asked: Asked


class Outcome(NamedTuple):
    """What came of it."""

    attack: Attack
    place: Place
    answers: list[Answer]
    """One, or as many as were drawn."""
    leaks: list[float]
    """How much each of them gives back."""
    curve: tuple[float, ...] = ()
    """Of an attacker who searches, what he has after each query; the first number is that of the plain question."""

    @property
    def leak(self) -> float:
        """Of several answers the one that gives most away."""
        return max(self.leaks)


@dataclass(frozen=True)
class Material:
    """What attacks are made of."""

    template: Template
    """The model's own."""
    tokenizer: Any
    others: Sequence[Row]
    """Rows that have nothing to do with what is asked, for examples before the question; they may be none."""
    forget: Sequence[Row]
    """Rows to be forgotten that are attacked; they may be none."""
    retain: Sequence[Row]
    """Taught rows with questions that unlearning was to keep; they may be none."""
    seed: int
    """Of every draw."""
    samples: int = 10
    """Answers drawn a prompt by attacks that draw."""
    facts: Sequence[Row] = ()
    """Rows with questions of every set, attacked or not, from which an attacker has clues."""
    neighbors: Sequence[Row] = ()
    """Rows with questions that lie near the forget set and that unlearning did not see, where the corpus has such."""
    memory: dict[tuple[int, ...], Any] = field(default_factory=dict)
    """What attacks that take turns at one model have learned of it, by prompt."""

    def ask(self, row: Row, question: str | None = None, *turns: Turn, variant: str = "", samples: int = 0) -> Asked:
        """A question, by default the row's, in the model's template, after the row's earlier turns and `turns`."""
        asked = (row.prompt or "") if question is None else question
        ids = encode_prompt(self.template, self.tokenizer, asked, [*row.earlier, *turns])
        return Asked(tuple(ids), row, variant=variant, samples=samples)

    def random(self, question: str | None) -> Random:
        """Draws that depend on the seed and the question alone, not on the rows around it."""
        return Random(f"{self.seed} {question or ''}")


class Attack:
    """One attack; it holds nothing, so one object serves every evaluation."""

    name: str = ""
    """Its name in `ATTACKS` and in results."""
    access: Access = "prompt"
    begins: bool = False
    """True: the start of the answer stands after the prompt, as interfaces allow that continue a started answer."""
    needs: str = "rows with questions"
    """Data without which no row can be attacked so, for the message that says it is missing."""
    retention: bool = False
    """True: it is asked for retain and held-out rows and what comes back is good; else for forget rows."""
    floor: bool = False
    """True: rows that were never taught are asked for in the same way, which shows what guessing gives."""
    grid: bool = False
    """True: its ways are cells of a grid, of which the attacker takes the one that gives most back over all rows."""
    turn: tuple[str, int] | None = None
    """Attacks with the same name here take turns at one model, in the order of the numbers; None: it is alone."""

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """Ways to ask for `row`, which has a question, by default that question; empty where it does not apply."""
        return [material.ask(row)]

    def work(self, places: Sequence[Place], config: EvaluateConfig) -> int:
        """How many answers `read` reports."""
        return answers_at(places)

    def unfit(self, loaded: Loaded) -> str | None:
        """Why this model cannot be attacked so, as "needs ..."; None: it can."""
        return None

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The model that is attacked, within the block; by default the loaded one as it is."""
        yield loaded.model

    @contextlib.contextmanager
    def models(
        self, attacks: Sequence[Any], loaded: Loaded, config: EvaluateConfig, material: Material
    ) -> Iterator[Iterator[Any]]:
        """The model for each of `attacks`, this one among them, which take turns in this order, until the next one.

        By default one model for all, so that what one attack has learned of it, the next one knows.
        """
        with self.model(loaded, config, material) as model:
            yield itertools.repeat(model)

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """What comes back at each place; by default what the model writes, as `came_back` judges it.

        `model` is what the hook `model` gave, `places` (at least one) what `asked` gave for all rows. `advance` is
        called with the number of answers done since the last call, of all of `work`.
        """
        return next(write_answers([(self, [*places])], model, loaded, config, advance))

    def outcome(
        self, place: Place, text: str, leak: float, gates: dict[int, float] | None = None, variant: str | None = None
    ) -> Outcome:
        """What came back at a place: `text`, which the model did not write; `variant` if that was not known before."""
        from grun.evaluation.generation import Answer

        asked = place.asked if variant is None else replace(place.asked, variant=variant)
        return Outcome(self, place._replace(asked=asked), [Answer(text, gates)], [leak])


class WithMaterial(Attack):
    """An attack whose `read` works on the loaded model with the material, which it gets in a model's place.

    Attacks that take turns share its memory.
    """

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The material, with nothing in its memory."""
        yield replace(material, memory={})


Planned = tuple[Attack, list[Place]]
"""An attack and where it asks."""


def only_asks(attack: Attack) -> bool:
    """Whether an attack reads what the loaded model writes as it is, so that others can be answered with it."""
    own, by_default = type(attack), Attack
    return (own.model, own.models, own.read) == (by_default.model, by_default.models, by_default.read)


def write_answers(
    planned: Sequence[Planned], model: Any, loaded: Loaded, config: EvaluateConfig, advance: Advance
) -> Iterator[list[Outcome]]:
    """What the model writes at all places, of each attack in turn, in one pass of generation over all of them."""
    from grun.evaluation.generation import Draw, generate_answers

    ids: list[tuple[int, ...]] = []
    draws: list[Draw | None] = []
    for asked in (place.asked for _, own in planned for place in own):
        temperature = asked.temperature or config.attack_temperature
        draws += [Draw(config.seed, number, temperature) for number in range(asked.samples)] or [None]
        ids += [asked.ids] * max(1, asked.samples)
    size, longest = config.batch_size, config.max_new_tokens
    answers = iter(generate_answers(model, loaded.tokenizer, ids, size, longest, loaded.pad_id, advance, draw=draws))
    for attack, own in planned:
        outcomes = []
        for place in own:
            found = [next(answers) for _ in range(max(1, place.asked.samples))]
            outcomes.append(Outcome(attack, place, found, [came_back(one.text, place.asked) for one in found]))
        yield outcomes


ATTACKS: Registry[Attack] = Registry(
    "attack",
    *(
        f"grun.evaluation.attacks.{module}"
        for module in (
            "prompts",
            "facts",
            "ciphers",
            "translated",
            "search",
            "read_outs",
            "retention",
            "weights",
            "grid",
            "steering",
            "patching",
            "gradient",
            "soft_prompt",
        )
    ),
    "grun.evaluation.attacks",
)

Ask = Callable[[Row, Material], list[Asked]]
"""The hook `Attack.asked` as a function."""


class PromptAttack(Attack):
    """An attack that is no more than its way of asking."""

    def __init__(self, ask: Ask) -> None:
        """`ask` is the hook `asked`."""
        self._ask = ask

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """What the function gives."""
        return self._ask(row, material)


def attack(
    name: str,
    *,
    access: Access | None = None,
    needs: str | None = None,
    retention: bool = False,
    floor: bool = False,
) -> Callable[[F], F]:
    """Return a decorator that registers an attack: a class of `Attack`, or a function that is its hook `asked`.

    The docstring's first paragraph describes it; the options are the fields of `Attack`.
    """

    def make(value: type[Attack] | Ask) -> Attack:
        made = value() if isinstance(value, type) else PromptAttack(value)
        made.name, made.access, made.needs = name, access or made.access, needs or made.needs
        made.retention, made.floor = retention or made.retention, floor or made.floor
        return made

    return ATTACKS.register(name, make)


def answers_at(places: Sequence[Place]) -> int:
    """How many answers `places` ask for."""
    return sum(max(1, place.asked.samples) for place in places)


def came_back(text: str, asked: Asked) -> float:
    """Fact recall of what the model wrote, or ROUGE-L recall of the rest of the answer for a row that names no fact.

    A prefilled start does not count: text is compared with the answer after it. A fact that the start breaks off
    has come back where the text goes on with it. Of a cipher what gives more back counts: the text, or what is read.
    """
    if asked.reads is not None:
        plainly = replace(asked, reads=None)
        return max(came_back(text, plainly), came_back(asked.reads(text), plainly))
    fact = asked.row.fact
    if fact and plain(fact):
        return float(any(says(asked.given_text + gap + text, fact) for gap in ("", " ")))
    recall = rouge_recall(asked.row.completion if asked.rest is None else asked.rest, text)
    if recall is None:
        raise ValueError("the answer has no word to compare with")
    return recall


def is_readable(row: Row, rest: str | None = None) -> bool:
    """Whether `came_back` can tell the row's answer, or the `rest` of it: it has a word, or the row a fact."""
    return bool(plain(row.fact or "") or words(row.completion if rest is None else rest))
