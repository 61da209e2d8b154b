"""What the published tools' command lines share: errors of one line, and flags that hold lists."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from grun.cli import exit_status
from grun.config.checks import check_home
from grun.config.options import LARGEST, SEEDS
from grun.errors import ConfigError
from grun.runtime import processes
from grun.runtime.reading import check_plain


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s; the last of repeated flags counts."""

    def error(self, message: str) -> NoReturn:
        """Without the usage text, which `--help` gives."""
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")

    def read(self, arguments: list[str]) -> argparse.Namespace:
        """What the flags say; ConfigError for what no flag can mean: infinite numbers, texts that are none."""
        given = self.parse_args(arguments)
        for name, value in vars(given).items():
            for one in value if isinstance(value, list) else [value]:
                if type(one) in (int, float) and not abs(one) <= {int: SEEDS, float: LARGEST[float]}[type(one)]:
                    raise ConfigError(f"--{name} {one:g} is too large to compute with; give a finite number")
                if isinstance(one, str):
                    check_plain(one, f"--{name}")
                    check_home(f"--{name}", one)
        return given


def names(text: str) -> list[str]:
    """Names separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names separated by commas")
    return found


def numbers(text: str) -> list[int]:
    """Integers separated by commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers separated by commas") from error


def weights(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers separated by commas") from error


def run_command(program: str, command: Callable[[], None]) -> int:
    """Exit status of `command`, whose errors are printed as `grun.cli.main` prints them: 2 wrong use, 1 any other."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("grun", "baselines"):
        logging.getLogger(package).setLevel(logging.INFO)

    def alone() -> int:
        if processes.count() > 1:
            raise ConfigError(f"{program} runs in one process; start it without torchrun")
        command()
        return 0

    return exit_status(alone)
