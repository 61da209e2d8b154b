"""A run of a published tool's command line: corpora and model to a folder with the result, run.json and the logs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines.command_line import Options
from baselines.tensors import check_block, named_tensors, numbered_tensors
from grun.config.options import ModelConfig, TrainConfig
from grun.data import templates
from grun.errors import ModelError
from grun.loading.models import load_base
from grun.method.fingerprint import fingerprint
from grun.runtime.files import holding, staged, target, writing
from grun.runtime.memory import enough_memory
from grun.runtime.runs import claim, finish_run, identity, open_run
from grun.training.task import Task
from grun.training.train import CHECKPOINTS, remove_checkpoints, train

log = logging.getLogger(__name__)

DECIDE_NOTHING = ("output_dir", "output_path", "overwrite", "device", "save_steps", "use_wandb", "wandb_project")
"""Options that change no result."""


@dataclass
class Loaded:
    """The model that is to forget."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: templates.Template | None
    fingerprint: str

    def save(self, folder: Path) -> None:
        """Write the model as transformers does, with tokenizer and template."""
        self.base.save_pretrained(folder)
        self.save_tokenizer(folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Tokenizer and template alone."""
        self.tokenizer.save_pretrained(folder)
        if self.template is not None:
            templates.store(self.template, folder)


@dataclass
class Prepared:
    """What is trained, how it is saved, and what run.json records beyond what it records of every run."""

    task: Task
    save: Callable[[Path, Path], None]
    """Writes the result into a new folder, of a run whose log lies in another one."""
    about: dict[str, Any] = field(default_factory=dict)


@holding()
def run_published(
    options: Options,
    training: TrainConfig,
    data: dict[str, str],
    prepare: Callable[[Loaded], Prepared],
    *,
    seed: int,
    smaller: Sequence[str],
    averaged: bool = True,
) -> tuple[Path, bool]:
    """Train and save; a finished run of the same options is found, not repeated.

    Args:
        options: of the command.
        training: how it is trained.
        data: hashes of what is read, by name.
        prepare: makes the task on the loaded model.
        seed: of the run.
        smaller: what to set where memory does not suffice.
        averaged: save the average of a schedule-free optimizer, not its last weights.

    Returns:
        The folder, and whether the run was made now.
    """
    loaded = _load(options)
    place = target(options.folder, options.FOLDER_FLAG)
    decides = {name: value for name, value in dataclasses.asdict(options).items() if name not in DECIDE_NOTHING}
    of_run = identity(decides, base=loaded.fingerprint, data=data)
    if open_run(place, of_run, overwrite=options.overwrite) == "finished":
        log.info("%s holds this very run, finished: nothing to do (--overwrite runs it again)", place)
        return place, False
    with enough_memory("running the untouched model", smaller):
        prepared = prepare(loaded)
    claim(place, of_run, overwrite=options.overwrite)
    result = train(prepared.task, training, place, seed, smaller=smaller, averaged=averaged)
    with writing(place), staged(place) as new:
        prepared.save(new, place)
    base = loaded.base
    trained, every = (sum(one.numel() for one in module.parameters()) for module in (prepared.task.module, base))
    finish_run(
        place,
        {
            "config": dataclasses.asdict(options),
            "quirks": options.quirks,
            "dtype": str(base.dtype).removeprefix("torch."),
            "data": data,
            "base_fingerprint": loaded.fingerprint,
            "parameters": {"trained": trained, "base": every},
            "steps": result.steps,
            "resumed_from": result.resumed_from,
            "seconds": round(result.seconds, 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "device": str(base.device),
            **prepared.about,
        },
        without=None if training.keep_all_checkpoints else CHECKPOINTS,
    )
    remove_checkpoints(place, training)
    return place, True


def chosen_tensors(base: PreTrainedModel, options: Options) -> dict[str, nn.Parameter]:
    """The tensors that the flags choose; ConfigError for a block or tensor that is not there."""
    check_block(base, options.layer_id, "--layer_id")
    if options.tensors is not None:
        return named_tensors(base, options.layer_ids, options.tensors)
    return numbered_tensors(base, options.layer_ids, options.param_ids or [])


def _load(options: Options) -> Loaded:
    config = ModelConfig(
        path=options.model_name_or_path,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        base, tokenizer, template = load_base(config)
    except ModelError as error:
        if options.trust_remote_code or "custom code" not in str(error):
            raise
        raise ModelError(
            f"{options.model_name_or_path} comes with model code of its own, which is not run unasked; read it, and "
            "pass --trust_remote_code if you trust it"
        ) from error
    return Loaded(base, tokenizer, template, fingerprint(base))
