"""report.html: a whole report as one file, from `templates/report.html` and blocks of content."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from grun.report.provenance import command_of, provenance
from grun.report.result import Result
from grun.report.tables import readable

if TYPE_CHECKING:
    from jinja2 import Template

    from grun.report.figures import Picture

WIDEST = 1500
"""Pixels up to which a picture is made to fit the page; a wider one would become too small to read, and scrolls."""


class Card(NamedTuple):
    """A question, and who answered what."""

    heading: str
    said: Sequence[tuple[str, str]]


class Examples(NamedTuple):
    """Questions of one kind, with answers."""

    label: str
    cards: Sequence[Card]
    meaning: str = ""


@dataclass(frozen=True)
class Block:
    """One piece of a section; `value` is what the template shows of this kind: a text, texts, a table, cards, ..."""

    kind: Literal["text", "heading", "points", "table", "terms", "verdict", "picture", "cards", "settings"]
    value: Any
    label: str = ""
    """What it is called, for a box that scrolls or opens."""
    first: str = "model"
    """Head of a table's first column."""
    opened: bool = False
    """Whether cards are shown from the start."""


class Section(NamedTuple):
    """A section of the page."""

    anchor: str
    link: str
    heading: str
    blocks: Sequence[Block]


def page(title: str, sections: Iterable[Section]) -> str:
    """A whole page; sections without content are left out. All text is escaped."""
    return _template().render(title=title, sections=[section for section in sections if section.blocks])


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader

    def clean(value: Any) -> Any:
        return readable(value) if type(value) is str else value

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=clean,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html")


# -- blocks that every report has -------------------------------------------------------------------------------------


def settings_block(result: Result) -> Block:
    """Settings of a model's evaluation and run."""
    about = "The run's command" if result.run else "The command that trained the model"
    value = {"terms": provenance(result), "command": command_of(result.record), "about": about}
    return Block("settings", value, result.title)


def picture_block(picture: Picture, path: Path, note: str = "") -> Block:
    """A picture, its bytes in the page, with its caption."""
    data = path.read_bytes()
    # Width and height stand at bytes 16 to 24 of a PNG; three of them make two on the page.
    width, height = (int.from_bytes(data[start : start + 4], "big") * 2 // 3 for start in (16, 20))
    about = {"title": picture.title, "text": picture.text, "note": note}
    shape = {"width": width, "height": height, "is_wide": width > WIDEST}
    return Block("picture", {**about, **shape, "data": base64.b64encode(data).decode()})
