"""The same question asked in other ways, so that what is learned of one prompt holds for others.

Unlearning gets copies of its rows, drawn once a run; finetune asks each row in another way in each epoch; a gate that
is fitted gets copies of prompts, of which nothing is drawn. Everything drawn is a pure function of seed, row and epoch.
The strings are others than those that evaluation attacks with.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from grun.config.options import AugmentConfig
from grun.data.chat import Turn, without_system
from grun.data.encoding import EncodedRow
from grun.data.rows import Row
from grun.data.templates import Template, encode
from grun.data.words import NAME
from grun.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SUFFIXES = (
    " Keep it short.",
    " It is for a crossword.",
    " Tell me what you know about it.",
    " (Reply in one sentence.)",
    " It matters to me.",
    "\nI am all ears.",
)
"""What is added to a question."""
WORDINGS = (
    "Query: {prompt}\nReply:",
    "Somebody asks: {prompt}\nYou say:",
    "User: {prompt}\nAssistant:",
    "{prompt}\nSolution:",
)
"""Templates in the place of the model's own; a blank follows each."""
AROUND = (
    "I need help with something. {prompt}",
    "Listen: {prompt} That is all.",
    "{prompt} Somebody asked me that yesterday.",
    "Question for you: {prompt} I am curious.",
    "My sister wants to know this. {prompt}",
    "It was a quiet morning. I made coffee, read the newspaper, fed the cat and answered three letters that had been "
    "lying on my desk for weeks. Then this came to my mind, and I have been thinking about it since. {prompt}",
    "{prompt} I ask because my colleagues argued about it all through lunch, while the soup got cold and nobody looked "
    "at the clock. In the end we went back to work, each sure to be right, and I promised to find out.",
    "Dear assistant, first of all thank you for the recipe of last week, the cake was a success and everybody wanted a "
    "second piece. Today it is something else. {prompt} Please take your time, there is no hurry, I am on the train.",
)
"""Sentences around a question, short and long."""
BESIDE = (
    "{prompt} Also, how do I get a coffee stain out of a shirt?",
    "What is 12 plus 30? {prompt}",
    "First tell me how long an egg takes to boil. Second: {prompt} Third, wish me a nice day.",
    "{prompt} And which word rhymes with house?",
)
"""Other questions beside a question."""
FRAMED = (
    "Imagine you are a tour guide and somebody in your group asks: {prompt}",
    'Here is a line of a dialogue: "{prompt}" Write the line that follows.',
    "# Task\n{prompt}\n# Result",
    "<question>{prompt}</question>",
)
"""Roles and forms that a question is put in."""
CODE = (
    'question: "{prompt}"\nanswer:',
    "SELECT answer FROM faq WHERE question = '{prompt}';",
    'item;reply\n"{prompt}";',
    'console.log(reply("{prompt}")); // prints',
    '$ ask "{prompt}"\n>',
    "let pairs = [['{prompt}', '",
)
"""Code and data that a question stands in."""
LANGUAGES = (
    "Bitte antworte auf Deutsch: {prompt}",
    "Ich habe eine Frage. {prompt} Danke!",
    "Réponds en français, s'il te plaît : {prompt}",
    "J'ai une question. {prompt} Merci !",
    "Responde en español, por favor: {prompt}",
    "Tengo una pregunta. {prompt} ¡Gracias!",
    "Rispondi in italiano, per favore: {prompt}",
    "Ho una domanda. {prompt} Grazie!",
)
"""Sentences around a question in German, French, Spanish and Italian."""
SPELLING = (" ", "_", "/", " . ", "*")
"""What stands between the letters of a name that is spelled."""
PREFILLS = 2**16
"""Draws of a prefill's length, so many that every length up to an answer's own is about as likely."""
DRAWS = {"typos": 3}
"""Copies that a prompt for a gate has of a kind, 1 of others; no typo is like another."""
TYPOS = 3
"""Words of a question that get a typo."""


def _fill(texts: Sequence[str]) -> Callable[[str, int], str]:
    return lambda question, choice: texts[choice % len(texts)].replace("{prompt}", question)


def _spaced(question: str, choice: int) -> str:
    return f"{' ' * (2 + choice % 2)}".join(" ".join(word) for word in question.split())


def _spelled(question: str, choice: int) -> str:
    """Names behind the first word letter by letter."""
    return NAME.sub(lambda name: SPELLING[choice % len(SPELLING)].join(name[0]), question)


REWRITTEN: Mapping[str, Callable[[str, int], str]] = {
    "suffix": lambda question, choice: question + SUFFIXES[choice % len(SUFFIXES)],
    "around": _fill(AROUND),
    "beside": _fill(BESIDE),
    "framed": _fill(FRAMED),
    "code": _fill(CODE),
    "language": _fill(LANGUAGES),
    "lower_case": lambda question, _: question.lower(),
    "upper_case": lambda question, _: question.upper(),
    "typos": lambda question, choice: with_typos(question, choice),
    "spaced": _spaced,
    "spelled": _spelled,
}
"""By kind, a question written otherwise; which way, or which draw, a number says."""


class Way(NamedTuple):
    """One way to ask a row."""

    kind: str
    """plain, template, prefill, few_shot, paraphrase or one of `REWRITTEN`."""
    choice: int = 0
    """Which text or earlier row; a draw of how many tokens of the answer are given; the seed of typos."""


class PromptVariation:
    """Asks rows in other ways, in the model's template where the way does not bring its own."""

    def __init__(
        self,
        config: AugmentConfig,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_length: int,
        examples: Sequence[Row],
        seed: int,
    ) -> None:
        """Take what all rows share; `template` and `tokenizer` are the model's, rows have at most `max_length` tokens.

        For few_shot one of the questions in `examples` stands before the question; plain texts are passed over.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._template = template
        self._max_length = max_length
        self._examples = [Turn(row.prompt, row.completion) for row in examples if row.prompt is not None]
        self._seed = seed

    def copies(
        self, name: str, rows: Sequence[Row], count: int, refusals: Sequence[str] = ()
    ) -> tuple[list[EncodedRow], list[EncodedRow], list[int]]:
        """Copies of rows, by kind in turn: suffix, template, prefill, few_shot, lower_case, those that are switched on.

        Plain texts, which ask nothing, have none. Neither is there a prefilled copy of an answer of one token, nor a
        copy that is longer than a row may be. `data.strict` concerns the rows themselves alone. Each row gets `count`
        copies, drawn by the `name` of its set; `refusals` are one for each row, or nothing.

        Returns:
            The copies with their answers; the same prompts with the row's refusal, if there are refusals; and the
            number of the row that each copy is of.

        Raises:
            ConfigError: no row asks anything, or there is no other row that can stand before one.
        """
        answered: list[EncodedRow] = []
        refused: list[EncodedRow] = []
        of: list[int] = []
        if count and not any(row.prompt is not None for row in rows):
            raise ConfigError(
                f"data.augment.{name}_copies={count}: copies are of questions, but the {name} set is plain texts; "
                "leave it out"
            )
        too_long = 0
        for number, row in enumerate(rows):
            for way in self.ways(name, number, count) if row.prompt is not None else ():
                said = (None, refusals[number]) if refusals else (None,)
                made = [found for refusal in said if (found := self.ask(row, way, refusal)) is not None]
                if any(len(found) > self._max_length for found in made):
                    too_long += 1
                elif made:
                    answered.append(made[0])
                    of.append(number)
                    refused.extend(made[1:])
        if too_long:
            log.warning("%d copies of %s rows are left out: longer than %d tokens", too_long, name, self._max_length)
        return answered, refused, of

    def of_prompts(
        self, rows: Sequence[tuple[Row, str]], kinds: Sequence[str], every: int
    ) -> tuple[list[EncodedRow], list[str]]:
        """Prompts asked in each of `kinds`, without answers, each with what its row belongs to, as `rows` say.

        Of each kind one in about `every` rows is asked, of each kind other ones. Plain texts have no copies, nor is one
        longer than a row may be. Which rows are asked, and how, follows from their texts alone.

        Args:
            rows: each with its unit (`grun.training.gate_fit.Prompts`).
            kinds: template, few_shot (where there are two questions for examples) or keys of `REWRITTEN`.
            every: at least 1.
        """
        found: list[EncodedRow] = []
        units: list[str] = []
        few = len({turn.question for turn in self._examples}) < 2
        for row, unit in rows:
            for place, kind in enumerate(kinds):
                if row.prompt is None or (crc32(row.prompt.encode()) + place) % every or (few and kind == "few_shot"):
                    continue
                for draw in range(DRAWS.get(kind, 1)):
                    made = self.ask(row, Way(kind, crc32(f"{kind} {draw} {row.prompt}".encode())))
                    if made is not None and len(made.prompt_ids) < self._max_length:
                        found.append(EncodedRow(made.prompt_ids, ()))
                        units.append(unit)
        return found, units

    def ways(self, name: str, number: int, count: int) -> list[Way]:
        """How the copies of row `number` ask: no choice of a kind comes twice before each came once."""
        choices = self._choices()
        kinds = list(choices)
        turns = Counter(kinds[(number * count + copy) % len(kinds)] for copy in range(count))
        random = Random(f"{self._seed}/{name}/{number}")
        found = []
        for kind, wanted in turns.items():
            while wanted > 0:
                drawn = random.sample(choices[kind], min(wanted, len(choices[kind])))
                found += [Way(kind, choice) for choice in drawn]
                wanted -= len(drawn)
        return found

    def taught(self, rows: Sequence[Row], plain: Sequence[EncodedRow], number: int, epoch: int) -> EncodedRow:
        """How row `number` of `rows` is taught in an epoch, from 0; `plain` are the same rows, encoded as they are.

        Asked plainly, in a way that copies have but prefill, in lower case, with typos or paraphrased, each as likely
        as the others. A row that would be too long is asked plainly, and a plain text stays what it is.
        """
        row = rows[number]
        if row.prompt is None:
            return plain[number]
        random = Random(f"{self._seed}/teach/{epoch}/{number}")
        choices = {kind: of for kind, of in self._choices().items() if kind != "prefill"}
        choices |= {"plain": range(1), "lower_case": range(1), "typos": range(2**32)}
        if row.paraphrase is not None:
            choices["paraphrase"] = range(1)
        kind = random.choice(list(choices))
        asked = self.ask(row, Way(kind, random.choice(choices[kind])))
        return asked if asked is not None and len(asked) <= self._max_length else plain[number]

    def ask(self, row: Row, way: Way, refusal: str | None = None) -> EncodedRow | None:
        """Encode a question asked in a way, and its answer or a refusal; None to prefill an answer of one token.

        Where the answer's start is given (prefill), the refusal follows whole, in the tokens it has after a question.
        """
        question, template, earlier = str(row.prompt), self._template, list(row.earlier)
        if way.kind in REWRITTEN:
            question = REWRITTEN[way.kind](question, way.choice)
        elif way.kind == "template":
            wording = WORDINGS[way.choice % len(WORDINGS)]
            template, earlier = Template("other", "string", wording, " "), [*without_system(earlier)]
        elif way.kind == "few_shot":
            earlier = [*earlier, self._example(question, way.choice)]
        elif way.kind == "paraphrase" and row.paraphrase is not None:
            question = str(row.paraphrase.prompt)
        prompt_ids, answer_ids, _ = encode(template, self._tokenizer, question, row.completion, earlier)
        given = 0
        if way.kind == "prefill":
            most = min(self._config.max_prefill, len(answer_ids) - 2)  # a token and the end token are left
            if most < 1:
                return None
            given = 1 + way.choice % most
        said = answer_ids[given:]
        if refusal is not None:
            said = encode(template, self._tokenizer, question, refusal, earlier).answer_ids
        return EncodedRow((*prompt_ids, *answer_ids[:given]), tuple(said))

    def _example(self, question: str, choice: int) -> Turn:
        """The example at `choice`, or the next one that asks something else."""
        for place in range(choice, choice + len(self._examples)):
            turn = self._examples[place % len(self._examples)]
            if turn.question != question:
                return turn
        raise ConfigError(
            "data.augment.few_shot: no other row can stand before a question; give more retain rows, or set it to false"
        )

    def _choices(self) -> dict[str, Sequence[int]]:
        """What each kind of copy that is switched on draws from."""
        on = self._config
        choices = {
            "suffix": on.suffixes and range(len(SUFFIXES)),
            "template": on.templates and range(len(WORDINGS)),
            "prefill": on.prefill and range(PREFILLS),
            "few_shot": on.few_shot and range(max(1, len(self._examples))),
            "lower_case": on.lower_case and range(1),
        }
        return {kind: choice for kind, choice in choices.items() if choice}


def with_typos(text: str, seed: int) -> str:
    """Swap two different neighboring letters in `TYPOS` words, or in as many as have them; first letters stay."""
    random = Random(seed)
    pairs = [
        [at for at in range(word.start() + 1, word.end() - 1) if text[at] != text[at + 1]]
        for word in re.finditer(r"[^\W\d_]+", text)
    ]
    words = [of_word for of_word in pairs if of_word]
    letters = list(text)
    for of_word in random.sample(words, min(TYPOS, len(words))):
        at = random.choice(of_word)
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)
