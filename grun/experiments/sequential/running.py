"""Carrying out one method's steps; one that is done is found again, not repeated.

RESULTS/METHOD/chain.json says what is to be done. RESULTS/METHOD/steps/ID.json is written when a request has been
served and measured; only then does the model before it go.
"""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from grun.config.options import EvaluateConfig
from grun.config.values import from_dict
from grun.errors import ConfigError
from grun.experiments.sequential.chain import Chain, Served
from grun.experiments.sequential.files import ChainFiles, ExperimentFiles
from grun.runtime.files import taken
from grun.runtime.records import Run, read_record
from grun.runtime.runs import RUN_FILE

log = logging.getLogger(__name__)


def run_chain(path: Path) -> None:
    """Carry out the steps of the chain in the file `path` that are not done.

    A process that finds another at work on the same chain waits for it.

    Raises:
        ConfigError: `path` is no chain's file.
        Exception: whatever training or evaluation raised.
    """
    from grun.experiments.sequential.steps import STEPS, discard

    if not path.is_file() or path.name != "chain.json":
        raise ConfigError(
            f"chain={path} is no chain's file; expected RESULTS/METHOD/chain.json, which the command writes"
        )
    with taken(path.parent.parent, lock=f"chain-{path.parent.name}", wait=True):
        chain = Chain.read(path)
        experiment = ExperimentFiles(path.parent.parent)
        files = ChainFiles(experiment.results, chain.method)
        spent: list[float] = []
        for done, number in enumerate(chain.at):
            name = chain.ids[number - 1]
            if files.step(name).is_file():
                chain.read_step(files.step(name))
                log.info("%s %d/%d: %s is done already", chain.method, number, len(chain.requests), name)
                discard(chain, files, number)
                continue
            started = time.monotonic()
            log.info("%s %d/%d: %s is asked to be forgotten", chain.method, number, len(chain.requests), name)
            served = STEPS[chain.method](chain, experiment, files, number)
            record = _measure(chain, files, number, served)
            chain.write_step(files.step(name), record)
            discard(chain, files, number)
            gc.collect()  # a whole model, before another is loaded
            spent.append(time.monotonic() - started)
            left = (len(chain.at) - done - 1) * sum(spent) / len(spent)
            log.info("%s %d/%d: %s", chain.method, number, len(chain.requests), _told(record, left))


def _measure(chain: Chain, files: ChainFiles, number: int, served: Served) -> dict[str, Any]:
    """Record of a step: recall of every request and set, gates, and what it cost."""
    from grun.commands.unlearn import saved_bytes
    from grun.evaluation.evaluate import evaluate
    from grun.experiments.sequential.measuring import gate_confusion, measured

    name = chain.ids[number - 1]
    config: EvaluateConfig = from_dict("evaluate", chain.evaluate)
    of_base = served.model == chain.model
    config.model = replace(config.model, path=served.model, revision=config.model.revision if of_base else None)
    config.adapter = None if served.adapter is None else str(served.adapter)
    config.overwrite = True  # the folder is this step's, whatever an earlier version of the code left there
    result = evaluate(config, files.evaluation(name))
    run = (
        read_record(served.run / RUN_FILE, Run) if served.run is not None and (served.run / RUN_FILE).is_file() else {}
    )
    return {
        "method": chain.method,
        "request": name,
        "number": number,
        **measured(files.evaluation(name), chain.requests),
        "gates": gate_confusion(config, chain.requests) if chain.method == "grun" else None,
        "seconds": {"train": run.get("seconds"), "evaluate": result["seconds"]["total"]},
        "peak_memory_bytes": run.get("peak_memory_bytes"),
        "saved_bytes": None if served.run is None else saved_bytes(served.run) or None,
    }


def _told(record: dict[str, Any], left: float) -> str:
    """One line on a step."""
    recall, number = list(record["recall"].values()), record["number"]
    parts = [f"forgotten {sum(recall[:number]) / number:.2f}"]
    if number < len(recall):
        parts.append(f"not yet asked {sum(recall[number:]) / (len(recall) - number):.2f}")
    parts += [f"{name} {value:.2f}" for name, value in record["sets"].items() if name in ("retain", "heldout")]
    still = f"; about {max(1, round(left / 60))} min still" if left > 0 else ""
    return f"{record['metric'].replace('_', ' ')}: {', '.join(parts)}{still}"
