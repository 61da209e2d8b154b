"""The command line: `python -m grun COMMAND key=value ...`.

Results that a script wants (the folder of a model or of an adapter) are the last line on stdout; progress and messages
go to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grun.errors import ConfigError, GrunError, unknown_name
from grun.runtime import processes, stopping
from grun.version import __version__


@dataclass(frozen=True)
class Command:
    """One command, and everything that the command line has to know of it."""

    summary: str
    """Its line in the overview."""
    run: str
    """module:function of its config, or with `takes="arguments"` of the arguments as they are. A path it returns, or
    several, is printed, unless it prints itself; False is failure, a number the exit status, all else success."""
    usage: str = ""
    """Line of its help above the options; or, as module:function, what gives the lines."""
    takes: str = "config"
    """config, config and questions, or arguments."""
    stdout: bool = False
    """Whether it prints results itself; else whatever a library prints goes to stderr."""
    on_several: bool = False
    """Whether it shares its work among the processes that torchrun starts."""
    plan: str | None = None
    """module:function that checks more of a config than `check`, for --print-config; the command does so itself."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Its own flags, and the option that each stands for."""


COMMANDS = {
    "finetune": Command("fine-tune a model on the corpus", "grun.commands.finetune:finetune", on_several=True),
    "unlearn": Command("make a fine-tuned model forget", "grun.commands.unlearn:unlearn", on_several=True),
    "evaluate": Command(
        "measure what a model knows, with or without an adapter", "grun.commands.evaluate:evaluate", on_several=True
    ),
    "lm_eval": Command(
        "lm-evaluation-harness's own command line, with the model grun",
        "grun.commands.lm_eval:run_harness",
        "grun.commands.lm_eval:usage",
        takes="arguments",
        stdout=True,
    ),
    "generate": Command(
        "answer questions and show the gates",
        "grun.commands.generate:ask",
        'adapter=FOLDER "question" ...   (without a question: asks on the terminal)',
        takes="config and questions",
        stdout=True,
    ),
    "serve": Command(
        "serve an adapter or a store of requests with OpenAI's API, and a page that shows the gates",
        "grun.serving.command:serve",
        "adapter=FOLDER_OR_STORE port=8000   (docs/serve.md)",
        stdout=True,
    ),
    "calibrate": Command(
        "set the threshold of an adapter's gates by rows that must stay, at a rate of false positives",
        "grun.commands.calibrate:calibrate",
        "adapter=FOLDER rows=FILE false_positives=0.01 output_dir=DIR   (docs/robustness.md)",
    ),
    "push": Command(
        "send an adapter to the Hugging Face hub, without text of what was to be forgotten",
        "grun.commands.push:push_adapter",
        "adapter=FOLDER repo=OWNER/NAME   (docs/share.md)",
    ),
    "import": Command(
        "make an adapter of files that the published GRUN code wrote",
        "grun.commands.upstream:import_adapter",
        "upstream=FOLDER model=BASE output_dir=DIR   (more in docs/formats.md)",
    ),
    "corpora": Command(
        "write corpora to forget and to keep: PKU-SafeRLHF's, the generated lore, or what a model says of a subject",
        "grun.commands.corpora:write_corpora",
        'source=subject subject="Marie Curie" kind=person model.path=MODEL output_dir=DIR   (docs/formats.md)',
    ),
    "sweep": Command(
        "unlearn and evaluate a grid of objectives, parametrizations and seeds; --tune chooses their settings",
        "grun.experiments.sweep.command:sweep",
        "sweep=NAME model=FOLDER retain_model=FOLDER [--tune]   (docs/sweep.md)",
        stdout=True,
        plan="grun.experiments.sweep.command:plan_of",
        flags={"--tune": "tune=true"},
    ),
    "sequential": Command(
        "requests to forget one after another, served by several methods, with tables and pictures",
        "grun.experiments.sequential.command:sequential",
        "sequence=NAME model=FOLDER retain_model=FOLDER   (docs/sequential.md)",
        stdout=True,
    ),
    "requests": Command(
        "a store of requests to forget: list, add, remove, disable, enable, verify, history",
        "grun.requests.command:requests",
        "grun.requests.command:usage",
        takes="arguments",
        stdout=True,
    ),
    "cache": Command(
        "what training keeps on disk of its data: list, remove",
        "grun.commands.cache:cache",
        "grun.commands.cache:usage",
        takes="arguments",
        stdout=True,
    ),
    "report": Command(
        "draw the table and pictures of a results folder; report tofu-log LOG: the numbers of TOFU's log",
        "grun.report.make:make_report",
        "tofu-log LOG [retain=LOG]   (prints the numbers of TOFU's own log as JSON)",
        stdout=True,
    ),
    "meta": Command(
        "which metric to believe: how well each tells models that know from models that never did",
        "grun.experiments.meta:meta",
        "knows=[FOLDER,...] never=[FOLDER,...] [unlearned=[FOLDER,...]], or models=6   (docs/metrics.md)",
        stdout=True,
    ),
    "leaderboard": Command(
        "results that anyone can check, and the board of them: submit, verify, board",
        "grun.commands.leaderboard:leaderboard",
        "grun.commands.leaderboard:usage",
        takes="arguments",
        stdout=True,
    ),
    "list": Command(
        "print the known names, of every kind or of those named: list [KIND ...]",
        "grun.commands.listing:list_names",
        "grun.commands.listing:usage",
        takes="arguments",
        stdout=True,
    ),
    "info": Command(
        "print versions, devices and caches, for bug reports",
        "grun.commands.listing:info",
        takes="arguments",
        stdout=True,
    ),
}
FAILURE = 1
BUG = 70
"""Exit statuses other than 0, 130 (interrupted) and those of `grun.errors`: any other error, a bug of GRUN."""
HELP = {"-h", "--help"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status, see `exit_status`."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # answers in letters that the terminal does not have
    if processes.count() > 1:  # read by torch when it is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("grun").setLevel(logging.INFO if processes.is_first() else logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names a package to install, quantized or not
    with contextlib.redirect_stdout(sys.stdout if processes.is_first() else None):
        return exit_status(lambda: _dispatch(arguments))


def exit_status(command: Callable[[], int]) -> int:
    """What `command` returns; of an error, which is printed as one line, its own status; 70 for a bug of GRUN.

    SIGINT and SIGTERM end it alike, with one line and 130 or 143. A bug is what nothing handed in explains; its
    line names the file that holds the traceback, which only its owner can read.
    """
    with stopping.by_signals():
        try:
            return command()
        except BaseException as error:
            if stopping.asked() or isinstance(error, KeyboardInterrupt):
                status = stopping.status()
                if processes.is_first() and not stopping.parent_reports():
                    _print_error("interrupted; the same command resumes")
                return status
            return _report(error)


def _report(error: BaseException) -> int:
    """Print what went wrong; the exit status."""
    if isinstance(error, GrunError):
        if processes.speaks_for(error):
            _print_error(f"error: {error}")
        return error.exit_status
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it at the end
        return FAILURE
    if isinstance(error, OSError):  # a folder that cannot be written to, a full disk
        where = f": {error.filename}" if error.filename else ""
        _print_error(f"error: {error.strerror or error}{where}")
        return FAILURE
    if not isinstance(error, Exception):
        raise error
    _print_error(
        f"error: a bug in GRUN ({type(error).__name__}), not your mistake; please report it {_traceback_file(error)}"
    )
    return BUG


def _print_error(line: str) -> None:
    """Print a line on stderr, below the progress bars that are open there."""
    tqdm = sys.modules.get("tqdm.std")
    bars = sorted(getattr(getattr(tqdm, "tqdm", None), "_instances", ()), key=lambda bar: -abs(bar.pos))
    for bar in bars:  # the uppermost last, which ends its line
        bar.close()
    print(" ".join(line.splitlines()), file=sys.stderr)


def _traceback_file(error: Exception) -> str:
    """Write the traceback of `error` where only its owner reads it; words that name the file."""
    text = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="grun-traceback-", suffix=".txt")  # mode 0600
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"grun {__version__}\n{text}")
    except OSError as reason:
        return f"(its traceback could not be written: {reason.strerror})"
    return f"with the traceback in {path}, which holds no rows unless the error's own words quote one"


def _dispatch(arguments: list[str]) -> int:
    from grun.runtime.reading import is_unicode

    for number, argument in enumerate(arguments, start=1):
        if not is_unicode(argument) or "\0" in argument:
            raise ConfigError(f"argument {number} ({ascii(argument)[:80]}) is no Unicode text; write it as UTF-8")
    if not arguments or arguments[0] in HELP:
        print(_overview())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in ("--version", "info") and rest and not HELP & {*rest}:
        raise ConfigError(f"{name} takes no arguments; leave {rest[0]!r} out")
    if name == "--version":
        print(f"grun {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(unknown_name("command", name, list(COMMANDS)))
    command = COMMANDS[name]
    if processes.count() > 1 and not command.on_several:
        several = ", ".join(other for other in COMMANDS if COMMANDS[other].on_several)
        raise ConfigError(f"{name} runs in one process; start it without torchrun (with it: {several})")
    if HELP & {*rest[: rest.index("--") if "--" in rest else None]}:
        print(_help(name, command))
        return 0
    if name == "report" and "tofu-log" in rest:
        logs = [argument for argument in rest if argument != "tofu-log"]
        return _carry_out(command, _load("grun.evaluation.tofu_log:main"), logs)
    if command.takes == "arguments":
        return _carry_out(command, _load(command.run), rest)
    return _run(name, command, rest)


def _run(name: str, command: Command, arguments: list[str]) -> int:
    from grun.config import values
    from grun.loading.checks import check
    from grun.loading.resolve import resolve

    more: tuple[Any, ...] = ()
    if command.takes == "config and questions":
        arguments, questions = _load("grun.commands.generate:without_questions")(arguments)
        more = (questions,)
    print_config = "--print-config" in arguments
    arguments = [command.flags.get(argument, argument) for argument in arguments if argument != "--print-config"]
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        *known, last = ("--help", "--print-config", *command.flags)
        raise ConfigError(f"unknown flag {flags[0]}; {name} knows {', '.join(known)} and {last}, options are key=value")
    config = resolve(name, arguments)
    check(config)
    if print_config:
        if command.plan is not None:
            _load(command.plan)(config)
        print(values.to_yaml(config), end="")
        return 0
    return _carry_out(command, _load(command.run), config, *more)


def _carry_out(command: Command, function: Callable[..., Any], *arguments: Any) -> int:
    """Exit status of a command; the folders of its results are printed."""
    with contextlib.nullcontext() if command.stdout else contextlib.redirect_stdout(sys.stderr):
        result = function(*arguments)
    if isinstance(result, int):
        return (0 if result else FAILURE) if isinstance(result, bool) else result
    if result is None or command.stdout:
        return 0
    print(*([result] if isinstance(result, Path) else result), sep="\n")
    return 0


def _load(path: str) -> Any:
    """What a string module:attribute names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "python -m grun COMMAND [key=value ...] [--help] [--print-config]",
        "",
        "Make a language model forget with a gated low-rank edit (GRUN).",
        "",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "Options are those of a profile (profile=NAME; `list profiles`), then what is stored with the model and the",
        "adapter, then key=value; what comes later wins. A command that is given neither starts from profile=demo.",
        "`COMMAND --help` lists every option with its default; --version prints the version.",
    ]
    return "\n".join(lines)


def _help(name: str, command: Command) -> str:
    from grun.commands.listing import known_names
    from grun.config import values

    lines = [f"python -m grun {name}: {command.summary}"]
    if command.usage:
        of_its_own = command.usage.startswith("grun.")
        lines += ["", _load(command.usage)() if of_its_own else f"python -m grun {name} {command.usage}"]
    if name not in values.COMMANDS:
        return "\n".join(lines)
    by_profile = "" if name in values.WITHOUT_PROFILE else "; defaults before the profile's"
    lines += ["", f"Options (key=value{by_profile}):"]
    for key, default, text in values.describe(values.COMMANDS[name]):
        lines.append(f"  {key}={'unset' if default is None else default}\n      {text}")
        for kind in re.findall(r"\blist (\w+)`", text):
            lines += textwrap.wrap(
                f"{kind}: {', '.join(known_names(kind))}", 116, initial_indent=" " * 6, subsequent_indent=" " * 8
            )
    return "\n".join(lines)
