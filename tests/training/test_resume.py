"""The same command gives the same bytes: twice, with another seed other ones, and after SIGKILL at any moment."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import demo
import pytest
from kill_and_resume import attempt
from safetensors import safe_open

from grun.cli import main

STEPS = 24
LEGS = ["train.epochs=8", "train.save_steps=4", "method.dropout=0.2", "objective=npo"]
"""24 steps; dropout, so that the random state matters."""


@pytest.fixture(scope="module")
def whole(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert demo.unlearn(taught, folder, *LEGS) == 0
    return folder


def digest(folder: Path, name: str = "adapter_model.safetensors") -> str:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def kill_and_resume(folder: Path, arguments: list[str], kills: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kill a command again and again in its folder, then let it finish; every kill is checked to have struck."""
    attempts = [attempt(arguments, folder, one) for one in [*kills, None]]
    assert [one["killed"] for one in attempts] == [True] * len(kills) + [False], attempts
    assert attempts[-1]["status"] == 0, attempts[-1]
    return attempts


def arguments_of(taught: Path, folder: Path, *more: str) -> list[str]:
    """A cache of its own: rows found in one that others filled have another rounding."""
    own = [f"model.path={taught}", f"output_dir={folder}", f"cache.dir={folder.with_name(folder.name + '-cache')}"]
    return ["unlearn", *demo.DATA, *demo.TRAINING, *own, *more]


def assert_is(folder: Path, whole: Path) -> None:
    """Bit-identical adapter and log, nothing left over, and a run that says it was resumed."""
    assert digest(folder) == digest(whole)
    assert steps_of(folder) == list(range(1, STEPS + 1))
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert json.loads((folder / "run.json").read_text())["resumed_from"] > 0


def random_kills(count: int, seed: int) -> list[dict[str, Any]]:
    """Moments in ascending order: right behind a random step, or up to two steps later."""
    drawn = random.Random(seed)
    steps = sorted(drawn.sample(range(1, STEPS - 3), count))
    return [{"after_step": step, "delay": drawn.uniform(0, 0.03)} for step in steps]


MID_SAVE = [
    {"in": "safetensors.torch.save_model", "call": 2},  # 4 is done, 8 is cut off
    {"in": "torch.save", "call": 4},  # of a checkpoint's optimizer, schedule and random state
    {
        "in": "os.replace",
        "call": 9,
    },  # the log's; task.json, log, seal and the whole of the first checkpoint, of this one
    {"in": "grun.method.saving.write_bytes", "call": 1},
    {"in": "grun.runtime.runs.write_json", "call": 1},
]
"""Halfway through files of a checkpoint, before its renaming, and while the result is saved."""
KEPT = (4, 8, 12, STEPS, STEPS)
"""Newest checkpoint behind each of them."""


def test_killed_at_random_moments_a_run_ends_bit_identical(taught: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "anytime"
    attempts = kill_and_resume(folder, arguments_of(taught, folder, *LEGS), random_kills(4, seed=11))
    assert len({one["step"] for one in attempts[:-1]}) > 2
    assert_is(folder, whole)


def test_killed_in_mid_save_a_run_resumes_from_the_checkpoint_before(taught: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mid_save"
    attempts = kill_and_resume(folder, arguments_of(taught, folder, *LEGS), MID_SAVE)
    for one, kept in zip(attempts[:-1], KEPT, strict=True):
        found = [Path(file).name for file in one["files"] if "/.grun/" not in file]
        assert f"checkpoint-{kept}" in found
        assert f"checkpoint-{kept + 4}" not in found
    assert any("/.grun/new-" in file for file in attempts[0]["files"])  # left behind, and gone at the end
    assert_is(folder, whole)


EVALUATION_KILLS = [
    {"in": "grun.evaluation.packed_scoring.scored_rows", "call": 3},
    {"in": "grun.evaluation.packed_scoring.scored_rows", "call": 4},
    {"in": "grun.evaluation.generation.prompt_gates", "call": 2},
    {"in": "grun.evaluation.table.write_text", "call": 2},
    {"in": "grun.evaluation.evaluate.write_json", "call": 1},
]
"""Behind one and three batches of scores, behind the first answers, and while the result is written."""


def test_a_killed_evaluation_ends_bit_identical(taught: Path, whole: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        base = ["evaluate", *demo.DATA, f"model.path={taught}", f"adapter={whole}", "max_new_tokens=4", "batch_size=16"]
        return [*base, "data.limit=6", f"output_dir={tmp_path / name}"]

    assert main(arguments("whole")) == 0
    kill_and_resume(tmp_path / "killed", arguments("killed"), EVALUATION_KILLS)
    for name in ("scores.jsonl", "generations.jsonl", "gates.jsonl"):
        assert digest(tmp_path / "killed", name) == digest(tmp_path / "whole", name)
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "killed"))
    assert first.pop("seconds") and second.pop("seconds") and first == second
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "killed" / ".grun").exists()


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(
    taught: Path, whole: Path, tmp_path: Path
) -> None:
    assert demo.unlearn(taught, tmp_path / "again", *LEGS) == 0
    assert digest(tmp_path / "again") == digest(whole)
    assert (tmp_path / "again" / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert demo.unlearn(taught, tmp_path / "other", *LEGS, "seed=43") == 0
    assert digest(tmp_path / "other") != digest(whole)
    with safe_open(whole / "adapter_model.safetensors", "pt") as first:
        with safe_open(tmp_path / "other" / "adapter_model.safetensors", "pt") as other:
            assert first.keys() == other.keys()


def test_finetuning_twice_gives_the_same_bytes_and_another_seed_others(taught: Path, tmp_path: Path) -> None:
    assert demo.finetune(tmp_path / "again") == 0
    for name in ("model.safetensors", "log.jsonl", "tokenizer.json", "grun_template.json"):
        assert digest(tmp_path / "again", name) == digest(taught, name)
    assert demo.finetune(tmp_path / "other", "seed=43") == 0
    assert digest(tmp_path / "other", "model.safetensors") != digest(taught, "model.safetensors")
    assert digest(tmp_path / "other", "tokenizer.json") == digest(taught, "tokenizer.json")
