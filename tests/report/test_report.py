"""The report: summary, table, verdicts, examples and pictures, from a made-up results folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_results import KNOWN, write_demo, write_evaluation, write_run, write_tofu
from scipy.stats import ks_2samp

from grun.config.options import ReportConfig
from grun.errors import RunError
from grun.evaluation.metrics import truth_ratios
from grun.report import distributions, figures, make
from grun.report.answers import ANSWER_SUITE
from grun.report.make import make_report
from grun.report.result import Result
from grun.report.results import find_results
from grun.report.verdict import judge
from grun.runtime.files import read_json, taken, write_bytes, write_json


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DPI", 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_demo(folder / "demo")
    write_tofu(folder / "tofu")
    return folder


def verdict(result: Result, results: list[Result]) -> str:
    return judge(result, results).sentence


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "demo", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def tofu(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "tofu", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make.REPORTS, "answers", replace(ANSWER_SUITE, pictures=()))


def test_a_run_that_lost_heldout_knowledge_is_said_to(results: Path) -> None:
    found = find_results(results)
    gd = found[2]
    gd.evaluation["sets"]["heldout"]["fact_recall"] = 0.85
    assert "NOT reached (keeps less than 90% on held-out)" in verdict(gd, found)
    assert "85% of before on held-out" in verdict(gd, found)


def test_pictures_are_drawn_from_what_is_there_and_old_ones_go(results: Path) -> None:
    with taken(results):
        for name in ("truth_ratios.png", "left_and_kept.png"):
            write_bytes(results / name, b"of an older report")
    for name in ("idk", "npo"):
        shutil.rmtree(results / name)
        shutil.rmtree(results / "evaluation" / name)
    make_report(ReportConfig(results_dir=str(results)))
    drawn = {"sets.png", "gate_histograms.png", "training_curves.png"}
    assert {path.name for path in results.glob("*.png")} == drawn
    for name in drawn:
        assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_looks_while_training_are_drawn_for_the_runs_that_have_them(results: Path) -> None:
    assert distributions.monitor_curves(find_results(results)) is None
    looks = [{"step": s, "sets": {"forget": {"fact_recall": 1 - s / 9}, "retain": {"fact_recall": 1}}} for s in (3, 6)]
    (results / "idk" / "monitor.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    figure = distributions.monitor_curves(find_results(results))
    assert figure is not None
    (panel,) = [axes for axes in figure.axes if axes.get_visible()]
    assert panel.get_title() == "IDK" and panel.get_ylabel() == "fact recall"
    forget, retain = panel.lines
    assert list(forget.get_ydata()) == pytest.approx([2 / 3, 1 / 3]) and list(retain.get_ydata()) == [1, 1]


def test_the_marked_distance_is_the_one_that_the_test_judges(tofu: Path) -> None:
    found = find_results(tofu)
    curves = distributions.truth_ratio_curves(found)
    assert curves is not None
    assert [axes.get_title() for axes in curves.axes if axes.get_visible()] == ["before", "GD GRUN", "NPO full"]
    target, gd = found[1], found[2]
    samples = [sorted(truth_ratios(result.table, "forget").values()) for result in (gd, target)]
    expected = ks_2samp(*samples)
    _, share, goal = distributions.largest_distance(*samples)
    assert abs(share - goal) == pytest.approx(expected.statistic, abs=1e-12)
    assert gd.reference["forget_quality"] == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.usefixtures("no_pictures")
def test_two_runs_of_one_objective_go_by_their_names(results: Path) -> None:
    write_evaluation(results / "evaluation" / "gd_rank8", KNOWN["gd"], gated=True)
    write_run(results / "gd_rank8", "gd")
    assert [result.label for result in find_results(results)][2:4] == ["gd", "gd_rank8"]
    assert {"gd", "gd_rank8", "idk", "npo"} == set(ANSWER_SUITE.summary(find_results(results), "demo")["gate"])


def test_an_evaluation_without_a_run_stands_by_its_own_name(results: Path) -> None:
    write_evaluation(results / "evaluation" / "other", KNOWN["gd"])
    (other,) = [result for result in find_results(results) if result.name == "other"]
    assert (other.label, other.objective, other.run) == ("other", None, None)


def test_an_adapter_that_was_trained_again_is_noticed(results: Path) -> None:
    from grun.loading.hashing import adapter_hash

    run = results / "gd"
    (run / "adapter_config.json").write_text("{}")
    (run / "adapter_model.safetensors").write_bytes(b"first")
    path = results / "evaluation" / "gd" / "evaluation.json"
    change(path, adapter="gd", identity={"base": None, "adapter": adapter_hash(run)})
    find_results(results)
    (run / "adapter_model.safetensors").write_bytes(b"second")
    with pytest.raises(RunError, match="an earlier adapter than .*gd holds now.*overwrite=true"):
        find_results(results)


def test_quantized_evaluations_are_rows_of_their_own(results: Path) -> None:
    for name, base in (("before-8bit", "q1"), ("gd-8bit", "q1")):
        folder = results / "evaluation" / name
        write_evaluation(folder, KNOWN["gd"])
        adapter = None if name.startswith("before") else "gd"
        change(folder / "evaluation.json", adapter=adapter, identity={"base": base, "quantization": "8bit"})
    found = {result.name: result for result in find_results(results)}
    assert found["gd-8bit"].run == results / "gd" and found["gd-8bit"].label == "GD 8bit"
    assert (found["before-8bit"].stage, found["before-8bit"].label) == ("before", "before 8bit")
    assert list(found)[:2] == ["before", "before-8bit"]  # the first is what all others are compared with
    assert "keeps 100% of before on retain" in verdict(found["gd"], list(found.values()))
    change(results / "evaluation" / "gd-8bit" / "evaluation.json", identity={"base": "q2", "quantization": "8bit"})
    with pytest.raises(RunError, match="another base model"):
        find_results(results)


@pytest.mark.parametrize(
    ("broken", "content"),
    [
        ("evaluation/before/evaluation.json", None),
        ("evaluation/gd/evaluation.json", "{"),
        ("evaluation/gd/evaluation.json", "[]"),
        ("gd/run.json", "{}"),
        ("evaluation/gd/gates.jsonl", None),
        ("evaluation/before/generations.jsonl", None),
        ("gd/log.jsonl", '{"step": 1}\n{"st'),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(
    results: Path, broken: str, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tuple(picture for picture in ANSWER_SUITE.pictures if picture.name == "training_curves.png")
    monkeypatch.setitem(make.REPORTS, "answers", replace(ANSWER_SUITE, pictures=training))
    path = results / broken
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(RunError) as error:
        make_report(ReportConfig(results_dir=str(results)))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_seconds_of_teaching_come_from_the_models_own_folder(results: Path, tmp_path: Path) -> None:
    path = results / "evaluation" / "before" / "evaluation.json"
    write_json(tmp_path / "models" / "taught" / "run.json", {"seconds": 100.5})
    write_json(path, {**json.loads(path.read_text()), "model": str(tmp_path / "models" / "taught")})
    assert ANSWER_SUITE.summary(find_results(results), "demo")["seconds"]["finetune/before"] == 100.5


# -- results of another model, or of other rows -----------------------------------------------------------------------


def change(path: Path, **values: object) -> None:
    write_json(path, {**read_json(path), **values})


@pytest.mark.parametrize(
    ("path", "values", "named"),
    [
        (
            "evaluation/gd/evaluation.json",
            {"identity": {"base": "b9"}},
            r"evaluation/gd was evaluated on another base model \(b9\) than .*\(b1\)",
        ),
        (
            "npo_full/run.json",
            {"base_fingerprint": "b9"},
            r"npo_full was trained from another base model \(b9\)",
        ),
        (
            "evaluation/gd/evaluation.json",
            {"adapter": None},
            "gd was evaluated without the adapter .*gd; evaluate it again",
        ),
        (
            "evaluation/gd/evaluation.json",
            {"data": {"forget": "hash of forget10"}},
            "forget sets differ.*evaluation/gd",
        ),
    ],
)
def test_what_is_of_another_model_or_of_other_rows_is_refused(
    tofu: Path, path: str, values: dict[str, object], named: str
) -> None:
    assert [result.base for result in find_results(tofu)] == ["b1", "b2", "b1", "b3"]  # a plain run has its own weights
    write_json(tofu / "gd" / "adapter_config.json", {})
    change(tofu / path, **values)
    with pytest.raises(RunError, match=named) as error:
        find_results(tofu)
    assert "\n" not in str(error.value)


# -- comparison -------------------------------------------------------------------------------------------------------


def copied(made: Path, folder: Path) -> Path:
    """TOFU's results at `folder`, whose runs are others than those made first."""
    shutil.copytree(made / "tofu", folder)
    for name in ("gd", "npo_full"):
        change(folder / "evaluation" / name / "evaluation.json", key=f"{folder.name} {name}")
    return folder


def test_a_comparison_of_other_corpora_is_refused_and_says_which(made: Path, tmp_path: Path) -> None:
    runs = [str(copied(made, tmp_path / name)) for name in ("a", "b")]
    for path in (tmp_path / "b").glob("evaluation/*/evaluation.json"):
        change(path, data={"forget": "other rows"})
    with pytest.raises(RunError, match=r"forget sets differ.*\(a: 12 rows, .*; b: 12 rows, ") as error:
        make_report(ReportConfig(results_dir=str(tmp_path / "out"), runs=runs))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_single_evaluations_can_be_compared(made: Path, tmp_path: Path) -> None:
    evaluation = copied(made, tmp_path / "a") / "evaluation"
    runs = [str(evaluation / "before"), str(evaluation / "gd"), str(copied(made, tmp_path / "b"))]
    change(evaluation / "before" / "evaluation.json", key="another")
    summary = make_report(ReportConfig(results_dir=str(tmp_path / "out"), runs=runs))
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["before", "b/before", "b/retain_only", "gd", "b/gd", "b/npo_full"]
    assert (rows["gd"]["objective"], rows["gd"]["stage"]) == ("gd", "after")
    assert "forget_quality" in rows["gd"]["reference"]  # against the only retain-only model there is


@pytest.mark.parametrize(("runs", "named"), [(["nowhere"], "nowhere"), (["{}", "{}"], "twice")])
def test_what_cannot_be_compared_is_said(tofu: Path, runs: list[str], named: str) -> None:
    with pytest.raises(RunError, match=named):
        make_report(ReportConfig(results_dir=str(tofu / "out"), runs=[run.format(tofu) for run in runs]))


def test_where_a_report_goes_if_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=str(Path("results/mine/evaluation/before"))):
        make_report(ReportConfig(profile="mine.yaml"))
