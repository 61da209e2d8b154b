"""How the rooms of the code may lean on each other: every import is read, those within functions and of types too."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from made_results import write_demo
from made_suites import write_knowledge, write_withstood

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    *("errors", "version", "registry", "runtime", "config", "data", "method", "objectives", "peft", "loading"),
    *("training", "cache"),
    *("evaluation", "report", "commands", "requests", "experiments", "serving", "api", "cli", "__init__", "__main__"),
)
"""From the ground up: a room imports itself and what stands before it."""
HALL = 9
"""Modules that may lie directly in `grun/`."""
LONGEST = 60
"""Lines of a function."""


PACKAGES = ("grun", "grun_vllm", "pyvene_custom", "baselines")


def modules() -> dict[str, Path]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__") if name != "grun.__init__" else name: path for path, name in names.items()}


MODULES = modules()


@functools.cache
def nodes(name: str) -> list[ast.AST]:
    """All of a module's syntax."""
    return [*ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))]


@functools.cache
def imports(name: str) -> set[str]:
    """Modules of ours that a module imports."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & {*MODULES} if names <= {*MODULES} else names | {str(node.module)}
    return {"grun.__init__" if module == "grun" else module for module in found} & {*MODULES} - {name}


def room(name: str) -> str:
    return name.split(".")[1]


def test_a_room_leans_on_those_below_it() -> None:
    wrong = []
    pairs = [(name, other) for name in MODULES if name.startswith("grun.") for other in imports(name)]
    for name, other in pairs:
        if other.startswith("baselines"):
            wrong.append(f"{name} imports {other}; name it by a registry's string")
        elif other.startswith("grun_vllm"):
            wrong.append(f"{name} imports {other}, which stands beside the rooms")
        elif other.startswith("grun.") and ROOMS.index(room(other)) > ROOMS.index(room(name)):
            wrong.append(f"{name} imports {other}, which stands above it")
        elif room(name) == "config" and other == "grun.registry":
            wrong.append(f"{name}: names are checked where they are resolved")
    assert wrong == []


def test_the_plugin_of_vllm_leans_on_the_method_and_what_is_below_it() -> None:
    for name in MODULES:
        if name.startswith("grun_vllm"):
            for other in imports(name) - {"grun.__init__"}:
                assert other.startswith("grun_vllm") or ROOMS.index(room(other)) <= ROOMS.index("method"), (name, other)


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: imports(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_pyvene_custom_knows_nothing_of_grun_but_its_errors() -> None:
    for name in MODULES:
        if name.startswith("pyvene_custom"):
            assert {other for other in imports(name) if other.startswith("grun.")} <= {"grun.errors"}, name


def test_the_hall_has_few_doors() -> None:
    assert len([*(ROOT / "grun").glob("*.py")]) <= HALL


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    folders = [
        write_demo(tmp_path / "demo"),
        write_withstood(tmp_path / "attacks"),
        write_knowledge(tmp_path / "known"),
    ]
    code = f"""
import importlib, sys
for name in {[name for name in MODULES if name.startswith("grun.report")]}:
    importlib.import_module(name)
from grun.config.options import ReportConfig
from grun.report.make import make_report
for folder in {[str(folder) for folder in folders]}:
    make_report(ReportConfig(results_dir=folder))
print("torch" in sys.modules or "transformers" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "False"), done.stderr
    assert all((folder / "report.html").is_file() for folder in folders)


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names)), "pytest imports test files by their names"


def test_functions_fit_on_a_screen() -> None:
    functions = [
        (f"{name}: {node.name}", node.end_lineno - node.lineno + 1)
        for name in MODULES
        for node in nodes(name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    assert len(functions) > 1000 and [(name, lines) for name, lines in functions if lines > LONGEST] == []
