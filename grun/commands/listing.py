"""What `python -m grun list` prints: every registry, one name a line with one line of text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

from grun.config.definitions import described

REGISTRIES = {
    "objectives": "grun.objectives.presets:OBJECTIVES",
    "terms": "grun.objectives.terms:TERMS",
    "parametrizations": "grun.method.parametrization:PARAMETRIZATIONS",
    "gates": "grun.method.gate:GATES",
    "templates": "grun.data.templates:TEMPLATES",
    "metrics": "grun.evaluation.metrics:METRICS",
    "attacks": "grun.evaluation.attacks.base:ATTACKS",
}


def _from_registry(kind: str) -> Iterator[tuple[str, str]]:
    module, _, attribute = REGISTRIES[kind].partition(":")
    for entry in getattr(importlib.import_module(module), attribute):
        yield entry.name, entry.description


def _packaged(kind: str) -> Iterator[tuple[str, str]]:
    yield from described(kind.removesuffix("s")).items()


KINDS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "objectives": _from_registry,
    "terms": _from_registry,
    "parametrizations": _from_registry,
    "gates": _from_registry,
    "templates": _from_registry,
    "profiles": _packaged,
    "sweeps": _packaged,
    "sequences": _packaged,
    "metrics": _from_registry,
    "attacks": _from_registry,
}


def lines(kind: str) -> list[str]:
    """One line for each name of `kind`, names padded to one width."""
    found = list(KINDS[kind](kind))
    width = max((len(name) for name, _ in found), default=0)
    return [f"{name:<{width}}  {text}" for name, text in found]
