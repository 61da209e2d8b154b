"""Whatever is killed anywhere, the same command then ends as if nothing had happened, and nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("GRUN_KILLS", "100"))
"""Kills of the slow test, over all cases."""
SEED = int(os.environ.get("GRUN_KILLS_SEED", "0"))
CASES = ("unlearn", "finetune", "evaluate", "requests", "sequential", "sweep")
LINE = "interrupted; the same command resumes\n"


def rows_of(folder: Path, count: int, *cases: str) -> list[dict[str, Any]]:
    """What tests/kill_anywhere.py prints."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kill_anywhere.py"), str(folder), str(count), str(SEED), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def killed(folder: Path, kills: int, *cases: str) -> list[dict[str, Any]]:
    """Kill, compare, and fail for each finding."""
    rows = rows_of(folder, kills, *cases)
    attempts = [attempt for row in rows for attempt in row["attempts"]]
    struck = [attempt for attempt in attempts if attempt["status"] != 0]
    print(f"{len(struck)} of {len(attempts)} kills struck; {len(rows)} runs were compared")
    assert len(attempts) == kills and len(struck) > kills / 2
    assert not [row for row in rows if row["wrong"]]
    assert not [attempt for attempt in attempts if attempt["orphans"] or "Traceback" in attempt["said"]]
    for attempt in struck:
        if attempt["who"] == "SIGTERM":
            assert attempt["status"] == 128 + signal.SIGTERM and attempt["said"].count(LINE) == 1, attempt
    return rows


def test_a_killed_training_ends_as_one_that_was_not_and_leaves_nothing_over(tmp_path: Path) -> None:
    killed(tmp_path, 4, "finetune")


@pytest.mark.slow
def test_kills_anywhere_change_no_result_and_leave_nothing_over(tmp_path: Path) -> None:
    rows = killed(tmp_path, KILLS, *CASES)
    assert {row["case"] for row in rows} == set(CASES)


@pytest.mark.slow
def test_of_two_runs_in_one_folder_at_once_one_is_refused_and_the_result_is_the_others(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 20, "pairs")
    assert len(rows) == 20 and not [row for row in rows if row["wrong"]]
    for row in rows:
        assert row["statuses"] == [0, 1] and row["said"][0].count("error: ") == 1 and "Traceback" not in row["said"][0]
