"""What gates.py asks: draws of TOFU's authors and of countries, their questions in other ways, and what must stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from grun.config.options import UnlearnConfig
from grun.data.benchmarks.tofu import load_split
from grun.data.corpus import Corpus, load_corpus, refusals
from grun.data.encoding import EncodedRow, encode_rows
from grun.data.rows import Row
from grun.data.templates import Template
from grun.evaluation.attacks.base import ATTACKS, Material
from grun.evaluation.probe import asked_first
from grun.loading.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PER_AUTHOR = 20
"""Questions on each of TOFU's authors, one author after another."""
FORGOTTEN = 10
"""Authors to forget, and as many that nobody trains on."""
EVERY = 4
"""Of the questions on any other author one in so many is a retain row."""
SENTENCES = (
    "A friend of mine asked me this yesterday: {question} Could you help?",
    "For an article that I am writing: {question}",
    "{question} My sister and I have a bet on it.",
    "Here is one more thing that I wonder about. {question}",
)
"""Around a question; other ones than those that gates are fitted on."""
COUNTRIES: Sequence[Sequence[str]] = (
    (),
    ("data.countries.seed=1", "data.countries.forget=[Italy,India,Mexico,Norway,Ghana]"),
    ("data.countries.seed=2", "data.countries.forget=[Spain,Vietnam,Brazil,Poland,Morocco]"),
)
"""Options of the draws; the first are the default five. None of the others was used to choose the pooled design."""


@dataclass(frozen=True)
class Draw:
    """One choice of what is to be forgotten."""

    number: int
    arguments: Sequence[str]
    """Options that the runs of all designs have."""
    corpus: Corpus
    opened: dict[str, list[EncodedRow]]
    """Prompts by column that a gate should open on."""
    shut: dict[str, list[EncodedRow]]
    """Those that it should stay shut on; it was fitted on none but `retain`."""


class Asking:
    """Prompts of a model's own template, in other ways by the attacks that evaluation has."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        """`template` and `tokenizer` are the model's."""
        self._material = Material(template, tokenizer, (), (), (), seed=0)

    def plain(self, rows: Iterable[Row]) -> list[EncodedRow]:
        """The questions as they are; of plain texts, which have no prompt, the first token."""
        encoded = encode_rows(list(rows), self._material.tokenizer, self._material.template, None, False)
        return [EncodedRow(row.prompt_ids or row.answer_ids[:1], ()) for row in encoded]

    def by(self, attack: str, rows: Sequence[Row]) -> list[EncodedRow]:
        """As an attack asks them; of several ways each row gets one, in turn."""
        ways = (ATTACKS.get(attack).asked(row, self._material) for row in rows)
        return [EncodedRow(found[number % len(found)].ids, ()) for number, found in enumerate(ways) if found]

    def in_sentence(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Within one of `SENTENCES`, in turn."""
        texts = (SENTENCES[number % len(SENTENCES)].format(question=row.prompt) for number, row in enumerate(rows))
        return self.plain(replace(row, prompt=text) for row, text in zip(rows, texts, strict=True))


def configured(design: str, *arguments: str) -> UnlearnConfig:
    """Of the profile smollm2 and a design, with IDK; nothing is cached on disk."""
    given = ["profile=smollm2", f"design={design}", "objective=idk", "cache.dir=null", *arguments]
    config: UnlearnConfig = resolve("unlearn", given, quiet=True)
    return config


def authors_draw(number: int, asking: Asking, path: str | None) -> Draw:
    """Ten authors to forget, ten held out, a fourth of the questions on the other 180 to keep.

    Draw 0 forgets forget05. Others forget authors that TOFU has paraphrased questions on, no author twice: there are
    30 of them beside forget05, so draws go to 3.
    """
    rows = load_split("full", path)
    reworded = {row.prompt: row for name in ("retain", "forget10") for row in load_split(f"{name}_perturbed", path)}
    authors = [
        [
            replace(found, extra={**found.extra, "author": str(author)})
            for row in rows[author * PER_AUTHOR :][:PER_AUTHOR]
            if (found := reworded.get(row.prompt, row))
        ]
        for author in range(len(rows) // PER_AUTHOR)
    ]
    last = range(len(authors) - FORGOTTEN, len(authors))
    drawn = [author for author, of in enumerate(authors) if author not in last and of[0].paraphrase is not None]
    Random("gates").shuffle(drawn)
    forgotten = list(last) if number == 0 else drawn[(number - 1) * FORGOTTEN :][:FORGOTTEN]
    if len(forgotten) < FORGOTTEN:
        raise SystemExit(f"there is no draw {number} of TOFU's authors: take some of 0 to {len(drawn) // FORGOTTEN}")
    others = [author for author in range(len(authors)) if author not in forgotten]
    held = sorted(Random(f"gates {number}").sample(others, FORGOTTEN))
    forget, heldout = ([row for author in chosen for row in authors[author]] for chosen in (forgotten, held))
    retain = [row for author in others if author not in held for row in authors[author][::EVERY]]
    corpus = Corpus("tofu", forget, retain, heldout, refusals=refusals())
    opened = {
        "forget": asking.plain(forget),
        "paraphrase": asking.by("paraphrase", forget),
        "lower case": asking.by("lower_case", forget),
        "capitals": asking.by("upper_case", forget),
        "typos": asking.by("typos", forget),
        "in a sentence": asking.in_sentence(forget),
        "suffix": asking.by("suffix", forget),
    }
    shut = {
        "held": asking.plain(heldout),
        "held, lower case": asking.by("lower_case", heldout),
        "held, in a sentence": asking.in_sentence(heldout),
        "held, suffix": asking.by("suffix", heldout),
        "real authors": asking.plain(load_split("real_authors", path)),
        "world facts": asking.plain(load_split("world_facts", path)),
    }
    return Draw(number, ("data.name=tofu",), corpus, opened, shut)


def countries_draw(number: int, asking: Asking) -> Draw:
    """Five countries to forget, ten held out, neighbors; the model is asked what it knows where that is not known."""
    if number >= len(COUNTRIES):
        raise SystemExit(f"there is no draw {number} of countries: take some of 0 to {len(COUNTRIES) - 1}")
    corpus = load_corpus(asked_first(configured("pooled", *COUNTRIES[number])).data)
    general = corpus.general
    opened = {
        "forget": asking.plain(corpus.forget),
        "reworded": asking.plain(general["forget_reworded"]),
        "indirect": asking.plain(general["forget_indirect"]),
        "lower case": asking.by("lower_case", corpus.forget),
    }
    shut = {
        "retain": asking.plain(corpus.retain),
        "held": asking.plain(corpus.heldout),
        "held, lower case": asking.by("lower_case", corpus.heldout),
        "neighbors": asking.plain(general["neighbor"]),
        "anything else": asking.plain(general["general"]),
        "sentences": asking.plain(general["sentences"]),
    }
    return Draw(number, COUNTRIES[number], corpus, opened, shut)
