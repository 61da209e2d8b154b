"""transformers' Trainer over a task: a step is one item of the data loader, a checkpoint is whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from grun.errors import RunError
from grun.runtime import processes, sharding
from grun.runtime.files import make_folder, place, remove, staging, write_bytes, write_text, writing
from grun.training.checkpoints import MANIFEST_FILE, checkpoints_in, seal
from grun.training.step_log import LOGS, LogSteps, StepLog
from grun.training.task import MicroBatch, StepData, Task, deal

TRAINED_FILE = "trained.safetensors"
"""File of a checkpoint that holds the trained parameters."""
TASK_FILE = "task.json"
"""File of a checkpoint that holds the task's own state."""
_LOSS = "loss"
"""What the whole loss is called among the terms."""


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
        self._no_split_modules = getattr(task.module, "_no_split_modules", None)  # FSDP's units, where it cuts weights

    def forward(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        return self._task.loss(batch, counts, step)


class StepTrainer(Trainer):
    """transformers' Trainer over a Task."""

    def __init__(
        self,
        task: Task,
        arguments: TrainingArguments,
        step_log: StepLog,
        keep: int | None,
        optimizer: tuple[type[Optimizer], dict[str, Any]] | None = None,
        trackers: Sequence[TrainerCallback] = (),
    ) -> None:
        """See `train`; `keep` is the number of checkpoints kept, None for all, `optimizer` as from `optimizer_of`."""
        self._task = task
        self._keep = keep
        self._staging: str | None = None
        self._logger = LogSteps(step_log, trackers)
        super().__init__(
            model=_Trained(task),
            args=arguments,
            train_dataset=_Steps(task),
            callbacks=[*trackers, self._logger],
            optimizer_cls_and_kwargs=optimizer,
        )

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
        """Forward and backward over this process's micro-batches of one step; gradients are those of the whole step."""
        model.train()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "train"):  # a schedule-free one takes gradients elsewhere than at its average
            optimizer.train()
        data: StepData = inputs
        step = self.state.global_step
        workers = processes.count()
        values: dict[str, float] = {_LOSS: 0.0}
        mine = deal(data.micro_batches, workers, processes.rank())
        for number, (batch, counts) in enumerate(mine):
            last = number == len(mine) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed takes its step by it
            with contextlib.nullcontext() if last else self._without_reducing(model):
                on_device = {name: part.to(self._task.device) for name, part in batch.items()}
                loss, parts = model(on_device, data.counts, step)
                if counts:
                    for name, part in {_LOSS: float(loss.detach()), **parts}.items():
                        values[name] = values.get(name, 0.0) + part
                if last:  # before gradients are exchanged, so that all processes stop here
                    values = processes.summed(values)
                    if not math.isfinite(values[_LOSS]):
                        self._give_up(f"the loss is {values[_LOSS]} at step {step + 1}")
                # What reduces gradients takes their mean over the processes.
                self.accelerator.backward(loss * (workers if counts else 0) if workers > 1 else loss)
        norm = gradient_norm(model)
        if not math.isfinite(norm):
            self._give_up(f"the gradient norm is {norm} at step {step + 1}")
        total = values.pop(_LOSS)
        self._task.stepped(values)
        assert self.lr_scheduler is not None
        self._logger.values = {
            "epoch": round(data.epoch, 4),
            "loss": total,
            **values,
            "lr": float(self.lr_scheduler.get_last_lr()[0]),
            "grad_norm": norm,
        }
        return torch.tensor(total, device=self.args.device, dtype=torch.float32)

    def _without_reducing(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Within the block gradients stay in this process; ZeRO has no such thing and reduces every time."""
        if processes.count() == 1 or self.is_deepspeed_enabled:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _give_up(self, what: str) -> None:
        assert self.model is not None
        self._save_checkpoint(self.model, None)  # parameters are still those of the last good step
        if not processes.is_first():
            raise processes.Elsewhere(what)
        raise RunError(
            f"{what}; training stopped, the state after step {self.state.global_step} is kept in "
            f"{self.args.output_dir}; lower train.lr or the term's weight and start again with overwrite=true"
        )

    @property
    def _is_cut(self) -> bool:
        """Whether each process holds a part of the weights."""
        zero_3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.is_fsdp_enabled or zero_3

    def _whole_state(self) -> dict[str, Tensor]:
        """All trained weights, in the first process."""
        if self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped) or {}
        else:
            state = sharding.whole_state(self.model_wrapped)
        return {name.removeprefix("trained."): value for name, value in state.items()}

    def keep_average(self) -> None:
        """Once trained: the weights are the average of an optimizer that averages. Checkpoints hold what it trains."""
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "eval"):
            optimizer.eval()

    def make_whole(self) -> None:
        """Once trained: the first process has the whole module again where its weights were cut."""
        if self._is_cut:
            sharding.put_back(self._task.module, self._whole_state())

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        if processes.of_first((root / name / MANIFEST_FILE).is_file):  # whole, or it would have been removed
            return
        with writing(root):
            self._staging = processes.of_first(lambda: str(staging(root, f"checkpoints-{self.state.global_step}")))
        try:
            with processes.agreed(), writing(root):
                super()._save_checkpoint(model, trial)
            processes.of_first(lambda: self._put_in_place(root, name))
        finally:
            self._staging = None

    def _put_in_place(self, root: Path, name: str) -> None:
        """Seal the checkpoint that all processes have written, logs so far included, name it, and remove older ones."""
        staged, run = Path(str(self._staging)) / name, root.parent
        with writing(root):
            for log in (run / log for log in LOGS if (run / log).is_file()):
                write_bytes(staged / log.name, log.read_bytes())
            seal(staged, name, run)
            place(staged, root / name)
        if self._keep is not None:
            for old in checkpoints_in(root)[max(1, self._keep) :]:
                remove(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        from safetensors.torch import save_model

        assert output_dir is not None
        state = self._whole_state() if self.is_fsdp_enabled else {}
        if not self.args.should_save:
            return
        make_folder(Path(output_dir))
        if state:
            sharding.write_trained(state, self._task.module, Path(output_dir) / TRAINED_FILE)
        elif not self._is_cut:  # DeepSpeed writes weights and optimizer by its own means
            save_model(self._task.module, os.path.join(output_dir, TRAINED_FILE))
        write_text(Path(output_dir) / TASK_FILE, json.dumps(self._task.state()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As one file of trained weights, whatever the processes hold of them."""
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = sharding.whole_optimizer_state(self.model_wrapped, self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        file = os.path.join(checkpoint, "optimizer.pt")
        state = torch.load(file, map_location="cpu", weights_only=True) if processes.is_first() else {}
        sharding.take_optimizer_state(self.model_wrapped, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file, load_model

        file = os.path.join(resume_from_checkpoint, TRAINED_FILE)
        if self.is_fsdp_enabled:
            state = load_file(file) if processes.is_first() else {}
            sharding.take_state(self.model_wrapped, {f"trained.{name}": value for name, value in state.items()})
        else:
            load_model(self._task.module, file)


def gradient_norm(model: nn.Module) -> float:
    """Norm of all gradients of a model, cut among processes or not."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return 0.0
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
