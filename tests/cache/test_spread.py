"""A model whose blocks lie on two devices trains on the cached engine; the second one is pretended."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from engine_steps import config_of, edited, step_of, task_of
from tiny import tiny

from benchmarks import pretended
from grun.cache.cached import CachedEngine
from grun.cache.engine import use_cached
from grun.training.unlearning import UnlearnTask
from pyvene_custom import Sites

HERE = torch.device("cpu")
CLOSE = 1e-9
"""Relative, in float64: the order of sums leaves 1e-13 or so."""
ROBUST = {"gate_read": "every_token", "gate_accumulate": "running_max", "edit_write": "every_token"}
POOLED = {"gate_blocks": [0, 1], "gate_pool": "maxmin", "edit_write": "sticky"}


def spread(task: UnlearnTask) -> None:
    """Move the upper half of the model, and the edits there, as accelerate has it."""
    base: Any = edited(task).base
    there = pretended.device()
    upper = [*base.model.layers[2:], base.model.norm, base.lm_head]
    for part in (*upper, *(edit for block, edit in edited(task).own_edits().items() if block >= 2)):
        pretended.move(part)
    for part, device in (*((part, HERE) for part in base.model.layers[:2]), *((part, there) for part in upper)):
        add_hook_to_module(part, AlignDevicesHook(device))
    add_hook_to_module(base, AlignDevicesHook(HERE, io_same_device=True))
    base.hf_device_map = {"model.embed_tokens": HERE, "": there}


def trained_there() -> int:
    """Exit status of a process that trains each design on two devices."""
    with pretended.on_it():
        for method in ({}, ROBUST, POOLED):
            task = task_of("gd", tiny("llama"), **method)
            plain = task.engine
            spread(task)
            assert use_cached(task, config_of()) is not None, method
            assert isinstance(task.engine, CachedEngine)
            found, wanted = step_of(task), step_of(task, plain)
            assert abs(found.loss - wanted.loss) < CLOSE * abs(wanted.loss)
            assert {gradient.device.type for gradient in wanted.gradients.values()} == {"cpu", pretended.NAME}
            for name, gradient in wanted.gradients.items():
                assert float((found.gradients[name].cpu() - gradient.cpu()).norm() / gradient.cpu().norm()) < CLOSE
        task = task_of("gd", tiny("llama"), **ROBUST)
        spread(task)
        with mock.patch.object(Sites, "to", lambda self, device: self):  # what an edit is told stays elsewhere
            assert use_cached(task, config_of()) is None and not isinstance(task.engine, CachedEngine)
        step_of(task)
    return 0


def test_every_design_trains_cached_on_two_devices_and_what_fails_there_is_run_plain() -> None:
    # A process of its own: torch's autograd takes no device that appears after its first backward pass.
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / folder) for folder in (".", "tests", "tests/cache"))
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "engine" in line]
    assert line.startswith("the plain engine is used, since the cached one does not fit this model: RuntimeError: ")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sys.exit(trained_there())
