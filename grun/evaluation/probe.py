"""Ask a model what it knows, once: its answers are kept on disk, and questions that are new are asked alone."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from grun.config.options import DataConfig, ModelConfig
from grun.data import templates
from grun.data.answers import FILE, Answered, kept_answers
from grun.data.corpus import BENCHMARKS
from grun.data.templates import OPTIONS
from grun.errors import ConfigError
from grun.evaluation.metrics.answers import says
from grun.evaluation.plan import code_hash
from grun.loading.fetching import hashes_of
from grun.loading.named import MODELS
from grun.runtime import processes
from grun.runtime.files import append, content_hash, file_hash, taken, write_bytes, write_json, writing
from grun.runtime.memory import enough_memory
from grun.runtime.places import user_cache
from grun.runtime.progress import progress

log = logging.getLogger(__name__)

C = TypeVar("C")

LONGEST = 24
"""Longest answer, tokens."""
BATCH = 64
"""Questions that are answered at once; so many batches go by between two writes:"""
BATCHES = 4
CODE = ("evaluation/generation.py", "data/encoding.py", "data/templates.py", "data/chat.py", "data/control_tokens.py")
"""Sources that decide what a model is asked and what it answers."""
ASKED = "asked.json"
"""Says what the folder's answers are of."""
WEIGHTS = (".safetensors", ".bin", ".gguf")


def asked_first(config: C) -> C:
    """The config with `data.path` set to the folder of the model's answers, where `data.name` needs them.

    The model without any adapter is asked what was never asked of it. A config that names the folder stays as it is.

    Raises:
        ConfigError, ModelError: the model cannot be loaded.
        DataError: a question cannot be asked of it.
    """
    options: Any = config
    data: DataConfig = options.data
    asks = BENCHMARKS.get(data.name).asks
    if asks is None or data.path is not None:
        return config
    folder = user_cache() / "known" / answers_key(options.model, data)
    keep_answers(options, asks(data), folder)
    changed: C = dataclasses.replace(options, data=dataclasses.replace(data, path=str(folder)))
    return changed


def keep_answers(config: Any, wanted: Mapping[str, str], folder: Path) -> None:
    """See to it that a folder holds the model's greedy answers to all questions.

    What was asked before is not asked again, so that an interrupted call goes on. Others wait meanwhile.

    Args:
        config: of a command with `model`, which one is asked, and `data`, the template.
        wanted: the fact that a right answer holds, by question.
        folder: made if need be.

    Raises:
        ConfigError: several processes were started, and something is to be asked.
    """
    if not _missing(kept_answers(folder), wanted):
        return
    if processes.count() > 1:
        raise ConfigError(
            f"{folder} lacks answers of {config.model.path}, which one process asks: run the same command without "
            "torchrun or accelerate until it has asked, then again"
        )
    with taken(folder, wait=True), writing(folder):
        found = kept_answers(folder)
        missing = _missing(found, wanted)
        again = [dataclasses.replace(one, fact=wanted[q]) for q in missing if (one := found.get(q))]
        lines = b"".join(one.line() for one in found.values())
        if not (folder / FILE).is_file() or (folder / FILE).read_bytes() != lines:
            write_bytes(folder / FILE, lines)  # without a line that was cut off
        asked = {name: getattr(config.data, name) for name in OPTIONS}
        write_json(folder / ASKED, {"model": dataclasses.asdict(config.model), "data": asked})
        with append(folder / FILE) as file:
            file.write(b"".join(_judged(one.question, one.answer, one.fact).line() for one in again))
            _ask(config, {q: wanted[q] for q in missing if q not in found}, file)


def _missing(found: Mapping[str, Answered], wanted: Mapping[str, str]) -> list[str]:
    return [question for question, fact in wanted.items() if question not in found or found[question].fact != fact]


def _judged(question: str, answer: str, fact: str) -> Answered:
    return Answered(question, answer, fact, says(answer, fact))


def _ask(config: Any, wanted: Mapping[str, str], file: Any) -> None:
    """Ask the model and append what it answers, some batches at a time."""
    from grun.evaluation.generation import generate_answers
    from grun.loading.models import load_base

    if not wanted:
        return
    started = time.monotonic()
    base, tokenizer, stored = load_base(config.model)
    template = templates.in_force(config, stored, tokenizer)
    prompts = {question: templates.encode_prompt(template, tokenizer, question) for question in wanted}
    order = sorted(wanted, key=lambda question: len(prompts[question]))
    right = 0
    with enough_memory("asking", ["a smaller model"]), progress("asking what the model knows", len(order)) as advance:
        for start in range(0, len(order), BATCH * BATCHES):
            chunk = order[start : start + BATCH * BATCHES]
            texts = generate_answers(
                base,
                tokenizer,
                [prompts[question] for question in chunk],
                BATCH,
                LONGEST,
                int(tokenizer.pad_token_id),
                advance,
            )
            judged = [_judged(question, one.text, wanted[question]) for question, one in zip(chunk, texts, strict=True)]
            file.write(b"".join(one.line() for one in judged))
            right += sum(one.right for one in judged)
    seconds = time.monotonic() - started
    log.info("asked %s %d questions in %.0f s: %d answers are right", config.model.path, len(order), seconds, right)


def answers_key(model: ModelConfig, data: DataConfig) -> str:
    """What the answers depend on, as a name of a folder: files of the model, how it is loaded, template, code."""
    how = {name: getattr(model, name) for name in ("dtype", "quantization", "attention")}
    asked = {name: getattr(data, name) for name in OPTIONS}
    return content_hash([_model_key(model), how, asked, code_hash(CODE), LONGEST])[:16]


def _model_key(model: ModelConfig) -> object:
    """The commit of a hub model; of files their contents, of weights size and time, since hashing them takes long."""
    if model.path in MODELS:
        return hashes_of(str(model.path))
    path = Path(model.path or "").expanduser()
    if not path.exists():
        from grun.loading.streaming import file_of

        found = file_of(str(model.path), "config.json", model.revision)
        return [model.path, model.revision, Path(found).parent.name if found else None]
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [
        [file.name, _stamp(file) if file.suffix in WEIGHTS else file_hash(file)]
        for file in files
        if file.suffix in (*WEIGHTS, ".json", ".jinja", ".model")
    ]


def _stamp(file: Path) -> list[int]:
    about = file.stat()
    return [about.st_size, about.st_mtime_ns]
