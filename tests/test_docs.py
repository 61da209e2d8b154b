"""The documentation builds without a warning, and its pages have every name and option that the code has."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from grun.commands.listing import KINDS
from grun.config import values
from grun.config.definitions import packaged_names
from grun.registry import REGISTRIES, registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return unescape((site / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_name_is_in_its_table(site: Path, kind: str) -> None:
    text = page(site, "names.html")
    names = registry(kind).names() if kind in REGISTRIES else packaged_names(kind.removesuffix("s"))
    assert names
    assert [name for name in names if f"<code>{name}</code>" not in text] == []


@pytest.mark.parametrize("command", values.COMMANDS)
def test_every_option_is_in_its_table(site: Path, command: str) -> None:
    text = page(site, "options.html").split(f'<h2 id="{command}">')[1].split("<h2")[0]
    keys = [key for key, _, _ in values.describe(values.COMMANDS[command])]
    assert [key for key in keys if f"<code>{key}</code>" not in text] == []


def test_no_mark_of_a_generated_part_is_left(site: Path) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert [name for name, text in texts.items() if re.search(r"<!-- (names|options|modules)|<p>:::", text)] == []


def test_nothing_is_asked_of_the_network(site: Path) -> None:
    asked = [
        path.name
        for path in site.rglob("*.html")
        for line in path.read_text(encoding="utf-8").splitlines()
        if ("<script" in line or "<link" in line or "<img" in line) and ('src="http' in line or 'href="http' in line)
    ]
    assert asked == []


def test_pages_of_the_python_names_have_their_docstrings(site: Path) -> None:
    assert "grun.method.model.GrunModel.wrap" in page(site, "api/method.html")
    assert "grun.objectives.preference.npo" in page(site, "api/objectives.html")
