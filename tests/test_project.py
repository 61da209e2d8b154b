"""What surrounds the code agrees with itself: dependencies, citation, README, and the wheel that users install."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned_versions(*files: str) -> dict[str, Version]:
    pins = {}
    for line in [line for file in files for line in (ROOT / file).read_text().splitlines()]:
        if line and not line.startswith(("#", "-r ")):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{line} is not an exact pin"
            pins[canonical(requirement.name)] = Version(pin.version)
    return pins


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_environment_yml_is_requirements_txt_on_a_python_that_the_project_accepts() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "grun"
    python, pip, from_pip = environment["dependencies"]
    assert pip == "pip"
    assert from_pip == {"pip": ["-r requirements.txt"]}
    version = Version(python.removeprefix("python="))
    assert version >= Version("3.11")
    assert version in Requirement(f"python{PROJECT['requires-python']}").specifier


EXTRAS = PROJECT["optional-dependencies"]
APART = ("vllm",)
"""Those that need an environment of their own: their packages do not go with the pinned ones."""


@pytest.mark.parametrize(
    ("line", "file"),
    [(line, "requirements.txt") for line in PROJECT["dependencies"] + EXTRAS["optimizers"] + EXTRAS["serve"]]
    + [
        (line, "requirements-dev.txt")
        for name in sorted({*EXTRAS} - {"optimizers", "serve", *APART})
        for line in EXTRAS[name]
    ],
)
def test_every_range_admits_the_pinned_version(line: str, file: str) -> None:
    wanted = Requirement(line)
    pinned = pinned_versions("requirements.txt", file)
    assert pinned[canonical(wanted.name)] in wanted.specifier


def test_pins_carry_no_local_build_tag_that_an_index_would_lack() -> None:
    pinned = pinned_versions("requirements.txt", "requirements-dev.txt")
    assert [name for name, version in pinned.items() if version.local] == []


def test_what_tests_need_adds_to_what_scripts_run_with() -> None:
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert pinned_versions("requirements.txt").keys().isdisjoint(pinned_versions("requirements-dev.txt"))


def test_citation_names_the_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()

    def arxiv_id(work: dict) -> str:
        return work["identifiers"][0]["value"]

    assert arxiv_id(citation["preferred-citation"]) == "arXiv:2502.17823"
    assert len(citation["preferred-citation"]["authors"]) == 11
    others = {"arXiv:2401.06121", "arXiv:2404.05868", "arXiv:2404.03592", "arXiv:2403.07809"}
    assert {arxiv_id(work) for work in citation["references"]} == others


def test_citation_has_the_version_of_the_code() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    source = (ROOT / "grun" / "version.py").read_text()
    assert f'__version__ = "{citation["version"]}"' in source


def other_peoples_grun(text: str) -> re.Match[str] | None:
    """Where `text` has pip install a package called grun, which on PyPI is not ours."""
    return re.search(r"pip3? +install\b[^\n`]*[ \"']grun(?![\w./-])", text)


def test_readme_never_installs_other_peoples_grun() -> None:
    assert other_peoples_grun((ROOT / "README.md").read_text()) is None
    for wrong in ("pip install grun", "pip install -U grun\n", "`pip install grun[dev]`", "pip install 'grun>=1'"):
        assert other_peoples_grun(wrong), wrong
    for right in ("pip install grun-unlearning", "pip install ./grun", "pip install -e .\ngrun list"):
        assert not other_peoples_grun(right), right


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the package: built from a copy of the source, unpacked as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, target = folder / "source", folder / "wheels", folder / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for package in ("grun", "pyvene_custom", "baselines"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("grun_unlearning-") and wheel.name.endswith("-none-any.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run_installed(installed: Path, empty: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(empty.iterdir()) == []
    return done.stdout


def test_installed_wheel_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run_installed(installed, tmp_path, "-c", "import grun; print(grun.__file__)").strip()
    assert Path(where).is_relative_to(installed)
    assert re.search(r"\d+\.\d+\.\d+", run_installed(installed, tmp_path, "-m", "grun", "--version"))
    profiles = run_installed(installed, tmp_path, "-m", "grun", "list", "profiles")
    assert "demo" in {line.split()[0] for line in profiles.splitlines() if line.strip()}


def test_wheel_holds_every_data_file_of_the_source(installed: Path) -> None:
    data = {"*.html", "*.json", "*.yaml", "*.txt", "py.typed", "README.md"}
    for package in ("grun", "pyvene_custom", "baselines"):
        for pattern in data:
            for file in (ROOT / package).rglob(pattern):
                assert (installed / file.relative_to(ROOT)).is_file(), f"{file.name} is not package data"


def test_importing_grun_loads_no_heavy_package(installed: Path, tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'pyvene', 'datasets', 'peft'}"
    command = f"import sys, grun; print(sorted({heavy} & set(sys.modules)))"
    assert run_installed(installed, tmp_path, "-c", command).strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_all_that_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    importlib.import_module(f"benchmarks.{path.stem}")
