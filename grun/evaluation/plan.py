"""What one evaluation takes and what its result depends on, before anything is asked of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.checks import quirks_in_force
from grun.config.options import EvaluateConfig
from grun.data.corpus import Corpus
from grun.data.rows import Row, evenly_spaced
from grun.errors import ConfigError, RunError, unknown_name
from grun.evaluation.items import Item, encode_items, questions
from grun.evaluation.table import Table
from grun.runtime.files import content_hash, file_hash, settle, take, target, writing
from grun.runtime.ownership import PRIVATE, foreign, listed
from grun.runtime.reading import DamagedFile
from grun.runtime.records import Evaluation, read_record
from grun.runtime.runs import first_difference
from grun.version import __version__

if TYPE_CHECKING:
    from grun.evaluation.shared_scoring import Subject
    from grun.loading.adapters import Loaded

log = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
FORMAT = 2
"""Raised when the table or the meaning of a metric changes, so that older results are not taken for new ones."""
CODE = (
    "evaluation/scoring.py",
    "evaluation/shared_scoring.py",
    "evaluation/packed_scoring.py",
    "evaluation/generation.py",
    "data/encoding.py",
    "data/templates.py",
    "data/chat.py",
    "data/control_tokens.py",
    "method/*.py",
    "method/stack/*.py",
    "cache/*.py",
    "../pyvene_custom/*.py",
)
"""Sources that decide what a model is asked and what it answers, relative to the package."""


@dataclass
class Plan:
    """One evaluation that is to be made, or that is there already."""

    config: EvaluateConfig
    """Names one adapter at most."""
    folder: Path
    subject: Subject
    tokenizer: Any
    sets: dict[str, list[Row]]
    items: list[Item]
    tokens: str
    """Hash of what is scored."""
    inputs: dict[str, Any]
    """What the result depends on, as it stands in evaluation.json."""
    key: str
    """Hash of inputs and tokens."""
    previous: dict[str, Any] | None
    """evaluation.json of the same key, if it is there."""
    replaces: bool
    """Whether an evaluation that is there goes: it is to be overwritten, or its table is damaged."""

    @property
    def journals(self) -> Path:
        """Folder of what is done so far."""
        return self.folder / PRIVATE / f"unfinished-{self.key[:16]}"


def make_plan(
    config: EvaluateConfig, folder: Path, loaded: Loaded, corpus: Corpus, previous: dict[str, Any] | None
) -> Plan:
    """What evaluating a loaded model takes; RunError where `previous` is another evaluation in `folder`."""
    from grun.data.templates import in_force
    from grun.evaluation.shared_scoring import Subject
    from grun.loading.models import context_length

    data, tokenizer, subject = config.data, loaded.tokenizer, Subject(loaded.model)
    template = in_force(config, loaded.template, tokenizer)
    sets = _choose(corpus.sets(), config.sets, data.limit)
    items = encode_items(sets, tokenizer, template, context_length(subject.base), config)
    inputs = {
        "identity": {**loaded.identity, "version": __version__, "format": FORMAT, "code": code_hash()},
        "template": template.to_dict(),
        "data": corpus.hashes(),
        "settings": {
            "sets": list(sets),
            "limit": data.limit,
            "continuations": list(config.continuations),
            "max_length": data.max_length,
            "max_new_tokens": config.max_new_tokens,
            "gate_threshold": config.gate_threshold,
            "quirks": quirks_in_force(config),
        },
    }
    tokens = content_hash([[item.set, item.kind, item.row.prompt_ids, item.row.answer_ids] for item in items])
    key = content_hash({**inputs, "tokens": tokens})
    previous = same_evaluation(folder, previous, key, inputs, config.overwrite)
    wrong = None if previous is None else _damage(folder, sets, items)
    if wrong:
        log.warning("%s is evaluated again: %s", folder, wrong)
        previous = None
    replaces = config.overwrite or wrong is not None
    return Plan(config, folder, subject, tokenizer, sets, items, tokens, inputs, key, previous, replaces)


def _damage(folder: Path, sets: Mapping[str, list[Row]], items: Sequence[Item]) -> str | None:
    """What is wrong with the table of an evaluation that is there; None: it has all that is asked."""
    try:
        table = Table.read(folder)
    except DamagedFile as error:
        return str(error)
    scored = [(record.set, record.index, record.kind, record.variant) for record in table.scores]
    answered = [(record.set, record.index) for record in table.generations]
    if scored != [(item.set, item.index, item.kind, item.variant) for item in items]:
        return "its scores are not those of the rows"
    return None if answered == [question[:2] for question in questions(sets, items)] else "answers are missing"


def same_evaluation(
    folder: Path, previous: dict[str, Any] | None, key: str, inputs: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """`previous` if it is the evaluation of `key`, None if it may be replaced; else a RunError."""
    if previous is None or previous.get("key") == key:
        return previous
    if not overwrite:
        there = {name: previous.get(name) for name in inputs}
        raise RunError(
            f"{folder} holds another evaluation ({first_difference(there, inputs)}); choose another output_dir or "
            "pass overwrite=true"
        )
    return None


def code_hash(patterns: Sequence[str] = CODE) -> str:
    """Hash of the sources that decide what a model is asked and what it answers, files that `patterns` name."""
    package = Path(__file__).parents[1]
    files = sorted({path for pattern in patterns for path in package.glob(pattern)})
    return content_hash([[path.name, file_hash(path)] for path in files])


def previous_in(output_dir: Path, overwrite: bool) -> dict[str, Any] | None:
    """The evaluation that lies in output_dir, None if there is none; RunError where it could not be replaced."""
    target(output_dir)
    settle(output_dir)
    path = output_dir / EVALUATION_FILE
    if not path.is_file():
        if names := foreign(output_dir):
            raise RunError(
                f"{output_dir} is there already and holds no {EVALUATION_FILE} (but {names[0]}); choose another "
                "output_dir"
            )
        return None
    if overwrite and listed(output_dir) is None:
        raise RunError(
            f"{output_dir} holds an evaluation without a readable list of its files (of an older version, or damaged), "
            "so it is not replaced; remove it yourself, or choose another output_dir"
        )
    try:
        return read_record(path, Evaluation)
    except DamagedFile:
        return {}


def begin(output_dir: Path, overwrite: bool) -> None:
    """Take output_dir for an evaluation that is to be made; RunError where another process has just made one."""
    with writing(output_dir):
        take(output_dir)
    if previous_in(output_dir, overwrite) is not None and not overwrite:
        raise RunError(f"another process has just evaluated into {output_dir}; the same command finds it")


def _choose(sets: Mapping[str, list[Row]], wanted: list[str], limit: int | None) -> dict[str, list[Row]]:
    for name in wanted:
        if name not in sets:
            raise ConfigError(unknown_name("evaluation set", name, list(sets)))
    return {name: evenly_spaced(rows, limit) for name, rows in sets.items() if not wanted or name in wanted}
