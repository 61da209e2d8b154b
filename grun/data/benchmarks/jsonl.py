"""Rows of the user's own files, or of any data set of the hub."""

from __future__ import annotations

from pathlib import Path

from grun.config.options import DataConfig
from grun.data.corpus import Corpus, benchmark, corpus_of_rows
from grun.data.jsonl import load_rows
from grun.errors import ConfigError


@benchmark("jsonl", options=("unknown",))
def load(config: DataConfig) -> Corpus:
    """Your own questions and answers: files, or data sets of the hub."""
    if config.forget == DataConfig.forget and not (Path(config.path or "").expanduser() / config.forget).exists():
        raise ConfigError("data.name=jsonl needs data.forget, the file of the rows to forget")
    forget = load_rows(config.forget, config.path, config.columns)
    retain = load_rows(config.retain, config.path, config.columns) if config.retain else []
    corpus = corpus_of_rows("jsonl", forget, retain, config)
    if config.unknown:
        corpus.unknown = load_rows(config.unknown, config.path, config.columns)
    return corpus
