"""The cells of a sweep: every combination of its axes with all its options resolved, before anything is loaded.

Precedence, later wins: profile, the sweep's `unlearn`, its `tuned`, `unlearn=[...]` of the command line, settings that
are tried (`--tune`), axes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grun.config.options import EvaluateConfig, FinetuneConfig, SweepConfig, UnlearnConfig
from grun.errors import ConfigError
from grun.experiments.sweep.definition import (
    DESIGN,
    OBJECTIVE,
    PARAMETRIZATION,
    SEED,
    SET_BY_SWEEP,
    SHARED,
    Sweep,
    argument,
    part,
    read_sweep,
)
from grun.loading.checks import check
from grun.loading.resolve import resolve
from grun.method.parametrization import PARAMETRIZATIONS

PUBLISHED = "published"
"""The design that cells of every parametrization take."""
CORPUS = (
    *("name", "path", "forget", "retain", "heldout", "validation", "retain_rows"),
    *("unknown", "unknown_rows", "refused_rows", "teach_general", "refusals"),
)
"""Data options that decide which row belongs to which set; teaching, unlearning and evaluation must agree on them."""


@dataclass(frozen=True)
class Planned:
    """One cell before it has a model and a folder."""

    name: str
    unlearn: UnlearnConfig
    tuned_for: str
    """Name of the cell without seed and settings: cells of one `tuned_for` try settings of the same choice."""
    part: str
    """Values of the further axes, as they stand in the name; empty where there are none."""
    setting: dict[str, Any]
    """Settings of the grid that it tries; empty but for `--tune`."""


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will do."""

    sweep: Sweep
    cells: list[Planned]
    evaluate: EvaluateConfig
    """Options of every evaluation; sets as they were given."""
    finetune: FinetuneConfig
    """How the base model is taught, where none is given."""
    base: UnlearnConfig
    """Options that all cells have in common."""


def make_plan(config: SweepConfig) -> Plan:
    """Resolve every cell of `config`; ConfigError names what is unknown, contradictory or out of range, and where."""
    sweep = read_sweep(config.sweep)
    sweep.profile = config.profile or sweep.profile
    for key, values in ((OBJECTIVE, config.objectives), (PARAMETRIZATION, config.parametrizations)):
        if values:
            sweep.axes[key] = list(values)
    if config.seeds:
        sweep.axes[SEED] = list(config.seeds)
    for key, values in sweep.axes.items():
        if len(set(map(str, values))) < len(values):
            raise ConfigError(f"sweep {sweep.name}: a value of the axis {key} is named twice: {values}")
    _check_arguments(sweep, config)
    sweep.model = config.model
    base = _resolve("unlearn", sweep, [*_arguments(sweep.unlearn), *config.unlearn], "unlearn", quiet=False)
    evaluate = _evaluate(sweep, config, base)
    cells = list(_cells(sweep, config, base))
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"sweep {sweep.name}: two cells would be called {name}; their values differ only in characters that a "
                "file name cannot have"
            )
    shared = [text for text in (*_arguments(sweep.unlearn), *config.unlearn) if text.startswith("data.")]
    taught = [text for text in shared if not text.startswith("data.retain_pool")]
    finetune = resolve("finetune", [*_given(sweep), *_corpus(base), *taught])
    return Plan(sweep, cells, evaluate, finetune, base)


def _check_arguments(sweep: Sweep, config: SweepConfig) -> None:
    """What `unlearn=[...]` and `evaluate=[...]` may not hold."""
    for command, texts in (("unlearn", config.unlearn), ("evaluate", config.evaluate)):
        for text in texts:
            key = text.partition("=")[0]
            if key in SET_BY_SWEEP[command]:
                raise ConfigError(f"{command}=[{text}]: {key} is set by the sweep; leave it out")
            if command == "unlearn" and key in (OBJECTIVE, PARAMETRIZATION, SEED):
                raise ConfigError(f"unlearn=[{text}]: give objectives=[...], parametrizations=[...] or seeds=[...]")
            if command == "unlearn" and key in sweep.axes:
                raise ConfigError(f"unlearn=[{text}]: {key} is an axis of the sweep {sweep.name}")
            if command == "unlearn" and config.tune and key in sweep.grid:
                raise ConfigError(f"unlearn=[{text}]: {key} is what --tune chooses; leave it out")


def _resolve(command: str, sweep: Sweep, arguments: list[str], where: str, *, quiet: bool = True) -> Any:
    given = _given(sweep) if sweep.model is None else [*_given(sweep), f"model.path={sweep.model}"]
    try:
        config = resolve(command, [*given, *arguments], quiet=quiet)
        check(config)
    except ConfigError as error:
        raise ConfigError(f"sweep {sweep.name}, {where}: {error}") from error
    return config


def _given(sweep: Sweep) -> list[str]:
    return [] if sweep.profile is None else [f"profile={sweep.profile}"]


def _arguments(options: Mapping[str, Any]) -> list[str]:
    return [argument(key, value) for key, value in options.items()]


def _corpus(base: UnlearnConfig) -> list[str]:
    """The corpus of the cells as arguments of another command."""
    demo = [argument(f"data.demo.{key}", value) for key, value in dataclasses.asdict(base.data.demo).items()]
    return [argument(f"data.{key}", getattr(base.data, key)) for key in CORPUS] + demo


def _evaluate(sweep: Sweep, config: SweepConfig, base: UnlearnConfig) -> EvaluateConfig:
    """Options of every evaluation, which see the corpus and the model's options of the cells."""
    shared = [text for text in (*_arguments(sweep.unlearn), *config.unlearn) if text.startswith(SHARED)]
    own = [*_arguments(sweep.evaluate), *config.evaluate]
    found = _resolve("evaluate", sweep, [*_corpus(base), *shared, *own], "evaluate")
    assert isinstance(found, EvaluateConfig)
    if "validation" in found.sets:
        raise ConfigError(
            f"sweep {sweep.name}: evaluate.sets names validation, by which settings are chosen; leave it out"
        )
    return found


def _cells(sweep: Sweep, config: SweepConfig, base: UnlearnConfig) -> Iterator[Planned]:
    axes = dict(sweep.axes)
    if config.tune:
        if not sweep.grid:
            raise ConfigError(f"sweep {sweep.name} has no tune.grid, so there is nothing that --tune could try")
        first = axes.get(SEED, [base.seed])[0]
        axes[SEED] = [first if sweep.tune_seed is None else sweep.tune_seed]
    resolved: dict[tuple[str, ...], UnlearnConfig] = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        objective = str(chosen.get(OBJECTIVE, base.objective))
        parametrization = str(chosen.get(PARAMETRIZATION, base.method.parametrization))
        if not PARAMETRIZATIONS.traits(parametrization).gated and chosen.get(DESIGN, PUBLISHED) != PUBLISHED:
            continue  # designs concern a gate: a parametrization without one has one cell
        further = part({key: chosen[key] for key in sweep.further_axes})
        ending = f"-{further}" if further else ""
        tuned = _tuned(sweep, objective, parametrization, further)
        seed = chosen.pop(SEED, base.seed)
        if not isinstance(seed, int):
            raise ConfigError(f"sweep {sweep.name}: axes: seed={seed} must be a whole number")
        for setting in _settings(sweep, parametrization) if config.tune else [{}]:
            name = f"{objective}-{parametrization}-s{seed}{ending}" + (f"-{part(setting)}" if setting else "")
            layers = [
                *_arguments(sweep.unlearn),
                *_arguments(tuned),
                *config.unlearn,
                *_arguments(setting),
                *_arguments(chosen),
            ]
            if tuple(layers) not in resolved:  # cells that differ by the seed alone are resolved once
                resolved[tuple(layers)] = _resolve("unlearn", sweep, layers, f"cell {name}")
            unlearn = dataclasses.replace(resolved[tuple(layers)], seed=seed)
            check(unlearn)
            yield Planned(name, unlearn, f"{objective}-{parametrization}{ending}", further, setting)


def _tuned(sweep: Sweep, objective: str, parametrization: str, further: str) -> dict[str, Any]:
    """Options chosen for a cell: those of its objective and parametrization, then those of its further axes."""
    entry = sweep.tuned.get(objective, {}).get(parametrization, {})
    options = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    return options | dict(entry.get(further) or {} if further else {})


def _settings(sweep: Sweep, parametrization: str) -> list[dict[str, Any]]:
    """Every setting of the grid for a parametrization, in the grid's order."""
    values = []
    for key, listed in sweep.grid.items():
        if isinstance(listed, dict) and parametrization not in listed:
            raise ConfigError(
                f"sweep {sweep.name}: tune.grid.{key} has no values for {parametrization}; add them, or narrow the "
                "sweep with parametrizations=[...]"
            )
        values.append(listed[parametrization] if isinstance(listed, dict) else listed)
    return [dict(zip(sweep.grid, combination, strict=True)) for combination in itertools.product(*values)]
