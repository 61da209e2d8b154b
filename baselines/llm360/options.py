"""The flags of LLM360's unlearning tool (`unlearn.py` of Analysis360), and a few more."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from baselines.command_line import DTYPES, Options, flag, model_flag
from grun.errors import ConfigError

FIXED_SEED = 42
"""Of the order of texts; of random vectors too where `fix_vector` says so."""
PUBLISHED_LR = "5e-5"
METHODS = {
    "max-entropy": "max_entropy",
    "min-posterior": "min_posterior",
    "random-mapping": "random_mapping",
    "rmu": "rmu",
}
"""Methods by published name, and the objectives they are here."""


def word(text: str) -> bool:
    """A truth value that is written as a word."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def method(text: str) -> str:
    """A method under its published name."""
    name = text.replace("_", "-").replace("random-matching", "random-mapping")
    if name == "llmu":
        raise argparse.ArgumentTypeError("llmu was never finished by its authors; choose one of " + ", ".join(METHODS))
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose one of {', '.join(METHODS)}")
    return name


@dataclass(frozen=True, kw_only=True)
class Llm360Options(Options):
    """The flags of LLM360's unlearning tool (`unlearn.py` of Analysis360), and a few more."""

    COMPAT = "llm360"
    MODULE_STR = "{model_name}.transformer.h[{layer_id}]"
    FOLDER_FLAG = "--output_path"
    PARAM_IDS = [12, 13]
    ACCEPTED = dict.fromkeys(
        ("bad_weight", "random_weight", "normal_weight"), (float, "of the method llmu, which was never finished")
    )

    random_seed: int = flag("seed of the run; the order of texts has its own, 42", 42)
    use_wandb: bool = flag("send the log to Weights & Biases", "True", kind=word, metavar="WORD")
    wandb_project: str = flag("project there", "unlearn360")
    model_name_or_path: str = model_flag("LLM360/CrystalChat")
    use_lora: bool = flag(
        "train a LoRA of rank 32 and alpha 16 on attention, and save that alone", "False", kind=word, metavar="WORD"
    )
    output_path: str = flag("the result goes to METHOD_TOPIC_MODEL in this folder", "./models")
    forget_topic: str = flag("name or file of texts", "bio-forget", metavar="CORPUS")
    retain_topic: str = flag("name or file of texts", "wikitext-test", metavar="CORPUS")
    min_len: int = flag("texts of this many characters or fewer are left out", 50, least=0)
    max_len: int = flag("longest text, tokens", 1000, least=1)
    unlearn_method: str = flag(", ".join(METHODS), "max-entropy", kind=method, metavar="METHOD")
    fix_vector: bool = flag(
        "draw random vectors with the seed 42, not with --random_seed", "True", kind=word, metavar="WORD"
    )
    warmup_steps: int = flag("updates in which the learning rate rises", 0, least=0)
    max_unlearn_steps: int = flag("micro-batches", 50, least=1)
    batch_size: int = flag("texts of each kind in a micro-batch", 1, least=1)
    gradient_accumulation_steps: int = flag("micro-batches of an update", 4, least=1)
    lr: float = flag(f"learning rate; it has to be given (published run: {PUBLISHED_LR})", above=0)
    alpha: float = flag("rmu: weight of the retain loss", 10.0, least=0)
    steering_coeff: float = flag("rmu: length of the control vector", 1.0, least=0)
    positions: str = flag(
        "all: texts are padded to max_len, and max-entropy, random-mapping and rmu count the padding; attended: no "
        "loss does",
        "all",
        choices=("all", "attended"),
        corrected="attended",
    )
    accumulation: str = flag(
        "published: the mean of the micro-batches' means, divided by their number a second time; exact: the mean over "
        "the update",
        "published",
        choices=("published", "exact"),
        corrected="exact",
    )
    dtype: str = flag(
        "type of the weights, trained ones too; auto: as stored", "bfloat16", choices=DTYPES, corrected="auto"
    )
    final_weights: str = flag(
        "what is saved: the schedule-free optimizer's average, or the last weights, as published by mistake",
        "averaged",
        choices=("averaged", "last"),
        further=True,
    )
    lora_targets: list[str] | None = flag(
        "linear layers by the end of their name; unset: c_attn, else all of attention", further=True
    )

    @property
    def folder(self) -> str:
        """Where the result goes, named as the published tool names it."""
        topic = re.sub(r"[^\w.-]+", "-", Path(self.forget_topic).stem)
        model = self.model_name_or_path.rstrip("/").rpartition("/")[2]
        return str(Path(self.output_path) / f"{self.unlearn_method}_{topic}_{model}")

    @property
    def updates(self) -> int:
        """Optimizer steps; micro-batches that are left over are dropped."""
        return self.max_unlearn_steps // self.gradient_accumulation_steps

    @property
    def vector_seed(self) -> int:
        """Of random vectors and of RMU's control vector."""
        return FIXED_SEED if self.fix_vector else self.random_seed

    @property
    def quirks(self) -> list[str]:
        """What is done in the published tool's own way."""
        return [*super().quirks, *(["final_weights=last"] if self.final_weights == "last" else [])]

    @classmethod
    def resolve(cls, given: argparse.Namespace) -> Self:
        """ConfigError without a learning rate."""
        if given.lr is None:
            raise ConfigError(
                "--lr must be given: the published default of 0.5 ruins a model; its one published run used "
                f"{PUBLISHED_LR}"
            )
        return super().resolve(given)

    def check(self) -> None:
        """ConfigError for a run without an update, and for a LoRA that RMU does not take."""
        if self.updates == 0:
            raise ConfigError(
                f"--max_unlearn_steps {self.max_unlearn_steps} counts micro-batches, and an update takes "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: there would be none; raise the "
                "first or lower the second"
            )
        if self.use_lora and self.unlearn_method == "rmu":
            raise ConfigError("--use_lora has no effect on rmu, which trains chosen tensors; leave it out")

    def shown(self) -> dict[str, Any]:
        """What --print_config prints."""
        return {**super().shown(), "folder": self.folder, "updates": self.updates}
