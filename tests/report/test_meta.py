"""`python -m grun meta`: how well metrics tell models that know from models that never did."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_results import TOFU_SETS, write_evaluation

from grun.cli import main
from grun.report.meta import quantization_robustness, relearning_robustness

KNOWN = {"k1": 1.0, "k2": 0.75, "k3": 0.25, "n1": 0.0, "n2": 0.25, "n3": 0.5, "u1": 0.25, "u2": 0.5}
"""Share of the forget rows that each model answers rightly: never-taught models guess some."""
AFTER = {
    "relearned": {"k1": 1.0, "k2": 1.0, "k3": 0.5, "n1": 0.25, "n2": 0.5, "n3": 0.75, "u1": 1.0, "u2": 0.75},
    "4bit": {"k1": 0.75, "k2": 0.75, "k3": 0.25, "n1": 0.0, "n2": 0.25, "n3": 0.25, "u1": 0.5, "u2": 0.25},
}
FALLING = ("forget.truth_ratio", "forget.truth_ratio_arithmetic")
"""What is lower the more a model knows."""


def write_model(folder: Path, share: float, **more: Any) -> Path:
    shares = dict.fromkeys(TOFU_SETS, 1.0) | {"unknown": 0.0, "forget": share}
    found: dict[str, Any] = {"settings": {"limit": None}, "data": {"forget": "hash"}, "key": folder.name, **more}
    write_evaluation(folder, shares, rows=12, facts=False, wrong_answers=True, **found)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name, share in KNOWN.items():
        write_model(tmp_path / name, share)
    return tmp_path


def write_damaged(models: Path) -> None:
    for damage, shares in AFTER.items():
        for name, share in shares.items():
            write_model(models / f"{name}-{damage}", share)


def command(models: Path, *more: str, knows: str = "k1 k2 k3", never: str = "n1 n2 n3") -> list[str]:
    groups = {"knows": knows, "never": never}
    named = [f"{group}=[{','.join(str(models / name) for name in names.split())}]" for group, names in groups.items()]
    return ["meta", *named, f"results_dir={models / 'table'}", *more]


def table(models: Path) -> dict[str, dict[str, str]]:
    with (models / "table" / "meta.csv").open(encoding="utf-8") as file:
        return {row["metric"]: row for row in csv.DictReader(file)}


def knowledge(folder: Path, metric: str) -> float:
    """A number of evaluation.json, turned so that more is known where it is higher."""
    found: Mapping[str, Any] = json.loads((folder / "evaluation.json").read_text())
    place, _, name = metric.partition(".")
    value = float(found["overall"][name] if place == "overall" else found["sets"][place][name])
    return 1 - value if metric in FALLING else value


def test_the_auc_is_the_share_of_pairs_that_are_the_right_way_round(models: Path) -> None:
    assert main(command(models)) == 0
    rows = table(models)
    assert {*FALLING, "forget.rouge_l", "forget.probability", "overall.mia_loss"} <= {*rows}
    for metric, row in rows.items():
        won = 0.0
        for knowing in ("k1", "k2", "k3"):
            for other in ("n1", "n2", "n3"):
                mine, theirs = (knowledge(models / name, metric) for name in (knowing, other))
                won += 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0
        assert float(row["faithfulness"]) == pytest.approx(won / 9), metric
    assert float(rows["forget.rouge_l"]["faithfulness"]) == pytest.approx(7.5 / 9)  # of KNOWN: 3 + 3 + 1.5
    order = [float(row["faithfulness"]) for row in rows.values()]
    assert order == sorted(order, reverse=True)
    assert not {"overall", "relearning", "quantization", "moved_quantized"} & {*rows["forget.rouge_l"]}


def test_only_metrics_of_what_is_to_be_forgotten_are_judged(models: Path) -> None:
    assert main(command(models)) == 0
    assert {metric.partition(".")[0] for metric in table(models)} == {"forget", "overall"}
    assert not {"forget.degenerate", "forget.perplexity", "overall.model_utility"} & {*table(models)}


def test_damage_moves_metrics_and_unlearned_models_give_both_robustnesses(models: Path) -> None:
    write_damaged(models)
    unlearned = f"unlearned=[{models / 'u1'},{models / 'u2'}]"
    assert main(command(models, unlearned)) == 0
    metric = "forget.exact_memorization"
    row = {key: float(value) for key, value in table(models)[metric].items() if key != "metric"}
    before = {name: knowledge(models / name, metric) for name in KNOWN}
    assert before == KNOWN  # all tokens of a right answer are hits, none of another one
    distance = (1 + 0.75 + 0.25) / 3 - (0 + 0.25 + 0.5) / 3
    assert row["moved_relearned"] == pytest.approx((0 + 0.25 + 0.25 + 0.25 + 0.25 + 0.25) / 6 / distance)
    assert row["moved_quantized"] == pytest.approx((0.25 + 0 + 0 + 0 + 0 + 0.25) / 6 / distance)
    assert row["faithfulness_quantized"] == pytest.approx((3 + 3 + 2) / 9)
    assert row["relearning"] == pytest.approx((0.25 / 0.75 + 1) / 2)
    assert row["quantization"] == pytest.approx((0.25 / 0.5 + 1) / 2)
    robust = 2 / (1 / row["relearning"] + 1 / row["quantization"])
    assert row["robustness"] == pytest.approx(robust)
    assert row["overall"] == pytest.approx(2 / (1 / row["faithfulness"] + 1 / robust))
    overall = [float(row["overall"]) for row in table(models).values()]
    assert overall == sorted(overall, reverse=True)


def test_robustness_is_1_where_nothing_comes_back_and_0_where_only_the_unlearned_gains() -> None:
    assert relearning_robustness([0.1, 0.3], [0.2, 0.4], [0.2, 0.2], [0.2, 0.4]) == pytest.approx((1 + 0.5) / 2)
    assert relearning_robustness([0.2], [0.1], [0.1], [0.5]) == 0
    assert quantization_robustness([0.0, 0.0, 0.3], [0.0, 0.5, 0.2]) == pytest.approx((1 + 0 + 1) / 3)


def test_the_best_metrics_are_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(models, knows="k1 k2", never="n1 n2")) == 0
    printed = capsys.readouterr().out
    assert "Believe first: ROUGE-L, forget; " in printed and "(AUC 1.000)" in printed
    text = (models / "table" / "meta.md").read_text()
    assert text.startswith("# Do the metrics tell? 2 knows, 2 never") and "| ROUGE-L, forget |" in text


@pytest.mark.parametrize(
    ("arguments", "named", "status"),
    [
        ({"never": "n1"}, "never names 1 evaluation folders, and 2 or more are needed", 2),
        ({"knows": ""}, "knows names 0 evaluation folders", 2),
        ({"never": "n1 k1"}, "are one evaluation of one model, which would count twice", 1),
        ({"never": "n1 copy"}, "are one evaluation of one model, which would count twice", 1),
        ({"never": "n1 short"}, "was evaluated on other sets, or with other answers,", 1),
        ({"never": "n1 other"}, "the forget sets differ", 1),
        ({"never": "n1 nowhere"}, "evaluation.json cannot be read", 1),
        ({"never": "n1 suite"}, "lacks sets", 1),
        ({"never": "n1 lost"}, "-4bit is not; evaluate all of never when quantized, or none", 1),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: dict[str, str], named: str, status: int, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(models / "copy", 0.0, key="n1")
    write_model(models / "short", 0.0, settings={"limit": 5})
    write_model(models / "other", 0.0, data={"forget": "another"})
    if "lost" in arguments.get("never", ""):
        write_model(models / "n1-4bit", 0.0)
        write_model(models / "lost", 0.0)
    (models / "suite").mkdir()
    (models / "suite" / "evaluation.json").write_text('{"suite": "attacks", "settings": {}, "attacks": {}}')
    assert main(command(models, **arguments)) == status
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (models / "table").exists()
