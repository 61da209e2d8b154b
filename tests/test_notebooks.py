"""What README and notebooks show in Python runs from top to bottom, and finds what is said there."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Fork

from grun.config.options import TinyConfig
from grun.loading.tiny import build_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("01_first_steps", ["without the edits: Accra.", "forget   fact recall 0.00", "unwrapped: Accra."]),
        ("02_new_objective", ["hinge + ce", "hinge  fact recall: forget 0."]),
    ],
)
def test_a_notebook_runs(name: str, found: list[str], tmp_path: Path) -> None:
    """In a fork, which keeps the folder, and names that are registered, to itself."""
    folder = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    notebook = json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]

    def run() -> int:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        names: dict[str, Any] = {}
        with open(tmp_path / "printed", "w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
            for number, cell in enumerate(cells):
                exec(compile(cell, f"cell {number}", "exec"), names)
        return 0

    assert Fork(run).wait() == 0
    printed = (tmp_path / "printed").read_text(encoding="utf-8")
    assert [text for text in found if text not in printed] == [], printed


def first_python(page: str) -> str:
    found: str = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)[0]
    return found


def test_the_first_python_of_the_readme_runs_and_that_of_the_documentation_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On fewer rows in fewer epochs."""
    monkeypatch.chdir(tmp_path)
    code = first_python("README.md")
    for given, smaller in (("range(100)", "range(8)"), ("epochs=20", "epochs=2")):
        assert code.count(given) == 1
        code = code.replace(given, smaller)
    sizes = TinyConfig(hidden_size=32, blocks=4, intermediate_size=64, vocabulary=300)
    for part in build_tiny(sizes, ["Where does Ada Lind live? In Otterford."], 0):
        part.save_pretrained("MODEL")
    exec(compile(code, "README.md", "exec"), {})
    recalled, leaked = (float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"[\d.]+", line))
    assert 0 <= recalled <= 1 and 0 <= leaked <= 1
    assert (tmp_path / "results" / "mine" / "adapter_config.json").is_file()
    both = ([line.partition("  #")[0] for line in first_python(page).splitlines()] for page in PAGES)
    readme, documentation = both
    assert len(documentation) > 5 and readme[: len(documentation)] == documentation
