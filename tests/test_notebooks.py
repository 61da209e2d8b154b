"""The notebooks run from top to bottom, as they stand, and find what they say."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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
