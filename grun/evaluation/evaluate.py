"""One evaluation: load, score, generate, write the table and the metrics computed from it.

The folder it writes holds `evaluation.json` and the files of `table.py`; it is whole or absent. While it is made, what
is done so far lies beside it in a hidden folder, from which the same command goes on after a kill.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grun
from grun.checks import check, evaluation_quirks
from grun.config import EvaluateConfig
from grun.data.corpus import Corpus
from grun.data.encoding import EncodedRow
from grun.data.rows import Row, evenly_spaced
from grun.data.templates import Template
from grun.errors import ConfigError, RunError
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.files import content_hash, file_hash, read_json, whole_folder, write_json, writing
from grun.registry import unknown_name
from grun.runs import first_difference

log = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
FORMAT = 2
"""Raised when the table or the meaning of a metric changes, so that older results are not taken for new ones."""
ANSWER_ONLY = ("forget_paraphrase",)
"""Sets of which only the answers are scored: their paraphrases and wrong answers belong to other questions."""
CODE = (
    "evaluation/scoring.py",
    "evaluation/generation.py",
    "data/encoding.py",
    "data/templates.py",
    "data/control_tokens.py",
    "method/*.py",
    "../pyvene_custom/*.py",
)
"""Sources that decide what a model is asked and what it says, relative to the package."""


@dataclass
class Parts:
    """What an evaluation needs, loaded."""

    model: Any
    """A transformers model, or a GrunModel around one."""
    tokenizer: Any
    template: Template
    corpus: Corpus
    identity: dict[str, str | None]
    """See `grun.loading.Loaded`."""


@dataclass(frozen=True)
class Item:
    """One continuation to score."""

    set: str
    index: int
    kind: str
    variant: int
    row: EncodedRow
    text: str
    """The continuation itself."""
    ended: bool
    """Whether its end token is there."""


def load_parts(config: EvaluateConfig) -> Parts:
    """Load the model, with its adapter if there is one, the corpus and the template that belongs to them."""
    from grun.data.corpus import load_corpus
    from grun.data.templates import resolve
    from grun.loading import load_model

    corpus = load_corpus(config.data)  # first: a misspelled file is found before minutes of loading
    loaded = load_model(config.model, config.adapter, strict=config.strict, gate_threshold=config.gate_threshold)
    data = config.data
    template = resolve(data.template, loaded.template, loaded.tokenizer, data.system_prompt, data.date)
    return Parts(loaded.model, loaded.tokenizer, template, corpus, loaded.identity)


def code_hash() -> str:
    """Hash of the sources that decide what a model is asked and what it says."""
    package = Path(grun.__file__).parent
    files = sorted(path for pattern in CODE for path in package.glob(pattern))
    return content_hash([[path.name, file_hash(path)] for path in files])


def evaluate(config: EvaluateConfig, output_dir: Path) -> dict[str, Any]:
    """Evaluate a model on every set of the corpus and return what `evaluation.json` in output_dir then holds.

    Where the table of the same model, adapter, rows, template, settings and code is there already, only the metrics
    are computed from it; anything else there is a RunError unless config.overwrite.
    """
    check(config)
    if config.gate_threshold is not None and config.adapter is None:
        raise ConfigError("gate_threshold needs an adapter: pass adapter=FOLDER, or leave gate_threshold out")
    started = time.monotonic()
    previous = _previous(output_dir, config.overwrite)
    reference = None if config.reference is None else read_evaluation(Path(config.reference))
    parts = load_parts(config)
    quirks = evaluation_quirks(config)
    sets = _choose(parts.corpus.sets(), config.sets, config.data.limit)
    items = encode_items(parts, sets, config)
    inputs = {
        "identity": {**parts.identity, "version": grun.__version__, "format": FORMAT, "code": code_hash()},
        "template": parts.template.to_dict(),
        "data": parts.corpus.hashes(),
        "settings": {
            "sets": list(sets),
            "limit": config.data.limit,
            "continuations": list(config.continuations),
            "max_length": config.data.max_length,
            "max_new_tokens": config.max_new_tokens,
            "gate_threshold": config.gate_threshold,
            "quirks": quirks,
        },
    }
    tokens = content_hash([[item.set, item.kind, item.row.prompt_ids, item.row.answer_ids] for item in items])
    key = content_hash({**inputs, "tokens": tokens})
    if previous is not None and previous.get("key") != key and not config.overwrite:
        there = {name: previous.get(name) for name in inputs}
        raise RunError(
            f"{output_dir} holds another evaluation ({first_difference(there, inputs)}); choose another output_dir or "
            "pass overwrite=true"
        )
    result = {"key": key, "model": config.model.path, "adapter": config.adapter, **inputs}
    if previous is not None and previous.get("key") == key:
        print(f"already evaluated: {output_dir}", file=sys.stderr)
        result |= {**measure(Table.read(output_dir), quirks, reference), "seconds": previous.get("seconds", {})}
        if result != previous:
            write_json(output_dir / EVALUATION_FILE, result)
        return result
    loaded = time.monotonic()
    with _journals(output_dir, key) as journals:
        table = Table()
        score_items(table, parts, items, config, journals)
        scored = time.monotonic()
        answer_questions(table, parts, sets, items, config, journals)
        finished = time.monotonic()
        seconds = {
            "load": round(loaded - started, 3),
            "score": round(scored - loaded, 3),
            "generate": round(finished - scored, 3),
            "total": round(finished - started, 3),
        }
        with whole_folder(output_dir) as folder:
            with writing(output_dir.parent):
                table.write(folder)
            # From what was written, so that the same table gives the same numbers later.
            result |= {**measure(Table.read(folder), quirks, reference), "seconds": seconds}
            with writing(output_dir.parent):
                write_json(folder / EVALUATION_FILE, result)
    return result


def read_evaluation(folder: Path) -> tuple[str, Table]:
    """Key and table of an evaluation on disk; RunError if there is none."""
    path = folder / EVALUATION_FILE
    try:
        key = read_json(path)["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"reference={folder}: no evaluation there ({EVALUATION_FILE} is missing or damaged); evaluate a model that "
            "was never taught the forget set with output_dir set to that folder first"
        ) from error
    return str(key), Table.read(folder)


def measure(table: Table, quirks: Collection[str] = (), reference: tuple[str, Table] | None = None) -> dict[str, Any]:
    """All metrics of a table: counts, sets, overall; gate for a model with gates; reference where there is one."""
    from grun.evaluation.gates import gate_table
    from grun.evaluation.metrics import overall_metrics, reference_metrics, set_metrics

    measured: dict[str, Any] = {
        "counts": {
            name: {
                "rows": len(table.scores_of(name)),
                "answer_tokens": sum(row.answer_tokens for row in table.scores_of(name)),
            }
            for name in table.sets()
        },
        "sets": set_metrics(table, quirks),
        "overall": overall_metrics(table, quirks),
    }
    if gate := gate_table(table):
        measured["gate"] = gate
    if reference is not None:
        key, of_reference = reference
        measured |= {"reference": reference_metrics(table, of_reference, quirks), "reference_key": key}
    return measured


@contextlib.contextmanager
def _journals(output_dir: Path, key: str) -> Iterator[Path]:
    """Folder of what is done so far of the evaluation `key`; it goes when the block ends without an exception."""
    folder = output_dir.with_name(f".{output_dir.name}.{key[:16]}.unfinished")
    yield folder
    for old in output_dir.parent.glob(f".{output_dir.name}.*.unfinished"):
        shutil.rmtree(old, ignore_errors=True)


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


def encode_items(parts: Parts, sets: Mapping[str, list[Row]], config: EvaluateConfig) -> list[Item]:
    """Everything to score: of each row its answer and, where it has them, its paraphrased and its wrong answers."""
    from grun.data.encoding import encode_rows
    from grun.evaluation.generation import base_of
    from grun.loading import context_length

    context = context_length(base_of(parts.model))
    longest = min(config.data.max_length or context, context)
    end = parts.tokenizer.eos_token_id
    items = []
    for name, rows in sets.items():
        places, texts = [], []
        incomplete = [index for index, row in enumerate(rows) if not row.extra.get("perturbed_answer")]
        if 0 < len(incomplete) < len(rows):
            log.warning(
                "%s: %d of %d rows (the first is row %d) have no perturbed_answer, so the set gets no truth ratio",
                name, len(incomplete), len(rows), incomplete[0] + 1,
            )  # fmt: skip
        for index, row in enumerate(rows):
            for kind, variant, text in _continuations(name, row):
                if not config.continuations or kind in config.continuations:
                    places.append((name, index, kind, variant))
                    texts.append(Row(row.prompt, text))
        encoded = encode_rows(texts, parts.tokenizer, parts.template, longest, config.data.strict)
        for place, row, ids in zip(places, texts, encoded, strict=True):
            items.append(Item(*place, ids, row.completion, bool(ids.answer_ids) and ids.answer_ids[-1] == end))
    return items


def _continuations(set_name: str, row: Row) -> Iterator[tuple[str, int, str]]:
    """Kind, variant and text of what is scored of a row."""
    yield "answer", 0, row.completion
    if set_name in ANSWER_ONLY:
        return
    if row.extra.get("paraphrased_answer"):
        yield "paraphrase", 0, str(row.extra["paraphrased_answer"])
    for variant, text in enumerate(row.extra.get("perturbed_answer") or ()):
        yield "perturbed", variant, text


def score_items(table: Table, parts: Parts, items: list[Item], config: EvaluateConfig, journals: Path | None) -> None:
    """Add the scores and gates of all sets to the table; sets are scored together, so no row is scored twice."""
    from grun.evaluation.journal import Journal
    from grun.evaluation.scoring import ScoredRow, score

    rows = [item.row for item in items]
    pad_id = parts.tokenizer.pad_token_id
    with contextlib.ExitStack() as stack:
        journal: Journal[ScoredRow] | None = None
        if journals is not None:
            journal = Journal(journals / "scores.jsonl", to_json=list, from_json=ScoredRow.from_json)
            stack.callback(journal.close)
        advance = stack.enter_context(_progress("scoring", len(items), shown=journals is not None))
        masked = _masked_id(parts, config)
        scored = score(parts.model, rows, config.batch_size, pad_id, advance, masked_id=masked, journal=journal)
    gated = set()
    for item, result in zip(items, scored, strict=True):
        table.scores.append(
            ScoreRecord(
                set=item.set,
                index=item.index,
                kind=item.kind,
                variant=item.variant,
                prompt_tokens=len(item.row.prompt_ids),
                answer_tokens=len(item.row.answer_ids),
                ended=item.ended,
                compressed_bytes=len(zlib.compress(item.text.encode())),
                logp=result.logp,
                hit=result.hit,
                vocabulary_mean=result.vocabulary_mean,
                vocabulary_variance=result.vocabulary_variance,
            )
        )
        if result.gates is not None and (item.set, item.index) not in gated:  # the same at every continuation
            gated.add((item.set, item.index))
            table.gates.append(GateRecord(item.set, item.index, result.gates))


def answer_questions(
    table: Table,
    parts: Parts,
    sets: Mapping[str, list[Row]],
    items: list[Item],
    config: EvaluateConfig,
    journals: Path | None,
) -> None:
    """Add an answer to every question of all sets to the table; plain text (no prompt) asks nothing."""
    from grun.evaluation.generation import Answer, generate_answers
    from grun.evaluation.journal import Journal

    prompts = {(item.set, item.index): list(item.row.prompt_ids) for item in items}
    asked = [
        (name, index, row, prompts[name, index])
        for name, rows in sets.items()
        for index, row in enumerate(rows)
        if row.prompt is not None and (name, index) in prompts
    ]
    with contextlib.ExitStack() as stack:
        journal: Journal[Answer] | None = None
        if journals is not None:
            journal = Journal(journals / "generations.jsonl", to_json=list, from_json=Answer.from_json)
            stack.callback(journal.close)
        answers = generate_answers(
            parts.model,
            parts.tokenizer,
            [prompt for *_, prompt in asked],
            config.batch_size,
            config.max_new_tokens,
            parts.tokenizer.pad_token_id,
            stack.enter_context(_progress("answering", len(asked), shown=journals is not None)),
            masked_id=_masked_id(parts, config),
            journal=journal,
        )
    for (name, index, row, _), answer in zip(asked, answers, strict=True):
        table.generations.append(GenerationRecord(name, index, row.prompt or "", row.completion, row.fact, answer.text))


def _masked_id(parts: Parts, config: EvaluateConfig) -> int | None:
    quirky = "eos_masked_attention" in evaluation_quirks(config)
    return int(parts.tokenizer.pad_token_id) if quirky else None


@contextlib.contextmanager
def _progress(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields what to call with the number of rows done."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
