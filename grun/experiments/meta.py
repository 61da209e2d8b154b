"""`python -m grun meta`: the table of metrics, from evaluations that are there or of models that it makes itself."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grun.config.options import MetaConfig
from grun.errors import ConfigError
from grun.experiments.options import resolved, shared
from grun.report.meta import judge_metrics
from grun.runtime.files import target

log = logging.getLogger(__name__)

SUBSETS = {"knows": "all", "never": "without_forget"}
"""What the models of each group are taught."""
RELEARNING = ("data.subset=forget", "train.epochs=1", "train.schedule=constant", "train.warmup=0")
"""One epoch of the forget rows, as published; at a constant rate, since it may be a step or two."""


def meta(config: MetaConfig) -> Path:
    """Judge the metrics as `config` asks; with `models` the models are made, damaged and evaluated first.

    Raises:
        ConfigError: both models and evaluations are named, or as `judge_metrics`.
        RunError: as `judge_metrics`.
    """
    if config.models is None:
        return judge_metrics(config)
    if config.knows or config.never:
        raise ConfigError("models=N makes the models that know and those that never did; leave knows and never out")
    options = _options(config)
    options(command="finetune", texts=config.finetune)  # what is wrong is told before anything is made
    options(command="evaluate", texts=[*config.evaluate, f"model.quantization={config.quantized}"])
    with contextlib.redirect_stdout(sys.stderr):
        made = {group: [str(folder) for folder in make_models(config, group)] for group in SUBSETS}
    return judge_metrics(replace(config, knows=made["knows"], never=made["never"]))


def make_models(config: MetaConfig, group: str) -> list[Path]:
    """Fine-tune, relearn, quantize and evaluate the models of a group; folders of the evaluations before damage.

    What is there already is found again, so the same command goes on after any end.
    """
    from grun.commands.finetune import finetune
    from grun.evaluation.evaluate import evaluate

    results = target(config.results_dir, "results_dir")
    options = _options(config)
    data = [text for text in shared(config.finetune) if text.startswith("data.")]
    names = [f"{group}-{seed}" for seed in range(1, int(config.models or 0) + 1)]
    for seed, name in enumerate(names, start=1):
        log.info("%s of %d", name, config.models)
        again = f"{name}-{config.relearned}"
        taught = [f"data.subset={SUBSETS[group]}", f"output_dir={results / name}"]
        learned = [*RELEARNING, f"model.path={results / name}", f"output_dir={results / again}"]
        for own in (taught, learned):
            finetune(options(command="finetune", texts=[*config.finetune, f"seed={seed}", *own]))
        for evaluation, model, more in (
            (name, name, []),
            (again, again, []),
            (f"{name}-{config.quantized}", name, [f"model.quantization={config.quantized}"]),
        ):
            own = [*more, f"model.path={results / model}"]
            asked = options(command="evaluate", texts=[*data, *config.evaluate, *own])
            evaluate(asked, results / "evaluation" / evaluation)
    return [results / "evaluation" / name for name in names]


def _options(config: MetaConfig) -> Callable[..., Any]:
    """Checked options of a command (`command`, `texts`) by the profile."""
    return partial(resolved, f"meta with profile={config.profile}", profile=config.profile, model=None)
