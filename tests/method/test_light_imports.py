"""What other engines share with the product is imported without pyvene and what comes with it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = "actions fingerprint pooling validation stack.combination stack.folder stack.group"
PLUGIN = "edits engine held worker plugin"


def test_the_maths_of_gates_and_edits_needs_no_pyvene_and_that_of_vllm_no_vllm() -> None:
    code = f"""
import importlib, sys
for name in {SHARED.split()}:
    importlib.import_module("grun.method." + name)
print(sorted({{"pyvene", "pyvene_custom", "matplotlib", "datasets", "omegaconf", "peft"}} & set(sys.modules)))
for name in {PLUGIN.split()}:
    importlib.import_module("grun_vllm." + name)
print(sorted({{"vllm", "pyvene", "matplotlib", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["[]", "[]"]), done.stderr or done.stdout
