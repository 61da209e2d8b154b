"""The files of a report on one folder of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grun.report.figures import Picture, save
from grun.report.results import Result
from grun.runtime.files import remove, write_json, write_text

Drawn = list[tuple[Picture, Path]]
"""Pictures that there was something to draw for, and their files."""


def draw(picture: Picture, results: Sequence[Result], folder: Path) -> Drawn:
    """Draw a picture into `folder`; without anything to draw, an older report's is removed: it would contradict."""
    figure, path = picture.draw(results), folder / picture.name
    if figure is None:
        remove(path)
        return []
    save(figure, path)
    return [(picture, path)]


def write_files(folder: Path, texts: Mapping[str, str], summary: dict[str, Any], drawn: Drawn) -> list[Path]:
    """Write texts by file name, and summary.json; all files of the report, the texts first, the pictures last."""
    for name, text in texts.items():
        write_text(folder / name, text)
    write_json(folder / "summary.json", summary)
    return [*(folder / name for name in (*texts, "summary.json")), *(path for _, path in drawn)]
