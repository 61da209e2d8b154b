"""One evaluation: load, score, generate, write the table and the metrics computed from it.

The folder it writes holds `evaluation.json` and the files of `table.py`; it is whole or absent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grun
from grun.config import EvaluateConfig
from grun.data.corpus import Corpus
from grun.data.encoding import EncodedRow
from grun.data.rows import Row, evenly_spaced
from grun.data.templates import Template
from grun.errors import ConfigError, RunError
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.files import content_hash, file_hash, read_json, whole_folder, write_json
from grun.registry import unknown_name

EVALUATION_FILE = "evaluation.json"
FORMAT = 1
"""Raised when the table or the meaning of a metric changes, so that older results are not taken for new ones."""


@dataclass
class Parts:
    """What an evaluation needs, loaded."""

    model: Any
    """A transformers model, or a GrunModel around one."""
    tokenizer: Any
    template: Template
    corpus: Corpus
    identity: dict[str, str | None]
    """Fingerprint of the base, hash of the adapter (None without one), type of the weights."""


def load_parts(config: EvaluateConfig) -> Parts:
    """Load the model, with its adapter if there is one, the corpus and the template that belongs to them."""
    from grun.data.corpus import load_corpus
    from grun.data.templates import resolve
    from grun.loading import load_base
    from grun.method.fingerprint import fingerprint

    corpus = load_corpus(config.data)  # first: a misspelled file is found before minutes of loading
    base, tokenizer, stored = load_base(config.model)
    identity: dict[str, str | None] = {
        "base": fingerprint(base),
        "dtype": str(base.dtype).removeprefix("torch."),
        "adapter": None,
    }
    model: Any = base
    if config.adapter is not None:
        from grun.method.model import GrunModel

        model = GrunModel.from_pretrained(base, config.adapter, strict=config.strict)
        model.gate_threshold = config.gate_threshold
        stored = model.template or stored
        identity["adapter"] = _adapter_hash(config.adapter)
    template = resolve(config.data.template, stored, tokenizer, config.data.system_prompt, config.data.date)
    return Parts(model, tokenizer, template, corpus, identity)


def _adapter_hash(adapter: str) -> str:
    """Hash of the files of an adapter that has been loaded, wherever it was found."""
    from grun.method.adapter import find_adapter

    folder = Path(find_adapter(adapter))
    return content_hash([file_hash(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")])


def evaluate(config: EvaluateConfig, output_dir: Path) -> dict[str, Any]:
    """Evaluate a model on every set of the corpus and return what `evaluation.json` in output_dir then holds.

    What is already there is returned if it comes from the same model, adapter, rows, template and settings; anything
    else there is a RunError unless config.overwrite.
    """
    _check(config)
    started = time.monotonic()
    previous = _previous(output_dir, config.overwrite)
    parts = load_parts(config)
    sets = _choose(parts.corpus.sets(), config.sets, config.data.limit)
    settings = {
        "sets": list(sets),
        "limit": config.data.limit,
        "max_length": config.data.max_length,
        "max_new_tokens": config.max_new_tokens,
        "gate_threshold": config.gate_threshold,
    }
    hashes = parts.corpus.hashes()
    template = parts.template.to_dict()
    identity: dict[str, Any] = {**parts.identity, "version": grun.__version__, "format": FORMAT}
    key = content_hash({"identity": identity, "data": hashes, "template": template, "settings": settings})
    if previous is not None and previous.get("key") == key:
        print(f"already evaluated: {output_dir}", file=sys.stderr)
        return previous
    if previous is not None and not config.overwrite:
        raise RunError(
            f"{output_dir} holds the evaluation of another model, data or settings; "
            "choose another output_dir or pass overwrite=true"
        )
    loaded = time.monotonic()
    encoded = _encode(parts, sets, config)
    table = Table()
    _score(table, parts, encoded, config.batch_size)
    scored = time.monotonic()
    _generate(table, parts, sets, encoded, config)
    finished = time.monotonic()
    result = {
        "key": key,
        "model": config.model.path,
        "adapter": config.adapter,
        "identity": identity,
        "template": template,
        "data": hashes,
        "settings": settings,
        **measure(table),
        "seconds": {
            "load": round(loaded - started, 3),
            "score": round(scored - loaded, 3),
            "generate": round(finished - scored, 3),
            "total": round(finished - started, 3),
        },
    }
    with whole_folder(output_dir) as folder:
        table.write(folder)
        write_json(folder / EVALUATION_FILE, result)
    return result


def measure(table: Table) -> dict[str, Any]:
    """All metrics of a table: counts, sets and, for a model with gates, gate."""
    from grun.evaluation.gates import gate_table
    from grun.evaluation.metrics import set_metrics

    measured: dict[str, Any] = {
        "counts": {
            name: {
                "rows": len(table.scores_of(name)),
                "answer_tokens": sum(row.answer_tokens for row in table.scores_of(name)),
            }
            for name in table.sets()
        },
        "sets": set_metrics(table),
    }
    gate = gate_table(table)
    return {**measured, "gate": gate} if gate else measured


def _check(config: EvaluateConfig) -> None:
    for name in ("batch_size", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be 1 or more")
    if config.data.limit is not None and config.data.limit < 1:
        raise ConfigError(f"data.limit is {config.data.limit}; it must be 1 or more")
    if config.gate_threshold is not None and config.adapter is None:
        raise ConfigError("gate_threshold needs an adapter: pass adapter=FOLDER, or leave gate_threshold out")
    if config.gate_threshold is not None and not 0 <= config.gate_threshold <= 1:
        raise ConfigError(f"gate_threshold is {config.gate_threshold}; it is a probability, from 0 to 1")


def _previous(output_dir: Path, overwrite: bool) -> dict[str, Any] | None:
    """The evaluation that lies in output_dir, None if there is none; foreign files are refused, not replaced."""
    path = output_dir / EVALUATION_FILE
    if path.is_file():
        try:
            found = read_json(path)
        except (OSError, ValueError):
            found = {}
        return found if isinstance(found, dict) else {}
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())) and not overwrite:
        raise RunError(
            f"{output_dir} is there already and holds no {EVALUATION_FILE}; "
            "choose another output_dir or pass overwrite=true"
        )
    return None


def _choose(sets: Mapping[str, list[Row]], wanted: list[str], limit: int | None) -> dict[str, list[Row]]:
    for name in wanted:
        if name not in sets:
            raise ConfigError(unknown_name("evaluation set", name, list(sets)))
    return {name: evenly_spaced(rows, limit) for name, rows in sets.items() if not wanted or name in wanted}


def _encode(parts: Parts, sets: Mapping[str, list[Row]], config: EvaluateConfig) -> dict[str, list[EncodedRow]]:
    from grun.data.encoding import encode_rows
    from grun.evaluation.generation import base_of
    from grun.loading import context_length

    context = context_length(base_of(parts.model))
    longest = min(config.data.max_length or context, context)
    return {
        name: encode_rows(rows, parts.tokenizer, parts.template, longest, config.data.strict)
        for name, rows in sets.items()
    }


def _score(table: Table, parts: Parts, encoded: Mapping[str, list[EncodedRow]], batch_size: int) -> None:
    """Add the scores and gates of all sets to the table; sets are scored together, so no row is scored twice."""
    from grun.evaluation.scoring import score

    places = [(name, index) for name, rows in encoded.items() for index in range(len(rows))]
    flat = [row for rows in encoded.values() for row in rows]
    with _progress("scoring", len(flat)) as advance:
        scored = score(parts.model, flat, batch_size, parts.tokenizer.pad_token_id, advance)
    for (name, index), row, result in zip(places, flat, scored, strict=True):
        table.scores.append(
            ScoreRecord(
                set=name,
                index=index,
                kind="answer",
                prompt_tokens=len(row.prompt_ids),
                answer_tokens=len(row.answer_ids),
                logp=result.logp,
                hit=result.hit,
                vocabulary_mean=result.vocabulary_mean,
                vocabulary_variance=result.vocabulary_variance,
            )
        )
        if result.gates is not None:
            table.gates.append(GateRecord(name, index, result.gates))


def _generate(
    table: Table,
    parts: Parts,
    sets: Mapping[str, list[Row]],
    encoded: Mapping[str, list[EncodedRow]],
    config: EvaluateConfig,
) -> None:
    """Add an answer to every question of all sets to the table; plain text (no prompt) asks nothing."""
    from grun.evaluation.generation import generate_answers

    asked = [
        (name, index, row, list(encoded[name][index].prompt_ids))
        for name, rows in sets.items()
        for index, row in enumerate(rows)
        if row.prompt is not None
    ]
    with _progress("answering", len(asked)) as advance:
        answers = generate_answers(
            parts.model,
            parts.tokenizer,
            [prompt for *_, prompt in asked],
            config.batch_size,
            config.max_new_tokens,
            parts.tokenizer.pad_token_id,
            advance,
        )
    for (name, index, row, _), answer in zip(asked, answers, strict=True):
        table.generations.append(GenerationRecord(name, index, row.prompt or "", row.completion, row.fact, answer.text))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields what to call with the number of rows done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
