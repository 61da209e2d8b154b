"""One cell of a sweep: unlearn, then evaluate, in one process.

Its file is RESULTS/cells/NAME.json; the run lies in RESULTS/NAME, its evaluation in RESULTS/evaluation/NAME.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grun.config.options import EvaluateConfig, UnlearnConfig
from grun.config.values import from_dict, with_sources
from grun.errors import RunError
from grun.experiments.job import Job
from grun.experiments.models import remove_weights, weights_in
from grun.method.parametrization import traits_of
from grun.runtime.files import content_hash, read_json, remove
from grun.runtime.reading import DamagedFile
from grun.runtime.runs import RUN_FILE, identity
from grun.version import __version__

REFERENCE = "retain_only"
Discard = Literal["nothing", "models", "weights"]


@dataclass
class Cell(Job):
    """What one process does."""

    command, option, pattern = "sweep", "cell", "cells/*.json"
    file: Path
    name: str
    unlearn: dict[str, Any] | None
    """Resolved options; None: the model of `evaluate` is evaluated as it is."""
    evaluate: dict[str, Any]
    """Resolved options."""
    base: dict[str, Any]
    """What tells the base model from another: see `base_identity`."""
    discard: Discard
    """What goes once it is evaluated: nothing, the weights of whole models, or of adapters too."""
    run_hash: str = ""
    """Of what decides the run."""
    hash: str = ""
    """Of what decides the run and its evaluation."""

    @property
    def run(self) -> Path:
        """Folder of the training."""
        return self.results / self.name

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation."""
        return self.results / "evaluation" / self.name

    def marks(self) -> dict[str, Any]:
        """Also whether the cell owns its folders, and may remove what lies there: nothing did when it first started."""
        owned = self.last().get("owned", not (self.run.exists() or self.evaluation.exists()))
        return {"hash": self.hash, "run_hash": self.run_hash, "owned": owned}

    def missing(self) -> str | None:
        """The evaluation, if it cannot be read."""
        from grun.evaluation.plan import EVALUATION_FILE

        try:
            whole = "key" in read_json(self.evaluation / EVALUATION_FILE, expect=dict)
        except (OSError, DamagedFile):
            whole = False
        return None if whole else f"its evaluation {self.evaluation} is damaged or missing"

    def prepare(self) -> None:
        """Remove what it left under other options; unlearn and evaluate refuse what lies there from others."""
        last = self.last()
        if not last.get("owned"):
            return
        without_weights = (self.run / RUN_FILE).exists() and not any(self.run.glob("*.safetensors"))
        if last.get("run_hash") != self.run_hash or without_weights:
            remove(self.run)
        if last.get("hash") != self.hash:
            remove(self.evaluation)

    def tidy(self) -> None:
        """Remove the weights that are not to be kept; run.json, log and evaluation stay."""
        whole_model = not (self.run / "adapter_config.json").exists()
        if self.unlearn is not None and (self.discard == "weights" or (self.discard == "models" and whole_model)):
            remove_weights(self.run)

    def carry_out(self) -> None:
        """Unlearn, if there is anything to, and evaluate."""
        from grun.evaluation.evaluate import EVALUATION_FILE, evaluate
        from grun.evaluation.suites.base import evaluate_suite

        asked: EvaluateConfig = from_dict("evaluate", self.evaluate)
        if self.unlearn is not None:
            self._train(self.unlearn)
            if (self.run / "adapter_config.json").exists():
                asked.adapter = str(self.run)
            else:
                asked.model.path = str(self.run)
        asked.overwrite = bool(self.last().get("owned"))
        if asked.suite != "answers":
            evaluate_suite(asked, self.evaluation)
            return
        reference = self.results / "evaluation" / REFERENCE
        if self.name != REFERENCE and (reference / EVALUATION_FILE).is_file():
            asked.reference = str(reference)
        evaluate(asked, self.evaluation)

    def _train(self, options: dict[str, Any]) -> None:
        from grun.commands.unlearn import unlearn

        config: UnlearnConfig = from_dict("unlearn", options)
        config.output_dir = str(self.run)
        unlearn(config)
        if not traits_of(config.method).untrained and not weights_in(self.run):
            raise RunError(
                f"{self.run} holds a finished run without its weights, and {self.sibling('outcome.json')} no longer "
                "records that the sweep removed them; remove the folder, and the same command makes it again"
            )
        gc.collect()  # a whole model and its reference, before another is loaded


def make_cell(
    results: Path,
    name: str,
    unlearn: UnlearnConfig | None,
    evaluate: EvaluateConfig,
    base: dict[str, Any],
    discard: Discard,
) -> Cell:
    """A cell with its hashes: over the options that decide results, the base model and grun's version."""
    options = None if unlearn is None else with_sources(unlearn)
    run_hash = content_hash({**identity(options or {}, base=base), "version": __version__})
    asked = with_sources(evaluate)
    both = content_hash([run_hash, identity(asked)])
    return Cell(results / "cells" / f"{name}.json", name, options, asked, base, discard, run_hash, both)
