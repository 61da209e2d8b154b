"""How each method serves a request, given what it made of the requests before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grun.config.options import CommandConfig, FinetuneConfig, ModelConfig, UnlearnConfig
from grun.config.values import from_dict
from grun.data import templates
from grun.data.jsonl import read_rows
from grun.errors import RunError
from grun.experiments.sequential.chain import Chain, Served
from grun.experiments.sequential.files import ChainFiles, ExperimentFiles
from grun.experiments.sweep.cells import WEIGHTS
from grun.runtime.files import remove, staged, taken, writing
from grun.runtime.records import Run, read_record
from grun.runtime.runs import RUN_FILE

Step = Callable[[Chain, ExperimentFiles, ChainFiles, int], Served]
"""Serves the request of a number, from 1."""


def serve_grun(chain: Chain, experiment: ExperimentFiles, files: ChainFiles, number: int) -> Served:
    """Train an adapter, on the untouched model or with the earlier ones in force, and put it into the store."""
    from grun.commands.unlearn import unlearn
    from grun.method.stack.manifest import MANIFEST_FILE
    from grun.requests.adding import stored_config
    from grun.requests.store import RequestStore

    name, folder = chain.ids[number - 1], files.run(chain.ids[number - 1])
    there = (files.store / MANIFEST_FILE).is_file()
    store = RequestStore.open(files.store) if there else RequestStore.create(files.store, rule=chain.rule)
    if name not in store.manifest.ids():
        config = _unlearn_config(chain, experiment, number, chain.model, folder)
        if chain.earlier_as_retain and number > 1:
            config.data.retain = str(experiment.retain_beside(name))
        beside = [] if chain.independent else store.manifest.ids(active=True)
        if beside:
            config.method.beside = str(files.store)
        unlearn(config)
        run = read_record(folder / RUN_FILE, Run, ("seconds", "steps"))
        metrics = {key: run[key] for key in ("seconds", "steps")}
        rows = read_rows(experiment.request(name))
        store.add(name, folder, forget_rows=rows, config=stored_config(config), metrics=metrics, beside=beside)
    if store.manifest.ids(active=True) != chain.ids[:number]:
        raise RunError(
            f"{files.store} holds other requests than {', '.join(chain.ids[:number])}; overwrite=true begins anew"
        )
    return Served(chain.model, files.store, folder)


def serve_full(chain: Chain, experiment: ExperimentFiles, files: ChainFiles, number: int) -> Served:
    """Train all weights of the model that the request before led to."""
    from grun.commands.unlearn import unlearn

    folder, before = files.run(chain.ids[number - 1]), chain.model
    if number > 1:
        before = str(files.run(chain.ids[number - 2]))
    unlearn(_unlearn_config(chain, experiment, number, before, folder))
    return Served(str(folder), None, folder)


def serve_lora(chain: Chain, experiment: ExperimentFiles, files: ChainFiles, number: int) -> Served:
    """Train a LoRA on the model that the request before led to, and merge it."""
    from grun.commands.unlearn import unlearn

    name, before = chain.ids[number - 1], chain.model
    if number > 1:
        before = str(files.merged(chain.ids[number - 2]))
    config = _unlearn_config(chain, experiment, number, before, files.run(name))
    unlearn(config)
    if not (files.merged(name) / "config.json").exists():
        merge(config.model, files.run(name), files.merged(name))
    return Served(str(files.merged(name)), None, files.run(name))


def serve_retrain(chain: Chain, experiment: ExperimentFiles, files: ChainFiles, number: int) -> Served:
    """Teach a new model everything but what was asked for so far; after the last request it is the retain-only one."""
    from grun.commands.finetune import finetune

    name = chain.ids[number - 1]
    if number == len(chain.ids) and chain.retain_model is not None:
        folder = Path(chain.retain_model).expanduser()
        return Served(chain.retain_model, None, folder if folder.is_dir() else None)
    config: FinetuneConfig = from_dict("finetune", chain.finetune)
    _set_rows(config, experiment.asked(name), experiment.kept(name))
    config.data.subset, config.output_dir = "without_forget", str(files.run(name))
    folder = finetune(config)
    return Served(str(folder), None, folder)


STEPS: dict[str, Step] = {
    "grun": serve_grun,
    "full": serve_full,
    "lora": serve_lora,
    "retrain": serve_retrain,
}


def discard(chain: Chain, files: ChainFiles, number: int) -> None:
    """Remove whole models that no further request needs, once the request of `number` is done."""
    if chain.method == "retrain":
        _remove_weights(files.run(chain.ids[number - 1]))
    elif number > 1:
        before = chain.ids[number - 2]
        if chain.method == "full":
            _remove_weights(files.run(before))
        elif chain.method == "lora":
            remove(files.merged(before))


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


def _unlearn_config(chain: Chain, experiment: ExperimentFiles, number: int, model: str, folder: Path) -> UnlearnConfig:
    """Options of a training that starts from `model`."""
    config: UnlearnConfig = from_dict("unlearn", chain.unlearn)
    config.model.path, config.output_dir = model, str(folder)
    if model != chain.model:
        config.model.revision = None
    _set_rows(config, experiment.request(chain.ids[number - 1]), experiment.retain)
    return config


def _set_rows(config: CommandConfig, forget: Path, retain: Path) -> None:
    """Take the rows of two files, which are what is left of the corpus once sets were put aside."""
    own: dict[str, Any] = {"name": "jsonl", "path": None, "forget": str(forget), "retain": str(retain)}
    own |= dict.fromkeys(("heldout", "validation", "unknown_rows", "refused_rows"), 0)
    own |= dict.fromkeys(("retain_rows", "retain_pool", "unknown")) | {"teach_general": False}
    config.data = replace(config.data, **own)
    config.sources = {key: source for key, source in config.sources.items() if key.removeprefix("data.") not in own}


def _remove_weights(folder: Path) -> None:
    for pattern in WEIGHTS:
        for file in folder.glob(pattern):
            remove(file)
