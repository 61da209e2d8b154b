"""What `python -m grun list` prints: every registry, one name a line with one line of text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

REGISTRIES = {
    "objectives": "grun.objectives.presets:OBJECTIVES",
    "terms": "grun.objectives.terms:TERMS",
    "parametrizations": "grun.parametrization:PARAMETRIZATIONS",
    "gates": "grun.method.gate:GATES",
    "templates": "grun.data.templates:TEMPLATES",
    "metrics": "grun.evaluation.metrics:METRICS",
    "attacks": "grun.evaluation.attacks.base:ATTACKS",
}


def _from_registry(kind: str) -> Iterator[tuple[str, str]]:
    module, _, attribute = REGISTRIES[kind].partition(":")
    for entry in getattr(importlib.import_module(module), attribute):
        yield entry.name, entry.description


def _profiles(_: str) -> Iterator[tuple[str, str]]:
    from grun.profiles import profile_names

    yield from profile_names().items()


def _sweeps(_: str) -> Iterator[tuple[str, str]]:
    from grun.sweep.definition import described

    yield from described().items()


def _sequences(_: str) -> Iterator[tuple[str, str]]:
    from grun.sequential.definition import described

    yield from described().items()


KINDS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "objectives": _from_registry,
    "terms": _from_registry,
    "parametrizations": _from_registry,
    "gates": _from_registry,
    "templates": _from_registry,
    "profiles": _profiles,
    "sweeps": _sweeps,
    "sequences": _sequences,
    "metrics": _from_registry,
    "attacks": _from_registry,
}


def lines(kind: str) -> list[str]:
    """One line for each name of `kind`, names padded to one width."""
    found = list(KINDS[kind](kind))
    width = max((len(name) for name, _ in found), default=0)
    return [f"{name:<{width}}  {text}" for name, text in found]
