"""`python -m grun unlearn`: train a parametrization so that a taught model forgets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from grun.cache.engine import use_cached
from grun.cache.gate_pretraining import pretrain_gates
from grun.cache.reference import use_reference
from grun.cache.store import Use
from grun.config.checks import quirks_in_force
from grun.config.options import MethodConfig, UnlearnConfig
from grun.config.values import to_dict
from grun.data import templates
from grun.data.corpus import Corpus, load_corpus
from grun.data.turns import user_turn_ids
from grun.errors import ConfigError, RunError
from grun.loading.checks import check
from grun.loading.hashing import adapter_hash
from grun.loading.models import context_length, load_base
from grun.loading.resolve import in_force
from grun.method.adapter import CONFIG_FILE, STACK_FILE, WEIGHTS_FILE
from grun.method.fingerprint import fingerprint
from grun.method.model import resolve_blocks
from grun.method.parametrization import PARAMETRIZATIONS, Parametrization, traits_of
from grun.objectives.presets import Objective, build_objective
from grun.runtime import processes, sharding
from grun.runtime.devices import input_device
from grun.runtime.files import holding, staged, target, writing
from grun.runtime.runs import claim, finish_run, identity, open_run
from grun.training.recomputation import recompute_blocks
from grun.training.step_log import Look
from grun.training.train import CHECKPOINTS, remove_checkpoints, train
from grun.training.unlearning import UnlearnTask, are_texts, encode_unlearn_rows
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)


@processes.connected()
@holding()
def unlearn(config: UnlearnConfig) -> Path:
    """Run `config` and return the folder of the result; a finished run of the same config is found, not repeated."""
    check(config)
    quirks = quirks_in_force(config)
    traits = traits_of(config.method)
    objective = build_objective(config.objective, config.loss, gated=traits.gated, quirks=quirks)
    parametrization = make_parametrization(config, quirks)  # first: its package may be missing
    with processes.first_goes_first():  # the others find what it downloads
        corpus = load_corpus(config.data)
        _check_rows(corpus, objective)
    folder = target(config.output_dir or f"results/{config.label()}/{config.objective}")
    with processes.agreed():
        base, tokenizer, stored = load_base(config.model)
        template = templates.in_force(config, stored, tokenizer)
    depth = len(find_blocks(base)[1])
    if config.method.blocks is None and traits.edits_blocks:
        sources = config.sources and {**config.sources, "method.blocks": "default"}
        config = replace(config, method=replace(config.method, blocks=resolve_blocks(None, depth)), sources=sources)
    hashes = corpus.hashes()
    run_identity = identity(
        to_dict(config), base=fingerprint(base), data=hashes, template=template.to_dict(), quirks=quirks
    )
    if config.method.beside is not None:
        run_identity["beside"] = adapter_hash(Path(config.method.beside).expanduser())
    state = processes.of_first(lambda: open_run(folder, run_identity, overwrite=config.overwrite))
    if state == "finished":
        log.info("%s holds this very run, finished: nothing to do (overwrite=true runs it again)", folder)
        return folder

    limit = min(config.data.max_length or 2**30, context_length(base))
    with processes.agreed():
        rows = encode_unlearn_rows(corpus, tokenizer, template, limit, config.data, seed=config.seed)
        check_blocks(objective, config.method, depth, later_edits="rmu_hidden_state_index" in quirks)
        in_base = sum(parameter.numel() for parameter in base.parameters())
        torch.manual_seed(config.seed)
        parametrization.prepare(base, template, turn_ids=user_turn_ids(template, tokenizer))
    if config.train.gradient_checkpointing:
        recompute_blocks(find_blocks(base)[1])
    trained = sum(parameter.numel() for _, parameter in parametrization.trainable_parameters())
    log.info(
        "unlearning with %s/%s: %d forget and %d retain rows, %s trained parameters (%.4f %% of the model's)",
        config.method.parametrization, config.objective, len(rows.answers), len(rows.retain), f"{trained:,}",
        100 * trained / in_base,
    )  # fmt: skip
    task = UnlearnTask(
        parametrization,
        objective,
        rows,
        config,
        pad_id=int(tokenizer.pad_token_id),
        device=input_device(base),
        fixed_pairing="retain_fixed_pairing" in quirks,
        depth=depth,
    )
    processes.of_first(lambda: claim(folder, run_identity, overwrite=config.overwrite))
    use, noted = None, _noted(folder, config, hashes)
    if config.train.engine == "cached":
        with processes.agreed():
            use = use_cached(task, config, noted)
    if config.train.gate_pretraining:
        if use is None:
            raise RunError(
                "train.gate_pretraining needs the cached engine, which does not fit this model; leave it out"
            )
        pretrain_gates(use.engine, task.rows("answer"), task.rows("retain"), config.train.gate_pretraining)
    if use is None:
        with processes.agreed():
            pad_id = int(tokenizer.pad_token_id)
            kept = use_reference(task, base, objective.reference, config, pad_id=pad_id, use=noted)
    else:
        kept = use.completed
    reads_base = traits.changes_weights and kept is None and objective.reference != "none"
    sharding.check_possible(looks=bool(config.train.monitor_epochs), needs_reference=reads_base)
    look = None
    if config.train.monitor_epochs:
        from grun.evaluation.monitor import Monitor

        monitor = Monitor(
            parametrization.model, tokenizer, template, corpus, rows=config.train.monitor_rows, max_length=limit
        )
        look = Look(monitor.look, config.train.monitor_epochs * task.steps // config.train.epochs)
    result = train(task, config.train, folder, config.seed, look, smaller=_smaller(config))
    with processes.agreed(), writing(folder):
        if processes.is_first():
            with staged(folder) as new:
                parametrization.save(new)
                if not (new / CONFIG_FILE).exists():  # a whole model needs its tokenizer beside it
                    tokenizer.save_pretrained(new)
    finish_run(
        folder,
        {
            "command": "unlearn",
            "profile": config.profile,
            "objective": config.objective,
            "terms": {side: objective.weights[side] for side in objective.terms},
            "parametrization": config.method.parametrization,
            "config": to_dict(config),
            "template": template.to_dict(),
            "in_force": in_force(config, template),
            "quirks": quirks,
            "data": hashes,
            "base_fingerprint": run_identity["base"],
            "parameters": {"trained": trained, "base": in_base},
            "saved_bytes": saved_bytes(folder),
            "engine": task.engine.name,
            "cache": None if kept is None else dataclasses.asdict(kept),
            "steps": result.steps,
            "resumed_from": result.resumed_from,
            "seconds": round(result.seconds + (kept.seconds if kept else 0.0), 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "device": str(base.device),
        },
        without=None if config.train.keep_all_checkpoints else CHECKPOINTS,
    )
    remove_checkpoints(folder, config.train)
    return folder


def _noted(folder: Path, config: UnlearnConfig, hashes: dict[str, str]) -> Use:
    """What a cache notes of this run: a store of requests trains each in its folder `training/ID`."""
    folder = folder.resolve()
    store = folder.parent.parent
    of_store = folder.parent.name == "training" and (store / STACK_FILE).is_file()
    request, stored_in = (folder.name, str(store)) if of_store else (None, None)
    return Use(str(folder), config.model.path, hashes, request, stored_in)


def _smaller(config: UnlearnConfig) -> list[str]:
    """What beside the options of training takes less memory."""
    if traits_of(config.method).changes_weights:
        return ["method.parametrization=lora"]
    return ["model.quantization=4bit"] if config.model.quantization is None else []


def make_parametrization(config: UnlearnConfig, quirks: Sequence[str]) -> Parametrization:
    """New parametrization for `config`; `quirks` are those in force."""
    return PARAMETRIZATIONS.get(config.method.parametrization).make(config, quirks)


def saved_bytes(folder: Path) -> int:
    """Bytes of the weights of a result, an adapter's or a whole model's."""
    found = [*folder.glob(WEIGHTS_FILE), *folder.glob("model*.safetensors")]
    return sum(path.stat().st_size for path in found)


def _check_rows(corpus: Corpus, objective: Objective) -> None:
    if not corpus.retain and "retain" in objective.continuations:
        raise ConfigError("the retain set is empty, but the objective has a retain or gate term; name data.retain")
    if are_texts(corpus.forget) and "refusal" in objective.continuations:
        raise ConfigError(
            "the objective answers forget questions with refusals, but the forget set is plain texts; choose another "
            "objective (rmu, npo, max_entropy), or give rows with questions"
        )
    if not corpus.refusals and "refusal" in objective.continuations:
        raise ConfigError("there are no refusals, but the objective has a term that reads them; name data.refusals")


def check_blocks(objective: Objective, method: MethodConfig, depth: int, *, later_edits: bool) -> None:
    """ConfigError for a state that no block has, for edits that none of the states read can train.

    Args:
        objective: its terms may read states of blocks.
        method: its edits may lie above those.
        depth: the model's blocks.
        later_edits: let edits stay that nothing trains, as published.
    """
    states = objective.hidden(depth)
    if not states:
        return
    if max(states) >= depth:
        raise ConfigError(
            f"loss.rmu_block: the objective reads the output of block {max(states)}, but the model has {depth} blocks, "
            f"0 to {depth - 1}"
        )
    if later_edits or not traits_of(method).edits_blocks:
        return
    blocks = resolve_blocks(method.blocks, depth)
    if min(blocks) > max(states):
        raise ConfigError(
            f"method.blocks={method.blocks}: the objective reads the output of block {max(states)}, which no edit "
            "changes; raise loss.rmu_block or edit that block or one below"
        )
    if max(blocks) > max(states) and not objective.reads_head:
        raise ConfigError(
            f"method.blocks={method.blocks}: the objective reads the output of block {max(states)}, so the edit at "
            f"block {max(blocks)} would stay untrained; raise loss.rmu_block or leave that block out"
        )
