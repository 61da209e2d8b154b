"""Where labels stand in a scatter plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def place_label(
    axes: Axes, text: str, spot: tuple[float, float], color: str, spots: Sequence[tuple[float, float]], taken: list[Any]
) -> None:
    """Write `text` near `spot` with a line to it, where it covers no point and no box in `taken`; adds its own box.

    Places are tried outwards from the spot, in turn all around it.

    Args:
        axes: drawn before, so that its pixels are known.
        text: in which a dollar sign begins mathematics.
        spot: in the units of the axes.
        color: of text and line.
        spots: points that it must not cover, in the units of the axes.
        taken: boxes in pixels.
    """
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axes.get_window_extent(renderer)
    pixels = axes.transData.transform(list(spots))
    label = axes.annotate(
        text,
        spot,
        xytext=(0, 0),
        textcoords="offset points",
        color=color,
        fontsize=10,
        fontweight="bold",
        ha="center",
        va="center",
        zorder=50,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 2},
    )
    box = label.get_window_extent(renderer)
    per_point = axes.figure.dpi / 72
    x, y = axes.transData.transform(spot)
    width, height = label.get_window_extent(renderer).width, 12 * per_point * 1.3
    for distance in range(26, 400, 8):
        for angle in range(0, 360, 15):
            across = distance * per_point * math.cos(math.radians(angle))
            along = distance * per_point * math.sin(math.radians(angle))
            across += math.copysign(width / 2, across) if abs(across) > 1 else 0.0
            box = Bbox.from_bounds(x + across - width / 2, y + along - height / 2, width, height)
            clear = 12 * per_point
            grown = Bbox.from_extents(box.x0 - clear, box.y0 - clear, box.x1 + clear, box.y1 + clear)
            within = box.x0 > inside.x0 and box.x1 < inside.x1 and box.y0 > inside.y0 and box.y1 < inside.y1
            covered = any(box.overlaps(other) for other in taken) or any(grown.contains(*pixel) for pixel in pixels)
            if within and not covered:
                label.set_position((across / per_point, along / per_point))
                taken.append(box)
                return
    taken.append(box)
