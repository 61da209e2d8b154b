"""How each method serves a request, given what it made of the requests before, and what is measured then."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grun.config.options import CommandConfig, EvaluateConfig, FinetuneConfig, ModelConfig, UnlearnConfig
from grun.config.values import from_dict
from grun.data import templates
from grun.data.jsonl import read_rows
from grun.errors import RunError
from grun.experiments.running import about
from grun.experiments.sequential.chain import Chain
from grun.experiments.sequential.measuring import gate_confusion, measured
from grun.runtime.files import staged, taken, writing
from grun.runtime.records import Run, read_record
from grun.runtime.runs import RUN_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What serving a request led to."""

    model: str
    """Folder or hub id of the model that is asked."""
    adapter: Path | None
    """Adapter, or store of adapters, on it."""
    run: Path | None
    """Folder of the training, with its run.json; None: of somebody else's."""


def serve_all(chain: Chain) -> None:
    """Carry out the steps of a chain that are not done; one that is done is found again, not repeated."""
    spent: list[float] = []
    for done, number in enumerate(chain.at):
        name = chain.ids[number - 1]
        which = f"{chain.method} {number}/{len(chain.requests)}"
        if chain.step(name).is_file():
            chain.read_step(name)
            log.info("%s: %s is done already", which, name)
        else:
            started = time.monotonic()
            log.info("%s: %s is asked to be forgotten", which, name)
            record = _measure(chain, number, STEPS[chain.method](chain, number))
            chain.write_step(name, record)
            spent.append(time.monotonic() - started)
            left = (len(chain.at) - done - 1) * sum(spent) / len(spent)
            log.info("%s: %s%s", which, _in_short(record), f"; {about(left)}" if left > 0 else "")
        chain.discard(number)
        gc.collect()  # a whole model, before another is loaded


def serve_grun(chain: Chain, number: int) -> Served:
    """Train an adapter, on the untouched model or with the earlier ones in force, and put it into the store."""
    from grun.commands.unlearn import unlearn
    from grun.method.stack.manifest import MANIFEST_FILE
    from grun.requests.adding import stored_config
    from grun.requests.store import RequestStore

    name = chain.ids[number - 1]
    there = (chain.store / MANIFEST_FILE).is_file()
    store = RequestStore.open(chain.store) if there else RequestStore.create(chain.store, rule=chain.rule)
    if name not in store.manifest.ids():
        config = _unlearn_config(chain, number, chain.model)
        if chain.earlier_as_retain and number > 1:
            config.data.retain = str(chain.experiment.rows("retain_and_earlier", name))
        if chain.subjects:
            config.data.subjects = chain.subjects[name]
        beside = [] if chain.independent else store.manifest.ids(active=True)
        if beside:
            config.method.beside = str(chain.store)
        unlearn(config)
        run = read_record(chain.run(name) / RUN_FILE, Run, ("seconds", "steps"))
        store.add(
            name,
            chain.run(name),
            forget_rows=read_rows(chain.experiment.rows("requests", name)),
            config=stored_config(config),
            metrics={key: run[key] for key in ("seconds", "steps")},
            beside=beside,
        )
    if store.manifest.ids(active=True) != chain.ids[:number]:
        raise RunError(
            f"{chain.store} holds other requests than {', '.join(chain.ids[:number])}; overwrite=true begins again"
        )
    return Served(chain.model, chain.store, chain.run(name))


def serve_full(chain: Chain, number: int) -> Served:
    """Train all weights of the model that the request before led to."""
    from grun.commands.unlearn import unlearn

    folder = chain.run(chain.ids[number - 1])
    unlearn(_unlearn_config(chain, number, str(chain.run(chain.ids[number - 2])) if number > 1 else chain.model))
    return Served(str(folder), None, folder)


def serve_lora(chain: Chain, number: int) -> Served:
    """Train a LoRA on the model that the request before led to, and merge it."""
    from grun.commands.unlearn import unlearn

    name = chain.ids[number - 1]
    config = _unlearn_config(chain, number, str(chain.merged(chain.ids[number - 2])) if number > 1 else chain.model)
    unlearn(config)
    if not (chain.merged(name) / "config.json").exists():
        merge(config.model, chain.run(name), chain.merged(name))
    return Served(str(chain.merged(name)), None, chain.run(name))


def serve_retrain(chain: Chain, number: int) -> Served:
    """Teach a new model everything but what was asked for so far; after the last request it is the retain-only one."""
    from grun.commands.finetune import finetune

    name = chain.ids[number - 1]
    if number == len(chain.ids) and chain.retain_model is not None:
        folder = Path(chain.retain_model).expanduser()
        return Served(chain.retain_model, None, folder if folder.is_dir() else None)
    config: FinetuneConfig = from_dict("finetune", chain.finetune)
    _set_rows(config, chain.experiment.rows("asked", name), chain.experiment.rows("kept", name))
    config.data.subset, config.output_dir = "without_forget", str(chain.run(name))
    folder = finetune(config)
    return Served(str(folder), None, folder)


STEPS: dict[str, Callable[[Chain, int], Served]] = {
    "grun": serve_grun,
    "full": serve_full,
    "lora": serve_lora,
    "retrain": serve_retrain,
}
"""What serves the request of a number, from 1."""


def merge(model: ModelConfig, adapter: Path, folder: Path) -> None:
    """Add a LoRA to the weights it was trained on, and save the whole model with its tokenizer and template.

    Args:
        model: the one that the LoRA was trained on.
        adapter: as PEFT saves it.
        folder: of the result, whole or absent.
    """
    from peft import PeftModel

    from grun.loading.models import load_base

    base, tokenizer, template = load_base(model)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    template = templates.load(adapter) or template
    with taken(folder), writing(folder), staged(folder) as new:
        merged.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if template is not None:
            templates.store(template, new)


def _unlearn_config(chain: Chain, number: int, model: str) -> UnlearnConfig:
    """Options of a training that starts from `model`."""
    name = chain.ids[number - 1]
    config: UnlearnConfig = from_dict("unlearn", chain.unlearn)
    config.model.path, config.output_dir = model, str(chain.run(name))
    if model != chain.model:
        config.model.revision = None
    _set_rows(config, chain.experiment.rows("requests", name), chain.experiment.retain)
    return config


def _set_rows(config: CommandConfig, forget: Path, retain: Path) -> None:
    """Take the rows of two files, which are what is left of the corpus once sets were put aside."""
    own: dict[str, Any] = {"name": "jsonl", "path": None, "forget": str(forget), "retain": str(retain)}
    own |= dict.fromkeys(("heldout", "validation", "unknown_rows", "refused_rows"), 0)
    own |= dict.fromkeys(("retain_rows", "retain_pool", "unknown")) | {"teach_general": False}
    config.data = replace(config.data, **own)
    config.sources = {key: source for key, source in config.sources.items() if key.removeprefix("data.") not in own}


def _measure(chain: Chain, number: int, served: Served) -> dict[str, Any]:
    """Record of a step: recall of every request and set, gates, and what it cost."""
    from grun.commands.unlearn import saved_bytes
    from grun.evaluation.evaluate import evaluate

    name = chain.ids[number - 1]
    config: EvaluateConfig = from_dict("evaluate", chain.evaluate)
    revision = config.model.revision if served.model == chain.model else None
    config.model = replace(config.model, path=served.model, revision=revision)
    config.adapter = None if served.adapter is None else str(served.adapter)
    config.overwrite = True  # the folder is this step's, whatever an earlier version of the code left there
    result = evaluate(config, chain.evaluation(name))
    run: dict[str, Any] = {}
    if served.run is not None and (served.run / RUN_FILE).is_file():
        run = read_record(served.run / RUN_FILE, Run)
    return {
        "method": chain.method,
        "request": name,
        "number": number,
        **measured(chain.evaluation(name), chain.requests),
        "gates": gate_confusion(config, chain.requests) if chain.method == "grun" else None,
        "seconds": {"train": run.get("seconds"), "evaluate": result["seconds"]["total"]},
        "peak_memory_bytes": run.get("peak_memory_bytes"),
        "saved_bytes": None if served.run is None else saved_bytes(served.run) or None,
    }


def _in_short(record: dict[str, Any]) -> str:
    recall, number = list(record["recall"].values()), record["number"]
    parts = [f"forgotten {sum(recall[:number]) / number:.2f}"]
    if number < len(recall):
        parts.append(f"not yet asked {sum(recall[number:]) / (len(recall) - number):.2f}")
    parts += [f"{name} {value:.2f}" for name, value in record["sets"].items() if name in ("retain", "heldout")]
    return f"{record['metric'].replace('_', ' ')}: {', '.join(parts)}"
