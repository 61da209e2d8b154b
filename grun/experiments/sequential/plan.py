"""What an experiment will do: its requests, and every command's options resolved, before anything is trained.

Precedence, later wins: profile, the file's `data`, its `unlearn`, its `methods_options`, the command line's
`unlearn=[...]`, whose `data.*` and `model.*` hold for fine-tuning and evaluation too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grun.config.options import DataConfig, EvaluateConfig, FinetuneConfig, SequentialConfig, UnlearnConfig
from grun.data.corpus import Corpus, load_corpus
from grun.data.jsonl import load_rows
from grun.data.rows import Row, are_texts
from grun.data.sets import in_order
from grun.data.subject import KINDS
from grun.errors import ConfigError
from grun.evaluation.probe import asked_first
from grun.experiments.models import nothing_to_teach
from grun.experiments.options import CORPUS, GENERATED, arguments, known, refuse_set, resolved, shared
from grun.experiments.sequential.definition import OwnRequest, Sequence, check_methods, read_sequence
from grun.experiments.sequential.files import ExperimentFiles, write_rows
from grun.experiments.sequential.splitting import NAMED, Request, check_requests, cut, joined
from grun.method.stack.combination import RULES
from grun.method.stack.manifest import check_id
from grun.runtime.files import target

LISTED = ("corpora", "muse")
"""Benchmarks of plain texts whose `data.forget` is a list of names, of which a request takes some."""
ASKED = 0.5
"""Share of a plain text that is given when it is to be continued."""


@dataclass(frozen=True)
class Plan:
    """Everything an experiment will do."""

    sequence: Sequence
    files: ExperimentFiles
    requests: list[Request]
    corpus: Corpus
    unlearn: dict[str, UnlearnConfig]
    """Options by method; those of retrain are never used."""
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    subjects: dict[str, list[str]]
    """Id of a request -> `data.subjects` of its GRUN adapter; empty where no kind of them is given."""
    at: dict[str, list[int]]
    """After which requests each method is measured, from 1."""


def make_plan(config: SequentialConfig) -> Plan:
    """Resolve the options of `config` and cut its forget set.

    Raises:
        ConfigError: something is unknown, contradictory or out of range; there are more requests than people.
        DataError: rows are missing or malformed, or a request overlaps the retain set or an earlier request.
    """
    sequence = _changed(read_sequence(config.sequence), config)
    files = ExperimentFiles(target(config.results_dir or f"results/{sequence.name}-sequential", "results_dir"))
    for command, texts in (("unlearn", config.unlearn), ("evaluate", config.evaluate)):
        for text in texts:
            refuse_set(f"{command}=[{text}]", text.partition("=")[0], command, "experiment")

    def options(command: str, *layers: list[str]) -> Any:
        model = None if command == "finetune" else config.model
        texts = [text for layer in layers for text in layer]
        return resolved(f"sequence {sequence.name}, {command}", command, sequence.profile, model, texts)

    of_file, of_all = arguments(sequence.data), arguments(sequence.unlearn)
    unlearn = {
        method: options(
            *("unlearn", of_file, of_all),
            [f"method.parametrization={'grun' if method == 'retrain' else method}"],
            arguments(sequence.methods_options.get(method, {})),
            config.unlearn,
        )
        for method in sequence.methods
    }
    if "retrain" in sequence.methods and nothing_to_teach(next(iter(unlearn.values()))):
        raise ConfigError("methods: retrain teaches a new model, but this corpus is what the model knows already")
    base = asked_first(next(iter(unlearn.values())))
    corpus, requests, chosen = _rows(sequence, base.data, files)
    data = [*of_file, *shared([*of_all, *config.unlearn])]
    evaluate = options("evaluate", data, arguments(sequence.evaluate), config.evaluate)
    finetune = options("finetune", data)
    of_corpus = {name: getattr(chosen, name) for name in CORPUS} | {name: getattr(chosen, name) for name in GENERATED}
    for command in (evaluate, finetune):
        command.data = replace(command.data, **of_corpus)
    evaluate.data.text = chosen.text
    evaluate.sets = _sets(evaluate, corpus)
    subjects = _subjects(sequence, requests, corpus, unlearn)
    check_requests(requests, corpus.forget, corpus.retain, overlap=base.data.allow_overlap)
    at = {method: list(range(1, len(requests) + 1)) for method in sequence.methods}
    if "retrain" in at and sequence.retrain_at:
        at["retrain"] = _steps(sequence, len(requests))
    return Plan(sequence, files, requests, corpus, unlearn, finetune, evaluate, subjects, at)


def _changed(sequence: Sequence, config: SequentialConfig) -> Sequence:
    """The experiment as the command line has it."""
    if config.methods:
        sequence.methods = check_methods("methods", list(config.methods))
    if config.requests is not None:
        if not isinstance(sequence.requests, int):
            raise ConfigError(f"requests={config.requests}: the sequence {sequence.name} lists its requests; leave out")
        sequence.requests = config.requests
    if isinstance(sequence.requests, int) and sequence.requests < 1:
        raise ConfigError(f"requests={sequence.requests} must be greater than 0")
    for name in ("retrain_at", "rule", "independent", "earlier_as_retain"):
        if getattr(config, name) not in (None, []):
            setattr(sequence, name, getattr(config, name))
    known(f"sequence {sequence.name}", "rule", [sequence.rule], RULES)
    return sequence


def _rows(sequence: Sequence, data: DataConfig, files: ExperimentFiles) -> tuple[Corpus, list[Request], DataConfig]:
    """The corpus whose forget set are all requests together, the requests, and the options that lead to it."""
    if isinstance(sequence.requests, int):
        corpus = load_corpus(data)
        return corpus, cut(corpus.forget, corpus.name, sequence.requests), _to_ask(corpus, data)
    if data.name in LISTED:
        own = _own(sequence.requests, lambda name: load_corpus(replace(data, forget=name)).forget)
        data = replace(data, forget=",".join(request.forget for request in sequence.requests))
        corpus = load_corpus(data)
        return corpus, joined(own)[0], _to_ask(corpus, data)
    if data.name != "jsonl":
        raise ConfigError(
            f"sequence {sequence.name} lists files of requests, so data.name must be jsonl, {' or '.join(LISTED)}, not "
            f"{data.name}"
        )
    folder = Path(data.path or "").expanduser()
    requests, rows = joined(_own(sequence.requests, lambda name: load_rows(name, str(folder), data.columns)))
    if data.retain is None:
        raise ConfigError("data.name=jsonl needs data.retain, the file of the rows to keep")
    unknown = None if data.unknown is None else str(folder / data.unknown)
    chosen = replace(data, path=None, forget=str(files.forget), retain=str(folder / data.retain), unknown=unknown)
    with tempfile.TemporaryDirectory() as temporary:  # nothing is written into results before it is sure whose they are
        write_rows(Path(temporary) / "forget.jsonl", rows)
        corpus = load_corpus(replace(chosen, forget=f"{temporary}/forget.jsonl"))
    return corpus, requests, chosen


def _to_ask(corpus: Corpus, data: DataConfig) -> DataConfig:
    """The options by which an evaluation asks for what is forgotten: plain texts are continued from their middle."""
    if not are_texts(corpus.forget) or data.text.asked:
        return data
    return replace(data, text=replace(data.text, asked=ASKED))


def _subjects(
    sequence: Sequence, requests: list[Request], corpus: Corpus, unlearn: dict[str, UnlearnConfig]
) -> dict[str, list[str]]:
    """Whom the rows of each request name, if the experiment says what kind of subjects they are."""
    kind, config = sequence.subject_kind, unlearn.get("grun")
    if kind is None or config is None:
        return {}
    where = f"sequence {sequence.name}: subject_kind"
    known(where, "kind", [kind], ("any", *KINDS))
    if config.method.gate_fit == "joint":
        raise ConfigError(f"{where} is for method.gate_fit=logistic (design=pooled has it); set that, or leave it out")
    config.data.subject_kind = kind
    found = {request.id: request.subjects(corpus.forget) for request in requests}
    if silent := [name for name, subjects in found.items() if not subjects]:
        raise ConfigError(f"{where}: no row of request {silent[0]} has a field {' or '.join(NAMED)}, whom it is about")
    return found


def _own(listed: list[OwnRequest], rows_of: Callable[[str], list[Row]]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for request in listed:
        check_id(request.id)
        if request.id.casefold() in map(str.casefold, found):
            raise ConfigError(f"two requests are called {request.id}; give each an id of its own")
        found[request.id] = rows_of(request.forget)
    return found


def _sets(evaluate: EvaluateConfig, corpus: Corpus) -> list[str]:
    if evaluate.data.limit is not None and evaluate.data.limit < len(corpus.forget):
        raise ConfigError(
            f"data.limit={evaluate.data.limit} would leave out forget rows, each of which belongs to a request; raise "
            f"it to {len(corpus.forget)} or leave it out"
        )
    if evaluate.sets and "forget" not in evaluate.sets:
        raise ConfigError("evaluate.sets leaves out forget, which the experiment is about; add it")
    return evaluate.sets or [one.name for one in in_order(corpus.sets()) if one.is_result]


def _steps(sequence: Sequence, count: int) -> list[int]:
    wanted = []
    for given in sequence.retrain_at:
        number = given if given > 0 else count + 1 + given
        if not 1 <= number <= count or given == 0:
            raise ConfigError(f"retrain_at={given}: there are {count} requests; give numbers from 1 to {count}, or -1")
        wanted.append(number)
    return sorted(set(wanted))
