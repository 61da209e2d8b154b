"""A sweep's YAML file: axes, options of all cells, the grid of `--tune` and what was chosen by it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grun.config.definitions import mapping, read_definition
from grun.errors import ConfigError
from grun.experiments.options import SHARED, check_option, known, section

SECTIONS = ("description", "profile", "axes", "unlearn", "evaluate", "tune", "tuned")
OBJECTIVE, PARAMETRIZATION, DESIGN, SEED = "objective", "method.parametrization", "design", "seed"
FREE_DATA = ("data.retain_pool",)
"""Data options that change what unlearning uses and not what is evaluated."""


@dataclass
class Sweep:
    """What a sweep's file holds, checked for unknown keys; options are flat, `section.key`."""

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
    known(where, "section", content, SECTIONS)
    tune = mapping(f"{where}: tune", content.get("tune"))
    known(f"{where}: tune", "key", tune, ("seed", "grid"))
    sweep = Sweep(
        name=Path(name).stem,
        profile=None if content.get("profile") is None else str(content["profile"]),
        axes=mapping(f"{where}: axes", content.get("axes")),
        unlearn=section(f"{where}: unlearn", content.get("unlearn"), "unlearn", "sweep"),
        evaluate=section(f"{where}: evaluate", content.get("evaluate"), "evaluate", "sweep"),
        tune_seed=tune.get("seed"),
        grid=mapping(f"{where}: tune.grid", tune.get("grid")),
    )
    for key, values in sweep.axes.items():
        _check_axis(f"{where}: axes", key, values)
    if sweep.tune_seed is not None and not isinstance(sweep.tune_seed, int):
        raise ConfigError(f"{where}: tune.seed={sweep.tune_seed} must be one number")
    _check_grid(f"{where}: tune.grid", sweep)
    parts = map(part, combinations({key: sweep.axes[key] for key in sweep.further_axes}))
    sweep.tuned = _read_tuned(f"{where}: tuned", content.get("tuned"), [text for text in parts if text])
    return sweep


def part(settings: Mapping[str, Any]) -> str:
    """Short text for some options, safe in a file name: lr0.001-retain_weight4.0."""
    return "-".join(f"{key.rpartition('.')[2]}{_safe(value)}" for key, value in settings.items())


def combinations(axes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every choice of one value an axis, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _safe(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._+-") else "_" for letter in text)


def _check_axis(where: str, key: str, values: Any) -> None:
    check_option(where, key, "unlearn", "sweep")
    if key.startswith(SHARED) and key not in FREE_DATA:
        raise ConfigError(f"{where}: {key} cannot differ between cells, which stand in one table; put it into unlearn")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: {key} must list one value or more, not {values!r}")
    if twice := [value for value in values if values.count(value) > 1]:
        raise ConfigError(f"{where}: {key} names {twice[0]} twice")


def _check_grid(where: str, sweep: Sweep) -> None:
    from grun.method.parametrization import PARAMETRIZATIONS

    for key, values in sweep.grid.items():
        check_option(where, key, "unlearn", "sweep")
        if key in sweep.axes or key in (OBJECTIVE, PARAMETRIZATION, SEED):
            raise ConfigError(f"{where}: {key} is an axis; settings are chosen for each cell of the axes")
        by_parametrization = values if isinstance(values, dict) else {}
        known(f"{where}.{key}", "parametrization", by_parametrization, PARAMETRIZATIONS.names())
        for listed in by_parametrization.values() if by_parametrization else [values]:
            _check_axis(where, key, listed)


def _read_tuned(where: str, value: Any, parts: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    from grun.method.parametrization import PARAMETRIZATIONS
    from grun.objectives.terms import OBJECTIVES

    tuned: dict[str, dict[str, dict[str, Any]]] = {}
    by_objective = mapping(where, value)
    known(where, "objective", by_objective, OBJECTIVES.names())
    for objective, entry in by_objective.items():
        by_parametrization = mapping(f"{where}.{objective}", entry)
        known(f"{where}.{objective}", "parametrization", by_parametrization, PARAMETRIZATIONS.names())
        tuned[objective] = {}
        for name, options in by_parametrization.items():
            place = f"{where}.{objective}.{name}"
            given = mapping(place, options)
            narrower = {key: given.pop(key) for key in parts if key in given}
            tuned[objective][name] = section(place, given, "unlearn", "sweep")
            for key, of_part in narrower.items():
                tuned[objective][name][key] = section(f"{place}.{key}", of_part, "unlearn", "sweep")
    return tuned
