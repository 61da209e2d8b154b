"""Registries: names, descriptions from docstrings, lazy imports, and what installed packages add to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grun import registry
from grun.commands.listing import KINDS
from grun.errors import ConfigError
from grun.registry import REGISTRIES, Registry, summary

ROOT = Path(__file__).resolve().parents[1]

PLUGIN = '''
"""An objective, an attack and a metric."""

from grun.evaluation.attacks.base import attack
from grun.evaluation.metrics.registry import metric
from grun.objectives.terms import OBJECTIVES, Preset

OBJECTIVES.add("ga_twice", Preset("ga", "ce", forget_weight=2.0), "gradient difference with twice the forgetting")


@attack("politely", needs="questions")
def politely(row, material):
    """Please, before the question."""
    return [material.ask(row, f"Please, {row.prompt}")]


@metric("answer_length", "length", reads="generations", good="as before", range="0 or more")
def answer_length(table, name, quirks=()):
    """Mean number of characters of an answer."""
    texts = [row.text for row in table.generations_of(name)]
    return sum(map(len, texts)) / len(texts) if texts else None
'''
LIST_AND_USE = """
from grun.cli import main
assert main(["list"]) == 0
from grun.config.options import LossConfig
from grun.data.rows import Row
from grun.evaluation.attacks.base import ATTACKS
from grun.evaluation.suites.attacks import chosen_attacks
from grun.evaluation.metrics import set_metrics
from grun.evaluation.table import GenerationRecord, Table
from grun.objectives.objective import build_objective

assert build_objective("ga_twice", LossConfig(), gated=False).weights == {"forget": 2.0, "retain": 1.0}
assert "politely" in [attack.name for attack in chosen_attacks(["prompt"])]
class Material:
    def ask(self, row, question): return question
assert ATTACKS.get("politely").asked(Row("who?", "Ada"), Material()) == ["Please, who?"]
answers = [GenerationRecord("forget", 0, "who?", "Ada", None, "Bob")]
assert set_metrics(Table(generations=answers))["forget"]["answer_length"] == 3.0
"""


def installed(folder: Path, name: str, text: str) -> None:
    """What `pip install --target` makes of a package with one module."""
    (folder / f"{name}.py").write_text(text)
    information = folder / f"{name}-0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(f"[grun.plugins]\n{name} = {name}\n")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(folder)))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_an_installed_package_adds_an_objective_an_attack_and_a_metric(tmp_path: Path) -> None:
    installed(tmp_path, "extra", PLUGIN)
    listed = run(tmp_path, "-c", LIST_AND_USE)
    assert listed.returncode == 0 and listed.stderr == "", listed.stderr
    lines = {line.partition("  ")[0]: line.rpartition("  ")[2] for line in listed.stdout.splitlines()}
    assert lines["ga_twice"] == "gradient difference with twice the forgetting"
    assert lines["politely"] == "please, before the question"
    assert lines["answer_length"] == "mean number of characters of an answer; 0 or more, as before"


def test_a_plugin_that_cannot_be_imported_is_left_out_with_one_warning(tmp_path: Path) -> None:
    installed(tmp_path, "broken", "import no_such_package\n")
    listed = run(tmp_path, "-m", "grun", "list", "gates")
    assert listed.returncode == 0 and "mlp_3" in listed.stdout
    (warning,) = listed.stderr.splitlines()
    assert "broken 0.1" in warning and "No module named 'no_such_package'" in warning


def test_a_plugin_that_takes_a_name_twice_is_an_error_that_names_both(tmp_path: Path) -> None:
    installed(tmp_path, "thief", PLUGIN.replace('"politely"', '"plain"'))
    listed = run(tmp_path, "-m", "grun", "list", "attacks")
    assert listed.returncode == 2 and listed.stdout == ""
    (line,) = listed.stderr.splitlines()
    assert "attack 'plain' is registered twice, by grun.evaluation.attacks" in line and "and by thief 0.1" in line


def test_a_registry_describes_what_it_holds_by_the_first_paragraph_of_its_docstring() -> None:
    choices: Registry[object] = Registry("choice")

    @choices.register("one")
    def one() -> None:
        """The first
        of all.

        More.
        """

    @choices.register("length", lambda value: len(value.__name__))
    class Named:
        """NPO without a name."""

    assert [(entry.name, entry.description) for entry in choices] == [
        ("one", "the first of all"),
        ("length", "NPO without a name"),
    ]
    assert choices.get("one") is one and choices.get("length") == len(Named.__name__)
    with pytest.raises(ValueError, match="needs a docstring"):
        choices.register("three")(lambda: None)
    with pytest.raises(ConfigError, match="choice 'one' is registered twice, by test_registry and by test_registry"):
        choices.register("one")(one)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A loss.", "a loss"),
        ("R = 1.", "R = 1"),
        ("ROUGE-L.", "ROUGE-L"),
        ("Q: ...", "Q: .."),
        ("npo + ce", "npo + ce"),
    ],
)
def test_a_description_starts_as_a_word_within_a_sentence(text: str, line: str) -> None:
    assert summary(type("Named", (), {"__doc__": text})) == line


def test_import_strings_are_resolved_when_they_are_asked_for() -> None:
    choices: Registry[object] = Registry("choice")
    choices.add("joined", "os.path:join", "a function")
    choices.add("absent", "no_such_package.module:thing", "needs a package")
    assert choices.get("joined") is os.path.join
    with pytest.raises(ConfigError, match="choice 'absent' needs the missing package 'no_such_package'"):
        choices.get("absent")
    with pytest.raises(ConfigError, match="unknown choice 'joint': did you mean 'joined'"):
        choices.get("joint")


def test_modules_of_a_registry_are_imported_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "rooms_of_choices"
    folder.mkdir()
    (folder / "__init__.py").write_text("from grun.registry import Registry\nCHOICES = Registry('choice', __name__)\n")
    for name in ("b", "a"):
        (folder / f"{name}.py").write_text(
            f"from rooms_of_choices import CHOICES\nCHOICES.add('{name}', 1, 'a module')\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    from rooms_of_choices import CHOICES  # type: ignore[import-not-found]

    assert "b" in CHOICES and CHOICES.names() == ["a", "b"]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_registry_is_listed_and_makes_a_table_for_the_docs(kind: str) -> None:
    assert kind in KINDS
    entries = list(registry.registry(kind))
    lines = registry.table(kind, source=lambda value: type(value).__name__).splitlines()
    assert len(lines) == 2 + len(entries)
    assert lines[0] == f"| {kind.removesuffix('s')} | what it is | source |" and lines[1] == "| --- | --- | --- |"
    for line, entry in zip(lines[2:], entries, strict=True):
        assert line.startswith(f"| `{entry.name}` | ") and entry.description[0] in line
