"""What `mkdocs build` takes from the code, so that no table of names or options is written twice.

A line of its own in a page stands for

    <!-- names: gates -->              the table of `python -m grun list gates`
    <!-- options: unlearn -->          the options of `python -m grun unlearn --help`
    <!-- modules: grun.objectives -->  the public classes and functions of a package, by their docstrings
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- (names|options|modules): (\S+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page, before it becomes HTML."""
    return MARK.sub(lambda found: WRITERS[found[1]](found[2]), markdown)


def names(kind: str) -> str:
    """The registered names of a kind; of attacks also what they need."""
    from grun.config.definitions import described
    from grun.registry import REGISTRIES, table

    if kind in REGISTRIES:
        return table(kind, **COLUMNS.get(kind, {}))
    return _table(("name", "what it is"), described(kind.removesuffix("s")).items())


COLUMNS = {
    "attacks": {"access": lambda attack: attack.access, "needs": lambda attack: attack.needs},
    "terms": {
        "mean over": lambda term: f"{term.per.replace('_', ' ')}s",
        "options": lambda term: ", ".join(f"`{name}` {_shown(value)}" for name, value in term.options.items()),
        "of the untouched model": lambda term: "" if term.reference == "none" else term.reference,
    },
}


def _shown(value: float | None) -> str:
    if value is None:
        return "must be set"
    return "none" if value == float("inf") else f"{value:g}"


def options(command: str) -> str:
    """Every option of a command with its default and its help text."""
    from grun.config import values

    described = values.describe(values.COMMANDS[command])
    rows = [(key, "" if value is None else f"`{value}`", _cell(text)) for key, value, text in described]
    return _table(("option", "default", "what it does"), rows)


def modules(package: str) -> str:
    """What mkdocstrings is asked for: each module of a package that has anything public."""
    found = []
    for path in sorted(ROOT.joinpath(*package.split(".")).rglob("*.py")):
        if re.search(r"^(class|def|async def|@) ?[^_\s]", path.read_text(encoding="utf-8"), re.MULTILINE):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found.append(f"::: {name}\n")
    return "\n".join(found)


WRITERS = {"names": names, "options": options, "modules": modules}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *((f"`{name}`", *more) for name, *more in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
