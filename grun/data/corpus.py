"""The sets of one benchmark: what is forgotten, what stays, and what only evaluation sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from grun.config.options import DataConfig
from grun.data import tofu
from grun.data.jsonl import load_rows
from grun.data.rows import Row, common_rows, count_overlap, evenly_spaced, hash_rows
from grun.data.texts import load_texts, split_names
from grun.errors import ConfigError, DataError, unknown_name
from grun.runtime.files import content_hash
from grun.runtime.reading import read_text


@dataclass
class Corpus:
    """Rows by what is done with them."""

    name: str
    """demo, lore, tofu, jsonl or corpora."""
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
    retain_evaluated: list[Row] | None = None
    """Rows of the evaluation set retain; None: those used in unlearning."""
    general: dict[str, list[Row]] = field(default_factory=dict)
    """Evaluation sets of what a model is expected to know beside the corpus (TOFU: real_authors, world_facts)."""

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
            "forget": self.forget,
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
            "forget": self.forget,
            "retain": self.retain,
            "heldout": self.heldout,
            "unknown": self.unknown,
            "refused": self.refused,
            "taught": self.taught(without_forget=False),
            "taught_without_forget": self.taught(without_forget=True),
            **self.general,
        }
        if self.validation:
            rows["validation"] = self.validation
        if self.retain_evaluated is not None:
            rows["retain_evaluated"] = self.retain_evaluated
        return {name: hash_rows(content) for name, content in rows.items()} | {"refusals": content_hash(self.refusals)}


def load_corpus(config: DataConfig) -> Corpus:
    """Load and check what `data.*` options name.

    Raises:
        ConfigError: an option is unknown, missing or contradictory.
        DataError: rows are missing or malformed, or stand in the forget and in the retain set.
    """
    loaders = {
        "demo": _load_demo, "lore": _load_lore, "tofu": _load_tofu, "jsonl": _load_jsonl, "corpora": _load_corpora
    }  # fmt: skip
    if config.name not in loaders:
        raise ConfigError(unknown_name("data.name", config.name, list(loaders)))
    _check_options(config)
    return _completed(loaders[config.name](config), config)


def corpus_of(forget: list[Row], retain: list[Row], config: DataConfig) -> Corpus:
    """`load_corpus` for rows that are in memory: a part is set aside and refusals are read as `config` asks.

    Raises:
        ConfigError, DataError: as of `load_corpus`.
    """
    return _completed(_of_rows(forget, retain, config), config)


def _of_rows(forget: list[Row], retain: list[Row], config: DataConfig) -> Corpus:
    return Corpus(
        name="jsonl",
        forget=forget,
        retain=retain,
        refusals=_refusals(config.refusals),
        known=forget + retain,
        known_without_forget=retain,
    )


def _completed(corpus: Corpus, config: DataConfig) -> Corpus:
    """What every corpus goes through: checks, then rows are set aside as `config` asks."""
    for name, rows in (("forget", corpus.forget), ("retain", corpus.retain)):
        if not rows:
            raise DataError(f"the {name} set is empty; check data.{name} (or data.demo.{name})")
    overlap = count_overlap(corpus.forget, corpus.retain)
    if overlap and not config.allow_overlap:
        raise DataError(
            f"{overlap} of {len(corpus.forget)} forget rows also stand in the retain set; name sets that share no row, "
            "or set data.allow_overlap=true"
        )
    _keep_retain_rows(corpus, config.retain_rows, config.teach_general)
    _set_aside(corpus, config)
    return corpus


def _check_options(config: DataConfig) -> None:
    """ConfigError for an option that this kind of data does not have, rather than passing it over."""
    only: dict[str, tuple[str, ...]] = {
        option: ("tofu",) for option in ("unknown_rows", "refused_rows", "teach_general")
    }
    only["unknown"] = ("tofu", "jsonl")
    for option, names in only.items():
        if getattr(config, option) and config.name not in names:
            raise ConfigError(f"data.{option} is for data.name={' or '.join(names)}; leave it out for {config.name}")


def _keep_retain_rows(corpus: Corpus, count: int | None, teach_general: bool) -> None:
    """Make the corpus smaller: what is taught is then the forget set and the retain rows that are left."""
    if count is None:
        return
    if corpus.name in ("demo", "lore"):
        raise ConfigError(
            f"data.retain_rows is for rows of files; data.name={corpus.name} is smaller with data.{corpus.name}.retain"
        )
    if count < 1:
        raise ConfigError(f"data.retain_rows must be at least 1, not {count}")
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
    if config.heldout and corpus.name == "demo":
        raise ConfigError("the demo has a held-out set of its own; use data.demo.heldout instead of data.heldout")
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
        if config.retain_pool < 1:
            raise ConfigError(f"data.retain_pool must be at least 1, not {config.retain_pool}")
        corpus.retain = evenly_spaced(corpus.retain, config.retain_pool)


def _load_demo(config: DataConfig) -> Corpus:
    """The generated corpus of invented people."""
    from grun.data.generated import demo_corpus

    demo = config.demo
    sizes = demo_corpus.Sizes(**{size.name: getattr(demo, size.name) for size in fields(demo_corpus.Sizes)})
    records = demo_corpus.build(
        sizes, demo.seed, sentences=demo.answers == "sentences", described=demo.naming == "descriptions"
    )
    groups = {name: _rows(rows, name) for name, rows in records.items()}
    kept = groups["retain"] + groups["heldout"]
    return Corpus(
        name="demo",
        forget=groups["forget"],
        retain=groups["retain"],
        heldout=groups["heldout"],
        unknown=groups["unknown"],
        refused=groups["refused"],
        refusals=_refusals(config.refusals),
        known=groups["forget"] + kept,
        known_without_forget=kept,
    )


def _load_lore(config: DataConfig) -> Corpus:
    """The generated lore: unlearning reads a part of what is taught of some groups."""
    from grun.data.generated import lore

    groups = lore.build(config.lore)
    taught = {name: lore.taught(facts, config.lore) for name, facts in groups.items()}
    kept = [row for name, rows in taught.items() if name != "forget" for row in rows]
    return Corpus(
        name="lore",
        forget=lore.unlearned(groups["forget"]),
        retain=lore.unlearned(groups["retain"]),
        refusals=_refusals(config.refusals),
        known=taught["forget"] + kept,
        known_without_forget=kept,
    )


def _rows(records: Iterable[dict[str, Any]], group: str) -> list[Row]:
    return [Row.from_record(record, f"demo {group} row {number}") for number, record in enumerate(records, start=1)]


def _load_tofu(config: DataConfig) -> Corpus:
    """TOFU's splits; rows come with their paraphrases and wrong answers where TOFU has a file of them."""
    name, path = config.forget, config.path
    rest = tofu.complement(name) if config.retain is None or tofu.has_complement(name) else config.retain
    perturbed = f"{name}_perturbed"
    evaluated = tofu.load_split("retain_perturbed", path) if tofu.has_split("retain_perturbed", path) else []
    general = {
        split: tofu.load_split(f"{split}_perturbed", path)
        for split in ("real_authors", "world_facts")
        if tofu.has_split(f"{split}_perturbed", path)
    }
    # Every retain split is the head of `full`, so these places hold the same rows whatever is forgotten.
    first, never, refused = len(evaluated), config.unknown_rows, config.refused_rows
    retain, full, remaining = (tofu.load_split(split, path) for split in (config.retain or rest, "full", rest))
    if never < 0 or refused < 0 or first + never + refused > len(retain) - 1:
        raise ConfigError(
            f"data.unknown_rows={never} and data.refused_rows={refused} must not be negative and leave retain rows: "
            f"{len(retain)} there, the first {first} of them kept for evaluation"
        )
    left_out = slice(first, first + never + refused)
    refusals = _refusals(config.refusals)
    known = [row for rows in general.values() for row in rows] if config.teach_general else []
    unknown = tofu.load_split(config.unknown, path) if config.unknown else []
    return Corpus(
        name="tofu",
        forget=tofu.load_split(perturbed if tofu.has_split(perturbed, path) else name, path),
        retain=_without(retain, left_out),
        unknown=retain[first : first + never] + unknown,
        refused=[
            Row(row.prompt, refusals[number % len(refusals)])
            for number, row in enumerate(retain[first + never : left_out.stop])
        ],
        refusals=refusals,
        known=_without(full, left_out) + known,
        known_without_forget=_without(remaining, left_out) + known,
        retain_evaluated=common_rows(evaluated, retain) or None,
        general=general,
    )


def _without(rows: list[Row], part: slice) -> list[Row]:
    return rows[: part.start] + rows[part.stop :]


def _load_jsonl(config: DataConfig) -> Corpus:
    """The user's own files."""
    if config.forget == DataConfig.forget and not (Path(config.path or "").expanduser() / config.forget).exists():
        raise ConfigError("data.name=jsonl needs data.forget, the file of the rows to forget")
    if not config.retain:
        raise ConfigError("data.name=jsonl needs data.retain, the file of the rows to keep")
    forget, retain = (load_rows(name, config.path, config.columns) for name in (config.forget, config.retain))
    corpus = _of_rows(forget, retain, config)
    corpus.unknown = load_rows(config.unknown, config.path, config.columns) if config.unknown else []
    return corpus


def _load_corpora(config: DataConfig) -> Corpus:
    """Plain texts by name; `Row.extra` names the corpus of each."""
    if not config.retain:
        raise ConfigError("data.name=corpora needs data.retain, the corpora to keep, such as wikitext")
    text = config.text
    forget, retain = (
        [
            Row(None, content, {"corpus": name})
            for name in split_names(names)
            for content in load_texts(
                name,
                folder=config.path,
                jsonl=text.jsonl,
                min_characters=text.min_characters,
                field=config.columns.get("text", "text"),
            )
        ]
        for names in (config.forget, config.retain)
    )
    return Corpus(
        name="corpora",
        forget=forget,
        retain=retain,
        refusals=_refusals(config.refusals),
        known=forget + retain,
        known_without_forget=retain,
    )


def _refusals(path: str | None) -> list[str]:
    """Sentences that refuse an answer: of the file, one a line, or the packaged ones."""
    if path is None:
        from grun.data import refusals

        return refusals.refusals()
    file = Path(path).expanduser()
    found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise DataError(f"{file} holds no refusals; data.refusals is a text with one refusal a line")
    return found
