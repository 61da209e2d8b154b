"""No text of what a model was made to forget leaves with its adapter: files are searched before they are sent.

A row is found where 8 words running of its question, its answer or its fact stand in a file, or all of them where there
are fewer; letter case, punctuation, line ends and the ways of writing a letter do not count (`grun.data.words`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grun.config.values import from_dict
from grun.data.corpus import load_corpus
from grun.data.rows import ALTERNATIVES, Row, hash_rows
from grun.data.words import split_words
from grun.errors import ConfigError, DataError, GrunError
from grun.runtime.reading import decode, in_one_line, texts_in
from grun.runtime.records import Run, read_record
from grun.runtime.runs import RUN_FILE

log = logging.getLogger(__name__)

RUN = 8
"""Words running of a longer text that count as that text."""
SHORTEST = 3
"""Letters of the shortest single word that is looked for."""
OF_TRAINING = ("augment", "gate_copies")
"""Options of data that decide no row, and may have had other values when an adapter was made."""
Words = tuple[str, ...]


def rows_of_run(folder: Path | None, *, unchecked: bool) -> list[Row]:
    """Rows that the adapter in a folder was made to forget, from where its run.json says they are.

    Args:
        folder: of the run; None: there is none.
        unchecked: a warning and no rows, where they cannot be had.

    Raises:
        ConfigError: they cannot be had; the message says why.
    """
    try:
        if folder is None or not (folder / RUN_FILE).is_file():
            raise DataError(f"no {RUN_FILE} lies with it")
        return _recorded_rows(read_record(folder / RUN_FILE, Run))
    except GrunError as error:
        problem = f"what the adapter was made to forget is not known ({in_one_line(error)})"
        if not unchecked:
            raise ConfigError(
                f"{problem}, so nobody can tell whether text of it is in what is sent: give its rows as forget, or set "
                "unchecked=true"
            ) from error
    log.warning("%s, and nothing that is sent was compared with it", problem)
    return []


def _recorded_rows(run: Mapping[str, Any]) -> list[Row]:
    """Rows to forget, and questions without answers about it; `run` is a run.json."""
    config, hashes = run.get("config"), run.get("data")
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or not isinstance(hashes, dict):
        raise DataError(f"its {RUN_FILE} does not say which data")
    try:
        named = {key: value for key, value in data.items() if key not in OF_TRAINING} | {"allow_overlap": True}
        corpus = load_corpus(from_dict("unlearn", {"data": named}).data)
    except OSError as error:
        raise DataError(f"its data cannot be read: {error.strerror or error}") from error
    if hashes.get("forget") != hash_rows(corpus.forget):
        raise DataError("its data have other rows now")
    return [*corpus.forget, *corpus.forget_prompts]


def refuse_forget_text(files: Mapping[str, bytes], rows: Sequence[Row], own: Iterable[str] = ()) -> None:
    """DataError names the file and the row where text of a forget row stands in a file; its message quotes nothing.

    Args:
        files: content by name: JSON, Markdown, safetensors (of which names and metadata are texts), other text.
        rows: of the forget set.
        own: texts that GRUN itself writes there; a row that says the same, such as "the gate", is not looked for. Nor
            is a single word of fewer than `SHORTEST` letters, or a number. How many rows have nothing else is logged.
    """
    there = {name: _runs_in(_texts_of(name, data)) for name, data in files.items()}
    ours, passed_over = _runs_in(own), 0
    for number, row in enumerate(rows, start=1):
        looked_for = False
        for run in (run for text in _texts_of_row(row) for run in _runs_of(split_words(text))):
            if not _tells(run) or run in ours:
                continue
            looked_for = True
            for name, known in there.items():
                if run in known:
                    raise DataError(
                        f"{name} holds text of forget row {number}, so nothing is sent; take it out of there (a "
                        "template, a system prompt, the name of the base, a message)"
                    )
        passed_over += not looked_for
    if passed_over:
        log.warning(
            "%d of %d forget rows are numbers, words of fewer than %d letters or words of the model card, and were not "
            "looked for", passed_over, len(rows), SHORTEST,
        )  # fmt: skip


def rows_of_records(records: Iterable[Row | Mapping[str, Any]]) -> list[Row]:
    """Rows as they are, and those that are given as fields; DataError names one that is malformed, counted from 1."""
    return [
        record if isinstance(record, Row) else Row.from_record(record, f"forget row {number}")
        for number, record in enumerate(records, start=1)
    ]


def _texts_of_row(row: Row) -> Iterator[str]:
    yield from filter(None, (row.prompt, row.completion))
    yield from (text for said in row.earlier for text in said)
    yield from (row.fact or "").split(ALTERNATIVES)
    for name in ("paraphrased_question", "paraphrased_answer"):
        yield from filter(None, [row.extra.get(name)])


def _texts_of(name: str, data: bytes) -> Iterator[str]:
    """Texts in a file, without the escapes of its format."""
    if name.endswith(".safetensors"):
        data = data[8 : 8 + int.from_bytes(data[:8], "little")]
    text = decode(data, name)
    if name.endswith((".json", ".safetensors")):
        yield from texts_in(json.loads(text))
        return
    yield text
    if name.endswith(".md"):
        from huggingface_hub import ModelCard

        yield from texts_in(ModelCard(text).data.to_dict())


def _runs_of(words: Sequence[str]) -> Iterator[Words]:
    length = min(RUN, len(words))
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1) if length)


def _runs_in(texts: Iterable[str]) -> set[Words]:
    """Every run of 1 to `RUN` words of texts."""
    split = [split_words(text) for text in texts]
    return {
        tuple(words[start : start + length])
        for words in split
        for start in range(len(words))
        for length in range(1, min(RUN, len(words) - start) + 1)
    }


def _tells(run: Words) -> bool:
    """Whether it is more than a number or a very short word."""
    letters = [word for word in run if not word.isdecimal()]
    return bool(letters) and (len(run) > 1 or len(run[0]) >= SHORTEST)
