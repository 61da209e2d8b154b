"""transformers' Trainer over a task: a step is one item of the data loader, a checkpoint is whole or absent."""

from __future__ import annotations

import contextlib
import copy
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
from grun.training.step_log import LOGS, LogSteps, StepLog, Taken
from grun.training.task import MicroBatch, StepData, Task, Terms, deal

TRAINED_FILE = "trained.safetensors"
"""File of a checkpoint that holds the trained parameters."""
TASK_FILE = "task.json"
"""File of a checkpoint that holds the task's own state."""
_LOSS, _NORM = "loss", "grad_norm"
"""What the whole loss and the norm of its gradient are called among the terms."""
READ_STEPS = 10
"""Steps after which the host reads terms from a device where it has to wait for them."""
READ_AT_ONCE = {"cpu"}
"""Devices where it does not."""


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

    def forward(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, Terms]:
        return self._task.loss(batch, counts, step)


class StepTrainer(Trainer):
    """transformers' Trainer over a Task.

    On a device that works behind the host's back, terms, loss and gradient norm of a step stay there, and are read
    every `READ_STEPS`. A step whose loss or norm is not finite changes nothing, nor does any after it: AdamW looks at a
    flag on the device. So the last good state is still there when the host sees it.
    """

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
        self._logger.read = self._read_terms
        alone = processes.count() == 1 and optimizer is None  # torch's fused AdamW, which knows the flag
        waits = alone and task.device.type not in READ_AT_ONCE and not task.state()  # whose next step needs terms
        self._flag = torch.zeros((), dtype=torch.float32, device=task.device) if waits else None
        """1 on the device once a loss or norm was not finite; None: each step is looked at before it is taken."""
        self._taken: list[Taken] = []
        """Steps whose terms were not read yet."""
        self._norm: Tensor | None = None

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
        workers = processes.count()
        values: dict[str, Any] = {}
        mine = deal(data.micro_batches, workers, processes.rank())
        for number, (batch, counts) in enumerate(mine):
            last = number == len(mine) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed takes its step by it
            with contextlib.nullcontext() if last else self._without_reducing(model):
                on_device = {name: part.to(self._task.device) for name, part in batch.items()}
                loss, parts = model(on_device, data.counts, self.state.global_step)
                if counts:
                    for name, part in {_LOSS: loss.detach(), **parts}.items():
                        values[name] = values[name] + part if name in values else part
                if last and self._flag is None:  # before gradients are exchanged, so that all processes stop here
                    values = processes.summed({name: float(value) for name, value in values.items()})
                    self._check(_LOSS, values.get(_LOSS, 0.0))
                # What reduces gradients takes their mean over the processes.
                self.accelerator.backward(loss * (workers if counts else 0) if workers > 1 else loss)
        self._norm = gradient_norm(model)
        norm: Any = self._norm
        if self._flag is None:
            norm = float(norm)
            self._check(_NORM, norm)
        else:
            wrong = ((values[_LOSS] + norm) * 0).nan_to_num(nan=1.0)  # 0 times what is not finite is not a number
            self._flag = torch.maximum(self._flag, wrong.to(self._flag))
            optimizer.optimizer.found_inf = self._flag
        self._note(data, values, norm)
        return torch.zeros((), device=self.args.device)  # Trainer's own mean of the losses, which nobody reads

    def _note(self, data: StepData, values: dict[str, Any], norm: Any) -> None:
        """Keep what log.jsonl holds of a step."""
        total = values.pop(_LOSS, 0.0)
        self._task.stepped(values)
        assert self.lr_scheduler is not None
        rate = float(self.lr_scheduler.get_last_lr()[0])
        line = {"epoch": round(data.epoch, 4), _LOSS: total, **values, "lr": rate, _NORM: norm}
        schedule = {} if self._flag is None else copy.deepcopy(self.lr_scheduler.state_dict())
        self._taken.append(Taken(self.state.global_step + 1, line, schedule))

    def _read_terms(self, now: bool = False) -> None:
        """At the end of a step: write the steps whose terms are due, or stop where one of them went wrong."""
        step = self.state.global_step
        if not (now or self._flag is None or step % READ_STEPS == 0 or step == self.state.max_steps):
            return
        taken, self._taken = self._taken, []
        for one in taken:
            values = {name: float(value) for name, value in one.values.items()}
            if self._flag is not None and not all(math.isfinite(values[name]) for name in (_LOSS, _NORM)):
                self._go_back(one)
                self._check(_LOSS, values[_LOSS])
                self._check(_NORM, values[_NORM])
            self._logger.write(one.step, values)

    def _go_back(self, to: Taken) -> None:
        """Count steps as before one that, with all after it, changed nothing."""
        assert self.lr_scheduler is not None and self.optimizer is not None
        self.state.global_step = to.step - 1
        self.lr_scheduler.load_state_dict(to.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _check(self, name: str, value: float) -> None:
        """Stop where the loss or the norm of the step at hand is not finite."""
        if not math.isfinite(value):
            what = {_LOSS: "loss", _NORM: "gradient norm"}[name]
            self._give_up(f"the {what} is {value} at step {self.state.global_step + 1}")

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._norm is None or processes.count() > 1:
            return super()._clip_grad_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, self._norm)
        return self._norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self._norm if grad_norm is None else grad_norm)

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
        self._read_terms(now=True)
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
        from safetensors.torch import save_file, save_model

        assert output_dir is not None
        state = self._whole_state() if self.is_fsdp_enabled else {}
        if not self.args.should_save:
            return
        make_folder(Path(output_dir))
        if state:
            own = {name: state[name].contiguous() for name, _ in self._task.module.named_parameters()}  # each once
            save_file(own, os.path.join(output_dir, TRAINED_FILE))
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
        state = sharding.whole_state(self.model_wrapped, self.optimizer)
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
        sharding.take_state(self.model_wrapped, state, self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file, load_model

        file = os.path.join(resume_from_checkpoint, TRAINED_FILE)
        if self.is_fsdp_enabled:
            state = load_file(file) if processes.is_first() else {}
            sharding.take_state(self.model_wrapped, {f"trained.{name}": value for name, value in state.items()})
        else:
            load_model(self._task.module, file)


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients of a model, cut among processes or not, on their device."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)  # 0 of none
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
