"""What `python -m grun list` prints: every registry, one name a line with one line of text."""

from __future__ import annotations

from grun.config.definitions import described
from grun.registry import REGISTRIES, registry

PACKAGED = ("profiles", "sweeps", "sequences")
"""Kinds of settings that come with the package."""
KINDS = (*REGISTRIES, *PACKAGED)


def lines(kind: str) -> list[str]:
    """One line for each name of `kind`, names padded to one width."""
    if kind in REGISTRIES:
        found = [(entry.name, entry.description) for entry in registry(kind)]
    else:
        found = list(described(kind.removesuffix("s")).items())
    width = max((len(name) for name, _ in found), default=0)
    return [f"{name:<{width}}  {text}" for name, text in found]
