"""`python -m baselines.llm360`: the flags of LLM360's unlearning tool (`unlearn.py` of Analysis360), and a few more.

Where the published tool goes about things in a way of its own, so does this command line (`QUIRKS`); `--compat none`
switches all of that off, and each has a flag. `--print_config` resolves all flags and loads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from baselines.command_line import Parser, names, numbers, run_command
from grun.errors import ConfigError
from grun.runtime import stopping

log = logging.getLogger(__name__)

PROGRAM = "python -m baselines.llm360"
MODULE_STR = "{model_name}.transformer.h[{layer_id}]"
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
QUIRKS = {
    "positions": ("all", "attended"),
    "accumulation": ("published", "exact"),
    "dtype": ("bfloat16", "auto"),
}
"""Flags by which the published tool differs: its value, and the one with `--compat none`."""
LLMU_WEIGHTS = ("bad_weight", "random_weight", "normal_weight")
"""Flags of a method that was never finished: they are accepted."""


@dataclass(frozen=True)
class Llm360Options:
    """Resolved flags, under the flags' names."""

    random_seed: int
    use_wandb: bool
    wandb_project: str
    model_name_or_path: str
    use_lora: bool
    lora_targets: list[str] | None
    output_path: str
    forget_topic: str
    retain_topic: str
    min_len: int
    max_len: int
    unlearn_method: str
    fix_vector: bool
    warmup_steps: int
    max_unlearn_steps: int
    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    lr: float
    alpha: float
    steering_coeff: float
    layer_id: int
    layer_ids: list[int]
    param_ids: list[int] | None
    """None: `tensors` chooses."""
    tensors: list[str] | None
    """None: `param_ids` chooses."""
    positions: str
    accumulation: str
    dtype: str
    final_weights: str
    data_dir: str | None
    device: str
    trust_remote_code: bool
    save_steps: int
    overwrite: bool

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
        """Published quirks that are in force."""
        found = [f"{name}={value}" for name, (value, _) in QUIRKS.items() if getattr(self, name) == value]
        return [*found, "final_weights=last"] if self.final_weights == "last" else found


def parse(arguments: list[str]) -> Llm360Options:
    """Options that a command line means; ConfigError if it means nothing."""
    return _resolve(_parser().read(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: wrong use, 1: any other error, 130 or 143: interrupted)."""
    return run_command(PROGRAM, lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> None:
    given = _parser().read(arguments)
    options = _resolve(given)
    if given.module_str != MODULE_STR:
        log.info("--module_str is not needed, and not evaluated: the blocks of a model are found by their shape")
    if given.print_config:
        shown = {**dataclasses.asdict(options), "folder": options.folder, "updates": options.updates}
        print(json.dumps({**shown, "quirks": options.quirks}, indent=2))
        return
    from baselines.llm360_run import run

    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
        folder = run(options)
    print(folder)


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


def _parser() -> Parser:
    parser = Parser(PROGRAM, description=(__doc__ or "").split("\n\n")[1])
    flag = parser.add_argument_group("flags of the published tool").add_argument
    flag("--random_seed", type=int, default=42, help="seed of the run (42); the order of texts has its own, 42")
    flag("--use_wandb", type=word, default=True, metavar="WORD", help="send the log to Weights & Biases (True)")
    flag("--wandb_project", default="unlearn360", help="project there (unlearn360)")
    flag(
        "--model_name_or_path",
        "--model_name",
        "--model",
        default="LLM360/CrystalChat",
        metavar="MODEL",
        help="hub id or folder (LLM360/CrystalChat)",
    )
    flag(
        "--use_lora",
        type=word,
        default=False,
        metavar="WORD",
        help="train a LoRA of rank 32 and alpha 16 on attention, and save that alone (False)",
    )
    flag("--output_path", default="./models", help="the result goes to METHOD_TOPIC_MODEL in this folder (./models)")
    flag("--forget_topic", default="bio-forget", metavar="CORPUS", help="name or file of texts (bio-forget)")
    flag("--retain_topic", default="wikitext-test", metavar="CORPUS", help="name or file of texts (wikitext-test)")
    flag("--min_len", type=int, default=50, help="texts of this many characters or fewer are left out (50)")
    flag("--max_len", type=int, default=1000, help="longest text, tokens (1000)")
    flag(
        "--unlearn_method",
        type=method,
        default="max-entropy",
        metavar="METHOD",
        help=f"{', '.join(METHODS)} (max-entropy)",
    )
    flag(
        "--fix_vector",
        type=word,
        default=True,
        metavar="WORD",
        help="draw random vectors with the seed 42, not with --random_seed (True)",
    )
    flag("--warmup_steps", type=int, default=0, help="updates in which the learning rate rises (0)")
    flag("--max_unlearn_steps", type=int, default=50, help="micro-batches (50)")
    flag("--batch_size", type=int, default=1, help="texts of each kind in a micro-batch (1)")
    flag("--gradient_accumulation_steps", type=int, default=4, help="micro-batches of an update (4)")
    flag("--lr", type=float, help=f"learning rate; it has to be given (published run: {PUBLISHED_LR})")
    flag("--module_str", default=MODULE_STR, help="not needed: blocks are found by their shape")
    flag("--alpha", type=float, default=10.0, help="rmu: weight of the retain loss (10)")
    flag("--steering_coeff", type=float, default=1.0, help="rmu: length of the control vector (1)")
    flag("--layer_id", type=int, default=7, help="rmu: block whose output the loss reads, 0-based (7)")
    flag("--layer_ids", type=numbers, default="5,6,7", help="rmu: blocks that are changed (5,6,7)")
    flag("--param_ids", type=numbers, help="rmu: tensors of a block, by their place (12,13 if --tensors is not given)")
    for name in LLMU_WEIGHTS:
        flag(f"--{name}", type=float, help="accepted; of the method llmu, which was never finished")
    flag = parser.add_argument_group("what the published tool does in its own way").add_argument
    flag("--compat", choices=("llm360", "none"), default="llm360", help="default of the next three flags (llm360)")
    flag(
        "--positions",
        choices=("all", "attended"),
        help="all: texts are padded to max_len, and max-entropy, random-mapping and rmu count the padding; attended: "
        "no loss does (all; with --compat none attended)",
    )
    flag(
        "--accumulation",
        choices=("published", "exact"),
        help="published: the mean of the micro-batches' means, divided by their number a second time; exact: the mean "
        "over the update (published; with --compat none exact)",
    )
    flag(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
        help="type of the weights, trained ones too; auto: as stored (bfloat16; with --compat none auto)",
    )
    flag(
        "--final_weights",
        choices=("averaged", "last"),
        default="averaged",
        help="what is saved: the schedule-free optimizer's average, or the last weights, as published by mistake "
        "(averaged)",
    )
    flag = parser.add_argument_group("further flags").add_argument
    flag("--lora_targets", type=names, help="linear layers by the end of their name (c_attn, else all of attention)")
    flag("--tensors", type=names, help="rmu: tensors by the end of their name in the block, such as mlp.down_proj")
    flag("--epochs", type=int, default=1, help="how often the texts may be read (1, as published)")
    flag("--data_dir", help="folder of local corpora; `data` is looked into too")
    flag("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    flag("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    flag("--save_steps", type=int, default=50, help="updates between checkpoints; 0: none (50)")
    flag("--overwrite", action="store_true", help="replace another run in the folder")
    flag("--print_config", "--print-config", action="store_true", help="print the resolved flags as JSON and stop")
    return parser  # fmt: skip


def _resolve(given: argparse.Namespace) -> Llm360Options:
    values = vars(given)
    for name, (published, corrected) in QUIRKS.items():
        if values[name] is None:
            values[name] = published if given.compat == "llm360" else corrected
    if given.lr is None:
        raise ConfigError(
            f"--lr must be given: the published default of 0.5 ruins a model; its one published run used {PUBLISHED_LR}"
        )
    if given.tensors is not None and given.param_ids is not None:
        raise ConfigError("--tensors and --param_ids both choose tensors; give one of them")
    if given.tensors is None and given.param_ids is None:
        values["param_ids"] = [12, 13]
    options = Llm360Options(**{field.name: values[field.name] for field in dataclasses.fields(Llm360Options)})
    _check(options)
    return options


def _check(options: Llm360Options) -> None:
    """ConfigError for values that no run can have."""
    for name in ("max_len", "max_unlearn_steps", "epochs", "batch_size", "gradient_accumulation_steps", "lr"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name} {getattr(options, name)} must be greater than 0")
    for name in ("min_len", "warmup_steps", "alpha", "steering_coeff", "layer_id", "save_steps"):
        if not getattr(options, name) >= 0:
            raise ConfigError(f"--{name} {getattr(options, name)} must not be negative")
    if not 0 <= options.random_seed < 2**32:
        raise ConfigError(f"--random_seed {options.random_seed} must lie between 0 and 2**32 - 1")
    if options.updates == 0:
        raise ConfigError(
            f"--max_unlearn_steps {options.max_unlearn_steps} counts micro-batches, and an update takes "
            f"--gradient_accumulation_steps {options.gradient_accumulation_steps}: there would be none; raise the "
            "first or lower the second"
        )
    if options.use_lora and options.unlearn_method == "rmu":
        raise ConfigError("--use_lora has no effect on rmu, which trains chosen tensors; leave it out")


if __name__ == "__main__":
    stopping.leave(main())
