"""`benchmarks/gpu.py` on the CPU: every stage runs at a tiny size, and one that fails or hangs ends alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu

TINY = ["--device", "cpu", "--shape", "tiny", "--epochs", "1", "--plain-steps", "1"]
TINY += ["--steps", "1", "--batch", "4", "--rows", "2", "--generated", "16"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows in TOFU's layout, of four authors, one of whom is forgotten."""
    folder = tmp_path / "tofu"
    folder.mkdir()

    def write(name: str, authors: range, **more: object) -> None:
        rows = [
            {"question": f"What is {what} of author {who}?", "answer": f"It is {what} number {who}{who}.", **more}
            for who in authors
            for what in ("the town", "the first book", "the prize", "the river", "the dog")
        ]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))

    write("full", range(4))
    write("forget05", range(3, 4))
    write("retain95", range(3))
    wrong = {"paraphrased_question": "Say it?", "paraphrased_answer": "That.", "perturbed_answer": ["a", "b", "c"]}
    for name, authors in (("forget05_perturbed", range(3, 4)), ("retain_perturbed", range(2))):
        write(name, authors, **wrong)
    for name in ("real_authors", "world_facts"):
        write(f"{name}_perturbed", range(5, 6), **wrong)
    monkeypatch.setenv("GRUN_TOFU_DIR", str(folder))
    return folder


@pytest.mark.parametrize("stage", list(gpu.STAGES))
def test_a_stage_runs_on_the_cpu(text: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "row.json"
    gpu.main([*TINY, "--stage", stage, "--json", str(file)])
    (row,) = json.loads(file.read_text())
    assert (row["stage"], row["device"], row["shape"]) == (stage, "CPU", "tiny")
    if stage == "finetune":
        assert row["steps_per_second"] > 0 and 0 <= row["padding_share"] < 1
    else:
        assert row["seconds"] > 0
    assert all(len(line) == 3 for line in gpu.lines(row))


def test_a_stage_that_hangs_or_fails_is_a_row_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, file = tmp_path / "stage.py", tmp_path / "rows.json"
    script.write_text(
        "import json, sys, time\n"
        "name, file = sys.argv[sys.argv.index('--stage') + 1], sys.argv[-1]\n"
        "if name == 'pooled': time.sleep(60)\n"
        "if name == 'finetune': sys.exit(3)\n"
        "json.dump([{'stage': name, 'device': 'CPU', 'seconds': 1.0}], open(file, 'w'))\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    with pytest.raises(SystemExit, match="a stage failed"):
        gpu.main([*TINY, "--stages", "pooled,finetune,attacks", "--limit", "1", "--json", str(file)])
    hung, failed, done = json.loads(file.read_text())
    assert hung == {"stage": "pooled", "failed": "not done within 1 s"}
    assert failed["failed"].startswith("ended with status 3") and done["seconds"] == 1.0


def test_all_limits_together_are_below_five_minutes() -> None:
    assert sum(stage.limit for stage in gpu.STAGES.values()) < 300


def test_an_unknown_stage_is_one_line() -> None:
    with pytest.raises(SystemExit, match="there is no stage training; there are published, pooled"):
        gpu.main([*TINY, "--stages", "training"])
