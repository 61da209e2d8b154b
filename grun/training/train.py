"""One trainer for every task: transformers' Trainer owns the loop, a Task the data and the loss.

A Task plans all steps of a run beforehand, so what a step sees is a function of the seed and the step alone. One
item of the data loader is one whole optimizer step; it is cut into micro-batches here, and every loss is divided by
counts of the whole step, so that cutting cannot change it. A checkpoint holds the trained parameters, optimizer,
schedule, random state and logs, and never a frozen base; it is used only whole (`grun.training.checkpoints`).

Of several processes each runs its share of a step's micro-batches; gradients, logged terms and checks are those of the
whole step, and the first process writes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from grun.config.options import TrainConfig
from grun.errors import ConfigError
from grun.runtime import processes
from grun.runtime.files import holding, make_folder, remove, take, writing
from grun.runtime.memory import enough_memory, peak_memory_bytes
from grun.training.checkpoints import CHECKPOINTS, newest_whole, step_of
from grun.training.optimizers import optimizer_of
from grun.training.step_log import TRACKED, Look, logs, trackers_of
from grun.training.step_trainer import TASK_FILE, StepTrainer
from grun.training.task import Task

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What training cost."""

    steps: int
    seconds: float
    """Looks aside."""
    peak_memory_bytes: int
    """Peak of the process (CPU) or of the device (GPU)."""
    resumed_from: int
    """Step that training was resumed from; 0: from the beginning."""


@processes.connected()
@holding()
def train(
    task: Task,
    config: TrainConfig,
    folder: Path,
    seed: int,
    look: Look | None = None,
    *,
    smaller: Sequence[str] = (),
    averaged: bool = True,
) -> TrainResult:
    """Train `task` to its last step, resuming from the newest whole checkpoint in `folder`.

    Writes `folder`/log.jsonl (one line a step), `folder`/checkpoints and, with `look`, `folder`/monitor.jsonl (one line
    a look); TensorBoard writes into `folder`/logs. Once the result is saved, the caller hands the folder to
    `remove_checkpoints`.

    Args:
        task: what is trained; every process of a run brings the same.
        config: options of training.
        folder: of the run; all processes see the same one.
        seed: of the random state.
        look: what is looked at from time to time.
        smaller: what, besides the options of training, would take less memory; named where memory does not suffice.
        averaged: whether an optimizer that averages weights leaves the average in the module, or the last weights.

    Raises:
        ConfigError: transformers refuses an option, such as the schedule's name.
        RunError: a loss or gradient is not finite, or the disk is full, or memory does not suffice, or another process
            is lost; the last good state is kept as a checkpoint.
    """
    newest = processes.of_first(lambda: _start_in(folder))
    resumed_from = 0 if newest is None else step_of(newest)
    arguments = _arguments(task, config, folder / CHECKPOINTS, seed)
    kept = None if config.keep_all_checkpoints else config.keep_checkpoints
    optimizer = optimizer_of(config, int(arguments.warmup_steps))
    with logs(folder, newest, look) as (step_log, looks):
        trackers = trackers_of(config.report_to, folder / TRACKED)
        trainer = StepTrainer(task, arguments, step_log, kept, optimizer, trackers)
        if looks is not None:
            trainer.add_callback(looks)
        if newest is not None:
            task.restore(json.loads((newest / TASK_FILE).read_text(encoding="utf-8")))
            log.info("resuming at step %d of %d", resumed_from, task.steps)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        with enough_memory("training", _memory_advice(config, smaller)):
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
            if averaged:
                trainer.keep_average()
            trainer.make_whole()
    seconds = time.monotonic() - started - (0.0 if looks is None else looks.seconds)
    return TrainResult(task.steps, seconds, peak_memory_bytes(), resumed_from)


def _start_in(folder: Path) -> Path | None:
    """Make the folder of checkpoints, and find the newest whole one."""
    with writing(folder):
        take(folder)
        make_folder(folder / CHECKPOINTS)
        return newest_whole(folder / CHECKPOINTS, folder)


def _memory_advice(config: TrainConfig, smaller: Sequence[str]) -> list[str]:
    """What takes less memory in training, the cheapest first."""
    rows = config.micro_batch_size or -(-config.batch_size // processes.count())
    advice = [f"train.micro_batch_size={rows // 2} (it is {rows} now)"] if rows > 1 else []
    if not config.gradient_checkpointing:
        advice.append("train.gradient_checkpointing=true")
    return [*advice, *smaller, "more processes with sharded weights (docs/multi_gpu.md)"]


def remove_checkpoints(folder: Path, config: TrainConfig) -> None:
    """Remove the checkpoints of a run whose result is saved, unless `config.keep_all_checkpoints`."""
    if not config.keep_all_checkpoints and processes.is_first():
        remove(folder / CHECKPOINTS)


def _arguments(task: Task, config: TrainConfig, checkpoints: Path, seed: int) -> TrainingArguments:
    warmup = int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * task.steps)
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=task.steps,
            num_train_epochs=1,
            per_device_train_batch_size=1,
            learning_rate=config.lr,
            lr_scheduler_type=config.schedule,
            warmup_steps=warmup,
            weight_decay=config.weight_decay,
            adam_beta2=config.beta2,
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch_fused",  # where `optimizer_of` gives no other
            save_strategy="steps" if config.save_steps else "no",
            save_steps=config.save_steps or 500,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # which waits for every loss
            report_to=[],  # `trackers_of` makes them
            run_name=checkpoints.parent.name,
            seed=seed,
            use_cpu=task.device.type == "cpu",
            remove_unused_columns=False,
            ddp_find_unused_parameters=True,  # an objective need not reach every one of them
            ddp_timeout=int(processes.PATIENCE.total_seconds()),
        )
    except ValueError as error:
        raise ConfigError(f"training options: {str(error).splitlines()[0]}") from error
    if arguments.n_gpu > 1:  # Trainer would wrap the module in DataParallel, which breaks hooks
        log.info("%d GPUs are visible and no launcher was used: training runs on one of them", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments
