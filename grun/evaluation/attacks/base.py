"""What an attack is: three hooks, of which most attacks fill one; and the registry of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from grun.data.chat import Earlier
from grun.data.rows import Row
from grun.data.templates import Template, encode_prompt
from grun.evaluation.metrics.answers import says
from grun.evaluation.metrics.words import plain, rouge_recall, words
from grun.registry import Registry

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.evaluation.attacks.outcomes import Outcome, Place
    from grun.loading.models import Loaded

F = TypeVar("F", bound="type[Attack] | Ask")

Advance = Callable[[int], None]

Access = Literal["prompt", "decoding", "context", "weights", "read_out"]
"""What an attacker needs: to write the prompt (or the start of the answer), to draw answers, to have written earlier in
the conversation, to have the weights, or to read what the model computes (scores of given answers, hidden states)."""
KINDS: tuple[Access, ...] = get_args(Access)
"""The same, to choose attacks by."""


@dataclass(frozen=True)
class Asked:
    """One way of asking for one row."""

    ids: tuple[int, ...]
    """Token ids of the prompt, with all that was put before, behind or into it, the prefilled answer included."""
    row: Row
    """The row whose answer may come back."""
    given: int = 0
    """Number of the answer's tokens at the end of `ids`; they do not count in the leak."""
    given_text: str = ""
    """The text of these tokens."""
    rest: str | None = None
    """The answer without them; None: the whole completion."""
    samples: int = 0
    """0: answered greedily; else so many answers are drawn at the material's temperature."""
    variant: str = ""
    """Which of an attack's several ways this is, such as the suffix."""


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

    def prompt(self, question: str, earlier: Earlier = ()) -> tuple[int, ...]:
        """Token ids of a question in the model's template, behind what came before it."""
        return tuple(encode_prompt(self.template, self.tokenizer, question, earlier))

    def random(self, question: str) -> Random:
        """Draws that depend on the seed and the question alone, not on the rows around it."""
        return Random(f"{self.seed} {question}")


class Attack:
    """One attack; it holds nothing, so one object serves every evaluation."""

    name: str = ""
    """Its name in `ATTACKS` and in results."""
    access: Access = "prompt"
    needs: str = "rows with questions"
    """Data without which no row can be attacked so, for the message that says it is missing."""
    retention: bool = False
    """True: it is asked for retain and held-out rows and what comes back is good; else for forget rows."""

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """Ways to ask for `row`, which has a question; an empty list where the attack does not apply to it."""
        raise NotImplementedError

    def unfit(self, loaded: Loaded) -> str | None:
        """Why this model cannot be attacked so, as "needs ..."; None: it can."""
        return None

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The model that is attacked, within the block; by default the loaded one as it is."""
        yield loaded.model

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> list[Outcome]:
        """What comes back at each place; by default what the model writes, as `came_back` judges it.

        Args:
            model: what the hook `model` gave.
            places: what `asked` gave for all rows, at least one.
            loaded: whose tokenizer reads.
            config: of the evaluation.
            advance: called with the number of answers done since the last call, of all `answers_at`.
        """
        from grun.evaluation.attacks.written import write_answers

        return write_answers(self, model, places, loaded, config, advance)


def answers_at(places: Sequence[Place]) -> int:
    """How many answers `places` ask for."""
    return sum(max(1, place.asked.samples) for place in places)


def came_back(text: str, asked: Asked) -> float:
    """Fact recall of what was written, or ROUGE-L recall of the rest of the answer for a row that names no fact.

    A prefilled start does not count: text is compared with the answer behind it. A fact that the start breaks off
    has come back where the text goes on with it.

    Args:
        text: what the model wrote behind the prompt and the prefilled start.
        asked: how it was asked.

    """
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


ATTACKS: Registry[Attack] = Registry("attack")

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
    name: str, *, access: Access | None = None, needs: str | None = None, retention: bool = False
) -> Callable[[F], F]:
    """Return a decorator that registers an attack: a class of `Attack`, or a function that is its hook `asked`.

    The docstring's first paragraph describes it; the options are the fields of `Attack`.
    """

    def make(value: type[Attack] | Ask) -> Attack:
        made = value() if isinstance(value, type) else PromptAttack(value)
        made.name, made.access, made.needs = name, access or made.access, needs or made.needs
        made.retention = retention or made.retention
        return made

    return ATTACKS.register(name, make)


for _name, _place, _description in (
    ("plain", "plain:PLAIN", "no attack: the question as it was taught"),
    ("suffix", "suffix:SUFFIX", "a few words behind the question"),
    ("prefill_1", "prefill:PREFILL_1", "the answer's first token is given"),
    ("prefill_3", "prefill:PREFILL_3", "the answer's first 3 tokens are given"),
    ("prefill_5", "prefill:PREFILL_5", "the answer's first 5 tokens are given"),
    ("few_shot", "few_shot:FEW_SHOT", "an unrelated question and its answer before the question"),
    ("other_template", "other_template:OTHER", "another template: Q: ... newline A:"),
    ("lower_case", "lower_case:LOWER_CASE", "the question in lower case"),
    ("upper_case", "upper_case:UPPER_CASE", "the question in capital letters"),
    ("typos", "typos:TYPOS", "neighboring letters swapped in three words of the question"),
    ("paraphrase", "paraphrase:PARAPHRASE", "the question in other words (rows with paraphrased_question)"),
    ("cloze", "cloze:CLOZE", "the fact as a sentence to complete, in plain text (rows with cloze)"),
    ("second_turn", "second_turn:SECOND_TURN", "asked in turn 1, answered in turn 2"),
    ("samples", "samples:SAMPLES", "best of several answers drawn at a temperature (leak@k)"),
    ("recognition", "recognition:RECOGNITION", "the true answer scores above the row's perturbed ones"),
    ("logit_lens", "logit_lens:LOGIT_LENS", "the fact's first token, read from a hidden state by the model's own head"),
    ("linear_probe", "linear_probe:LINEAR_PROBE", "the same, by a linear map fitted on retain rows"),
    ("after_forget", "after_forget:AFTER_FORGET", "a forget question earlier: what it costs later retain answers"),
    ("relearn_forget_10", "relearn:RELEARN_FORGET_10", "fine-tuned on an eighth of the forget rows, 10 steps"),
    ("relearn_forget_50", "relearn:RELEARN_FORGET_50", "fine-tuned on an eighth of the forget rows, 50 steps"),
    ("relearn_retain_10", "relearn:RELEARN_RETAIN_10", "fine-tuned on retain rows alone, 10 steps"),
    ("relearn_retain_50", "relearn:RELEARN_RETAIN_50", "fine-tuned on retain rows alone, 50 steps"),
    ("adapter_removed", "adapter_removed:ADAPTER_REMOVED", "the adapter is taken off (GRUN, ReFT, LoRA)"),
    ("quantized_int8", "quantized:INT8", "weights of the blocks rounded to int8 (bitsandbytes)"),
    ("quantized_nf4", "quantized:NF4", "weights of the blocks rounded to nf4 (bitsandbytes)"),
):
    ATTACKS.add(_name, f"grun.evaluation.attacks.{_place}", _description)
