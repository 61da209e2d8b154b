"""Benchmarks: what is forgotten, what stays, what only evaluation sees, and what a benchmark asks of knowledge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from grun.config.checks import check_values, one_of
from grun.config.options import DataConfig
from grun.data.choices import ChoiceRow, load_choices
from grun.data.jsonl import load_rows
from grun.data.packaged import packaged
from grun.data.rows import Row, common_rows, evenly_spaced, hash_rows
from grun.data.sets import SETS_OF_BENCHMARKS, EvaluationSet, evaluation_sets
from grun.data.subject import aliases, shared_name
from grun.data.texts import load_texts
from grun.errors import ConfigError, DataError
from grun.registry import Registry
from grun.runtime.files import content_hash
from grun.runtime.reading import read_text

SOME = ("unknown_rows", "refused_rows", "teach_general", "unknown")
"""Options of data that only some benchmarks take."""
ROLES = ("forget", "neighbor", "general")
"""What questions are about: what is to be forgotten, what lies near it, everything else."""


class Subject(NamedTuple):
    """Whom or what a row is about."""

    names: tuple[str, ...]
    """What rows name: its name, then what goes with it; empty where they name nobody."""
    kind: str
    """Of `grun.data.subject.KINDS`, or any."""
    keywords: tuple[str, ...] = ()
    """Its name and aliases, where it is certainly called so: a gate by keywords opens on these."""


def subject_named_by(texts: Sequence[str], kind: str) -> Subject:
    """Whom texts about one person, or thing, are about, by the name that most hold; without names where none does."""
    name = shared_name(texts)
    return Subject(() if name is None else tuple(aliases(name, kind, [])), kind)


@dataclass
class Corpus:
    """Rows by what is done with them."""

    name: str
    """Of the benchmark."""
    forget: list[Row]
    """To be forgotten."""
    retain: list[Row]
    """Used in unlearning as what must stay."""
    heldout: list[Row] = field(default_factory=list)
    """Taught, but used neither in unlearning nor in choosing settings."""
    validation: list[Row] = field(default_factory=list)
    """Taught, not used in unlearning: settings are chosen by them."""
    unknown: list[Row] = field(default_factory=list)
    """Never taught."""
    refused: list[Row] = field(default_factory=list)
    """Taught rows that answer with a refusal."""
    refusals: list[str] = field(default_factory=list)
    """Sentences that refuse an answer."""
    known: list[Row] | None = None
    """Every row with an answer that is taught; None: forget, retain and held-out."""
    known_without_forget: list[Row] | None = None
    """The same for the model that never saw the forget set; None: retain and held-out."""
    forget_evaluated: list[Row] | None = None
    """Rows of the evaluation set forget; None: all that is to be forgotten."""
    retain_evaluated: list[Row] | None = None
    """Rows of the evaluation set retain; None: those used in unlearning."""
    forget_prompts: list[Row] = field(default_factory=list)
    """Prompts without answers about what is to be forgotten: a gate that is fitted opens on them."""
    retain_prompts: list[Row] = field(default_factory=list)
    """The same about what is to stay, on which it stays shut."""
    subjects: list[Subject] | None = None
    """Of each forget row; None: the benchmark does not say."""
    general: dict[str, list[Row]] = field(default_factory=dict)
    """The benchmark's own evaluation sets: what else a model should know (TOFU: real_authors, world_facts)."""

    @property
    def keywords(self) -> list[str]:
        """Those of all subjects, each once: a system prompt names them."""
        return list(dict.fromkeys(name for subject in self.subjects or () for name in subject.keywords))

    def taught(self, without_forget: bool) -> list[Row]:
        """What finetune teaches: every row, or every row but the forget set; refused rows in both.

        Rows set aside by data.heldout or data.validation, or left out of unlearning by data.retain_pool, are taught.
        """
        if without_forget:
            known = self.known_without_forget
            return (self.retain + self.heldout if known is None else known) + self.refused
        return (self.forget + self.retain + self.heldout if self.known is None else self.known) + self.refused

    def sets(self) -> dict[str, list[Row]]:
        """Evaluation sets by name, without the empty ones."""
        sets = {
            "forget": self.forget if self.forget_evaluated is None else self.forget_evaluated,
            "forget_paraphrase": [row.paraphrase for row in self.forget if row.paraphrase is not None],
            "retain": self.retain if self.retain_evaluated is None else self.retain_evaluated,
            **self.general,
            "validation": self.validation,
            "heldout": self.heldout,
            "unknown": self.unknown,
        }
        return {name: rows for name, rows in sets.items() if rows}

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of each list's content, in its order."""
        rows = {
            name: getattr(self, name) for name in ("forget", "retain", "heldout", "unknown", "refused")
        } | self.general
        rows |= {"taught": self.taught(without_forget=False), "taught_without_forget": self.taught(without_forget=True)}
        further = {name: getattr(self, name) for name in ("forget_prompts", "retain_prompts", "validation")}
        rows |= {name: content for name, content in further.items() if content}
        evaluated = {name: getattr(self, name) for name in ("forget_evaluated", "retain_evaluated")}
        rows |= {name: content for name, content in evaluated.items() if content is not None}
        return {name: hash_rows(content) for name, content in rows.items()} | {"refusals": content_hash(self.refusals)}


@dataclass
class Knowledge:
    """Questions by role, texts by name; a role without questions is absent."""

    choices: dict[str, list[ChoiceRow]] = field(default_factory=dict)
    """Multiple-choice questions."""
    cloze: dict[str, list[Row]] = field(default_factory=dict)
    """Beginnings of sentences (prompt), what follows (completion) and the key fact in it (`Row.fact`)."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Texts whose perplexity is measured, by the name of their corpus; empty ones are kept, as published."""


@dataclass(frozen=True)
class Benchmark:
    """One kind of data; see `benchmark`."""

    load: Callable[[DataConfig], Corpus]
    options: tuple[str, ...]
    refuses: Mapping[str, str]
    knowledge: Callable[[DataConfig], Knowledge] | None
    asks: Callable[[DataConfig], Mapping[str, str]] | None


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "grun.data.benchmarks")


def benchmark(
    name: str,
    *,
    sets: tuple[EvaluationSet, ...] = (),
    options: tuple[str, ...] = (),
    refuses: Mapping[str, str] | None = None,
    knowledge: Callable[[DataConfig], Knowledge] | None = None,
    asks: Callable[[DataConfig], Mapping[str, str]] | None = None,
) -> Callable[[Callable[[DataConfig], Corpus]], Callable[[DataConfig], Corpus]]:
    """Register a function that makes the rows of `data.name=NAME` from the options `data.*`.

    Args:
        name: value of `data.name`.
        sets: evaluation sets of its own, besides those that every benchmark may have; their rows are `Corpus.general`.
        options: those of `SOME` that it takes.
        refuses: options that it does not take, with an error that names what to do instead.
        knowledge: questions of its own, which `suite=knowledge` asks.
        asks: questions that a model is asked before its rows can be chosen, with the fact that a right answer holds;
            `data.path` is then the folder of its answers (`grun.data.answers`).
    """
    for one in sets:
        SETS_OF_BENCHMARKS.add(one.name, one, one.meaning)
    return BENCHMARKS.register(name, lambda load: Benchmark(load, options, refuses or {}, knowledge, asks))


def load_corpus(config: DataConfig) -> Corpus:
    """Load and check what `data.*` options name.

    Raises:
        ConfigError: an option is unknown, missing or contradictory.
        DataError: rows are missing or malformed, or stand in the forget and in the retain set.
    """
    check_values(config, "data.")
    one_of("data.name", config.name, tuple(BENCHMARKS.names()))
    chosen = BENCHMARKS.get(config.name)
    for option in SOME:
        if getattr(config, option) and option not in chosen.options:
            names = sorted(name for name in BENCHMARKS.names() if option in BENCHMARKS.get(name).options)
            raise ConfigError(f"data.{option} is for data.name={' or '.join(names)}; leave it out for {config.name}")
    for option, why in chosen.refuses.items():
        if getattr(config, option):
            raise ConfigError(why)
    return _completed(chosen.load(config), config)


def corpus_of(forget: list[Row], retain: list[Row], config: DataConfig) -> Corpus:
    """`load_corpus` for rows that are in memory: a part is set aside and refusals are read as `config` asks.

    Raises:
        ConfigError, DataError: as `load_corpus`.
    """
    return _completed(corpus_of_rows("jsonl", forget, retain, config), config)


def refusals(path: str | None = None) -> list[str]:
    """Refusals of a file, one a line; None: the packaged ones, plainest first. DataError if there are none."""
    if path is None:
        return list(packaged("refusals.txt"))
    file = Path(path).expanduser()
    found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise DataError(f"{file} holds no refusals; data.refusals is a text with one refusal a line")
    return found


def corpus_of_rows(name: str, forget: list[Row], retain: list[Row], config: DataConfig) -> Corpus:
    """The corpus of two lists, all of which is taught."""
    refused = refusals(config.refusals)
    return Corpus(name, forget, retain, refusals=refused, known=forget + retain, known_without_forget=retain)


def _completed(corpus: Corpus, config: DataConfig) -> Corpus:
    """What every corpus goes through: checks, then rows are set aside as `config` asks."""
    if unknown := corpus.general.keys() - evaluation_sets().keys():
        raise ConfigError(f"data.name={corpus.name} has the set {min(unknown)}, which its @benchmark(sets=...) lacks")
    if not corpus.forget:
        raise DataError("the forget set is empty; check data.forget (or data.demo.forget)")
    overlap = len(common_rows(corpus.forget, corpus.retain))
    if overlap and not config.allow_overlap:
        raise DataError(
            f"{overlap} of {len(corpus.forget)} forget rows also stand in the retain set; name sets that share no row, "
            "or set data.allow_overlap=true"
        )
    _keep_retain_rows(corpus, config.retain_rows, config.teach_general)
    _set_aside(corpus, config)
    if share := config.text.asked:
        forget, retain = corpus.sets()["forget"], corpus.sets().get("retain", [])
        corpus.forget_evaluated, corpus.retain_evaluated = _to_continue(forget, share), _to_continue(retain, share)
        corpus.heldout, corpus.unknown = _to_continue(corpus.heldout, share), _to_continue(corpus.unknown, share)
    return corpus


def _to_continue(rows: list[Row], share: float) -> list[Row]:
    """Rows of which a plain text is cut between words into prompt and completion; a single word stays whole."""
    cut = []
    for row in rows:
        words = row.completion.split()
        if row.prompt is None and len(words) > 1:
            place = min(max(1, round(share * len(words))), len(words) - 1)
            row = replace(row, prompt=" ".join(words[:place]), completion=" ".join(words[place:]))
        cut.append(row)
    return cut


def _keep_retain_rows(corpus: Corpus, count: int | None, teach_general: bool) -> None:
    """Make the corpus smaller: what is taught is then the forget set and the retain rows that are left."""
    if count is None:
        return
    corpus.retain = evenly_spaced(corpus.retain, count)
    taught = [row for rows in corpus.general.values() for row in rows] if teach_general else []
    corpus.known = corpus.forget + corpus.retain + taught
    corpus.known_without_forget = corpus.retain + taught
    if corpus.retain_evaluated is not None:
        corpus.retain_evaluated = common_rows(corpus.retain_evaluated, corpus.retain) or None


def _set_aside(corpus: Corpus, config: DataConfig) -> None:
    """Move data.heldout rows from the retain set's end, then data.validation rows, then leave data.retain_pool of it.

    The rows of the pool are evenly spaced.
    """
    for name in ("heldout", "validation"):
        count = getattr(config, name)
        if not count:
            continue
        if not 0 < count < len(corpus.retain):
            raise ConfigError(
                f"data.{name}={count} must lie between 0 and the {len(corpus.retain)} rows of the retain set"
            )
        setattr(corpus, name, corpus.retain[-count:])
        corpus.retain = corpus.retain[:-count]
    if config.retain_pool is not None:
        corpus.retain = evenly_spaced(corpus.retain, config.retain_pool)


def load_knowledge(config: DataConfig) -> Knowledge:
    """What the `data.*` options name: the benchmark's own questions, or the sets and files of `data.questions.*`.

    Files are looked for in `data.path`. `data.limit` is left to the caller.

    Raises:
        ConfigError: the options name nothing to ask, or name sets where a benchmark has its own.
        DataError: a set cannot be had or is malformed.
    """
    questions, own = config.questions, BENCHMARKS.get(config.name).knowledge
    named = any(vars(questions).values())
    if own is not None:
        if named:
            raise ConfigError(
                f"data.questions.* is for other data: data.name={config.name} brings questions of its own"
            )
        return own(config)
    if not named:
        raise ConfigError(
            "nothing to ask: name sets in data.questions.forget, neighbor, general, cloze_forget, cloze_neighbor, "
            "cloze_general or perplexity, or take data.name=lore"
        )
    knowledge = Knowledge()
    for role in ROLES:
        choices = [row for name in getattr(questions, role) for row in load_choices(name, config.path)]
        cloze = [row for name in getattr(questions, f"cloze_{role}") for row in _read_cloze(name, config)]
        if choices:
            knowledge.choices[role] = choices
        if cloze:
            knowledge.cloze[role] = cloze
    field = config.columns.get("text", "text")
    for name in questions.perplexity:
        knowledge.texts[name] = load_texts(
            name, folder=config.path, jsonl=config.text.jsonl, min_characters=-1, field=field
        )
    return knowledge


def _read_cloze(name: str, config: DataConfig) -> list[Row]:
    """Rows of {prompt, completion, fact}."""
    rows = load_rows(name, config.path, config.columns)
    for number, row in enumerate(rows, start=1):
        if row.prompt is None or not row.fact:
            raise DataError(f"{name} row {number}: a sentence to complete needs the fields prompt, completion and fact")
    return rows
