"""The reader of TOFU's own logs: published numbers from published logs, and small logs of our own in both layouts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from grun.cli import main
from grun.errors import DataError
from grun.evaluation.tofu_log import SECTIONS, tofu_log

ROOT = Path(__file__).resolve().parents[2]
Captured = pytest.CaptureFixture[str]
Log = dict[str, dict[str, Any]]
FULL, RETAIN90 = "llama2-7b_full_wd0.01.json", "llama2-7b_retain90_wd0.01.json"


def make_log(seed: int, forget: int = 8) -> Log:
    """Random losses in lists; as in TOFU's logs, the answer is its own paraphrase on real authors and world facts."""
    draw = np.random.default_rng(seed).uniform
    log: Log = {}
    for name, section in SECTIONS.items():
        rows, wrong = (forget, 5) if name == "forget" else (6, 5) if name == "retain" else (4, 3)
        answer = draw(0.1, 2, rows).tolist()
        log[section] = {
            "avg_gt_loss": answer,
            "gt_loss": [loss * 10 for loss in answer],
            "generated_text": [["question", "answer", "truth"]] * rows,
            "rougeL_recall": draw(0.2, 1, rows).tolist(),
            "average_perturb_loss": draw(1, 4, (rows, wrong)).tolist(),
            "avg_paraphrased_loss": draw(0.5, 3, rows).tolist() if wrong == 5 else answer,
        }
    return log


def indexed(log: Log, seed: int = 0) -> Log:
    """The same in dicts, each field in an order of its own."""
    generator = np.random.default_rng(seed)

    def shuffle(values: list[Any]) -> dict[str, Any]:
        return {str(index): values[index] for index in generator.permutation(len(values)).tolist()}

    return {name: {field: shuffle(values) for field, values in part.items()} for name, part in log.items()}


def write(path: Path, log: object) -> Path:
    path.write_text(log if isinstance(log, str) else json.dumps(log))
    return path


def by_definition(log: Log, over: Callable[[np.ndarray], np.ndarray]) -> tuple[list[float], np.ndarray]:
    """The nine numbers of the model utility and the forget rows' truth ratios; `over` turns losses into P_wrong."""
    nine: list[float] = []
    for name in ("retain", "real_authors", "world_facts"):
        part = log[SECTIONS[name]]
        p, wrong = np.exp(-np.array(part["avg_gt_loss"])), np.array(part["average_perturb_loss"])
        ratio = over(wrong) / np.exp(-np.array(part["avg_paraphrased_loss"]))
        share = p if name == "retain" else p / (p + np.exp(-wrong).sum(1))
        nine += [share.mean(), np.mean(part["rougeL_recall"]), np.maximum(0, 1 - ratio).mean()]
    part = log[SECTIONS["forget"]]
    return nine, over(np.array(part["average_perturb_loss"])) / np.exp(-np.array(part["avg_paraphrased_loss"]))


def geometric(losses: np.ndarray) -> np.ndarray:
    return np.exp(-losses.mean(1))


def arithmetic(losses: np.ndarray) -> np.ndarray:
    return np.exp(-losses).mean(1)


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("GRUN_TOFU_LOGS"), reason="GRUN_TOFU_LOGS names no folder of TOFU's own logs")
def test_published_logs_give_the_published_numbers() -> None:
    folder = ROOT / os.environ["GRUN_TOFU_LOGS"]  # an absolute path stays as it is
    found = tofu_log(folder / FULL, folder / RETAIN90)
    assert found["model_utility"] == pytest.approx(0.6227, abs=5e-5)  # four digits are published
    assert found["model_utility_arithmetic"] == pytest.approx(0.5859, abs=5e-5)
    assert found["ks_statistic"] == pytest.approx(0.3967, abs=5e-5)
    assert found["forget_quality"] == pytest.approx(1.834e-21, rel=5e-4)
    assert found["forget_quality_log10"] == pytest.approx(math.log10(1.834e-21), abs=5e-4)
    assert found["forget_quality_arithmetic"] == pytest.approx(6.03e-23, rel=1e-3)
    forget = found["sets"]["forget"]
    assert forget["rows"] == 300
    assert (forget["probability"], forget["rouge_l"]) == pytest.approx((0.991, 0.985), abs=5e-4)
    retrained = tofu_log(folder / RETAIN90)
    assert retrained["model_utility"] == pytest.approx(0.6137, abs=5e-5)
    assert retrained["model_utility_arithmetic"] == pytest.approx(0.5752, abs=5e-5)
    forget = retrained["sets"]["forget"]
    assert (forget["probability"], forget["rouge_l"]) == pytest.approx((0.148, 0.408), abs=5e-4)


def test_numbers_equal_their_definitions(tmp_path: Path) -> None:
    ours, theirs = make_log(0), make_log(1)
    found = tofu_log(write(tmp_path / "log.json", ours), write(tmp_path / "retain.json", theirs))
    for key, truth, quality, over in (
        ("model_utility", "truth_ratio", "forget_quality", geometric),
        ("model_utility_arithmetic", "truth_ratio_arithmetic", "forget_quality_arithmetic", arithmetic),
    ):
        nine, ratios = by_definition(ours, over)
        assert found[key] == pytest.approx(hmean(nine))
        sets = found["sets"]
        assert [
            sets[name][metric]
            for name in ("retain", "real_authors", "world_facts")
            for metric in ("probability" if name == "retain" else "probability_normalized", "rouge_l", truth)
        ] == pytest.approx(nine)
        assert sets["forget"][truth] == pytest.approx(np.minimum(ratios, 1 / ratios).mean())
        test = ks_2samp(ratios, by_definition(theirs, over)[1])
        assert found[quality] == pytest.approx(test.pvalue)
        if over is geometric:
            assert found["ks_statistic"] == pytest.approx(test.statistic)
            assert found["forget_quality_log10"] == pytest.approx(math.log10(test.pvalue))
    rows = {"retain": 6, "real_authors": 4, "world_facts": 4, "forget": 8}
    assert {name: numbers["rows"] for name, numbers in sets.items()} == rows
    part = ours["eval_log_forget.json"]
    assert sets["forget"]["probability"] == pytest.approx(np.exp(-np.array(part["avg_gt_loss"])).mean())
    assert sets["forget"]["rouge_l"] == pytest.approx(np.mean(part["rougeL_recall"]))


def test_both_layouts_in_any_order_of_rows_give_the_same(tmp_path: Path) -> None:
    ours, theirs = make_log(0, forget=12), make_log(1, forget=12)
    lists = tofu_log(write(tmp_path / "a", ours), write(tmp_path / "b", theirs))
    dicts = tofu_log(write(tmp_path / "c", indexed(ours)), write(tmp_path / "d", indexed(theirs, 1)))
    mixed = tofu_log(write(tmp_path / "e", indexed(ours, 2)), tmp_path / "b")
    for other in (dicts, mixed):
        assert flat(other) == pytest.approx(flat(lists), rel=1e-12)  # sums in another order


def flat(result: dict[str, Any]) -> dict[str, float]:
    sets = {f"{name} {key}": value for name, part in result["sets"].items() for key, value in part.items()}
    return {**{key: value for key, value in result.items() if key != "sets"}, **sets}


def test_a_set_without_any_recall_makes_the_model_utility_zero(tmp_path: Path) -> None:
    log = make_log(0)
    log["eval_real_world_wo_options.json"]["rougeL_recall"] = [0.0] * 4
    assert tofu_log(write(tmp_path / "log.json", log))["model_utility"] == 0.0


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_json_object_of_numbers_and_nothing_else(tmp_path: Path, capsys: Captured) -> None:
    log = write(tmp_path / "log.json", indexed(make_log(0)))
    assert main(["report", "tofu-log", str(log)]) == 0
    printed = capsys.readouterr()
    alone = json.loads(printed.out)
    assert printed.err == ""
    assert set(alone) == {"model_utility", "model_utility_arithmetic", "sets"}
    assert main(["report", "tofu-log", str(log), f"retain={write(tmp_path / 'retain.json', make_log(1))}"]) == 0
    both = json.loads(capsys.readouterr().out)
    forget_quality = {"forget_quality", "forget_quality_log10", "forget_quality_arithmetic", "ks_statistic"}
    assert set(both) == set(alone) | forget_quality
    assert all(isinstance(value, int | float) for value in flat(both).values())


def test_help_names_the_command(capsys: Captured) -> None:
    for arguments in (["--help"], ["report", "--help"], ["report", "tofu-log", "--help"]):
        assert main(arguments) == 0
        assert "report tofu-log LOG" in capsys.readouterr().out


def test_wrong_use_is_told_the_right_one(tmp_path: Path, capsys: Captured) -> None:
    log = str(write(tmp_path / "log.json", make_log(0)))
    for arguments in ([], [log, log], [log, "retain="], [log, f"retain={log}", f"retain={log}"], [log, "--fast"]):
        assert main(["report", "tofu-log", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1 and "report tofu-log LOG [retain=LOG]" in printed.err


# -- logs that cannot be read -----------------------------------------------------------------------------------------


def refused(path: Path, retain: Path | None = None) -> str:
    with pytest.raises(DataError) as error:
        tofu_log(path, retain)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_damaged_or_foreign_file_is_named(tmp_path: Path, capsys: Captured) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        assert f"cannot read {path}" in refused(path)
    assert "not valid JSON" in refused(write(tmp_path / "cut.json", json.dumps(make_log(0))[:500]))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused(tmp_path / "binary")
    assert "holds a list" in refused(write(tmp_path / "list.json", []))
    line = refused(write(tmp_path / "other.json", {"forget_Q_A_Prob": {"agg_value": 1}, "model_utility": {}}))
    assert "expected eval_log.json, eval_real_author_wo_options.json" in line
    assert "found forget_Q_A_Prob, model_utility" in line
    good = write(tmp_path / "log.json", make_log(0))
    assert str(tmp_path / "list.json") in refused(good, tmp_path / "list.json")
    assert main(["report", "tofu-log", str(tmp_path / "nowhere.json")]) == 1
    assert capsys.readouterr().out == ""


def broken(change: Callable[[dict[str, Any]], object]) -> Log:
    log = indexed(make_log(0))
    change(log["eval_log_forget.json"])
    return log


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda part: part.pop("average_perturb_loss"), ("no average_perturb_loss", "found avg_gt_loss")),
        (lambda part: part["average_perturb_loss"].pop("3"), ("row 3", "average_perturb_loss (7 rows)")),
        (lambda part: part["average_perturb_loss"].update({"3": []}), ("row 3: 0 losses", "list of 5")),
        (lambda part: part["average_perturb_loss"].update({"3": [1.0, 2.0]}), ("row 3: 2 losses", "list of 5")),
        (lambda part: part["average_perturb_loss"].update({"3": None}), ("row 3: null", "list of 5")),
        (lambda part: part["average_perturb_loss"]["3"].__setitem__(1, math.nan), ("row 3: nan", "finite")),
        (lambda part: part["avg_paraphrased_loss"].update({"2": math.nan}), ("avg_paraphrased_loss, row 2: nan",)),
        (lambda part: part["avg_gt_loss"].update({"2": math.inf}), ("avg_gt_loss, row 2: inf", "finite")),
        (lambda part: part["rougeL_recall"].update({"2": "0.5"}), ("rougeL_recall, row 2: a text",)),
        (lambda part: part["rougeL_recall"].clear(), ("rougeL_recall: no rows",)),
        (lambda part: part.update(avg_gt_loss=0.5), ("avg_gt_loss: a number", "{index: value} or a list")),
    ],
)
def test_rows_that_lack_a_number_are_named(
    change: Callable[[dict[str, Any]], object], expected: tuple[str, ...], tmp_path: Path
) -> None:
    line = refused(write(tmp_path / "log.json", broken(change)))
    for words in ("eval_log_forget.json", *expected):
        assert words in line


def test_the_log_of_another_split_is_refused_and_the_right_one_named(tmp_path: Path) -> None:
    of_forget01 = write(tmp_path / "forget01.json", make_log(0, forget=40))
    of_forget05 = write(tmp_path / "forget05.json", make_log(1, forget=200))
    line = refused(of_forget01, of_forget05)
    assert "forget has 40 rows" in line and ", 200 in" in line and "at most 300" in line
    assert line.endswith("use the log of retain99")
    assert refused(of_forget05, of_forget01).endswith("use the log of retain95")
    shifted = make_log(2, forget=40)
    for field, values in shifted["eval_log_forget.json"].items():
        shifted["eval_log_forget.json"][field] = {str(index + 1): value for index, value in enumerate(values)}
    assert "row 0 in one of them alone" in refused(of_forget01, write(tmp_path / "shifted.json", shifted))
