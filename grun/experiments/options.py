"""From an experiment's file and command line to the options of `unlearn`, `evaluate` and `finetune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grun.config.definitions import mapping
from grun.config.values import COMMANDS, argument, describe, flatten
from grun.errors import ConfigError, DataError, unknown_name
from grun.loading.checks import check
from grun.loading.resolve import resolve

BY_SWEEP = {
    "unlearn": ("profile", "model.path", "output_dir", "overwrite"),
    "evaluate": (
        *("profile", "model.path", "output_dir", "overwrite", "adapter", "adapters", "with_base", "suffix"),
        *("reference", "gate_threshold"),
    ),
}
"""Options that a sweep itself sets, or that would differ between an adapter and a whole model."""
SET_BY = {
    "sweep": BY_SWEEP,
    "experiment": {
        "unlearn": (*BY_SWEEP["unlearn"], "method.parametrization", "method.beside"),
        "evaluate": (*BY_SWEEP["evaluate"], "suite"),
    },
}
"""The same of sequential requests too."""
SHARED = ("model.", "data.")
"""Options that all models have in common, since their results stand in one table."""
CORPUS = (
    *("name", "path", "forget", "retain", "heldout", "validation", "retain_rows"),
    *("unknown", "unknown_rows", "refused_rows", "teach_general", "refusals"),
)
"""Data options that decide which row belongs to which set; teaching, unlearning and evaluation must agree on them."""


GENERATED = ("demo", "countries")
"""Sections of `data` that do too."""


def known(where: str, kind: str, names: Any, every: Any) -> None:
    """ConfigError for the first of `names` that is not among `every`."""
    for name in names:
        if name not in list(every):
            raise ConfigError(f"{where}: {unknown_name(kind, str(name), list(every))}")


def check_option(where: str, key: str, command: str, owner: str) -> None:
    """ConfigError for an option that the command does not have, or that the `owner` sets itself."""
    known(where, "option", [key], keys_of(command))
    refuse_set(where, key, command, owner)


def refuse_set(where: str, key: str, command: str, owner: str) -> None:
    """ConfigError for an option of a command that the `owner` (sweep, experiment) sets itself."""
    if key in SET_BY[owner][command]:
        raise ConfigError(f"{where}: {key} is set by the {owner}; leave it out")


def section(where: str, value: Any, command: str, owner: str) -> dict[str, Any]:
    """Nested options of a section as flat ones, checked by name."""
    options = flatten(mapping(where, value), keys_of(command))
    for key in options:
        check_option(where, key, command, owner)
    return options


def keys_of(command: str) -> list[str]:
    """Keys of the options of a command."""
    return [key for key, _, _ in describe(COMMANDS[command])]


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as the key=value that `grun.loading.resolve.resolve` reads."""
    return [f"{key}={'' if value is None else argument(value)}" for key, value in options.items()]


def shared(texts: Sequence[str]) -> list[str]:
    """Arguments that hold for all models."""
    return [text for text in texts if text.startswith(SHARED)]


def resolved(
    where: str, command: str, profile: str | None, model: str | None, texts: Sequence[str], *, quiet: bool = True
) -> Any:
    """Checked options of a command; ConfigError names the place where they are wrong."""
    given = [] if profile is None else [f"profile={profile}"]
    given += [] if model is None else [f"model.path={model}"]
    try:
        config = resolve(command, [*given, *texts], quiet=quiet)
        check(config)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return config
