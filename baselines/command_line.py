"""What the published tools' command lines share: flags made from the fields of a dataclass, errors of one line.

Where a published tool goes about things in a way of its own, so does its command line here; `--compat none` switches
all of that off, and each has a flag. `--print_config` resolves all flags and loads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self, get_type_hints

from grun.cli import exit_status
from grun.config.checks import check_home
from grun.config.options import LARGEST, SEEDS
from grun.errors import ConfigError
from grun.runtime import processes
from grun.runtime.reading import check_plain

log = logging.getLogger(__name__)


DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s; the last of repeated flags counts."""

    def error(self, message: str) -> NoReturn:
        """Without the usage text, which `--help` gives."""
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")

    def read(self, arguments: list[str]) -> argparse.Namespace:
        """Values of the flags; ConfigError for what no flag can mean: infinite numbers, texts that are none."""
        given = self.parse_args(arguments)
        for name, value in vars(given).items():
            for one in value if isinstance(value, list) else [value]:
                if type(one) in (int, float) and not abs(one) <= {int: SEEDS, float: LARGEST[float]}[type(one)]:
                    raise ConfigError(f"--{name} {one:g} is too large to compute with; give a finite number")
                if isinstance(one, str):
                    check_plain(one, f"--{name}")
                    check_home(f"--{name}", one)
        return given


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def _list_of(kind: Callable[[str], Any], what: str) -> Callable[[str], list[Any]]:

    def read(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {what} separated by commas") from error

    return read


def _name(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


KINDS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    list[int]: _list_of(int, "integers"),
    list[float]: _list_of(float, "numbers"),
    list[str]: _list_of(_name, "names"),
}
"""How the text of a flag is read, by the type of its field."""


def flag(
    text: str,
    default: Any = None,
    *,
    names: tuple[str, ...] = (),
    kind: Callable[[str], Any] | None = None,
    least: float | None = None,
    above: float | None = None,
    corrected: str | None = None,
    further: bool = False,
    **how: Any,
) -> Any:
    """A field that is the flag of its name.

    Args:
        text: its help.
        default: its value where it is not given, a text as on the command line.
        names: further names of the flag.
        kind: reads its text, in place of what `KINDS` has for the field's type.
        least: no value may be below.
        above: every value has to be above.
        corrected: its value with `--compat none`; `default` is then what the published tool does in its own way.
        further: it is no flag of the published tool.
        how: `choices` and `metavar`, as in argparse.
    """
    checked = {"least": least, "above": above, "corrected": corrected, "further": further}
    metadata = {"text": text, "default": default, "names": names, "kind": kind, "how": how, **checked}
    return dataclasses.field(metadata=metadata)


def model_flag(default: str) -> Any:
    """The model that is to forget."""
    return flag("hub id or folder", default, names=("--model_name", "--model"), metavar="MODEL")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Resolved flags, under the flags' names: those that both tools have."""

    COMPAT: ClassVar[str]
    """Value of --compat that does all as the published tool does."""
    MODULE_STR: ClassVar[str]
    """The published tool's default of --module_str."""
    FOLDER_FLAG: ClassVar[str]
    PARAM_IDS: ClassVar[list[int]]
    """Of --param_ids, where --tensors is not given."""
    ACCEPTED: ClassVar[Mapping[str, tuple[Callable[[str], Any], str]]] = {}
    """Flags that have no effect: how they are read, and help."""

    model_name_or_path: str = model_flag("")
    layer_id: int = flag("block whose output the loss reads, 0-based", 7, least=0)
    layer_ids: list[int] = flag("blocks that are changed", "5,6,7")
    param_ids: list[int] | None = flag("tensors of a block, by their place in it")
    """None: `tensors` chooses."""
    tensors: list[str] | None = flag(
        "tensors by the end of their name in the block, such as mlp.down_proj, in place of --param_ids", further=True
    )
    """None: `param_ids` chooses."""
    epochs: int = flag("how often the texts may be read; the published tool reads them once", 1, least=1, further=True)
    data_dir: str | None = flag("folder of local corpora; `data` is looked into too", further=True)
    dtype: str = flag("type of the model; auto: as stored", "auto", choices=DTYPES, further=True)
    device: str = flag("auto, cpu, cuda or mps", "auto", further=True)
    trust_remote_code: bool = flag("run model code that comes with the weights", further=True)
    save_steps: int = flag("updates between checkpoints, which a run goes on from; 0: none", 50, least=0, further=True)
    overwrite: bool = flag("replace another run in the folder", further=True)

    @property
    def folder(self) -> str:
        """Where the result goes."""
        raise NotImplementedError

    @property
    def quirks(self) -> list[str]:
        """What is done in the published tool's own way."""
        flags = {one.name: one.metadata for one in dataclasses.fields(self)}
        own = {name: how["default"] for name, how in flags.items() if how["corrected"] is not None}
        return [f"{name}={published}" for name, published in own.items() if getattr(self, name) == published]

    @classmethod
    def parser(cls) -> Parser:
        """The flags."""
        parser = Parser(f"python -m {cls._package()}", description=cls.__doc__, formatter_class=_Help)
        published = parser.add_argument_group("flags of the published tool")
        quirks = parser.add_argument_group("what the published tool does in its own way")
        further = parser.add_argument_group("further flags")
        quirks.add_argument("--compat", choices=(cls.COMPAT, "none"), default=cls.COMPAT, help="default of the others")
        types = get_type_hints(cls)
        for one in dataclasses.fields(cls):
            how, kind, default = one.metadata, types[one.name], one.metadata["default"]
            text, group = how["text"], further if how["further"] else published
            more: dict[str, Any] = dict(how["how"])
            if kind is bool and how["kind"] is None:
                more["action"] = "store_true"
            else:
                optional = [known for known in KINDS if kind == known | None]
                more |= {"type": how["kind"] or KINDS[optional[0] if optional else kind], "default": default}
            if how["corrected"] is not None:
                group, text = quirks, f"{text} ({default}; with --compat none {how['corrected']})"
                more["default"] = None
            group.add_argument(f"--{one.name}", *how["names"], help=text, **more)
        published.add_argument(
            "--module_str", default=cls.MODULE_STR, help="not needed: blocks are found by their shape"
        )
        for name, (read, text) in cls.ACCEPTED.items():
            published.add_argument(f"--{name}", type=read, help=text)
        text = "print the resolved flags as JSON and stop"
        further.add_argument("--print_config", "--print-config", action="store_true", help=text)
        return parser

    @classmethod
    def parse(cls, arguments: list[str]) -> Self:
        """Options that a command line means; ConfigError if it means nothing."""
        return cls.resolve(cls.parser().read(arguments))

    @classmethod
    def resolve(cls, given: argparse.Namespace) -> Self:
        """Options of flags as they are read."""
        values = vars(given)
        flags = dataclasses.fields(cls)
        for one in flags:
            if one.metadata["corrected"] is not None and values[one.name] is None:
                values[one.name] = one.metadata["corrected" if given.compat == "none" else "default"]
        if given.tensors is not None and given.param_ids is not None:
            raise ConfigError("--tensors and --param_ids both choose tensors; give one of them")
        if given.tensors is None and given.param_ids is None:
            values["param_ids"] = cls.PARAM_IDS
        options = cls(**{one.name: values[one.name] for one in flags})
        for one in flags:
            of_flag = getattr(options, one.name)
            for value in of_flag if isinstance(of_flag, list) else [of_flag]:
                _check_number(one.name, value, one.metadata["least"], one.metadata["above"])
        options.check()
        return options

    def check(self) -> None:
        """ConfigError for values that no run can have."""

    def shown(self) -> dict[str, Any]:
        """What --print_config prints."""
        return {**dataclasses.asdict(self), "quirks": self.quirks}

    @classmethod
    def main(cls, arguments: list[str] | None = None) -> int:
        """Run the command line (None: that of this process), and print the folder of the result.

        The exit status is 2 for wrong use, 1 for any other error, 130 or 143 where interrupted; errors are printed as
        `grun.cli.main` prints them.
        """
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        for package in ("grun", "baselines"):
            logging.getLogger(package).setLevel(logging.INFO)
        return exit_status(lambda: cls._command(sys.argv[1:] if arguments is None else arguments))

    @classmethod
    def _command(cls, arguments: list[str]) -> int:
        if processes.count() > 1:
            raise ConfigError(f"python -m {cls._package()} runs in one process; start it without torchrun")
        given = cls.parser().read(arguments)
        options = cls.resolve(given)
        for name, (_, text) in cls.ACCEPTED.items():
            if getattr(given, name) is not None:
                log.info("--%s is not used: %s", name, text)
        if given.module_str != cls.MODULE_STR:
            log.info("--module_str is not needed, and not evaluated: the blocks of a model are found by their shape")
        if given.print_config:
            print(json.dumps(options.shown(), indent=2))
            return 0
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
            folder = importlib.import_module(f"{cls._package()}.run").run(options)
        print(folder)
        return 0

    @classmethod
    def _package(cls) -> str:
        return cls.__module__.rpartition(".")[0]


def _check_number(name: str, value: Any, least: float | None, above: float | None) -> None:
    if "seed" in name and not 0 <= value < 2**32:
        raise ConfigError(f"--{name} {value} must be from 0 to 2^32 - 1")
    if least is not None and not value >= least:
        what = f"be at least {least:g}" if least else "not be negative"
        raise ConfigError(f"--{name} {value:g} must {what}")
    if above is not None and not value > above:
        raise ConfigError(f"--{name} {value:g} must be above {above:g}")
