"""One trainer for every task: transformers' Trainer owns the loop, a Task the data and the loss.

A Task plans all steps of a run beforehand, so what a step sees is a function of the seed and the step alone. One
item of the data loader is one whole optimizer step; it is cut into micro-batches here, and every loss is divided by
counts of the whole step, so that cutting cannot change it. A checkpoint holds the trained parameters, optimizer,
schedule and random state, and never a frozen base; it is written under a temporary name and then renamed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grun.config import TrainConfig
from grun.data.encoding import Batch
from grun.errors import ConfigError, RunError
from grun.files import write_text, writing

log = logging.getLogger(__name__)

TASK_FILE = "task.json"
"""File of a checkpoint that holds the task's own state."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints within that of the run."""

MicroBatch = dict[str, Batch]
"""What one forward pass per key reads."""


@dataclass
class StepData:
    """One optimizer step."""

    micro_batches: list[MicroBatch]
    counts: dict[str, int]
    """Denominators over the whole step, by name."""
    epoch: float
    """Passes over the data when this step is done."""


class Task(Protocol):
    """What is trained, on what."""

    module: nn.Module
    """Holds exactly the trained parameters."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    def data(self, step: int) -> StepData:
        """Data of 0-based `step`; a pure function of it."""
        ...

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Share of this micro-batch in the step's loss, and the shares of its terms for the log."""
        ...

    def stepped(self, parts: dict[str, float]) -> None:
        """Told after every step what the terms were over the whole of it."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep beside parameters and optimizer, so that a resumed run is the same run."""
        ...

    def restore(self, state: dict[str, float]) -> None:
        """Take up what `state` gave."""
        ...


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


@dataclass
class Look:
    """A look at the model from time to time while it is trained."""

    at: Callable[[], dict[str, Any]]
    """What is written down; it must leave the model and the random state as they are."""
    every: int
    """Steps from one look to the next; the last step is looked at too."""


def train(task: Task, config: TrainConfig, folder: Path, seed: int, look: Look | None = None) -> TrainResult:
    """Train `task` to its last step, resuming from the newest complete checkpoint in `folder`.

    Writes `folder`/log.jsonl (one line a step), `folder`/checkpoints and, with `look`, `folder`/monitor.jsonl (one
    line a look). Once the result is saved, the caller hands the folder to `remove_checkpoints`.

    Raises:
        ConfigError: transformers refuses an option, such as the schedule's name.
        RunError: a loss or gradient is not finite, or the disk is full; the last good state is kept as a checkpoint.
    """
    checkpoints = folder / CHECKPOINTS
    with writing(folder):
        checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in checkpoints.glob(".staging*"):
        shutil.rmtree(leftover, ignore_errors=True)
    newest = newest_checkpoint(checkpoints)
    resumed_from = 0 if newest is None else step_of(newest)
    arguments = _arguments(task, config, checkpoints, seed)
    with writing(folder):
        step_log = StepLog(folder / "log.jsonl", keep_to=resumed_from)
        looker = None if look is None else _Looks(look, StepLog(folder / "monitor.jsonl", keep_to=resumed_from))
    trainer = StepTrainer(task, arguments, step_log, None if config.keep_all_checkpoints else config.keep_checkpoints)
    if looker is not None:
        trainer.add_callback(looker)
    if newest is not None:
        log.info("resuming at step %d of %d", resumed_from, task.steps)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    finally:
        step_log.close()
        if looker is not None:
            looker.step_log.close()
    seconds = time.monotonic() - started - (looker.seconds if looker is not None else 0.0)
    return TrainResult(task.steps, seconds, peak_memory_bytes(), resumed_from)


def remove_checkpoints(folder: Path, config: TrainConfig) -> None:
    """Remove the checkpoints of a run whose result is saved, unless `config.keep_all_checkpoints`."""
    if not config.keep_all_checkpoints:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def peak_memory_bytes() -> int:
    """Peak memory of the GPU if one is used, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def newest_checkpoint(folder: Path) -> Path | None:
    """Checkpoint with the most steps; a checkpoint that has its name is complete, because it was renamed to it."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def split(items: Sequence[Any], size: int | None) -> list[Sequence[Any]]:
    """Cut `items` into consecutive pieces of at most `size`."""
    size = size or len(items)
    return [items[start : start + size] for start in range(0, len(items), size)]


class StepLog:
    """One JSON line a step or look, whole lines only, without steps that a resumed run does again."""

    def __init__(self, path: Path, keep_to: int) -> None:
        """Open `path` for appending after dropping what lies beyond step `keep_to`."""
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= keep_to]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        """Append one step."""
        with writing(self._path.parent):
            self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what could not be written has been reported by `write`
            self._file.close()


class _Steps(Dataset[StepData]):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return self.task.steps

    def __getitem__(self, step: int) -> StepData:
        return self.task.data(step)


class _Trained(nn.Module):
    """Holds the trained module, so that Trainer and accelerate see its parameters and nothing else."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.trained = task.module
        self._task = task

    def forward(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        return self._task.loss(batch, counts, step)


class _LogSteps(TrainerCallback):
    def __init__(self, step_log: StepLog) -> None:
        self.step_log = step_log
        self.values: dict[str, float] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_log.write({"step": state.global_step, **self.values})


class _Looks(TrainerCallback):
    def __init__(self, look: Look, step_log: StepLog) -> None:
        self.look = look
        self.step_log = step_log
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.look.every == 0 or state.global_step == state.max_steps:
            started = time.monotonic()
            self.step_log.write({"step": state.global_step, **self.look.at()})
            self.seconds += time.monotonic() - started


class StepTrainer(Trainer):
    """transformers' Trainer over a Task."""

    def __init__(self, task: Task, arguments: TrainingArguments, step_log: StepLog, keep: int | None) -> None:
        """See `train`; `keep` is the number of checkpoints kept, None for all."""
        self._task = task
        self._keep = keep
        self._staging: str | None = None
        self._logger = _LogSteps(step_log)
        super().__init__(model=_Trained(task), args=arguments, train_dataset=_Steps(task), callbacks=[self._logger])

    def get_train_dataloader(self) -> DataLoader[StepData]:
        """One item is one step, in order; nothing is left for accelerate to shuffle or shard."""
        return DataLoader(_Steps(self._task), batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # a step brings its own counts

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every step is in log.jsonl already."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over the micro-batches of one step."""
        model.train()
        data: StepData = inputs
        step = self.state.global_step
        values: dict[str, float] = {}
        total = torch.zeros((), dtype=torch.float64)
        for batch in data.micro_batches:
            on_device = {name: part.to(self._task.device) for name, part in batch.items()}
            loss, parts = model(on_device, data.counts, step)
            if not math.isfinite(value := float(loss.detach())):
                self._give_up(f"the loss is {value} at step {step + 1}")
            self.accelerator.backward(loss)
            total += value
            for name, part in parts.items():
                values[name] = values.get(name, 0.0) + part
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            self._give_up(f"the gradient norm is {norm} at step {step + 1}")
        self._task.stepped(values)
        assert self.lr_scheduler is not None
        self._logger.values = {
            "epoch": round(data.epoch, 4),
            "loss": float(total),
            **values,
            "lr": float(self.lr_scheduler.get_last_lr()[0]),
            "grad_norm": norm,
        }
        return total.to(device=self.args.device, dtype=torch.float32)

    def _give_up(self, what: str) -> None:
        assert self.model is not None
        self._save_checkpoint(self.model, None)  # parameters are still those of the last good step
        raise RunError(
            f"{what}; training stopped, the state after step {self.state.global_step} is kept in "
            f"{self.args.output_dir}; lower train.lr or the term's weight and start anew with overwrite=true"
        )

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        if (root / name).is_dir():  # whole, since it has its name
            return
        self._staging = str(root / f".staging-{self.state.global_step}")
        try:
            with writing(root):
                super()._save_checkpoint(model, trial)
                for file in (Path(self._staging) / name).iterdir():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                os.replace(Path(self._staging) / name, root / name)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self._keep is not None:
            for old in sorted(root.glob("checkpoint-*"), key=step_of)[: -max(1, self._keep)]:
                shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_model

        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        save_model(self._task.module, os.path.join(output_dir, "trained.safetensors"))
        write_text(Path(output_dir) / TASK_FILE, json.dumps(self._task.state()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_model

        load_model(self._task.module, os.path.join(resume_from_checkpoint, "trained.safetensors"))
        self._task.restore(json.loads((Path(resume_from_checkpoint) / TASK_FILE).read_text(encoding="utf-8")))


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
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch",
            save_strategy="steps" if config.save_steps else "no",
            save_steps=config.save_steps or 500,
            logging_strategy="no",
            report_to=[],
            seed=seed,
            use_cpu=task.device.type == "cpu",
            remove_unused_columns=False,
        )
    except ValueError as error:
        raise ConfigError(f"training options: {str(error).splitlines()[0]}") from error
    if arguments.n_gpu > 1:  # Trainer would wrap the module in DataParallel, which breaks hooks
        log.info("%d GPUs are visible and no launcher was used: training runs on one of them", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments
