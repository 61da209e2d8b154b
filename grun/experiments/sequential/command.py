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
from grun.data.rows import Row, are_texts, hash_rows
from grun.errors import RunError
from grun.experiments.job import run_job
from grun.experiments.models import base_identity, both_models
from grun.experiments.running import check_launcher, run_jobs
from grun.experiments.sequential.chain import Chain
from grun.experiments.sequential.files import BEFORE, RETAIN_ONLY, write_rows
from grun.experiments.sequential.plan import Plan, make_plan
from grun.runtime.files import clear, content_hash, remove, taken, writing
from grun.runtime.ownership import foreign
from grun.runtime.reading import DamagedFile
from grun.runtime.runs import first_difference, identity
from grun.runtime.sealed import read_sealed, write_sealed
from grun.version import __version__

log = logging.getLogger(__name__)


def sequential(config: SequentialConfig) -> bool:
    """Run `config`: one method where it names its chain, else the whole experiment; whether nothing failed.

    Steps that are done under the same options are passed over, so the same command goes on after any end. Each method
    runs in a process of its own, whose peak of memory is then the method's.
    """
    if config.chain is not None:
        from grun.experiments.sequential.steps import serve_all

        with contextlib.redirect_stdout(sys.stderr):
            run_job(Chain, Path(config.chain).expanduser(), serve_all)
        return True
    plan = make_plan(config)
    if config.launcher is not None:
        check_launcher(config.launcher, plan.files.results)
    with contextlib.redirect_stdout(sys.stderr):
        chains = _prepare(plan, config)
        standing = run_jobs(chains, at_once=config.jobs, launcher=config.launcher, resubmit=config.resubmit)
    if standing.settled:
        from grun.experiments.sequential.report import make_report

        make_report(plan.files.results)
    for line in standing.lines():
        log.info("%s", line)
    return not standing.failed


def _prepare(plan: Plan, config: SequentialConfig) -> list[Chain]:
    """Teach the models, write the rows and the chains, and evaluate the models that nothing is done to."""
    files, first = plan.files, next(iter(plan.unlearn.values()))
    with taken(files.results, wait=True):
        _claim(plan, config)
        _write_rows(plan)
        compared = "retrain" in plan.sequence.methods
        model, retain_model = both_models(config.model, config.retain_model, first, plan.finetune, compared=compared)
        base = {"model": base_identity(model, first.model.revision)}
        if retain_model is not None:
            base["retain_model"] = base_identity(retain_model, None)
        chains = [_chain(plan, method, model, retain_model, base) for method in plan.sequence.methods]
        for chain in chains:
            if chain.file.is_file() and _replaces_chain(chain, overwrite=config.overwrite):
                remove(chain.folder)
            chain.write()
        _evaluate(plan, BEFORE, model, first.model.revision)
        if retain_model is not None:
            _evaluate(plan, RETAIN_ONLY, retain_model, None)
    return chains


def _claim(plan: Plan, config: SequentialConfig) -> None:
    """Make the results folder this experiment's; RunError if it holds another one, or anything else."""
    results, path = plan.files.results, plan.files.experiment
    taught_as: Any = identity(to_dict(plan.finetune))["config"]
    rows = plan.corpus.forget
    wanted = {
        "requests": {request.id: hash_rows([rows[place] for place in request.rows]) for request in plan.requests},
        "data": plan.corpus.hashes(),
        "model": taught_as if config.model is None else base_identity(config.model, plan.finetune.model.revision),
        "evaluate": identity(to_dict(plan.evaluate))["config"],
        "version": __version__,
    }
    if not path.is_file():
        if names := foreign(results):
            raise RunError(
                f"{results} is not empty and holds no experiment (but {names[0]}); choose another results_dir"
            )
        clear(results)
    else:
        try:
            there = read_sealed(path)
        except DamagedFile as error:
            if not config.overwrite:
                raise RunError(f"{error}, choose another results_dir, or overwrite=true begins again") from error
            there = {}
        if _replaces(path, there, wanted, overwrite=config.overwrite):
            clear(results)
    with writing(results):
        write_sealed(path, wanted)


def _replaces_chain(chain: Chain, *, overwrite: bool) -> bool:
    """As `_replaces`; a file that is damaged is written again, since each step names the chain that it is of."""
    try:
        there = Chain.read(chain.file).identity()
    except RunError:
        if not overwrite:
            log.warning("%s is damaged and is written again", chain.file)
        return overwrite
    return _replaces(chain.file, there, chain.identity(), overwrite=overwrite)


def _replaces(path: Path, there: dict[str, Any], wanted: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether what `path` holds is to be replaced by something else; RunError if it may not be."""
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
    """Forget rows as a model answers them on which their request acts, for a later one that is to keep them so.

    None of plain texts, which get no refusal.
    """
    refusals = corpus.refusals
    if not refusals or are_texts(corpus.forget):
        return []
    return [replace(corpus.forget[place], completion=refusals[place % len(refusals)], extra={}) for place in places]


def _write_rows(plan: Plan) -> None:
    """Write the rows of every request, what stays, and what each retraining is fine-tuned on."""
    files, corpus = plan.files, plan.corpus
    write_rows(files.forget, corpus.forget)
    write_rows(files.retain, corpus.retain)
    asked: list[Row] = []
    unchanged: list[Row] = []
    for number, request in enumerate(plan.requests, start=1):
        rows = [corpus.forget[place] for place in request.rows]
        write_rows(files.rows("requests", request.id), rows)
        if plan.sequence.earlier_as_retain:
            write_rows(files.rows("retain_and_earlier", request.id), corpus.retain + unchanged)
        asked += rows
        unchanged += rows if plan.sequence.independent else _refused(corpus, request.rows)
        if number in plan.at.get("retrain", []) and number < len(plan.requests):
            gone = {(row.prompt, row.completion) for row in asked}
            every = corpus.taught(without_forget=False)
            write_rows(files.rows("asked", request.id), asked)
            write_rows(
                files.rows("kept", request.id), [row for row in every if (row.prompt, row.completion) not in gone]
            )


def _chain(plan: Plan, method: str, model: str, retain_model: str | None, base: dict[str, Any]) -> Chain:
    return Chain(
        file=plan.files.chain(method),
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
        subjects=plan.subjects,
    )


def _evaluate(plan: Plan, name: str, model: str, revision: str | None) -> None:
    from grun.evaluation.evaluate import evaluate

    asked = replace(plan.evaluate, model=replace(plan.evaluate.model, path=model, revision=revision), overwrite=True)
    evaluate(asked, plan.files.evaluation(name))
