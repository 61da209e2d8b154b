"""Training that is watched: a task cut off at a step, what a forward pass keeps, the log, and the weights."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grun.training.task import StepData


class CutOff:
    """A task that is interrupted at one step."""

    def __init__(self, task: Any, at: int) -> None:
        self._task, self._at = task, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def data(self, step: int) -> StepData:
        if step == self._at:
            raise KeyboardInterrupt
        data: StepData = self._task.data(step)
        return data


class Step(NamedTuple):
    """What a whole step gives, before the optimizer takes it."""

    loss: float
    parts: dict[str, float]
    gradients: dict[str, Tensor]
    sizes: list[int]
    """Rows of each micro-batch."""


def whole_step(task: Any, step: int = 0) -> Step:
    """Loss, terms and gradients of a step, summed over its micro-batches."""
    task.module.zero_grad()
    data = task.data(step)
    total, values = 0.0, dict[str, float]()
    for batch in data.micro_batches:
        loss, parts = task.loss(batch, data.counts, step)
        loss.backward()
        total += loss.item()
        for name, part in parts.items():
            values[name] = values.get(name, 0.0) + float(part)
    gradients = {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}
    return Step(total, values, gradients, [next(iter(batch.values())).rows for batch in data.micro_batches])


def assert_same(found: Step, expected: Step) -> None:
    """1e-9 relative in float64: sums in another order leave 1e-13 or so."""
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    assert found.parts == pytest.approx(expected.parts, rel=1e-9)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert float((found.gradients[name] - gradient).norm()) <= 1e-9 * float(gradient.norm()) + 1e-12, name


def saved_bytes(run: Any) -> int:
    """Bytes of different tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        held = run()
    del held
    return sum(kept.values())


def logged(folder: Path) -> list[dict[str, float]]:
    """Lines of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies, by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def refuse_files_beyond(size: int) -> None:
    """From now on writing a file beyond `size` bytes fails, as it does on a full disk; -1: no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    before, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    refuse_files_beyond(size)
    try:
        yield
    finally:
        refuse_files_beyond(before)


class Recorded(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


FORK = multiprocessing.get_context("fork")  # a child that need not import torch again
CHANGING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")


def killed_before(step: int, change: Callable[[], object]) -> None:
    """Carry out `change`, and die before the file system is changed for the `step`-th time."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGING:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    change()


def in_fork(run: Callable[..., None], *arguments: Any) -> Any:
    process = FORK.Process(target=run, args=arguments)
    process.start()
    return process
