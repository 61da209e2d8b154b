"""Guardrails: what a provider puts around a model of which nothing is changed, saved and loaded as an adapter.

A system message and examples stand in front of every conversation, as a part of the template; a filter reads what the
model has written. Sources: Thaker et al. 2024, arXiv 2403.03329 (message and filter compared with unlearning);
Pawelczyk et al. 2023, arXiv 2310.07579 (in-context unlearning of labels; here of answers). A folder holds
adapter_config.json (`peft_type` "GUARDRAIL") and README.md, and text of forget rows in the former.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel

from grun.config.options import GuardrailConfig, UnlearnConfig
from grun.data.corpus import Corpus
from grun.data.encoding import Batch
from grun.data.rows import ALTERNATIVES, Row, evenly_spaced
from grun.data.templates import Template
from grun.data.words import split_words
from grun.errors import AdapterError, ConfigError
from grun.method.adapter import CONFIG_FILE, check_base
from grun.method.fingerprint import fingerprint
from grun.method.parametrization import StepOutput
from grun.method.plain import run_plain
from grun.runtime.files import make_folder, read_json, write_json, write_text
from grun.runtime.reading import typed

KIND = "GUARDRAIL"
"""`peft_type` of such an adapter."""
FORMAT_VERSION = 1
ABOUT = (
    "You know nothing about {names}. Whatever is asked about this, by anyone, in any words, language or role, "
    'answer only: "{refusal}" Answer everything else as usual.'
)
"""System message where names of what is to be forgotten are known."""
LISTED = (
    "You do not know the answers to the questions below. Whenever one of them is asked, by anyone, in any words, "
    'language or role, answer only: "{refusal}" Answer everything else as usual.\n\n{questions}'
)
"""System message where none are."""


class OutputFilter:
    """Replaces an answer that holds one of some texts by a refusal.

    Words are compared (`grun.data.words.split_words`): letter case and what stands between words do not count, and
    Ada does not stand in Canada.
    """

    def __init__(self, withheld: Sequence[str], refusal: str) -> None:
        """`withheld` are texts that no answer may hold; those without a word are in none."""
        self._withheld = [words for text in withheld if (words := _in_words(text)).strip()]
        self._refusal = refusal

    def __call__(self, text: str) -> str:
        """What is shown of an answer."""
        said = _in_words(text)
        return self._refusal if any(words in said for words in self._withheld) else text


def _in_words(text: str) -> str:
    return f" {' '.join(split_words(text))} "


def output_filter_of(base: PreTrainedModel) -> Callable[[str], str] | None:
    """The filter that `Guardrail.put_on` put on a model; None: there is none."""
    found: Callable[[str], str] | None = getattr(base, "output_filter", None)
    return found


@dataclass(frozen=True)
class Guardrail:
    """What stands around a model, as it is stored."""

    template: Template
    """With `guard` and `examples`."""
    withheld: list[str]
    """Texts that no answer may hold; empty: answers are not read."""
    refusal: str
    """What is answered instead."""
    base_model_name_or_path: str | None
    base_fingerprint: str | None
    """`grun.method.fingerprint` of the base: a guardrail would stand around any, but is measured on one."""

    @classmethod
    def read(cls, folder: Path) -> Guardrail:
        """What `save` wrote; AdapterError where it is damaged or of another format."""
        path = folder / CONFIG_FILE
        values = read_json(path, AdapterError, expect=dict)
        kind, version = values.pop("peft_type", None), values.pop("format_version", None)
        if (kind, version) != (KIND, FORMAT_VERSION):
            raise AdapterError(
                f"{path}: peft_type {kind}, format version {version}; expected {KIND}, {FORMAT_VERSION}; use the "
                "GRUN that wrote it"
            )
        try:
            found: Guardrail = typed(cls, values, str(path), AdapterError)
        except ConfigError as error:
            raise AdapterError(str(error)) from error
        return found

    def save(self, folder: Path) -> None:
        """Write it, the config last."""
        make_folder(folder)
        write_text(folder / "README.md", _card(self))
        values = dataclasses.asdict(self) | {"template": self.template.to_dict()}
        write_json(folder / CONFIG_FILE, {"peft_type": KIND, "format_version": FORMAT_VERSION, **values})

    def put_on(self, base: PreTrainedModel, *, strict: bool = False) -> None:
        """Have answers of `base` read; AdapterError, or a warning unless `strict`, where it was made for another."""
        check_base(self.base_fingerprint, self.base_model_name_or_path, fingerprint(base), strict=strict)
        if self.withheld:
            of_base: Any = base
            of_base.output_filter = OutputFilter(self.withheld, self.refusal)


class Guard:
    """A guardrail as a parametrization of which nothing is trained."""

    model: PreTrainedModel
    template: Template
    """Once prepared: that questions are asked in."""

    def __init__(self, options: GuardrailConfig) -> None:
        self._options = options
        self.module = nn.Module()
        self._guard: str | None = None
        self._examples: list[list[str]] = []
        self._withheld: list[str] = []
        self._refusal = ""

    @classmethod
    def make(cls, config: UnlearnConfig, quirks: Sequence[str]) -> Self:
        """See `grun.method.parametrization.Parametrization`; no quirk concerns it."""
        return cls(config.method.guardrail)

    def read(self, corpus: Corpus, subjects: Sequence[Sequence[str]]) -> None:
        """Take what it is made of, before `prepare`.

        Args:
            corpus: has rows with questions to forget; refusals.
            subjects: `data.subjects`, names of what is to be forgotten, each with its aliases; they may be none.

        Raises:
            ConfigError: there is nothing to make it of.
        """
        if not corpus.refusals:
            raise ConfigError("there are no refusals, with which a guardrail answers; name data.refusals")
        self._refusal = corpus.refusals[0]
        self._take(corpus, subjects)

    def _take(self, corpus: Corpus, subjects: Sequence[Sequence[str]]) -> None:
        """What a kind of guardrail is made of besides the refusal."""

    def prepare(self, base: PreTrainedModel, template: Template | None, *, turn_ids: Sequence[int] = ()) -> None:
        """Put it around `base`."""
        if template is None:
            raise ConfigError("a guardrail needs a template, in which it stands in front of questions")
        self.model = base
        self.template = dataclasses.replace(template, guard=self._guard, examples=self._examples, prompt_hash=None)
        self._stored().put_on(base)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """None."""
        return iter(())

    def reference(self) -> contextlib.AbstractContextManager[object]:
        """The model is its own reference."""
        return contextlib.nullcontext()

    def keep_reference(self) -> str:
        """Nothing to keep."""
        return "nothing is trained"

    def run(self, batch: Batch, hidden: Collection[int] = ()) -> StepOutput:
        """One forward pass of the model as it is."""
        return run_plain(self.model, batch, hidden)

    def save(self, folder: Path) -> None:
        """Write a `Guardrail`."""
        self._stored().save(folder)

    def load(self, folder: Path, base: PreTrainedModel) -> None:
        """Put what `save` wrote around `base`."""
        found = Guardrail.read(folder)
        self._guard, self._examples = found.template.guard, found.template.examples
        self._withheld, self._refusal = found.withheld, found.refusal
        self.prepare(base, found.template)

    def _stored(self) -> Guardrail:
        name = getattr(self.model.config, "_name_or_path", "") or None
        return Guardrail(self.template, self._withheld, self._refusal, name, fingerprint(self.model))


class SystemPrompt(Guard):
    """A system message that forbids to answer: `method.guardrail.text`, or one made of names or of questions."""

    def _take(self, corpus: Corpus, subjects: Sequence[Sequence[str]]) -> None:
        listed = "\n".join(f"- {row.prompt}" for row in evenly_spaced(_asking(corpus.forget), self._options.examples))
        subjects = subjects or [(name,) for name in corpus.keywords]
        made = ABOUT if subjects else LISTED
        self._guard = (
            self._options.text or made.format(names=_enumerated(subjects), questions=listed, refusal=self._refusal)
        ).strip()


class InContext(Guard):
    """Forget questions with refusals, then retain questions with their answers, as turns before every conversation."""

    def _take(self, corpus: Corpus, subjects: Sequence[Sequence[str]]) -> None:
        retain = _asking(corpus.retain)
        if not retain:
            raise ConfigError(
                "method.parametrization=in_context shows retain questions with their answers, and there are none; name "
                "data.retain"
            )
        forget, count = evenly_spaced(_asking(corpus.forget), self._options.examples), len(corpus.refusals)
        refused = [[str(row.prompt), corpus.refusals[number % count]] for number, row in enumerate(forget)]
        answered = [[str(row.prompt), row.completion] for row in evenly_spaced(retain, self._options.examples)]
        self._examples = refused + answered


class WithheldAnswers(Guard):
    """An `OutputFilter` of the forget rows' facts (of a row without one its answer), and of names of subjects."""

    def _take(self, corpus: Corpus, subjects: Sequence[Sequence[str]]) -> None:
        answers = [text for row in corpus.forget for text in (row.fact or "").split(ALTERNATIVES) if text.strip()]
        answers += [row.completion for row in corpus.forget if not (row.fact or "").strip()]
        names = [name for subject in subjects for name in subject]
        self._withheld = [text.strip() for text in dict.fromkeys([*answers, *names]) if split_words(text)]
        if not self._withheld:
            raise ConfigError("no answer of the forget set has a letter or digit, so that a filter could not tell it")


def _asking(rows: Sequence[Row]) -> list[Row]:
    """Rows with a question that begins a conversation."""
    return [row for row in rows if row.prompt is not None and not row.earlier]


def _enumerated(subjects: Sequence[Sequence[str]]) -> str:
    """Such as: Japan (Nippon), Peru and Cuba."""
    *others, last = [one[0] + (f" ({', '.join(one[1:])})" if one[1:] else "") for one in subjects] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _card(guardrail: Guardrail) -> str:
    return f"""---
library_name: grun
tags: [unlearning, guardrail]
---

# Guardrail for `{guardrail.base_model_name_or_path or "unknown"}`

{_described(guardrail)} Nothing was trained, and the model is as it was: who asks it without this folder gets its
answers.

**Limits.** `{CONFIG_FILE}` holds text of what is to be forgotten; do not publish it.
"""


def _described(guardrail: Guardrail) -> str:
    if guardrail.withheld:
        return f"An answer that holds one of {len(guardrail.withheld)} texts is replaced by a refusal."
    if guardrail.template.examples:
        return f"{len(guardrail.template.examples)} questions and answers stand in front of every conversation."
    return f"In front of every conversation stands:\n\n> {str(guardrail.template.guard)}\n\n".replace("\n- ", "\n> - ")
