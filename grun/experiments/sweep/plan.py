"""The cells of a sweep: every combination of its axes with all its options resolved, before anything is loaded.

Precedence, later wins: profile, the sweep's `unlearn`, its `tuned`, `unlearn=[...]` of the command line, settings that
are tried (`--tune`), axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grun.config.options import EvaluateConfig, FinetuneConfig, SweepConfig, UnlearnConfig
from grun.errors import ConfigError
from grun.experiments.options import CORPUS, GENERATED, arguments, refuse_set, resolved, shared
from grun.experiments.sweep.definition import (
    DESIGN,
    OBJECTIVE,
    PARAMETRIZATION,
    SEED,
    Sweep,
    combinations,
    part,
    read_sweep,
)
from grun.loading.checks import check
from grun.method.actions import EDIT
from grun.method.parametrization import PARAMETRIZATIONS

EDITS = "method.edit"
PUBLISHED = "published"
"""The design that cells of every parametrization take."""


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
    sweep = _changed(read_sweep(config.sweep), config)
    _check_arguments(sweep, config)
    of_all = [*arguments(sweep.unlearn), *config.unlearn]
    base = _resolved(sweep, "unlearn", of_all, "unlearn", quiet=False)
    generated = {f"{part}.{key}": value for part in GENERATED for key, value in vars(getattr(base.data, part)).items()}
    named = {key: getattr(base.data, key) for key in CORPUS}
    corpus = arguments({f"data.{key}": value for key, value in {**named, **generated}.items()})
    evaluate = _resolved(
        sweep, "evaluate", [*corpus, *shared(of_all), *arguments(sweep.evaluate), *config.evaluate], "evaluate"
    )
    if "validation" in evaluate.sets:
        raise ConfigError(
            f"sweep {sweep.name}: evaluate.sets names validation, by which settings are chosen; leave it out"
        )
    cells = list(_cells(sweep, config, base))
    names = [cell.name for cell in cells]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"sweep {sweep.name}: two cells would be called {twice[0]}; their values differ only in characters that a "
            "file name cannot have"
        )
    to_teach = [text for text in of_all if text.startswith("data.") and not text.startswith("data.retain_pool")]
    finetune = resolved(
        f"sweep {sweep.name}, finetune", "finetune", sweep.profile, None, [*corpus, *to_teach], quiet=False
    )
    return Plan(sweep, cells, evaluate, finetune, base)


def _changed(sweep: Sweep, config: SweepConfig) -> Sweep:
    """The sweep as the command line has it."""
    sweep.profile = config.profile or sweep.profile
    sweep.model = config.model
    given: dict[str, list[Any]] = {OBJECTIVE: config.objectives, PARAMETRIZATION: config.parametrizations}
    given[SEED] = config.seeds
    sweep.axes |= {key: list(values) for key, values in given.items() if values}
    for key, values in sweep.axes.items():
        if len(set(map(str, values))) < len(values):
            raise ConfigError(f"sweep {sweep.name}: a value of the axis {key} is named twice: {values}")
    return sweep


def _check_arguments(sweep: Sweep, config: SweepConfig) -> None:
    """What `unlearn=[...]` and `evaluate=[...]` may not hold."""
    for text in config.evaluate:
        refuse_set(f"evaluate=[{text}]", text.partition("=")[0], "evaluate", "sweep")
    for text in config.unlearn:
        key = text.partition("=")[0]
        refuse_set(f"unlearn=[{text}]", key, "unlearn", "sweep")
        if key in (OBJECTIVE, PARAMETRIZATION, SEED):
            raise ConfigError(f"unlearn=[{text}]: give objectives=[...], parametrizations=[...] or seeds=[...]")
        if key in sweep.axes:
            raise ConfigError(f"unlearn=[{text}]: {key} is an axis of the sweep {sweep.name}")
        if config.tune and key in sweep.grid:
            raise ConfigError(f"unlearn=[{text}]: {key} is what --tune chooses; leave it out")


def _resolved(sweep: Sweep, command: str, texts: list[str], where: str, *, quiet: bool = True) -> Any:
    return resolved(f"sweep {sweep.name}, {where}", command, sweep.profile, sweep.model, texts, quiet=quiet)


def _cells(sweep: Sweep, config: SweepConfig, base: UnlearnConfig) -> Iterator[Planned]:
    axes = dict(sweep.axes)
    if config.tune:
        if not sweep.grid:
            raise ConfigError(f"sweep {sweep.name} has no tune.grid, so there is nothing that --tune could try")
        first = axes.get(SEED, [base.seed])[0]
        axes[SEED] = [first if sweep.tune_seed is None else sweep.tune_seed]
    resolved_before: dict[tuple[str, ...], UnlearnConfig] = {}
    for chosen in combinations(axes):
        objective = str(chosen.get(OBJECTIVE, base.objective))
        parametrization = str(chosen.get(PARAMETRIZATION, base.method.parametrization))
        if not PARAMETRIZATIONS.traits(parametrization).gated and chosen.get(DESIGN, PUBLISHED) != PUBLISHED:
            continue  # designs concern a gate: a parametrization without one has one cell
        first = (axes.get(OBJECTIVE, [objective])[0], axes.get(SEED, [base.seed])[0])
        traits = PARAMETRIZATIONS.traits(parametrization)
        if traits.untrained and (objective, chosen.get(SEED, base.seed)) != first:
            continue  # neither objective nor seed changes it
        if chosen.get("method.action", EDIT) != EDIT and chosen.get(EDITS) != axes.get(EDITS, [None])[0]:
            continue  # another action than an edit has one cell
        if traits.learns and objective != first[0]:
            continue  # no objective changes it
        further = part({key: chosen[key] for key in sweep.further_axes})
        ending = f"-{further}" if further else ""
        tuned = _tuned(sweep, objective, parametrization, further)
        seed = chosen.pop(SEED, base.seed)
        if not isinstance(seed, int):
            raise ConfigError(f"sweep {sweep.name}: axes: seed={seed} must be a whole number")
        for setting in _settings(sweep, parametrization) if config.tune else [{}]:
            name = f"{objective}-{parametrization}-s{seed}{ending}" + (f"-{part(setting)}" if setting else "")
            own = [*arguments(sweep.unlearn), *arguments(tuned), *config.unlearn]
            layers = (*own, *arguments(setting), *arguments(chosen))
            if layers not in resolved_before:  # cells that differ by the seed alone are resolved once
                resolved_before[layers] = _resolved(sweep, "unlearn", list(layers), f"cell {name}")
            unlearn = dataclasses.replace(resolved_before[layers], seed=seed)
            check(unlearn)
            yield Planned(name, unlearn, f"{objective}-{parametrization}{ending}", further, setting)


def _tuned(sweep: Sweep, objective: str, parametrization: str, further: str) -> dict[str, Any]:
    """Options chosen for a cell: those of its objective and parametrization, then those of its further axes."""
    entry = sweep.tuned.get(objective, {}).get(parametrization, {})
    options = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    return options | dict(entry.get(further) or {} if further else {})


def _settings(sweep: Sweep, parametrization: str) -> list[dict[str, Any]]:
    """Every setting of the grid for a parametrization, in the grid's order."""
    values = {}
    for key, listed in sweep.grid.items():
        if isinstance(listed, dict) and parametrization not in listed:
            raise ConfigError(
                f"sweep {sweep.name}: tune.grid.{key} has no values for {parametrization}; add them, or narrow the "
                "sweep with parametrizations=[...]"
            )
        values[key] = listed[parametrization] if isinstance(listed, dict) else listed
    return combinations(values)
