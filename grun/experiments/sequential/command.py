"""`python -m grun sequential`: requests one after another, served by several methods, and what came of it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grun.config.options import SequentialConfig
from grun.config.values import to_dict, with_sources
from grun.data.corpus import Corpus
from grun.data.rows import Row, hash_rows
from grun.errors import RunError
from grun.experiments.sequential.chain import Chain
from grun.experiments.sequential.files import BEFORE, RETAIN_ONLY, ChainFiles, ExperimentFiles, write_rows
from grun.experiments.sequential.plan import Plan, make_plan
from grun.experiments.sequential.running import run_chain
from grun.experiments.sweep.cells import base_identity
from grun.runtime import stopping
from grun.runtime.files import clear, content_hash, remove, taken, writing
from grun.runtime.ownership import foreign
from grun.runtime.reading import DamagedFile
from grun.runtime.runs import first_difference, identity
from grun.runtime.sealed import read_sealed, write_sealed
from grun.version import __version__

log = logging.getLogger(__name__)


def sequential(config: SequentialConfig) -> bool:
    """Run `config`: one method where it names its chain, else the whole experiment; whether nothing failed.

    Steps that are done under the same options are passed over, so the same command goes on after any end.
    """
    if config.chain is not None:
        with contextlib.redirect_stdout(sys.stderr):
            run_chain(Path(config.chain).expanduser())
        return True
    plan = make_plan(config)
    with contextlib.redirect_stdout(sys.stderr):
        _prepare(plan, config)
        ends = {method: start(plan.files, method) for method in plan.sequence.methods}
    from grun.experiments.sequential.report import make_report

    make_report(plan.files.results)
    failed = {method: status for method, status in ends.items() if status != 0}
    for method, status in failed.items():
        told = "its error stands above" if 0 < status < 128 else f"its process was stopped, status {status}"
        log.info("failed: %s (%s); the same command goes on", method, told)
    return not failed


def start(files: ExperimentFiles, method: str) -> int:
    """Carry out a method in a process of its own, whose peak of memory is then the method's; its exit status."""
    chain = ChainFiles(files.results, method).chain
    child = stopping.start([sys.executable, "-m", "grun", "sequential", f"chain={chain}"])
    with stopping.ended([child]):
        return child.wait()


def _prepare(plan: Plan, config: SequentialConfig) -> None:
    """Teach the models, write the rows and the chains, and evaluate the models that nothing is done to."""
    files, first = plan.files, next(iter(plan.unlearn.values()))
    with taken(files.results, wait=True):
        _claim(plan, config)
        _write_rows(plan)
        model, retain_model = _models(plan, config)
        base = {"model": base_identity(model, first.model.revision)}
        if retain_model is not None:
            base["retain_model"] = base_identity(retain_model, None)
        for method in plan.sequence.methods:
            _write_chain(_chain(plan, method, model, retain_model, base), files.results, overwrite=config.overwrite)
        _evaluate(plan, BEFORE, model, first.model.revision)
        if retain_model is not None:
            _evaluate(plan, RETAIN_ONLY, retain_model, None)


def _claim(plan: Plan, config: SequentialConfig) -> None:
    """Make the results folder this experiment's; RunError if it holds another one, or anything else."""
    files, requests = plan.files, plan.requests
    taught: Any = identity(to_dict(plan.finetune))["config"]
    wanted = {
        "requests": {
            request.id: hash_rows([plan.corpus.forget[place] for place in request.rows]) for request in requests
        },
        "data": plan.corpus.hashes(),
        "model": taught if config.model is None else base_identity(config.model, plan.finetune.model.revision),
        "evaluate": identity(to_dict(plan.evaluate))["config"],
        "version": __version__,
    }
    if not files.experiment.is_file():
        if names := foreign(files.results):
            raise RunError(
                f"{files.results} is not empty and holds no experiment (but {names[0]}); choose another results_dir"
            )
        clear(files.results)
    elif _replaces(files.experiment, _experiment(files.experiment, config), wanted, overwrite=config.overwrite):
        clear(files.results)
    with writing(files.results):
        write_sealed(files.experiment, wanted)


def _experiment(path: Path, config: SequentialConfig) -> dict[str, Any]:
    """What the results folder is of; RunError where that can no longer be said, unless it is to be replaced anyway."""
    try:
        return read_sealed(path)
    except DamagedFile as error:
        if config.overwrite:
            return {}
        raise RunError(f"{error}, choose another results_dir, or overwrite=true begins anew") from error


def _write_chain(chain: Chain, results: Path, *, overwrite: bool) -> None:
    """Write a method's chain; steps of another one that stand there are an error, or go."""
    files = ChainFiles(results, chain.method)
    if files.chain.is_file() and _replaces_chain(files.chain, chain, overwrite=overwrite):
        remove(files.folder)
    chain.write(files.chain)


def _replaces_chain(path: Path, chain: Chain, *, overwrite: bool) -> bool:
    """As `_replaces`; a file that is damaged is written again, since each step says which chain it is of."""
    try:
        there = Chain.read(path).identity()
    except RunError:
        if not overwrite:
            log.warning("%s is damaged and is written again", path)
        return overwrite
    return _replaces(path, there, chain.identity(), overwrite=overwrite)


def _replaces(path: Path, there: dict[str, Any], wanted: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether what `path` says is to be replaced by something else; RunError if it may not be."""
    wanted = json.loads(json.dumps(wanted))
    if content_hash(there) == content_hash(wanted):
        return False
    if not overwrite:
        raise RunError(
            f"{path} is of another experiment ({first_difference(there, wanted)}); choose another results_dir, or "
            "overwrite=true replaces it"
        )
    return True


def _refused(corpus: Corpus, places: Iterable[int]) -> list[Row]:
    """Forget rows as a model answers them on which their request acts, for a later one that is to leave them alone."""
    refusals = corpus.refusals
    if not refusals:
        return []
    return [replace(corpus.forget[place], completion=refusals[place % len(refusals)], extra={}) for place in places]


def _write_rows(plan: Plan) -> None:
    """Write the rows of every request, what stays, and what each retraining teaches."""
    files, corpus = plan.files, plan.corpus
    write_rows(files.forget, corpus.forget)
    write_rows(files.retain, corpus.retain)
    asked: list[Row] = []
    left_alone: list[Row] = []
    for number, request in enumerate(plan.requests, start=1):
        rows = [corpus.forget[place] for place in request.rows]
        write_rows(files.request(request.id), rows)
        if plan.sequence.earlier_as_retain:
            write_rows(files.retain_beside(request.id), corpus.retain + left_alone)
        asked += rows
        left_alone += rows if plan.sequence.independent else _refused(corpus, request.rows)
        if number in plan.at.get("retrain", []) and number < len(plan.requests):
            gone = {(row.prompt, row.completion) for row in asked}
            taught = corpus.taught(without_forget=False)
            write_rows(files.asked(request.id), asked)
            write_rows(files.kept(request.id), [row for row in taught if (row.prompt, row.completion) not in gone])


def _models(plan: Plan, config: SequentialConfig) -> tuple[str, str | None]:
    """The model that knows everything and the one never taught any request, taught where they are not given."""
    from grun.commands.finetune import finetune

    def taught(subset: str) -> str:
        return str(finetune(replace(plan.finetune, data=replace(plan.finetune.data, subset=subset))))

    model = config.model or taught("all")
    if config.retain_model is None and config.model is not None and "retrain" not in plan.sequence.methods:
        return model, None
    return model, config.retain_model or taught("without_forget")


def _chain(plan: Plan, method: str, model: str, retain_model: str | None, base: dict[str, Any]) -> Chain:
    return Chain(
        method=method,
        requests={request.id: list(request.rows) for request in plan.requests},
        at=plan.at[method],
        model=model,
        retain_model=retain_model,
        base=base,
        unlearn=with_sources(plan.unlearn[method]),
        finetune=with_sources(plan.finetune),
        evaluate=with_sources(plan.evaluate),
        rule=plan.sequence.rule,
        independent=plan.sequence.independent,
        earlier_as_retain=plan.sequence.earlier_as_retain,
    )


def _evaluate(plan: Plan, name: str, model: str, revision: str | None) -> None:
    from grun.evaluation.evaluate import evaluate

    asked = replace(plan.evaluate, model=replace(plan.evaluate.model, path=model, revision=revision), overwrite=True)
    evaluate(asked, plan.files.evaluation(name))
