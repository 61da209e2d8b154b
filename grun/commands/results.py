"""The end of a training: run.json, which marks its folder as complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grun.config.values import to_dict
from grun.data.templates import Template
from grun.loading.resolve import in_force
from grun.runtime.runs import finish_run
from grun.training.train import CHECKPOINTS, TrainResult, remove_checkpoints


def finish_training(
    folder: Path, config: Any, template: Template, result: TrainResult, about: Mapping[str, Any], *, before: float = 0.0
) -> None:
    """Write run.json and remove the checkpoints that are not to be kept.

    Args:
        folder: of the result, which is there already.
        config: of the command.
        template: that was trained with.
        result: of the training.
        about: what else the command records: its name, data, parameters, device.
        before: seconds that were spent before training.
    """
    values = {
        **about,
        "profile": config.profile,
        "config": to_dict(config),
        "template": template.to_dict(),
        "in_force": in_force(config, template),
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "seconds": round(result.seconds + before, 2),
        "peak_memory_bytes": result.peak_memory_bytes,
    }
    finish_run(folder, values, without=None if config.train.keep_all_checkpoints else CHECKPOINTS)
    remove_checkpoints(folder, config.train)
