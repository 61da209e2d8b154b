"""What `mkdocs build` takes from the code, so that no table of names or options is written twice.

A line of its own in a page stands for

    <!-- names: gates -->              the table of `python -m grun list gates`
    <!-- options: unlearn -->          the options of `python -m grun unlearn --help`
    <!-- modules: grun.objectives -->  the public classes and functions of a package, by their docstrings
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- (names|options|modules): (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page, before it becomes HTML."""
    return MARK.sub(lambda found: "\n".join(WRITERS[found[1]](found[2])), markdown)


def names(kind: str) -> Iterator[str]:
    """The registered names of a kind; of attacks also what they need."""
    from grun.commands.listing import KINDS

    rows = [[f"`{name}`", _escaped(text)] for name, text in KINDS[kind](kind)]
    head = ["name", "what it is"]
    if kind == "attacks":
        from grun.evaluation.attacks.base import ATTACKS

        head += ["access", "needs"]
        for row, attack in zip(rows, (ATTACKS.get(name) for name in ATTACKS.names()), strict=True):
            row += [attack.access, attack.needs]
    return _table(head, rows)


def options(command: str) -> Iterator[str]:
    """Every option of a command with its default and its help text."""
    from grun.config import values

    described = values.describe(values.COMMANDS[command])
    rows = [[f"`{key}`", _default(value), _escaped(" ".join(text.split()))] for key, value, text in described]
    return _table(["option", "default", "what it does"], rows)


def modules(package: str) -> Iterator[str]:
    """What mkdocstrings is asked for: each module of a package that has anything public."""
    folder = ROOT.joinpath(*package.split("."))
    for path in sorted(folder.rglob("*.py")):
        if re.search(r"^(class|def|async def|@) ?[^_\s]", path.read_text(encoding="utf-8"), re.MULTILINE):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield f"::: {name}\n"


WRITERS = {"names": names, "options": options, "modules": modules}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _default(value: Any) -> str:
    return "" if value is None else f"`{value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
