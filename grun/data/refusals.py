"""Refusals: the packaged one-line answers of a model that does not know, the plainest twenty first."""

from __future__ import annotations

from functools import cache
from importlib import resources

from grun.errors import DataError


@cache
def _lines() -> tuple[str, ...]:
    try:
        text = resources.files("grun.data").joinpath("refusals.txt").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError("grun/data/refusals.txt is missing from the installation: reinstall grun") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise DataError("grun/data/refusals.txt holds no refusals: reinstall grun")
    return lines


def refusals() -> list[str]:
    """Every packaged refusal, in file order; a new list at each call."""
    return list(_lines())
