"""The smallest demo that goes all the way: arguments, the model it teaches, and the command line called in process."""

from __future__ import annotations

from pathlib import Path

from grun.cli import main

DATA = [f"data.demo.{group}=2" for group in ("forget", "heldout", "unknown", "refused")]
DATA += ["data.demo.retain=4", "data.demo.questions=5", "data.demo.seed=0"]
"""10 forget rows, 20 retain rows. All that tests rest on is set here, so that the demo's settings can change."""
MODEL = [
    *("model.path=tiny", "model.tiny.hidden_size=32", "model.tiny.blocks=4", "model.tiny.intermediate_size=64"),
    *("model.tiny.vocabulary=600", "train.batch_size=16", "train.epochs=2"),
]
"""50 taught rows, 8 steps."""
TRAINING = [
    *("method.blocks=[1,2,3]", "method.rank=4", "method.gate=linear", "train.epochs=4", "train.batch_size=4"),
    *("train.lr=0.01", "train.save_steps=100", "loss.retain_weight=2", "loss.gate_weight=10", "objective=gd"),
]
"""3 steps an epoch, 12 in all."""


def finetune(folder: Path, *arguments: str) -> int:
    return main(["finetune", *DATA, *MODEL, f"output_dir={folder}", *arguments])


def unlearn(taught: Path, folder: Path, *arguments: str) -> int:
    return main(["unlearn", *DATA, *TRAINING, f"model.path={taught}", f"output_dir={folder}", *arguments])
