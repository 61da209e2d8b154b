"""Forget rows asked about others: whom they name, who takes the place, and what the untouched model is asked then."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch

from grun.config.options import DataConfig
from grun.data import templates
from grun.data.augmentation import PromptVariation, Way
from grun.data.corpus import Corpus, Subject, subject_named_by
from grun.data.encoding import EncodedRow
from grun.data.rows import Row
from grun.data.subject import Swap, mentions
from grun.errors import ConfigError
from grun.training.gate_prompts import asked_apart, earlier_about, other_names, read_subjects
from grun.training.teacher import Counterfactual, matched

log = logging.getLogger(__name__)

ANY_NAME = "Complete the following name."
"""What is asked where a row asks for the name itself: a name, of nobody in particular."""


def subjects_of(corpus: Corpus, data: DataConfig) -> list[Subject]:
    """Whom or what each forget row is about: as `data.subjects` say, the benchmark, or rows of one `data.group`.

    Of a group it is the name that most of its rows hold. Rows that name nobody have a subject without names.

    Raises:
        ConfigError: no row names a subject.
    """
    texts = [f"{row.prompt} {row.completion}" for row in corpus.forget]
    if given := read_subjects(data.subjects):
        swaps = [(names, Swap([names])) for names in given]
        named = [next((names for names, swap in swaps if swap.concerns(text)), ()) for text in texts]
        found = [Subject(names, data.subject_kind) for names in named]
    elif corpus.subjects is not None:
        found = corpus.subjects
    else:
        groups: dict[str, list[str]] = {}
        values = [str(row.extra.get(data.group or "", "")) for row in corpus.forget]
        for value, text in zip(values, texts, strict=True):
            groups.setdefault(value, []).append(text)
        names_of = {value: subject_named_by(some, data.subject_kind) for value, some in groups.items() if value}
        found = [names_of.get(value, Subject((), data.subject_kind)) for value in values]
    if not any(one.names for one in found):
        raise ConfigError(
            "the objective asks what the model says of others, and no forget row names whom it is about; set "
            "data.subjects=[NAME], or data.group, a field of the rows that is the same for all rows on one of them"
        )
    return found


def encode_counterfactuals(
    corpus: Corpus, tokenizer: Any, template: templates.Template, max_length: int, data: DataConfig, *, seed: int
) -> dict[EncodedRow, Counterfactual]:
    """How each forget row, and each copy of it, is asked about `data.counterfactuals` others.

    The others of a subject are the same for all its rows, and drawn by `seed`. Rows that name nobody are left out.
    """
    vary = PromptVariation(data.augment, tokenizer, template, max_length, corpus.retain, seed)
    any_name = tuple(templates.encode_prompt(template, tokenizer, ANY_NAME))
    subjects = subjects_of(corpus, data)
    others = {one: _others(corpus, data, one, subjects, seed) for one in dict.fromkeys(subjects) if one.names}
    drafts: list[_Draft] = []
    unnamed = 0
    for number, (row, subject) in enumerate(zip(corpus.forget, subjects, strict=True)):
        swap = Swap([subject.names or (ANY_NAME,)])
        if not swap.concerns(f"{row.prompt} {row.completion}"):
            unnamed += 1
            continue
        by_name = any(map(swap.concerns, (str(row.prompt), *(text for turn in row.earlier for text in turn))))
        about = [_about(row, subject, swap, other) for other in others[subject]]
        for way in (Way("plain"), *vary.ways("forget", number, data.augment.forget_copies)):
            copy = _asked(vary, row, way, max_length)
            # What an answer begins with may be given to a copy: whole answers are compared.
            whole = Way("plain") if way.kind == "prefill" else way
            own = _asked(vary, row, whole, max_length)
            theirs = [found for one in about if (found := _asked(vary, one, whole, max_length)) is not None]
            if copy is not None and own is not None and theirs:
                drafts.append(_draft(copy, own, theirs, subject, None if by_name else any_name))
    if unnamed:
        log.warning("%d forget rows name no subject: their teacher is the model as it is", unnamed)
    names: dict[Subject, dict[int, list[int]]] = {}
    for draft in drafts:
        for token, *others_first in zip(draft.own.answer_ids, *draft.first, strict=True):
            if min(others_first) >= 0:
                names.setdefault(draft.subject, {}).setdefault(token, others_first)
    return {draft.own: draft.finished(names.get(draft.subject, {})) for draft in drafts}


class _Draft(NamedTuple):
    """A forget row, and what of its `Counterfactual` follows from itself."""

    own: EncodedRow
    rows: tuple[EncodedRow, ...]
    places: list[list[int]]
    first: list[list[int]]
    subject: Subject
    by_name: bool

    def finished(self, names: Mapping[int, list[int]]) -> Counterfactual:
        """`names`: the others' first tokens, by that of the subject, as its rows write them."""
        pairs = [[own, *theirs] for own, theirs in names.items() if self.by_name and len(theirs) == len(self.places)]
        written = torch.tensor(pairs, dtype=torch.long).reshape(-1, 1 + len(self.places))
        return Counterfactual(self.rows, torch.tensor(self.places), torch.tensor(self.first), written)


def _draft(
    copy: EncodedRow,
    own: EncodedRow,
    others: Sequence[EncodedRow],
    subject: Subject,
    any_name: tuple[int, ...] | None,
) -> _Draft:
    """Match a row with what is asked about each other.

    Args:
        copy: what is taught: the row, or its prompt with the first answer tokens, and the rest of the answer.
        own: the row with its whole answer.
        others: the same about others.
        subject: of the row.
        any_name: a prompt for a name, where the row does not ask by name, so that the answer's first is what is asked.
    """
    offsets: dict[EncodedRow, int] = {}

    def offset(row: EncodedRow) -> int:
        return offsets.setdefault(row, sum(len(one.answer_ids) for one in offsets))

    all_places, all_first = [], []
    given = len(own.answer_ids) - len(copy.answer_ids)
    for other in others:
        found, stretches = matched(own.answer_ids, other.answer_ids)
        start = offset(other)
        places = [place if place < 0 else start + place for place in found]
        first = [-1] * len(places)
        for number, (begin, end) in enumerate(stretches):
            if number == 0 and any_name is not None:
                bare = offset(EncodedRow(any_name, own.answer_ids[begin:end]))
                places[begin:end] = range(bare, bare + end - begin)
            elif found[begin] >= 0:
                first[begin] = other.answer_ids[found[begin]]
        all_places.append(places[given:])
        all_first.append(first[given:])
    return _Draft(copy, tuple(offsets), all_places, all_first, subject, any_name is None)


def _others(
    corpus: Corpus, data: DataConfig, subject: Subject, subjects: Sequence[Subject], seed: int
) -> list[tuple[str, ...]]:
    """Who takes the subject's place: those with as many names, where there are any."""
    found = other_names(subject.kind, [one.names for one in {*subjects}], asked_apart(corpus))
    found = [names for names in found if len(names) >= len(subject.names)] or found
    if not found:
        raise ConfigError(
            f"every packaged name of the kind {subject.kind} stands in questions, so that none can take the place of "
            f"{subject.names[0]!r}; set data.subject_kind=any"
        )
    return Random(f"{seed}/others/{subject.names[0]}").sample(found, min(data.counterfactuals, len(found)))


def _about(row: Row, subject: Subject, swap: Swap, other: Sequence[str]) -> Row:
    """The row about another; what goes with the subject's name, as a capital, is no name in the answer."""
    name = subject.names[0]
    answered = Swap([[one if mentions(name, [one]) else name for one in subject.names]])
    earlier = earlier_about(row, swap, other)
    return Row(swap(str(row.prompt), other), answered(row.completion, other), row.extra, earlier)


def _asked(vary: PromptVariation, row: Row, way: Way, max_length: int) -> EncodedRow | None:
    """The row in tokens, cut as rows of unlearning are; None for what unlearning leaves out, too."""
    found = vary.ask(row, way)
    if found is None or (len(found) > max_length and way.kind != "plain") or len(found.prompt_ids) >= max_length:
        return None
    return EncodedRow(found.prompt_ids, found.answer_ids[: max_length - len(found.prompt_ids)])
