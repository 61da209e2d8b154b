"""What all pictures share. Colors are Okabe and Ito's, which people with any form of color vision can distinguish."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grun.report.result import Result, after
from grun.runtime.files import remove, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
GREY = "#555555"
PER_ROW = 3
"""Most panels in a row."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#9A8F00")


@dataclass(frozen=True)
class Picture:
    """One file of pictures, with a text for those who do not see it."""

    name: str
    title: str
    text: str
    """What is drawn and how to read it."""
    draw: Callable[[Sequence[Result]], Figure | None]
    """Returns None where the results lack what it shows."""
    every_seed: bool = False
    """Shows all seeds of a cell; others show the first."""


Drawn = list[tuple[Picture, Path]]
"""Pictures that there was something to draw for, and their files."""


def draw(pictures: Iterable[tuple[Picture, Sequence[Result]]], folder: Path) -> Drawn:
    """Draw what the results allow into `folder` and return it with its files; a picture without data is left out."""
    drawn = ((picture, folder / picture.name, picture.draw(results)) for picture, results in pictures)
    return [(picture, path) for picture, path, figure in drawn if save(figure, path)]


def save(figure: Figure | None, path: Path) -> bool:
    """Write a figure as a PNG file; without one remove an older report's, which would contradict this one."""
    if figure is None:
        remove(path)
        return False
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    write_bytes(path, buffer.getvalue())
    return True


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own (inches), without pyplot's global list and without a display (Agg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(
    width: float, height: float, down: int, across: int, count: int | None = None, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels (None: all) in so many rows and columns, the last ones empty."""
    figure = new_figure(width, height)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    count = len(panels) if count is None else count
    for empty in panels[count:]:
        empty.set_visible(False)
    return figure, panels[:count]


def titled_panels(count: int, title: str, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in as few rows as hold them, with a title."""
    down = math.ceil(count / PER_ROW)
    across = math.ceil(count / down)
    width = max(5.5, 3.6 * across)
    lines = textwrap.wrap(title, int(8 * width))  # about nine letters to the inch
    figure, panels = new_panels(width, 0.3 + 0.2 * len(lines) + height * down, down, across, count)
    figure.suptitle("\n".join(lines), fontsize=12)
    return figure, panels


def clean(axes: Axes, grid: Literal["both", "x"] = "both", **settings: Any) -> None:
    """No frame, a light grid in the background; `settings` are those of `Axes.set`, such as xlim and xlabel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set(**settings)


def plain(text: str) -> str:
    """Text in which a dollar sign is no mathematics."""
    return text.replace("$", r"\$")


def colors_of(results: Sequence[Result]) -> dict[str, str]:
    """A color for each model by name, the same in every picture."""
    fixed = {"before": GREY, "retain_only": "#000000"}
    cycled = {one.name: PALETTE[number % len(PALETTE)] for number, one in enumerate(after(results))}
    return {result.name: fixed.get(result.stage) or cycled[result.name] for result in results}
