"""Corpora to forget and to keep from PKU-SafeRLHF (Ji et al. 2024, arXiv 2406.15513): responses of Alpaca-7B.

A row of the data set is a prompt with two responses, each marked as safe or not and, if not, by harm category. What is
forgotten are the unsafe responses of one category; what is kept, as many of the safe ones. The published split is that
of hkhanuja/Unlearning; in it test rows share prompts with training rows, and rows to keep with rows to forget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from grun.data.jsonl import hub_rows, read_records
from grun.errors import ConfigError, DataError, unknown_name
from grun.runtime.reading import read_fields

T = TypeVar("T")

REPOSITORY, CONFIG = "PKU-Alignment/PKU-SafeRLHF", "alpaca-7b"
PARTS = ("train", "test")
SPLITS = ("published", "by_prompt")
RESPONSES = (0, 1)
SEED = 42
"""Of every draw, as published."""
TEST_SHARE = 0.2

_READ_AS_MISSING = frozenset(
    "|None|NaN|N/A|NA|null|NULL|nan|-nan|-NaN|n/a|<NA>|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|1.#IND|1.#QNAN".split("|")
)
"""Texts that pandas takes for a missing value when it reads a CSV file, as the published procedure did."""


class Pair(NamedTuple):
    """A prompt and one response to it."""

    prompt: str
    response: str


@dataclass(frozen=True)
class SafeRlhf:
    """Rows of one category to forget and safe rows to keep."""

    forget: list[Pair]
    """To be forgotten."""
    forget_test: list[Pair]
    """The same kind, for evaluation."""
    retain: list[Pair]
    """Used in unlearning as what must stay: as many of `retain_pool` as there are rows to forget."""
    retain_pool: list[Pair]
    """Every safe row that is not for evaluation."""
    retain_test: list[Pair]
    """Safe rows for evaluation."""


def read_preferences(folder: str | None) -> list[Mapping[str, Any]]:
    """Rows of train and test together: from {train,test}.jsonl in the folder, or from the hub.

    Raises:
        DataError: a file is missing, a row lacks a field, or the hub cannot be reached.
    """
    instead = f"path, a folder that holds train.jsonl and test.jsonl of its data/Alpaca-7B ({REPOSITORY})"
    records: list[Mapping[str, Any]] = []
    for part in PARTS:
        if folder is None:
            named: Iterable[tuple[str, Any]] = hub_rows(
                REPOSITORY, CONFIG, part, called=f"{REPOSITORY} {part}", instead=instead
            )
        else:
            path = Path(folder).expanduser() / f"{part}.jsonl"
            if not path.is_file():
                raise DataError(f"no file {path}; give {instead}, or leave path out to fetch it from the hub")
            named = read_records(path)
        for where, record in named:
            read_fields(record, where, FIELDS)
            records.append(record)
    return records


def build(records: Sequence[Mapping[str, Any]], category: str, split: str) -> SafeRlhf:
    """Make corpora of one harm category, named as the data spells it, from what `read_preferences` gives.

    Both splits draw 20 % for evaluation with seed 42 from the rows of response 0 followed by those of response 1.
    published: unsafe rows are split for each response apart, safe rows at once. by_prompt: prompts are split, not
    rows, so that no prompt stands on both sides; safe rows whose prompt is one to forget are left out, and so are
    repeated and blank rows.

    Raises:
        ConfigError: the category or the split is unknown.
        DataError: too few rows to split.
    """
    if split not in SPLITS:
        raise ConfigError(unknown_name("split", split, list(SPLITS)))
    known = list(dict.fromkeys(name for row in records for i in RESPONSES for name in row[_category_field(i)]))
    if category not in known:
        raise ConfigError(unknown_name("harm category", category, known))
    unsafe = [_pairs(records, i, category) for i in RESPONSES]
    safe = [pair for i in RESPONSES for pair in _pairs(records, i, None)]
    if split == "published":
        parts = [train_test_split([pair for pair in pairs if _survives_csv(pair)]) for pairs in unsafe]
        forget, forget_test = ([pair for part in parts for pair in part[side]] for side in (0, 1))
        pool, retain_test = train_test_split([pair for pair in safe if _survives_csv(pair)])
    else:
        distinct = _distinct(pair for pairs in unsafe for pair in pairs)
        forget, forget_test = _split_by_prompt(distinct)
        to_forget = _prompts(distinct)
        pool, retain_test = _split_by_prompt([pair for pair in _distinct(safe) if _key(pair) not in to_forget])
    if not forget or not pool:
        raise DataError(f"{len(forget)} rows of {category} and {len(pool)} safe rows are too few to make a corpus")
    return SafeRlhf(forget, forget_test, sample(pool, len(forget)), pool, retain_test)


def train_test_split(rows: Sequence[T]) -> tuple[list[T], list[T]]:
    """Train and test rows: what sklearn's train_test_split(rows, test_size=0.2, random_state=42) gives, order included.

    Of a random permutation the first ceil(0.2 n) rows are test, the others train.
    """
    order = np.random.RandomState(SEED).permutation(len(rows))
    tests = math.ceil(TEST_SHARE * len(rows))
    return [rows[index] for index in order[tests:]], [rows[index] for index in order[:tests]]


def sample(rows: Sequence[T], count: int) -> list[T]:
    """`count` rows, or all if there are fewer, as pandas' sample(n=count, random_state=42) draws them."""
    order = np.random.RandomState(SEED).permutation(len(rows))
    return [rows[index] for index in order[:count]]


def leaks(corpora: SafeRlhf) -> dict[str, int]:
    """How far evaluation and unlearning rows, and rows to forget and to keep, overlap.

    Prompts are compared without outer blanks.
    """
    forget, forget_test = _prompts(corpora.forget), _prompts(corpora.forget_test)
    return {
        "forget_test_rows": len(corpora.forget_test),
        "forget_test_rows_with_forget_prompts": sum(_key(pair) in forget for pair in corpora.forget_test),
        "forget_test_prompts": len(forget_test),
        "forget_test_prompts_in_forget": len(forget_test & forget),
        "retain_test_rows_with_retain_prompts": _sharing(corpora.retain_test, corpora.retain_pool),
        "retain_rows_with_forget_prompts": _sharing(corpora.retain, corpora.forget),
        "retain_rows_with_forget_test_prompts": _sharing(corpora.retain, corpora.forget_test),
        "duplicate_forget_pairs": len(corpora.forget) - len(set(corpora.forget)),
        "duplicate_retain_pairs": len(corpora.retain) - len(set(corpora.retain)),
    }


def _pairs(records: Sequence[Mapping[str, Any]], i: int, category: str | None) -> list[Pair]:
    """Rows of response i that are unsafe and of the category, or, with None, safe."""
    return [
        Pair(row["prompt"], row[f"response_{i}"])
        for row in records
        if row[_safe_field(i)] == (category is None) and (category is None or row[_category_field(i)].get(category))
    ]


def _survives_csv(pair: Pair) -> bool:
    return pair.prompt not in _READ_AS_MISSING and pair.response not in _READ_AS_MISSING


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Rows that are not blank, each once."""
    return list(dict.fromkeys(pair for pair in pairs if pair.prompt.strip() and pair.response.strip()))


def _split_by_prompt(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Train and test rows in the order given, all rows of a prompt on one side."""
    _, tests = train_test_split(list(dict.fromkeys(map(_key, pairs))))
    of_test = set(tests)
    return [pair for pair in pairs if _key(pair) not in of_test], [pair for pair in pairs if _key(pair) in of_test]


def _sharing(pairs: Sequence[Pair], others: Sequence[Pair]) -> int:
    known = _prompts(others)
    return sum(_key(pair) in known for pair in pairs)


def _prompts(pairs: Iterable[Pair]) -> set[str]:
    return set(map(_key, pairs))


def _key(pair: Pair) -> str:
    return pair.prompt.strip()


def _safe_field(i: int) -> str:
    return f"is_response_{i}_safe"


def _category_field(i: int) -> str:
    return f"response_{i}_harm_category"


FIELDS: dict[str, type] = {"prompt": str}
"""Of a row of the data set, with their kinds."""
for _i in RESPONSES:
    FIELDS |= {f"response_{_i}": str, _safe_field(_i): bool, _category_field(_i): dict}
