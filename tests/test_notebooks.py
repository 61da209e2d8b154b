"""What README and notebooks show in Python runs from top to bottom, as it stands, and finds what is said there."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from grun.config.options import TinyConfig
from grun.loading.tiny import build_tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("01_first_steps", ["without the edits: Accra.", "forget   fact recall 0.00", "unwrapped: Accra."]),
        ("02_new_objective", ["hinge + ce", "hinge  fact recall: forget 0."]),
    ],
)
def test_a_notebook_runs(name: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    folder = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    assert [text for text in found if text not in printed] == [], printed


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = TinyConfig(hidden_size=32, blocks=4, intermediate_size=64, vocabulary=300)
    for part in build_tiny(sizes, ["Where does Ada Lind live? In Otterford."], 0):
        part.save_pretrained("MODEL")
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    exec(compile(code, page, "exec"), {})
    recalled, leaked = (float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"[\d.]+", line))
    assert 0 <= recalled <= 1 and 0 <= leaked <= 1
    assert (tmp_path / "results" / "mine" / "adapter_config.json").is_file()
