"""What a gate is fitted on: prompts of forget and retain rows, of the benchmark, of files, and about named subjects."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

from grun.config.options import DataConfig
from grun.data.augmentation import PromptVariation
from grun.data.chat import System, Turn
from grun.data.corpus import Corpus
from grun.data.encoding import EncodedRow
from grun.data.everyday import everyday_prompts, names_of, prompts_about, wordings_of
from grun.data.jsonl import load_prompts
from grun.data.rows import ALTERNATIVES, Row
from grun.data.subject import Swap, is_other, mentions
from grun.errors import ConfigError, DataError
from grun.runtime.files import content_hash
from grun.training.gate_fit import Prompts
from grun.training.unlearning import UnlearnRows

log = logging.getLogger(__name__)

PER_NAME = 6
"""One in so many ways to ask is asked about each other name, of each name other ones."""
SWAPS = 4
"""Other names that take the subject's place in each forget row."""

COPIED = {"forget": (1, 3), "retain": (3, 5)}
"""By side, one in so many questions of rows, and one in so many prompts without answers, has a copy of a kind."""

BENCHMARK = "benchmark"
"""Source of prompts that `Corpus` brings."""

Belonging = tuple[Row, str]
"""A prompt, and what it belongs to."""


@dataclass
class GatePrompts:
    """Prompts without answers, by where they are from."""

    forget: dict[str, list[Belonging]] = field(default_factory=dict)
    """On what is to be forgotten."""
    retain: dict[str, list[Belonging]] = field(default_factory=dict)
    """On what is to stay."""
    always: list[Row] = field(default_factory=list)
    """On anything else, which is to stay too, and of which nothing follows for a user's rows."""

    @property
    def shut(self) -> list[Row]:
        """All that is to stay."""
        return [row for source in self.retain.values() for row, _ in source] + self.always

    def counts(self, rows: UnlearnRows) -> Iterator[tuple[str, str, int]]:
        """Side, source and number of the prompts of each source, `rows` and their copies first."""
        for side, own, sources in (("forget", rows.answers, self.forget), ("retain", rows.retain, self.retain)):
            yield side, "rows", len(own)
            for source, prompts in sources.items():
                yield side, source, len(prompts)

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of what files and subjects give; the benchmark's own are the corpus'."""
        found = {}
        for name, side in (("gate_prompts", self.forget), ("gate_negatives", self.retain)):
            asked = [[row.to_dict(), of] for key, some in side.items() if key != BENCHMARK for row, of in some]
            if asked:
                found[name] = content_hash(asked)
        return found


def collect(corpus: Corpus, data: DataConfig) -> GatePrompts:
    """Prompts that the benchmark brings, that `data.gate_prompts` and `gate_negatives` hold and that subjects make.

    Raises:
        ConfigError: subjects without a name, or two that share one.
        DataError: a file is missing, empty or malformed.
    """
    found = GatePrompts()
    _add(found.forget, BENCHMARK, _units(corpus.forget_prompts, None))
    _add(found.retain, BENCHMARK, _units(corpus.retain_prompts, data.group))
    _add(found.forget, "files", _units(_read(data.gate_prompts, data), None))
    _add(found.retain, "files", _units(_read(data.gate_negatives, data), data.group))
    if subjects := read_subjects(data.subjects):
        asked = wordings_of(data.subject_kind)
        others = other_names(data.subject_kind, subjects, asked_apart(corpus))
        _add(found.forget, "subjects", [(row, str(row.prompt)) for row in _about(subjects, asked)])
        _add(found.retain, "subjects", [*_about_others(others, asked)])
        _add(found.retain, "swapped", [*swapped(corpus.forget, subjects, others)])
    if "files" in {*found.forget, *found.retain} or subjects:
        found.always = [Row(prompt, "") for prompt in everyday_prompts()["other"]]
    return found


def check_given(data: DataConfig) -> None:
    """The errors of `collect`, before a model is loaded."""
    read_subjects(data.subjects)
    for name in (data.gate_prompts, data.gate_negatives):
        _read(name, data)


def sides(
    rows: UnlearnRows, prompts: GatePrompts, encode: Callable[[Row], EncodedRow | None]
) -> tuple[Prompts, Prompts]:
    """Both sides of a fit: rows, with their copies, and prompts.

    Args:
        rows: encoded, with their units.
        prompts: of `collect`.
        encode: of a prompt; None for one that is too long.
    """
    found = []
    for own, units, side, always in (
        (rows.answers, rows.forget_units, prompts.forget, ()),
        (rows.retain, rows.retain_units, prompts.retain, prompts.always),
    ):
        belonging = [(encode(row), unit) for source in side.values() for row, unit in source]
        more = [(row, unit) for row, unit in belonging if row is not None]
        fixed = [row for one in always if (row := encode(one)) is not None]
        found.append(Prompts([*own, *(row for row, _ in more)], [*units, *(unit for _, unit in more)], fixed))
        if left := len(belonging) - len(more):
            log.warning("%d prompts of the gate are longer than a row may be, and are left out", left)
    return found[0], found[1]


def copies(
    corpus: Corpus, rows: UnlearnRows, prompts: GatePrompts, vary: PromptVariation, kinds: Sequence[str]
) -> tuple[Prompts, Prompts]:
    """Copies of both sides in each of `kinds`, each belonging to what its original does.

    Every question of a forget row is asked in each, of other prompts as many as `COPIED` says.
    """
    found = []
    for own, units, side, always in (
        (corpus.forget, rows.forget_units, prompts.forget, ()),
        (corpus.retain, rows.retain_units, prompts.retain, prompts.always),
    ):
        every, every_prompt = COPIED["retain" if own is corpus.retain else "forget"]
        more = [belonging for source in side.values() for belonging in source]
        made, of = vary.of_prompts([*zip(own, units, strict=False)], kinds, every)
        further, further_of = vary.of_prompts(more, kinds, every_prompt)
        fixed, _ = vary.of_prompts([(row, "") for row in always], kinds, every_prompt)
        found.append(Prompts([*made, *further], [*of, *further_of], fixed))
    return found[0], found[1]


def read_subjects(given: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of each subject, its aliases behind it; ConfigError for an empty one, and for a name that two share."""
    subjects = [tuple(dict.fromkeys(name.strip() for name in one.split(ALTERNATIVES.strip()))) for one in given]
    owner: dict[str, str] = {}
    for one, names in zip(given, subjects, strict=True):
        if not all(re.search(r"\w", name) for name in names):
            raise ConfigError(f'data.subjects: {one!r} holds an empty name; write "NAME" or "NAME | ALIAS | ALIAS"')
        for name in names:
            if owner.setdefault(name.casefold(), one) != one:
                raise ConfigError(
                    f"data.subjects: {name!r} is in {owner[name.casefold()]!r} and in {one!r}; a name is of one subject"
                )
    if len({*given}) < len(given):
        raise ConfigError("data.subjects names a subject twice; leave one of them out")
    return subjects


def other_names(kind: str, subjects: Iterable[Sequence[str]], apart: str) -> list[tuple[str, ...]]:
    """Packaged names of a kind, which are none of the subjects', nor part of one, nor hold one.

    Neither are those that go with a subject's, as Tokyo with Japan, and those that stand in `apart`, texts.
    """
    called = [name for subject in subjects for name in subject]
    given, packaged = {name.casefold() for name in called}, names_of(kind)
    called += [name for names in packaged if given & {name.casefold() for name in names} for name in names]
    kept = []
    for names in packaged:
        fine = tuple(name for name in names if all(is_other(name, subject) for subject in called))
        if fine[:1] == names[:1] and not mentions(apart, fine):
            kept.append(fine)
    return kept


def asked_apart(corpus: Corpus) -> str:
    """Questions of the forget set, which other names in them belong to, and of every set that is in no training."""
    sets = (corpus.forget, corpus.heldout, corpus.validation, corpus.unknown, *corpus.general.values())
    return "\n".join(row.prompt for rows in sets for row in rows if row.prompt)


def swapped(
    rows: Sequence[Row], subjects: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> Iterator[Belonging]:
    """Questions of forget rows with other names in place of the subjects', each belonging to the other name.

    An alias gives way to the other's alias of the same place: others with as many names are taken, where there are any.
    """
    most = max(map(len, subjects))
    others = [names for names in others if len(names) >= most] or others
    swap = Swap(subjects)
    asking = [row for row in rows if row.prompt is not None]
    for subject in subjects:
        if not any(mentions(str(row.prompt), subject) for row in asking):
            log.warning("data.subjects: no question of the forget set names %s; nothing is swapped there", subject[0])
    for number, row in enumerate(row for row in asking if swap.concerns(str(row.prompt))):
        for shift in range(min(SWAPS, len(others))):
            other = others[(number * SWAPS + shift) % len(others)]
            yield Row(swap(str(row.prompt), other), "", earlier=earlier_about(row, swap, other)), other[0]


def earlier_about(row: Row, swap: Swap, other: Sequence[str]) -> tuple[System | Turn, ...]:
    """What came before in the row's conversation, about another."""
    return tuple(type(one)(*(swap(text, other) for text in one)) for one in row.earlier)


def _about(subjects: Iterable[Sequence[str]], wordings: Sequence[str]) -> Iterator[Row]:
    for subject in subjects:
        yield from prompts_about(subject, wordings)


def _about_others(others: Sequence[Sequence[str]], wordings: Sequence[str]) -> Iterator[Belonging]:
    for names in others:
        # Which ones depends on the name alone: what a gate reads of them is then found again at the next request.
        for row in prompts_about(names, wordings, every=PER_NAME, start=crc32(names[0].encode())):
            yield row, names[0]


def _read(name: str | None, data: DataConfig) -> list[Row]:
    rows = [] if name is None else load_prompts(name, data.path, data.columns)
    if any(row.prompt is None for row in rows):
        raise DataError(f"{name} holds plain texts, which ask nothing; give prompts")
    return [replace(row, completion="") for row in rows]


def _units(rows: Sequence[Row], group: str | None) -> list[Belonging]:
    """Each by itself, or with those of the same value of `group`."""
    return [(row, str(row.extra.get(group or "", row.prompt))) for row in rows]


def _add(side: dict[str, list[Belonging]], source: str, prompts: list[Belonging]) -> None:
    if prompts:
        side[source] = prompts
