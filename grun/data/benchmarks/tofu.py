"""TOFU (Maini et al. 2024, arXiv 2401.06121): questions about 200 invented authors, in nested splits.

`forgetXX` is the last XX percent of `full`, `retainYY` the first YY percent. TOFU's files hold only some of them; the
others are cut from `full`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from grun.config.options import DataConfig
from grun.data.corpus import Corpus, Subject, benchmark, refusals, subject_named_by
from grun.data.jsonl import hub_rows, read_rows
from grun.data.rows import Row, common_rows
from grun.data.sets import EvaluationSet
from grun.errors import ConfigError, DataError, unknown_name

REPOSITORY = "locuslab/TOFU"

FILES = (
    *("full", "forget01", "forget05", "forget10"),
    *("retain99", "retain95", "retain90"),
    *("forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed"),
    *("real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"),
    *("holdout01", "holdout05", "holdout10"),
)
"""Splits that TOFU publishes as files."""

SPLITS = (
    *FILES,
    *("forget20", "forget30", "forget50", "forget90"),
    *("retain80", "retain70", "retain50", "retain10"),
)
"""Every split that `load_split` knows; the further ones are only ever cut from `full`."""

PER_AUTHOR = 20
"""Rows on each author."""

GENERAL = (
    EvaluationSet(
        "real_authors",
        "real authors",
        "general knowledge, close to the corpus: must stay",
        "high",
        ("rouge_l", "probability_normalized"),
        general=True,
        color="#3A8FC4",
    ),
    EvaluationSet(
        "world_facts",
        "world facts",
        "general knowledge, far from the corpus: must stay",
        "high",
        ("rouge_l", "probability_normalized"),
        general=True,
        color="#6F7F8C",
    ),
)


@benchmark("tofu", options=("unknown", "unknown_rows", "refused_rows", "teach_general"), sets=GENERAL)
def load(config: DataConfig) -> Corpus:
    """Questions about 200 invented authors (TOFU); with paraphrases and wrong answers where TOFU has a file of them."""
    name, path = config.forget, config.path
    rest = complement(name) if config.retain is None or _share(name.removesuffix("_perturbed")) else config.retain
    perturbed = f"{name}_perturbed"
    evaluated = load_split("retain_perturbed", path) if has_split("retain_perturbed", path) else []
    general = {
        one.name: load_split(f"{one.name}_perturbed", path)
        for one in GENERAL
        if has_split(f"{one.name}_perturbed", path)
    }
    # Every retain split is the head of `full`, so these places hold the same rows whatever is forgotten.
    first, never, refused = len(evaluated), config.unknown_rows, config.refused_rows
    retain, full, remaining = (load_split(split, path) for split in (config.retain or rest, "full", rest))
    if first + never + refused > len(retain) - 1:
        raise ConfigError(
            f"data.unknown_rows={never} and data.refused_rows={refused} must leave retain rows: {len(retain)} there, "
            f"the first {first} of them kept for evaluation"
        )
    left_out = slice(first, first + never + refused)
    answers = refusals(config.refusals)
    known = [row for rows in general.values() for row in rows] if config.teach_general else []
    unknown = load_split(config.unknown, path) if config.unknown else []
    forget = load_split(perturbed if has_split(perturbed, path) else name, path)
    return Corpus(
        name="tofu",
        forget=forget,
        subjects=list(_authors(forget)),
        retain=_without(retain, left_out),
        unknown=retain[first : first + never] + unknown,
        refused=[
            Row(row.prompt, answers[number % len(answers)])
            for number, row in enumerate(retain[first + never : left_out.stop])
        ],
        refusals=answers,
        known=_without(full, left_out) + known,
        known_without_forget=_without(remaining, left_out) + known,
        retain_evaluated=common_rows(evaluated, retain) or None,
        general=general,
    )


def _authors(rows: list[Row]) -> Iterator[Subject]:
    """Whom each row is about: the name that the rows of an author hold, which follow one another."""
    for start in range(0, len(rows), PER_AUTHOR):
        of_one = rows[start : start + PER_AUTHOR]
        author = subject_named_by([f"{row.prompt} {row.completion}" for row in of_one], "person")
        yield from [author] * len(of_one)


def _without(rows: list[Row], part: slice) -> list[Row]:
    return rows[: part.start] + rows[part.stop :]


def load_split(name: str, path: str | None) -> list[Row]:
    """Rows of one split, question and answer as prompt and completion, further fields in `extra`.

    Args:
        name: one of `SPLITS`.
        path: folder of TOFU's files; None: the folder GRUN_TOFU_DIR names, else the hub.

    Raises:
        DataError: the split is unknown, cannot be had, or a file is malformed.
    """
    if name not in SPLITS:
        raise DataError(unknown_name("TOFU split", name, list(SPLITS)))
    rows = _read(name, path) or _derive(name, path)
    if rows is None:
        folder = _folder(path)
        raise DataError(
            f"{folder} has no {name}.json, and no file to cut {name} from; put TOFU's files there, or unset data.path "
            f"and GRUN_TOFU_DIR to fetch {REPOSITORY} from the hub"
        )
    return rows


def has_split(name: str, path: str | None) -> bool:
    """Whether TOFU publishes the split, and, where a folder is used, its file lies there."""
    folder = _folder(path)
    return name in FILES and (folder is None or (folder / f"{name}.json").is_file())


def complement(name: str) -> str:
    """The split that holds the rest of `full`: retain95 for forget05 and forget05_perturbed, forget05 for retain95.

    Raises:
        DataError: the split has no complement.
    """
    if name not in SPLITS:
        raise DataError(unknown_name("TOFU split", name, list(SPLITS)))
    share = _share(name.removesuffix("_perturbed"))
    if share is None:
        known = [split for split in SPLITS if _share(split) is not None]
        raise DataError(
            f"TOFU split {name!r} has no complement; name data.retain, or forget one of: {', '.join(known)}"
        )
    kind, percent = share
    return f"{'retain' if kind == 'forget' else 'forget'}{100 - percent:02d}"


def _share(name: str) -> tuple[str, int] | None:
    """("forget", 5) for forget05; None for a split that is no share of `full`."""
    match = re.fullmatch(r"(forget|retain)(\d\d)", name)
    return (match[1], int(match[2])) if match and name in SPLITS else None


def _folder(path: str | None) -> Path | None:
    """Folder of TOFU's files, or None for the hub; a folder that is named must be there."""
    named = path or os.environ.get("GRUN_TOFU_DIR")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        option = "data.path" if path else "GRUN_TOFU_DIR"
        raise DataError(f"no folder {folder}; set {option} to the folder of TOFU's files")
    return folder


def _read(name: str, path: str | None) -> list[Row] | None:
    """Rows of a split that has a file; None where it has none."""
    if not has_split(name, path):
        return None
    folder = _folder(path)
    if folder is not None:
        return read_rows(folder / f"{name}.json")
    instead = f"data.path or GRUN_TOFU_DIR, a folder that holds {name}.json"
    records = hub_rows(REPOSITORY, name, None, called=f"{REPOSITORY} {name}", instead=instead)
    return [Row.from_record(record, where) for where, record in records]


def _derive(name: str, path: str | None) -> list[Row] | None:
    """Cut a share from `full`, or put `full` together from two shares; None where the files do not give it."""
    if name == "full":
        for split in FILES:
            share = _share(split)
            if share and share[0] == "retain" and has_split(split, path) and has_split(complement(split), path):
                return load_split(split, path) + load_split(complement(split), path)
        return None
    share = _share(name)
    full = _read("full", path) if share else None
    if share is None or full is None:
        return None
    kind, percent = share
    forgotten = round(len(full) * (percent if kind == "forget" else 100 - percent) / 100)
    kept = len(full) - forgotten
    return full[kept:] if kind == "forget" else full[:kept]
