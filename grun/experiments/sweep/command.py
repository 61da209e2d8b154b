"""`python -m grun sweep`: every cell of a grid, unlearned and evaluated, and what came of it."""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from grun.config.options import EvaluateConfig, ReportConfig, SweepConfig
from grun.data.corpus import load_corpus
from grun.errors import ConfigError
from grun.evaluation.probe import asked_first
from grun.experiments.job import run_job
from grun.experiments.models import base_identity, both_models, nothing_to_teach
from grun.experiments.running import check_launcher, run_jobs
from grun.experiments.sweep.cells import REFERENCE, Cell, Discard, make_cell
from grun.experiments.sweep.plan import Plan, make_plan
from grun.experiments.sweep.tuning import GUESSED, SETS, write_choice
from grun.runtime.files import holding, take, target

log = logging.getLogger(__name__)

BEFORE = "before"


@holding()
def sweep(config: SweepConfig) -> bool:
    """Run `config`: one cell where it names one, else the whole sweep; whether nothing failed.

    Cells that are done under the same options are passed over, so the same command goes on after any end.
    """
    if config.cell is not None:
        with contextlib.redirect_stdout(sys.stderr):
            run_job(Cell, Path(config.cell).expanduser(), Cell.carry_out)
        return True
    plan = plan_of(config)
    results = results_dir(config)
    where = results / "tune" if config.tune else results
    with contextlib.redirect_stdout(sys.stderr):
        model, retain_model = both_models(config.model, config.retain_model, plan.base, plan.finetune, compared=False)
        evaluate = asked_first(replace(plan.evaluate, model=replace(plan.evaluate.model, path=model)))
        cells = _cells(config, plan, evaluate, model, retain_model, where)
        take(where)
        run = partial(run_jobs, at_once=config.jobs, launcher=config.launcher, resubmit=config.resubmit)
        # The retain-only model first, since the evaluations of the others compare with it.
        first = run([cell for cell in cells if cell.name == REFERENCE])
        standing = run([cell for cell in cells if cell.name != REFERENCE], before=first)
    lines = standing.lines()
    targets = {BEFORE} if retain_model is None else {BEFORE, REFERENCE}
    if config.tune and standing.settled and targets <= set(standing.done):
        lines += write_choice(where, plan.cells, standing.failed)
    if not config.tune and standing.settled and BEFORE in standing.done:
        from grun.report.make import make_report

        make_report(ReportConfig(results_dir=str(results), profile=plan.base.label()))
    for line in lines:
        log.info("%s", line)
    return not standing.failed


def results_dir(config: SweepConfig) -> Path:
    """Folder of the sweep's results."""
    return target(config.results_dir or f"results/{Path(config.sweep).stem}-sweep", "results_dir")


def plan_of(config: SweepConfig) -> Plan:
    """The plan; ConfigError for anything wrong with the sweep or its cells that shows before something is loaded."""
    plan = make_plan(config)
    if config.launcher is not None:
        check_launcher(config.launcher, results_dir(config))
    if config.tune and not plan.base.data.validation:
        raise ConfigError("--tune chooses by the set validation: set unlearn: {data: {validation: ROWS}} in the sweep")
    if config.tune and config.model is not None and config.retain_model is None and not nothing_to_teach(plan.base):
        raise ConfigError("--tune compares with a retain-only model: give retain_model=FOLDER too")
    return plan


def _cells(
    config: SweepConfig, plan: Plan, evaluate: EvaluateConfig, model: str, retain_model: str | None, results: Path
) -> list[Cell]:
    """The evaluations of the two models that were not unlearned, then the cells of the plan."""
    base = base_identity(model, plan.base.model.revision)
    if config.tune:
        guessed = [GUESSED] if retain_model is None else []
        evaluate = replace(evaluate, sets=[*SETS, *guessed], continuations=["answer"])
    elif not evaluate.sets and evaluate.data.validation:  # by which settings were chosen: it is no test of them
        evaluate = replace(evaluate, sets=[name for name in load_corpus(evaluate.data).sets() if name != "validation"])
    cells = []
    if retain_model is not None:
        of_retain = replace(evaluate, model=replace(evaluate.model, path=retain_model, revision=None))
        cells.append(make_cell(results, REFERENCE, None, of_retain, base_identity(retain_model, None), "nothing"))
    cells.append(make_cell(results, BEFORE, None, evaluate, base, "nothing"))
    discard: Discard = "weights" if config.tune else "models" if config.discard_models else "nothing"
    for planned in plan.cells:
        data = replace(planned.unlearn.data, path=evaluate.data.path)
        unlearn = replace(planned.unlearn, model=replace(planned.unlearn.model, path=model), data=data)
        cells.append(make_cell(results, planned.name, unlearn, evaluate, base, discard))
    return cells
