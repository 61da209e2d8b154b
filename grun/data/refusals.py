"""Refusals: one-line answers of a model that does not know; of the packaged ones the plainest twenty come first."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from grun.errors import DataError
from grun.runtime.reading import read_text


def refusals(path: str | None = None) -> list[str]:
    """Refusals of a file, one a line; None: the packaged ones. DataError if there are none."""
    if path is None:
        file, hint = Path(str(resources.files("grun.data") / "refusals.txt")), "reinstall grun"
    else:
        file, hint = Path(path).expanduser(), "data.refusals is a text with one refusal a line"
    found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise DataError(f"{file} holds no refusals; {hint}")
    return found
