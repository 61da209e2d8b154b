"""MUSE (Shi et al. 2024, arXiv 2407.06460): news or books to forget as plain texts, and what a model holds of them.

Verbatim memorization (VerbMem), knowledge memorization (KnowMem), privacy leakage (PrivLeak) and utility; texts of
requests in sequence (sust) and of a growing forget set (scal) for News.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from grun.config.options import DataConfig
from grun.data.corpus import Corpus, benchmark, corpus_of_rows
from grun.data.jsonl import load_rows
from grun.data.rows import Row
from grun.data.sets import EvaluationSet
from grun.data.texts import load_texts
from grun.errors import ConfigError, DataError

REPOSITORIES = ("muse-bench/MUSE-News", "muse-bench/MUSE-Books")
PASSAGE = 8000
"""Longest text to train on, characters: about the 2,048 tokens that MUSE cuts its corpora into."""
END_OF_ANSWER = ("\n\n", "\nQuestion", "Question:")
"""What a model of plain text goes on with after an answer."""
_SPLIT = re.compile(r"[\w.-]+/[\w.-]+")

SETS = (
    EvaluationSet(
        "verbmem",
        "VerbMem",
        "beginnings of what is to be forgotten, to be continued",
        "low",
        ("rouge_l_f1",),
        ("rouge_l", "extraction_strength"),
        color="#A63A00",
        longest_answer=128,
        longest_reference=128,
    ),
    EvaluationSet(
        "knowmem",
        "KnowMem",
        "questions on what is to be forgotten",
        "low",
        ("rouge_l_f1",),
        ("rouge_l", "probability"),
        color="#C98A2B",
        longest_answer=32,
        stops=END_OF_ANSWER,
    ),
    EvaluationSet(
        "knowmem_retain",
        "KnowMem of retain",
        "questions on what is to stay: MUSE's utility",
        "high",
        ("rouge_l_f1",),
        ("rouge_l", "probability"),
        color="#3A8FC4",
        longest_answer=32,
        stops=END_OF_ANSWER,
    ),
)


@benchmark("muse", sets=SETS)
def load(config: DataConfig) -> Corpus:
    """News or books to forget (MUSE), with its sets for VerbMem, KnowMem, utility and PrivLeak.

    `data.path` is one of `REPOSITORIES`, or a folder of the same layout; `data.forget` and `data.retain` are
    CONFIG/SPLIT, such as raw/forget (the default), sust/forget_2, scal/forget_4, and raw/retain1, or several,
    separated by commas. The evaluation sets forget, unknown and retain are the texts of privleak: forget, holdout and
    retain; with `data.text.asked`, which asks for texts, forget are those that are to be forgotten.
    """
    if not config.path:
        raise ConfigError(f"data.name=muse needs data.path: {' or '.join(REPOSITORIES)}, or a folder of their layout")
    forget = "raw/forget" if config.forget == DataConfig.forget else config.forget
    wanted = [(forget, "data.forget"), (config.retain or "raw/retain1", "data.retain")]
    rows = [
        [row for name in names.split(",") for row in _passages(name.strip(), option, config.path)]
        for names, option in wanted
    ]
    corpus = corpus_of_rows("muse", rows[0], rows[1], config)
    corpus.forget_evaluated, corpus.retain_evaluated, corpus.unknown = (
        [Row(None, text) for text in _texts(f"privleak/{split}", config.path)]
        for split in ("forget", "retain", "holdout")
    )
    if config.text.asked:
        corpus.forget_evaluated = None
    corpus.general = {
        "verbmem": _rows("verbmem/forget", config.path, {"completion": "gt"}),
        "knowmem": _asked("forget", config.path),
        "knowmem_retain": _asked("retain", config.path),
    }
    return corpus


def _asked(kind: str, path: str) -> list[Row]:
    """Questions of one kind, each after the same answered ones."""
    examples = "".join(f"{_question(row)} {row.completion}\n\n" for row in _rows(f"knowmem/{kind}_qa_icl", path))
    return [Row(examples + _question(row), row.completion, row.extra) for row in _rows(f"knowmem/{kind}_qa", path)]


def _question(row: Row) -> str:
    return f"Question: {row.prompt}\nAnswer:"


def _passages(name: str, option: str, path: str) -> list[Row]:
    """Texts to train on, cut between words."""
    if not _SPLIT.fullmatch(name):
        raise ConfigError(f"{option}={name}: data.name=muse expects CONFIG/SPLIT, such as raw/forget or sust/forget_1")
    return [Row(None, passage) for text in _texts(name, path) for passage in cut(text)]


def cut(text: str) -> list[str]:
    """A text in passages of at most PASSAGE characters, cut where white space is; a longer word is cut within."""
    return textwrap.wrap(
        text, PASSAGE, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False, drop_whitespace=True
    )


def _texts(name: str, path: str) -> list[str]:
    if _folder(path):
        return load_texts(f"{name}.json", folder=path)
    return load_texts(f"hub:{path}:{name.replace('/', ':')}")


def _rows(name: str, path: str, columns: dict[str, str] | None = None) -> list[Row]:
    if folder := _folder(path):
        return load_rows(f"{name}.json", str(folder), columns)
    return load_rows(f"hub:{path}:{name.replace('/', ':')}", None, columns)


def _folder(path: str) -> Path | None:
    """The folder, or None for a data set of the hub; DataError for what is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path in REPOSITORIES:
        return None
    raise DataError(f"no folder {folder}; set data.path to {' or '.join(REPOSITORIES)}, or to a folder of their layout")
