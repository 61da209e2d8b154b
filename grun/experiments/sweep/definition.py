"""A sweep's YAML file: axes, options of all cells, the grid of `--tune` and what was chosen by it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grun.config.definitions import mapping, read_definition
from grun.config.options import EvaluateConfig, UnlearnConfig
from grun.config.values import describe
from grun.errors import ConfigError, unknown_name

SECTIONS = ("description", "profile", "axes", "unlearn", "evaluate", "tune", "tuned")
TUNE_KEYS = ("seed", "grid")
OBJECTIVE, PARAMETRIZATION, DESIGN, SEED = "objective", "method.parametrization", "design", "seed"
SET_BY_SWEEP = {
    "unlearn": ("profile", "model.path", "output_dir", "overwrite"),
    "evaluate": (
        *("profile", "model.path", "output_dir", "overwrite", "adapter", "adapters", "with_base", "suffix"),
        *("reference", "gate_threshold", "base_evaluation"),
    ),
}
"""Options that the sweep itself sets, or that would differ between an adapter and a whole model."""
SHARED = ("model.", "data.")
"""Options that all cells have in common, since their results stand in one table."""
FREE_DATA = ("data.retain_pool",)
"""Data options that change what unlearning uses and not what is evaluated."""


@dataclass
class Sweep:
    """What a sweep's file says, checked for unknown keys; options are flat, `section.key`."""

    name: str
    profile: str | None = None
    """None: what a given model was taught with, demo where none is given."""
    model: str | None = None
    """Hub id or folder that the command line gives."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Option of unlearn -> its values."""
    unlearn: dict[str, Any] = field(default_factory=dict)
    """Options of every cell."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of every evaluation."""
    tune_seed: int | None = None
    """Seed of the runs that settings are chosen by; None: the sweep's first."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Option -> values to try, or parametrization -> values to try."""
    tuned: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Objective -> parametrization -> options; where there are further axes, also the name of their part -> options."""

    @property
    def further_axes(self) -> list[str]:
        """Axes other than objective, parametrization and seed."""
        return [key for key in self.axes if key not in (OBJECTIVE, PARAMETRIZATION, SEED)]


def read_sweep(name: str) -> Sweep:
    """A packaged sweep, or the file `name` that ends in .yaml; ConfigError names a key that is unknown."""
    where = f"sweep {name}"
    content = read_definition("sweep", name)
    for key in content:
        _known(where, "section", key, SECTIONS)
    axes = mapping(f"{where}: axes", content.get("axes"))
    for key, values in axes.items():
        _check_axis(f"{where}: axes", key, values)
    tune = mapping(f"{where}: tune", content.get("tune"))
    for key in tune:
        _known(f"{where}: tune", "key", key, TUNE_KEYS)
    sweep = Sweep(
        name=Path(name).stem,
        profile=None if content.get("profile") is None else str(content["profile"]),
        axes=axes,
        unlearn=_options(f"{where}: unlearn", content.get("unlearn"), "unlearn"),
        evaluate=_options(f"{where}: evaluate", content.get("evaluate"), "evaluate"),
        tune_seed=tune.get("seed"),
        grid=mapping(f"{where}: tune.grid", tune.get("grid")),
    )
    if sweep.tune_seed is not None and not isinstance(sweep.tune_seed, int):
        raise ConfigError(f"{where}: tune.seed={sweep.tune_seed} must be one number")
    _check_grid(f"{where}: tune.grid", sweep)
    sweep.tuned = _read_tuned(f"{where}: tuned", content.get("tuned"), parts_of(sweep))
    return sweep


def argument(key: str, value: Any) -> str:
    """An option as the key=value that `grun.loading.resolve.resolve` reads."""
    if value is None:
        return f"{key}="
    return f"{key}={value}" if isinstance(value, str) else f"{key}={json.dumps(value)}"


def part(settings: Mapping[str, Any]) -> str:
    """Short text for some options, safe in a file name: lr0.001-retain_weight4.0."""
    return "-".join(f"{key.rpartition('.')[2]}{_safe(value)}" for key, value in settings.items())


def parts_of(sweep: Sweep) -> list[str]:
    """Texts of every combination of the further axes; empty where there are none."""
    combinations: list[dict[str, Any]] = [{}]
    for key in sweep.further_axes:
        combinations = [{**settings, key: value} for settings in combinations for value in sweep.axes[key]]
    return [part(settings) for settings in combinations] if sweep.further_axes else []


def flat(options: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested options as (section.key, value)."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _safe(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._+-") else "_" for letter in text)


def _known(where: str, kind: str, key: str, known: Any) -> None:
    if key not in known:
        raise ConfigError(f"{where}: {unknown_name(kind, str(key), list(known))}")


def _known_option(where: str, key: str, command: str = "unlearn") -> None:
    """ConfigError for an option that the command does not have, or that the sweep sets itself."""
    schema = {"unlearn": UnlearnConfig, "evaluate": EvaluateConfig}[command]
    _known(where, "option", key, [name for name, _, _ in describe(schema)])
    if key in SET_BY_SWEEP[command]:
        raise ConfigError(f"{where}: {key} is set by the sweep; leave it out")


def _options(where: str, value: Any, command: str) -> dict[str, Any]:
    options = dict(flat(mapping(where, value)))
    for key in options:
        _known_option(where, key, command)
    return options


def _check_axis(where: str, key: str, values: Any) -> None:
    _known_option(where, key)
    if key.startswith(SHARED) and key not in FREE_DATA:
        raise ConfigError(f"{where}: {key} cannot differ between cells, which stand in one table; put it into unlearn")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: {key} must list one value or more, not {values!r}")
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ConfigError(f"{where}: {key} names {twice[0]} twice")


def _check_grid(where: str, sweep: Sweep) -> None:
    from grun.method.parametrization import PARAMETRIZATIONS

    for key, values in sweep.grid.items():
        _known_option(where, key)
        if key in sweep.axes or key in (OBJECTIVE, PARAMETRIZATION, SEED):
            raise ConfigError(f"{where}: {key} is an axis; settings are chosen for each cell of the axes")
        for name in values if isinstance(values, dict) else ():
            _known(f"{where}.{key}", "parametrization", name, PARAMETRIZATIONS.names())
        for listed in values.values() if isinstance(values, dict) else [values]:
            _check_axis(where, key, listed)


def _read_tuned(where: str, value: Any, parts: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    from grun.method.parametrization import PARAMETRIZATIONS
    from grun.objectives.terms import OBJECTIVES

    tuned: dict[str, dict[str, dict[str, Any]]] = {}
    for objective, of_objective in mapping(where, value).items():
        _known(where, "objective", objective, OBJECTIVES.names())
        tuned[objective] = {}
        for name, options in mapping(f"{where}.{objective}", of_objective).items():
            place = f"{where}.{objective}.{name}"
            _known(f"{where}.{objective}", "parametrization", name, PARAMETRIZATIONS.names())
            given = mapping(place, options)
            narrower = {key: _options(f"{place}.{key}", given.pop(key), "unlearn") for key in parts if key in given}
            tuned[objective][name] = {**_options(place, given, "unlearn"), **narrower}
    return tuned
