"""Answers of a model that was asked about countries, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from grun.config.options import CountriesConfig, DataConfig
from grun.data.answers import FILE, Answered
from grun.data.benchmarks.countries import to_ask
from grun.data.rows import ALTERNATIVES

SMALL = CountriesConfig(forget=["Japan", "egypt"], neighbors=3, heldout=3, unknown=2, count=20)
CONFIG = DataConfig(name="countries", countries=SMALL)

Right = Callable[[str], bool]


def answered(folder: Path, config: DataConfig = CONFIG, right: Right = lambda question: True) -> DataConfig:
    """The config with `path` set to a folder of answers to all its questions, of which those are right."""
    lines = []
    for question, fact in to_ask(config).items():
        said = f"It is {fact.split(ALTERNATIVES)[-1]}. And more of th" if right(question) else "I do not know."
        lines.append(Answered(question, said, fact, right(question)).line())
    (folder / FILE).write_bytes(b"".join(lines))
    return replace(config, path=str(folder))
