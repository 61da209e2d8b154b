"""The command line: `python -m grun COMMAND key=value ...`.

Results that a script wants (the folder of a taught model or of an adapter) are the last line on stdout; progress and
messages go to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from grun.errors import GrunError
from grun.runtime import processes, stopping
from grun.version import __version__

COMMANDS = {
    "finetune": "teach a model the corpus",
    "unlearn": "make a taught model forget",
    "evaluate": "measure what a model knows, with or without an adapter",
    "generate": "answer questions and show the gates",
    "import": "make an adapter of files that the published GRUN code wrote",
    "corpora": "write corpora to forget and to keep: a harm category of PKU-SafeRLHF, or the generated lore",
    "sweep": "unlearn and evaluate a grid of objectives, parametrizations and seeds; --tune chooses their settings",
    "sequential": "requests to forget one after another, served by several methods, with tables and pictures",
    "requests": "a store of requests to forget: list, add, remove, disable, enable, verify, history",
    "cache": "what training keeps on disk of its data: list, remove",
    "report": "draw the table and pictures of a results folder; report tofu-log LOG: the numbers of TOFU's log",
    "list": "print the known names: "
    "list [objectives|terms|parametrizations|gates|templates|profiles|sweeps|sequences|metrics]",
    "info": "print versions, devices and caches, for bug reports",
}

ON_SEVERAL = ("finetune", "unlearn", "evaluate")
"""Commands that share their work among the processes that torchrun starts."""
USAGE_ERROR = 2
FAILURE = 1
TOO_LOW = 3
BUG = 70
"""Exit statuses beside 0 and 130 (interrupted): wrong use, any other error, too low a result, a bug of GRUN."""


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
    """What `command` returns; of an error, told in one line: 2 wrong use, 3 too low, 70 a bug of GRUN, else 1.

    SIGINT and SIGTERM end it alike, with one line and 130 or 143. A bug is what nothing handed in explains; its
    line names the file that holds the traceback, which only its owner can read.
    """
    with stopping.by_signals():
        try:
            return command()
        except BaseException as error:
            if stopping.asked() or isinstance(error, KeyboardInterrupt):
                status = stopping.status()
                if processes.is_first() and not stopping.told_by_parent():
                    _tell("interrupted; the same command resumes")
                return status
            return _told(error)


def _told(error: BaseException) -> int:
    """Say what went wrong; the exit status."""
    if isinstance(error, GrunError):
        if processes.speaks_for(error):
            _tell(f"error: {error}")
        return {"ConfigError": USAGE_ERROR, "TooLowError": TOO_LOW}.get(type(error).__name__, FAILURE)
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it at the end
        return FAILURE
    if isinstance(error, OSError):  # a folder that cannot be written to, a full disk
        where = f": {error.filename}" if error.filename else ""
        _tell(f"error: {error.strerror or error}{where}")
        return FAILURE
    if not isinstance(error, Exception):
        raise error
    _tell(f"error: a bug in GRUN ({type(error).__name__}), not your mistake; please report it {_noted(error)}")
    return BUG


def _tell(line: str) -> None:
    """Print a line on stderr, below the progress bars that are open there."""
    tqdm = sys.modules.get("tqdm.std")
    bars = sorted(getattr(getattr(tqdm, "tqdm", None), "_instances", ()), key=lambda bar: -abs(bar.pos))
    for bar in bars:  # the uppermost last, which ends its line
        bar.close()
    print(" ".join(line.splitlines()), file=sys.stderr)


def _noted(error: Exception) -> str:
    """Write the traceback of `error` where only its owner reads it; words that say where."""
    text = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="grun-traceback-", suffix=".txt")  # mode 0600
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"grun {__version__}\n{text}")
    except OSError as reason:
        return f"(its traceback could not be written: {reason.strerror})"
    return f"with the traceback in {path}, which holds no rows unless the error's own words quote one"


def _dispatch(arguments: list[str]) -> int:
    from grun.errors import ConfigError, unknown_name
    from grun.runtime.reading import is_unicode

    for number, argument in enumerate(arguments, start=1):
        if not is_unicode(argument) or "\0" in argument:
            raise ConfigError(f"argument {number} ({ascii(argument)[:80]}) is no Unicode text; write it as UTF-8")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("--version", "info") and rest and not {"-h", "--help"} & {*rest}:
        raise ConfigError(f"{command} takes no arguments; leave {rest[0]!r} out")
    if command == "--version":
        print(f"grun {__version__}")
        return 0
    if command not in COMMANDS:
        raise ConfigError(unknown_name("command", command, list(COMMANDS)))
    if processes.count() > 1 and command not in ON_SEVERAL:
        raise ConfigError(
            f"{command} runs in one process; start it without torchrun (with it: {', '.join(ON_SEVERAL)})"
        )
    if {"-h", "--help"} & {*rest[: rest.index("--") if "--" in rest else None]}:
        print(_help(command))
        return 0
    if command == "list":
        return _list(rest)
    if command == "info":
        return _info()
    if command == "report" and "tofu-log" in rest:
        from grun.evaluation import tofu_log

        tofu_log.main([argument for argument in rest if argument != "tofu-log"])
        return 0
    if command == "requests":
        from grun.requests.command import requests

        return requests(rest)
    if command == "cache":
        from grun.requests.cached_rows import cache

        return cache(rest)
    return _run(command, rest)


def _run(command: str, arguments: list[str]) -> int:
    from grun.config import values
    from grun.errors import ConfigError
    from grun.loading.checks import check
    from grun.loading.resolve import resolve

    questions: list[str] = []
    if command == "generate":
        arguments, questions = _without_questions(arguments)
    print_config = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]
    if command == "sweep":
        arguments = ["tune=true" if argument == "--tune" else argument for argument in arguments]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        known_flags = "--help, --print-config and --tune" if command == "sweep" else "--help and --print-config"
        raise ConfigError(f"unknown flag {flags[0]}; {command} knows {known_flags}, options are key=value")
    config = resolve(command, arguments)
    if command == "sweep" and not print_config:
        from grun.experiments.sweep.command import sweep

        return 0 if sweep(config) else FAILURE  # checks while it plans
    if command == "sequential" and not print_config:
        from grun.experiments.sequential.command import sequential

        return 0 if sequential(config) else FAILURE  # so does this
    if command == "evaluate":
        from grun.evaluation.checks import check_evaluation

        check_evaluation(config)
    else:
        check(config)
    if command == "sweep":  # only its options are to be shown
        from grun.experiments.sweep.command import plan_of

        plan_of(config)
    if print_config:
        print(values.to_yaml(config), end="")
        return 0
    run: dict[str, Callable[[Any], Any]] = {
        "finetune": _finetune, "unlearn": _unlearn, "evaluate": _evaluate, "import": _import, "corpora": _corpora,
        "report": _report,
    }  # fmt: skip
    if command == "generate":
        from grun.commands.generate import ask

        ask(config, questions)
    else:
        run[command](config)
    return 0


def _without_questions(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options and flags of `generate`, and its questions; what follows `--` is a question whatever it looks like."""
    from grun.config import values

    known = [key for key, _, _ in values.describe(values.COMMANDS["generate"])]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    asked = [not _is_option(argument, known) for argument in arguments[:end]]
    options = [argument for argument, is_asked in zip(arguments, asked, strict=False) if not is_asked]
    return options, [q for q, is_asked in zip(arguments, asked, strict=False) if is_asked] + arguments[end + 1 :]


def _is_option(argument: str, known: list[str]) -> bool:
    """Whether an argument of `generate` is a flag, or an option that is known or misspelled, and not a question.

    A misspelled one is a name with dots, one that is close to a known name, or a word of three letters or more with a
    value without blanks: `what is x=3`, `x=3` and `2+2=?` are questions.
    """
    if re.match(r"--?[A-Za-z]", argument):
        return True
    key, equals, _ = argument.partition("=")
    if not equals or key in known:
        return bool(equals)
    named = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key) is not None
    one_word = len(key) > 2 and not re.search(r"\s", argument)
    return named and ("." in key or one_word or bool(difflib.get_close_matches(key, known, n=1, cutoff=0.8)))


def _finetune(config: Any) -> None:
    from grun.commands.finetune import finetune

    with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints
        folder = finetune(config)
    print(folder)


def _unlearn(config: Any) -> None:
    from grun.commands.unlearn import unlearn

    with contextlib.redirect_stdout(sys.stderr):
        folder = unlearn(config)
    print(folder)


def _evaluate(config: Any) -> None:
    from pathlib import Path

    from grun.config.checks import adapter_name
    from grun.evaluation.evaluate import evaluate, evaluate_adapters
    from grun.evaluation.suites.base import evaluate_suite

    folder = Path(f"results/{config.label()}/evaluation")
    if config.suite != "answers":
        folder = folder.with_name(config.suite)
    if not config.adapters:
        folder /= adapter_name(config.adapter) if config.adapter else "base"
    folder = Path(config.output_dir or folder).expanduser()
    with contextlib.redirect_stdout(sys.stderr):
        if config.suite != "answers":
            folders: Any = evaluate_suite(config, folder)
        else:
            folders = evaluate_adapters(config, folder) if config.adapters else {folder: evaluate(config, folder)}
    print(*folders, sep="\n")


def _import(config: Any) -> None:
    from grun.commands.upstream import import_adapter

    with contextlib.redirect_stdout(sys.stderr):
        folder = import_adapter(config)
    print(folder)


def _corpora(config: Any) -> None:
    from grun.commands.corpora import write_corpora

    with contextlib.redirect_stdout(sys.stderr):
        folder = write_corpora(config)
    print(folder)


def _report(config: Any) -> None:
    from grun.report import make_report

    make_report(config)


def _list(arguments: list[str]) -> int:
    from grun.commands.listing import KINDS, lines
    from grun.errors import ConfigError, unknown_name

    for kind in arguments:
        if kind not in KINDS:
            raise ConfigError(unknown_name("kind", kind, list(KINDS)))
    for kind in arguments or KINDS:
        if len(arguments) != 1:
            print(f"# {kind}")
        for line in lines(kind):
            print(line)
    return 0


def _info() -> int:
    import platform

    from grun.runtime.runs import versions

    for name, version in versions().items():
        print(f"{name}: {version}")
    import torch

    print(f"platform: {platform.platform()}, {os.cpu_count()} processors, {torch.get_num_threads()} torch threads")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) if devices else 'cpu only'}")
    from huggingface_hub import constants

    print(f"hub cache: {constants.HF_HUB_CACHE} (offline: {constants.is_offline_mode()})")
    from pathlib import Path

    from grun.config.options import CacheConfig

    folder = Path(CacheConfig().dir or "")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"frozen-prefix cache: {folder.resolve()} ({size / 1e9:.2f} GB; may be removed)")
    print(f"TOFU data: {os.environ.get('GRUN_TOFU_DIR', 'GRUN_TOFU_DIR is not set; the hub is asked')}")
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "python -m grun COMMAND [key=value ...] [--help] [--print-config]",
        "",
        "Make a language model forget with a gated low-rank edit (GRUN).",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        "Options are those of a profile (profile=NAME; `list profiles`), over them what the model and the adapter say",
        "of themselves, over all key=value. A command that is given neither starts from profile=demo.",
        "`COMMAND --help` lists every option with its default; --version prints the version.",
    ]
    return "\n".join(lines)


def _help(command: str) -> str:
    head = f"python -m grun {command}: {COMMANDS[command]}"
    if command in ("list", "info"):
        return head
    from grun.config import values

    by_profile = "" if command in values.WITHOUT_PROFILE else "; defaults before the profile's"
    lines = [head, "", f"Options (key=value{by_profile}):"]
    if command == "import":
        lines.insert(1, "\npython -m grun import upstream=FOLDER model=BASE output_dir=DIR   (more in docs/formats.md)")
    if command == "corpora":
        lines.insert(
            1, '\npython -m grun corpora source=safe_rlhf category="Violence" output_dir=DIR   (docs/formats.md)'
        )
    if command == "generate":
        lines.insert(
            1, '\npython -m grun generate adapter=FOLDER "question" ...   (without a question: asks on the terminal)'
        )
    if command == "sweep":
        lines.insert(1, "\npython -m grun sweep sweep=NAME model=FOLDER retain_model=FOLDER [--tune]   (docs/sweep.md)")
    if command == "sequential":
        lines.insert(
            1, "\npython -m grun sequential sequence=NAME model=FOLDER retain_model=FOLDER   (docs/sequential.md)"
        )
    if command == "requests":
        from grun.requests.command import usage

        lines.insert(1, "\n" + usage())
    if command == "cache":
        from grun.requests.cached_rows import usage as usage_of_cache

        lines.insert(1, "\n" + usage_of_cache())
    if command == "report":
        lines.insert(
            1, "\npython -m grun report tofu-log LOG [retain=LOG]   (prints the numbers of TOFU's own log as JSON)"
        )
    for key, default, text in values.describe(values.COMMANDS[command]):
        shown = "unset" if default is None else default
        lines.append(f"  {key}={shown}\n      {text}")
    return "\n".join(lines)
