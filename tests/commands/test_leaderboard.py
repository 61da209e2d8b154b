"""Submissions to the leaderboard: what they hold, what is refused, and the board that is made of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from made_results import write_cell, write_evaluation

from grun.cli import main
from grun.report.submission_checks import REQUIRED
from grun.runtime.files import content_hash, write_json

Captured = pytest.CaptureFixture[str]
SEEDS = (42, 43, 44)
SHARES = {"forget": 0.0, "retain": 1.0, "heldout": 0.95}
LEFT = {"gd": (0.0, 0.05, 0.0), "npo": (0.3, 0.2, 0.25)}
"""Fact recall on the forget set by objective and seed."""
LEAKS = {"gd": 0.5, "npo": 0.25}
"""Leak of each row under few_shot, which is the worst."""


def write_attacked(folder: Path, adapter: str, leaked: float) -> None:
    """An evaluation of suite=attacks of four rows; under few_shot each gives back `leaked`, in one of two ways."""
    lines: list[dict[str, Any]] = []
    for attack in REQUIRED:
        for index in range(4):
            for variant in ("one", "two") if attack == "few_shot" else ("",):
                leak = leaked if variant == "one" else 0.0
                said = {"set": "forget", "index": index, "variant": variant, "prompt": "Who?", "text": "Nobody."}
                lines.append({"attack": attack, **said, "leak": leak})
    lines.append({"attack": "plain", "set": "heldout", "index": 0, "prompt": "Who?", "text": "Ada", "leak": 1.0})
    folder.mkdir(parents=True)
    (folder / "attacks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    identity = {"base": "b1", "adapter": adapter}
    about = {"suite": "attacks", "identity": identity, "settings": {"rows": {"forget": "f1"}, "seed": 0}}
    write_json(folder / "evaluation.json", {**about, "attacks": {}})


def results(folder: Path, objectives: tuple[str, ...] = ("gd", "npo"), seeds: tuple[int, ...] = SEEDS) -> Path:
    """A results folder with three seeds of two methods, each attacked."""
    more: dict[str, Any] = {"settings": {"limit": 40, "sets": list(SHARES)}, "data": {"forget": "f1", "retain": "r1"}}
    write_evaluation(folder / "evaluation" / "before", {**SHARES, "forget": 1.0}, identity={"base": "b1"}, **more)
    target = {"base": "b2"}
    write_evaluation(folder / "evaluation" / "retain_only", {**SHARES, "heldout": 1.0}, identity=target, **more)
    for objective in objectives:
        for number, seed in enumerate(seeds):
            name = f"{objective}-s{seed}"
            shares = {**SHARES, "forget": LEFT[objective][number], "heldout": 1 - number / 40}
            identity = {"base": "b1", "adapter": name}
            write_evaluation(folder / "evaluation" / name, shares, identity=identity, adapter=name, **more)
            write_cell(folder / name, objective, "lora", seed, data={"name": "countries", "path": "/home/me"})
            write_attacked(folder / "attacks" / name, name, LEAKS[objective])
    return folder


def submitted(folder: Path, *, name: str = "mine.json", tuning: str = "the defaults", **kinds: Any) -> Path:
    arguments = [str(results(folder / "results", **kinds)), f"tuning={tuning}", f"output={folder / name}"]
    assert main(["leaderboard", "submit", *arguments]) == 0
    return folder / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    submission: dict[str, Any] = json.loads(submitted(tmp_path_factory.mktemp("whole")).read_text())
    return submission


@pytest.fixture
def edited(whole: dict[str, Any], tmp_path: Path, capsys: Captured) -> Iterator[Callable[..., str]]:
    """Write a copy after an edit, with a hash that fits it, and what verify says of it."""

    def edit(change: Callable[[dict[str, Any]], Any], rehashed: bool = True) -> str:
        copy = json.loads(json.dumps(whole))
        change(copy)
        if rehashed:
            copy["hash"] = content_hash({key: value for key, value in copy.items() if key != "hash"})
        (tmp_path / "copy.json").write_text(json.dumps(copy))
        assert main(["leaderboard", "verify", str(tmp_path / "copy.json")]) != 0
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        return printed.err

    yield edit


def model(submission: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in submission["models"] if one["name"] == name)
    return found


def test_a_submission_is_verified_from_its_rows_alone(tmp_path: Path, capsys: Captured) -> None:
    path = submitted(tmp_path, name="mine.json.gz")
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["leaderboard", "verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert "countries: GD LoRA, NPO LoRA; 3 seeds; every number is that of its rows" in said
    assert "/home/me" not in gzip.decompress(path.read_bytes()).decode()


def test_its_numbers_are_those_of_the_rows(whole: dict[str, Any]) -> None:
    for objective, left in LEFT.items():
        for seed, share in zip(SEEDS, left, strict=True):
            numbers = model(whole, f"{objective}-s{seed}")["numbers"]
            assert numbers["sets"]["forget"]["fact_recall"] == pytest.approx(share)
            few_shot = numbers["attacks"]["few_shot"]  # a mean over its two ways, and the worse of them
            assert (few_shot["leak"], few_shot["worst"]) == (LEAKS[objective] / 2, LEAKS[objective])
            assert numbers["worst"]["leak"] == LEAKS[objective] and numbers["attacks"]["plain"]["rows"] == 4


def without_second_turn(submission: dict[str, Any]) -> None:
    attempts = model(submission, "npo-s42")["attempts"]
    attempts[:] = [one for one in attempts if one["attack"] != "second_turn"]


def one_run_as_two_seeds(submission: dict[str, Any]) -> None:
    first, second = (model(submission, f"gd-s{seed}") for seed in (42, 43))
    second.update({key: value for key, value in first.items() if key not in ("seed", "name")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda file: model(file, "npo-s43")["numbers"]["sets"]["forget"].update(fact_recall=0.0),
            "copy.json: npo-s43: sets.forget.fact_recall is 0.0 in the file, and 0.2 by its rows",
        ),
        (
            lambda file: model(file, "gd-s44")["numbers"]["worst"].update(leak=0.0),
            "gd-s44: worst.leak is 0.0 in the file, and 0.5 by its rows",
        ),
        (lambda file: model(file, "gd-s42")["generations"].pop(3), "not those of before (first that differs: forget, "),
        (
            lambda file: file["models"].remove(model(file, "gd-s43")),
            "seed 43 is missing (seeds of this file: 42, 43",
        ),
        (one_run_as_two_seeds, "GD LoRA: two seeds hold the same scores to the last digit"),
        (lambda file: model(file, "npo-s42").update(attempts=[]), "NPO LoRA, seed 42: the attack table is missing"),
        (without_second_turn, "NPO LoRA, seed 42: the attack table lacks second_turn"),
        (lambda file: file.update(tuning=" "), "the tuning rule is missing"),
        (lambda file: file.update(format=9), "format 9 is not 1"),
        (lambda file: file.pop("seeds"), "lacks seeds"),
        (lambda file: model(file, "gd-s42")["cost"].update(seconds=None), "its cost lacks seconds"),
        (lambda file: model(file, "gd-s42")["data"].update(forget="f2"), "other data than before (hashes: forget)"),
        (lambda file: model(file, "gd-s42").update(base="b9"), "another base (b9) than before (b1)"),
        (lambda file: model(file, "gd-s43")["config"].update(train={"lr": 1}), "settings are not those of seed 42"),
        (lambda file: model(file, "gd-s42")["settings"].update(limit=4), "evaluated otherwise than before"),
        (lambda file: model(file, "gd-s43")["asked"].update(seed=1), "attacked otherwise than seed 42"),
        (lambda file: model(file, "gd-s42")["attempts"][0].update(leaks=[]), "its rows give no numbers"),
        (lambda file: model(file, "gd-s42")["attempts"][0].update(attack="x"), "unknown attack x"),
        (lambda file: model(file, "before").update(stage="after"), "0 models are called before"),
    ],
)
def test_what_was_edited_or_left_out_is_refused_by_name(
    edited: Callable[..., str], change: Callable[..., Any], said: str
) -> None:
    assert said in edited(change)


def test_what_no_row_can_tell_is_held_by_the_hash(edited: Callable[..., str]) -> None:
    error = edited(lambda file: model(file, "gd-s42")["cost"].update(seconds=1.0), rehashed=False)
    assert "its content is not what its hash says" in error


def test_a_file_that_is_no_submission_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    for name, data in (("a.json", b"[]"), ("b.json.gz", b"{}"), ("c.json", b"\xff"), ("d.json", b"{")):
        (tmp_path / name).write_bytes(data)
        assert main(["leaderboard", "verify", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1


def test_a_file_that_unpacks_to_far_too_much_is_one_line(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grun.report.submission.LARGEST", 2**20)
    (tmp_path / "large.json.gz").write_bytes(gzip.compress(b" " * (2**20 + 1)))
    assert main(["leaderboard", "verify", str(tmp_path / "large.json.gz")]) == 1
    assert "large.json.gz holds more than 1 MiB" in capsys.readouterr().err


def test_the_board_ranks_methods_by_what_they_forget_and_keep(whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(whole))
    one_seed = submitted(tmp_path, name="single.json", objectives=("gd",), seeds=(42,))
    board = tmp_path / "board.md"
    board.write_text("# Board\n\nAbove.\n\n<!-- board -->\nold\n<!-- end of the board -->\n\nBelow.\n")
    for _ in range(2):  # what it replaces the second time is its own
        assert main(["leaderboard", "board", str(tmp_path / "mine.json"), str(one_seed), f"output={board}"]) == 0
        text = board.read_text()
        assert text.startswith("# Board\n\nAbove.") and text.endswith("\n\nBelow.\n") and "old" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head, lines = rows[0], [row for row in rows[2:] if row[-1].endswith(".json")]
    first, second, third = (dict(zip(head[1:], row[1:], strict=True)) | {"": row[0]} for row in lines)
    assert [one[""] for one in (first, second, third)] == ["GD LoRA", "NPO LoRA", "GD LoRA"]
    assert [one["rank"] for one in (first, second, third)] == ["1", "2", "-"]
    assert [one["forgets and keeps"] for one in (first, second)] == ["yes", "no"]
    mean, spread = fmean(LEFT["npo"]), stdev(LEFT["npo"])
    assert second["forget fact recall"] == f"{mean:.2f} ± {spread:.2f}" and third["seeds"] == "1"
    assert second["leak, worst"].startswith("0.25") and "settings: the defaults" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs an action"),
        (["sumbit"], "did you mean 'submit'"),
        (["verify"], "needs files or folders"),
        (["board", "a.json"], "needs output=FILE"),
        (["submit", "a", "output=b.json"], "needs tuning="),
        (["submit", "nowhere", "tuning=x", "output=b.json"], "holds no evaluation.json"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], said: str, capsys: Captured) -> None:
    assert main(["leaderboard", *arguments]) != 0
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
