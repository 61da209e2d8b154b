"""`python -m baselines.rmu`: the flags of the published RMU tool (`python3 -m rmu.unlearn` of wmdp), and a few more.

Where the published tool goes about things in a way of its own, so does this command line (`QUIRKS`); `--compat none`
switches all of that off, and each has a flag. `--print_config` resolves all flags and loads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from dataclasses import dataclass

from baselines.command_line import Parser, names, numbers, run_command, weights
from grun.errors import ConfigError
from grun.runtime import stopping

log = logging.getLogger(__name__)

PROGRAM = "python -m baselines.rmu"
MODULE_STR = "{model_name}.model.layers[{layer_id}]"
QUIRKS: dict[str, tuple[tuple[str, ...], str]] = {
    "optimizer": (("legacy", "torch"), "AdamW: transformers' former one (eps 1e-6, before bias correction) or torch's"),
    "loss_mask": (
        ("all", "attended", "attended_no_bos"),
        "positions of the loss: all, padding included; tokens; or tokens but for the first of each text",
    ),
    "jsonl_mode": (
        ("published", "field", "raw"),
        "text of a line: its field `text`, or the raw line; published: the line, but of bio-forget-corpus the field",
    ),
    "length_rule": (
        ("position", "name"),
        "forget texts are cut at 512 tokens; at 768 from the second topic on, or if the corpus is called cyber",
    ),
    "padding_side": (("left", "right"), "side of the padding"),
    "pad_token": (("eos", "own"), "what pads: the end token, or the tokenizer's own pad token"),
    "master_dtype": (("param", "fp32"), "what the trained tensors are held in: the model's type, or float32"),
}
"""Flags: their values (what the published tool does, what `--compat none` does, others), and what they mean."""


@dataclass(frozen=True)
class RmuOptions:
    """Resolved flags, under the flags' names."""

    model_name_or_path: str
    output_dir: str
    retain_corpora: list[str]
    forget_corpora: list[str]
    alpha: list[float]
    steering_coeffs: list[float]
    lr: float
    min_len: int
    batch_size: int
    max_num_batches: int
    layer_id: int
    layer_ids: list[int]
    param_ids: list[int] | None
    """None: `tensors` chooses."""
    tensors: list[str] | None
    """None: `param_ids` chooses."""
    seed: int
    verbose: bool
    optimizer: str
    loss_mask: str
    jsonl_mode: str
    length_rule: str
    padding_side: str
    pad_token: str
    master_dtype: str
    epochs: int
    save: str
    data_dir: str | None
    dtype: str
    device: str
    trust_remote_code: bool
    save_steps: int
    overwrite: bool

    @property
    def quirks(self) -> list[str]:
        """Published quirks that are in force."""
        return [f"{name}={values[0]}" for name, (values, _) in QUIRKS.items() if getattr(self, name) == values[0]]


def parse(arguments: list[str]) -> RmuOptions:
    """Options that a command line means; ConfigError if it means nothing."""
    return _resolve(_parser().read(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: wrong use, 1: any other error, 130 or 143: interrupted)."""
    return run_command(PROGRAM, lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> None:
    given = _parser().read(arguments)
    options = _resolve(given)
    _say_what_is_not_used(given)
    if given.print_config:
        print(json.dumps({**dataclasses.asdict(options), "quirks": options.quirks}, indent=2))
        return
    from baselines.rmu_run import run

    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
        folder = run(options)
    print(folder)


def _parser() -> Parser:
    parser = Parser(PROGRAM, description=(__doc__ or "").split("\n\n")[1], formatter_class=_Help)
    published = parser.add_argument_group("flags of the published tool")
    flag = published.add_argument
    flag(
        "--model_name_or_path",
        "--model_name",
        "--model",
        default="HuggingFaceH4/zephyr-7b-beta",
        metavar="MODEL",
        help="hub id or folder",
    )
    flag("--module_str", default=MODULE_STR, help="not needed: blocks are found by their shape")
    flag("--output_dir", help="folder of the result; unset: models/ and a name made of the model and the settings")
    flag("--retain_corpora", type=names, default="wikitext,wikitext", help="one for each topic")
    flag("--forget_corpora", type=names, default="bio-forget-corpus,cyber-forget-corpus", help="one for each topic")
    flag("--alpha", type=weights, default="100,100", help="weight of the retain loss, for each topic")
    flag("--steering_coeffs", type=weights, default="20,20", help="length of the control vector, for each topic")
    flag("--lr", type=float, default=5e-5, help="learning rate")
    flag("--min_len", type=int, default=0, help="texts of this many characters or fewer are left out")
    flag("--max_len", type=int, help="accepted; the published tool never used it")
    flag("--batch_size", type=int, default=4, help="texts of a batch")
    flag("--max_num_batches", type=int, default=80, help="steps over all topics, which take turns")
    flag("--layer_id", type=int, default=7, help="block whose output the loss reads, 0-based")
    flag("--layer_ids", type=numbers, default="5,6,7", help="blocks that are changed")
    flag("--param_ids", type=numbers, help="tensors of a block, by their place in it (6 if --tensors is not given)")
    flag("--seed", type=int, default=42, help="of the control vectors")
    flag("--verbose", action="store_true", help="log cosines and norms of the activations in every step")
    quirks = parser.add_argument_group("what the published tool does in its own way")
    quirks.add_argument("--compat", choices=("wmdp", "none"), default="wmdp", help="default of the flags below")
    for name, (known, text) in QUIRKS.items():
        own = f"{text} ({known[0]}; with --compat none {known[1]})"
        quirks.add_argument(f"--{name}", choices=known, help=own)
    flag = parser.add_argument_group("further flags").add_argument
    flag("--tensors", type=names, help="tensors by the end of their name in the block, such as mlp.down_proj")
    flag("--epochs", type=int, default=1, help="how often the corpora are read; the published tool reads them once")
    flag("--save", choices=("full", "delta"), default="full", help="the whole model, or the changed tensors alone")
    flag("--data_dir", help="folder of local corpora; `data` is looked into too")
    flag(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
        default="auto",
        help="type of the model; auto: as stored",
    )
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    flag("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    flag("--save_steps", type=int, default=50, help="steps between checkpoints, which a run goes on from; 0: none")
    flag("--overwrite", action="store_true", help="replace another run in the folder")
    flag("--print_config", "--print-config", action="store_true", help="print the resolved flags as JSON and stop")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are set."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _resolve(given: argparse.Namespace) -> RmuOptions:
    values = vars(given)
    for name, ((published, corrected, *_), _) in QUIRKS.items():
        if values[name] is None:
            values[name] = published if given.compat == "wmdp" else corrected
    if given.tensors is not None and given.param_ids is not None:
        raise ConfigError("--tensors and --param_ids both choose tensors; give one of them")
    if given.tensors is None and given.param_ids is None:
        values["param_ids"] = [6]
    if given.output_dir is None:
        values["output_dir"] = _default_folder(given)
    fields = [field.name for field in dataclasses.fields(RmuOptions)]
    options = RmuOptions(**{name: values[name] for name in fields})
    _check(options)
    return options


def _default_folder(given: argparse.Namespace) -> str:
    """As the published tool names it, without brackets, the model's owner and the time: the same command resumes."""
    model = given.model_name_or_path.rstrip("/").rpartition("/")[2]
    alpha = "-".join(f"{value:g}" for value in given.alpha)
    return f"models/{model}_alpha-{alpha}_batches-{given.max_num_batches}_layer-{given.layer_id}"


def _check(options: RmuOptions) -> None:
    """ConfigError for values that no run can have."""
    topics = len(options.forget_corpora)
    for name in ("retain_corpora", "alpha", "steering_coeffs"):
        if len(getattr(options, name)) != topics:
            raise ConfigError(
                f"--{name} has {len(getattr(options, name))} entries and --forget_corpora {topics}; give one for each "
                "topic, separated by commas"
            )
    for name in ("batch_size", "max_num_batches", "epochs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} must be at least 1")
    for name in ("layer_id", "save_steps"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name} {getattr(options, name)} must not be negative")
    if not options.lr > 0:
        raise ConfigError(f"--lr {options.lr:g} must be above 0")
    if min(options.alpha) < 0:
        raise ConfigError(f"--alpha {min(options.alpha):g} must not be negative")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed {options.seed} must be from 0 to 2^32 - 1")


def _say_what_is_not_used(given: argparse.Namespace) -> None:
    if given.max_len is not None:
        log.info("--max_len is not used: the published tool never used it; texts are cut at 512 or 768 tokens")
    if given.module_str != MODULE_STR:
        log.info("--module_str is not needed, and not evaluated: the blocks of a model are found by their shape")


if __name__ == "__main__":
    from baselines import rmu  # by its own name, which messages are logged under

    stopping.leave(rmu.main())
