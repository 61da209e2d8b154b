"""Sweeps: what is refused, which cells there are and with which options, going on, failing, launchers, and tuning."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import demo
import pytest
import yaml
from forked import PATIENCE, Fork, killed

from grun.cli import main
from grun.config.definitions import packaged_names
from grun.config.options import SweepConfig
from grun.errors import ConfigError
from grun.experiments import running
from grun.experiments.job import Job
from grun.experiments.models import base_identity
from grun.experiments.sweep.cells import Cell, make_cell
from grun.experiments.sweep.definition import read_sweep
from grun.experiments.sweep.plan import make_plan
from grun.experiments.sweep.tuning import Tried, choose
from grun.loading.resolve import resolve
from grun.report.results import find_results

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cells run as forks, launchers for real; default folders are relative."""
    real = running.start
    monkeypatch.setattr(
        running, "start", lambda job, launcher, jobs: real(job, launcher, jobs) if launcher else fork_of(job)
    )
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="grun")


def fork_of(job: Job) -> Fork:
    return Fork(lambda: main(["sweep", f"cell={job.file}"]), job.sibling("log"))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that a report was asked for; drawing takes seconds."""
    asked: list[Any] = []
    monkeypatch.setattr("grun.report.make.make_report", asked.append)
    return asked


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the taught and the retain-only model."""
    folder = tmp_path_factory.mktemp("models")
    assert demo.finetune(folder / "taught") == 0
    assert demo.finetune(folder / "retain", "data.subset=without_forget", "train.epochs=1") == 0
    return [f"model={folder / 'taught'}", f"retain_model={folder / 'retain'}"]


SIZES = {"forget": 2, "heldout": 2, "unknown": 2, "refused": 2, "retain": 4, "questions": 5, "seed": 0}
UNLEARN = {
    "data": {"demo": SIZES, "validation": 4},
    "method": {"blocks": [1, 2, 3], "gate": "linear"},
    "train": {"epochs": 1, "batch_size": 5, "lr": 0.01, "save_steps": 1},
    "cache": {"dir": None},
}
"""2 steps on 10 forget and 16 retain rows."""
EVALUATE = {"max_new_tokens": 4, "data": {"limit": 4}}
AXES = {"objective": ["gd"], "method.parametrization": ["full", "grun"], "seed": [42]}


def definition(folder: Path, **changes: Any) -> str:
    """A sweep's file as an argument; `changes` replace its sections."""
    content = {"profile": "demo", "axes": AXES, "unlearn": UNLEARN, "evaluate": EVALUATE, **changes}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return f"sweep={path}"


def plan_of(*arguments: str) -> Any:
    return make_plan(resolve("sweep", list(arguments)))


def outcome(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / "cells" / f"{name}.outcome.json").read_text())
    return found


def states(results: Path) -> dict[str, str]:
    return {
        path.name.removesuffix(".outcome.json"): json.loads(path.read_text())["state"]
        for path in (results / "cells").glob("*.outcome.json")
    }


# -- the cells --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seeds"), [("demo", 3), ("tofu_small", 1), ("llama3.1", 1), ("mistral", 1)])
def test_every_packaged_sweep_can_be_planned_and_has_a_grid(name: str, seeds: int) -> None:
    assert name in packaged_names("sweep")
    cells = plan_of(f"sweep={name}").cells
    assert len(cells) == 3 * 4 * seeds
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.unlearn.profile for cell in cells} == {name}
    grid, parametrizations = read_sweep(name).grid, read_sweep(name).axes["method.parametrization"]
    assert list(grid) == ["train.lr", "loss.retain_weight"] and list(grid["train.lr"]) == parametrizations


def test_the_demos_sweep_sets_a_validation_set_aside_and_tries_settings_with_one_seed() -> None:
    narrowed = ["sweep=demo", "objectives=[gd]", "parametrizations=[full,grun]"]
    plan = plan_of(*narrowed)
    assert [cell.name for cell in plan.cells if "grun" in cell.name] == [f"gd-grun-s{seed}" for seed in (42, 43, 44)]
    assert plan.evaluate.data.validation == plan.base.data.validation == 48
    tried = plan_of(*narrowed, "tune=true").cells
    assert len(tried) == 2 * 4 * 2 and {cell.unlearn.seed for cell in tried} == {42}
    assert SweepConfig().sweep in packaged_names("sweep")


def test_later_layers_win(tmp_path: Path) -> None:
    """Profile, the sweep's unlearn, tuned, the command line, axes."""
    profile = tmp_path / "profile.yaml"
    options = {"lr": 0.1, "epochs": 2, "batch_size": 2, "weight_decay": 0.5, "warmup": 1}
    narrower = {"parametrizations": {"full": {"train": {"warmup": 3}}}}
    profile.write_text(yaml.safe_dump({"base": "demo", "unlearn": {"train": options, **narrower}}))
    sweep = definition(
        tmp_path,
        profile=str(profile),
        axes={**AXES, "train.lr": [0.5]},
        unlearn={"train": {"epochs": 3, "batch_size": 3, "weight_decay": 0.3, "lr": 0.3}},
        tuned={"gd": {"full": {"train.batch_size": 4, "train.weight_decay": 0.4, "train.lr": 0.4}}},
    )
    full, grun = plan_of(sweep, "unlearn=[train.weight_decay=0.45]").cells
    assert full.name == "gd-full-s42-lr0.5"
    train = full.unlearn.train
    assert (train.lr, train.weight_decay, train.batch_size, train.epochs, train.warmup) == (0.5, 0.45, 4, 3, 3)
    train = grun.unlearn.train
    assert (train.batch_size, train.warmup) == (3, 1)  # what is tuned for full stays there


def test_designs_are_cells_of_grun_alone(tmp_path: Path) -> None:
    cells = plan_of(definition(tmp_path, axes={**AXES, "design": ["published", "robust"]})).cells
    assert [cell.name for cell in cells] == [
        "gd-full-s42-designpublished",
        "gd-grun-s42-designpublished",
        "gd-grun-s42-designrobust",
    ]
    assert [cell.unlearn.method.edit_write for cell in cells] == ["last_prompt", "last_prompt", "every_token"]


def test_another_action_than_an_edit_is_no_cell_of_each_edit() -> None:
    """And of CAST the gate reads a middle block, whatever is done where it is open."""
    cells = plan_of("sweep=smollm2_gates").cells
    assert len(cells) == 4 * 3 and len({cell.name for cell in cells}) == 12
    for cell in cells:
        method = cell.unlearn.method
        assert method.action == "edit" or method.edit == "loreft"
        assert method.gate_blocks == [0.4 if method.gate == "condition" else 0]
        assert (method.edit == "steer") == (method.blocks == [0.67]) == (method.steer_strength == 1.4)
    assert {cell.unlearn.method.edit for cell in cells} == {"loreft", "steer"}


def test_the_attack_demo_holds_both_designs_and_evaluates_under_attack() -> None:
    plan = plan_of("sweep=attack_demo", "seeds=[42]")
    assert len(plan.cells) == 3 * (4 + 1)
    assert (plan.evaluate.suite, plan.finetune.data.augment.teach) == ("attacks", True)
    robust = [cell.unlearn for cell in plan.cells if cell.unlearn.design == "robust"]
    assert {(tuple(config.method.blocks), config.train.lr) for config in robust} == {((6, 7), 5e-3)}


def test_a_sweep_may_evaluate_another_suite(models: list[str], tmp_path: Path, no_report: list[Any]) -> None:
    evaluate = {"suite": "attacks", "attacks": ["plain", "suffix"], "attack_rows": 2, "max_new_tokens": 4}
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["full"]}, evaluate=evaluate)
    assert main(["sweep", sweep, *models, "results_dir=r"]) == 0
    assert set(states(tmp_path / "r").values()) == {"done"} and len(no_report) == 1
    for name in ("before", "retain_only", "gd-full-s42"):
        found = json.loads((tmp_path / "r" / "evaluation" / name / "evaluation.json").read_text())
        assert set(found["attacks"]) == {"plain", "suffix"}


def test_what_trains_nothing_is_a_cell_without_weights_that_is_found_again(
    models: list[str], tmp_path: Path, no_report: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    axes = {"objective": ["gd", "npo"], "method.parametrization": ["output_filter"], "seed": [42, 43]}
    arguments = [
        definition(tmp_path, axes=axes),
        models[0],
        f"results_dir={tmp_path / 'results'}",
        "discard_models=true",
    ]
    assert main(["sweep", *arguments]) == 0
    name = "gd-output_filter-s42"
    assert states(tmp_path / "results") == {"before": "done", name: "done"}
    evaluated = json.loads((tmp_path / "results" / "evaluation" / name / "evaluation.json").read_text())
    assert evaluated["adapter"] == str(tmp_path / "results" / name) and evaluated["identity"]["adapter"]
    caplog.clear()
    assert main(["sweep", *arguments]) == 0
    assert "2 done, 0 failed" in caplog.text and "start" not in caplog.text


def test_axes_can_be_narrowed_and_replaced(tmp_path: Path) -> None:
    cells = plan_of(definition(tmp_path), "objectives=[idk,npo]", "parametrizations=[reft]", "seeds=[1,2]").cells
    assert [cell.name for cell in cells] == ["idk-reft-s1", "idk-reft-s2", "npo-reft-s1", "npo-reft-s2"]
    assert [(cell.unlearn.objective, cell.unlearn.seed) for cell in cells] == [
        *(("idk", 1), ("idk", 2), ("npo", 1), ("npo", 2))
    ]


def test_further_axes_stand_in_names_that_are_safe_and_have_settings_of_their_own(tmp_path: Path) -> None:
    axes = {**AXES, "method.parametrization": ["grun"], "data.retain_pool": [8, 12], "method.blocks": [[1, 2]]}
    sweep = definition(tmp_path, axes=axes, tuned={"gd": {"grun": {"retain_pool8-blocks_1__2_": {"train.lr": 0.7}}}})
    small, large = plan_of(sweep).cells
    assert small.name == "gd-grun-s42-retain_pool8-blocks_1__2_"
    assert (small.unlearn.data.retain_pool, small.unlearn.method.blocks) == (8, [1, 2])
    assert (small.unlearn.train.lr, large.unlearn.train.lr) == (0.7, 0.01)


def test_cells_evaluations_and_teaching_see_one_corpus(tmp_path: Path) -> None:
    """Whatever section of the profile, the sweep or the command line says which rows there are."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"base": "demo", "unlearn": {"data": {"validation": 7}}}))
    sweep = definition(tmp_path, profile=str(profile), unlearn={"data": {"demo": {"heldout": 5}}})
    plan = plan_of(sweep, "unlearn=[data.demo.seed=9]")
    for config in (plan.cells[0].unlearn, plan.evaluate, plan.finetune):
        assert (config.data.validation, config.data.demo.heldout, config.data.demo.seed) == (7, 5, 9)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "mine.yaml: unknown section 'axis': did you mean 'axes'?"),
        ({"axes": {"objectiv": ["gd"]}}, "axes: unknown option 'objectiv': did you mean 'objective'?"),
        ({"axes": {"seed": 42}}, "axes: seed must list one value or more, not 42"),
        ({"axes": {"seed": [42, 42]}}, "axes: seed names 42 twice"),
        ({"axes": {"seed": ["a"]}}, "seed=a must be a whole number"),
        ({"axes": {"data.forget": ["a", "b"]}}, "data.forget cannot differ between cells"),
        ({"axes": {"objective": ["gdd"]}}, "unknown objective 'gdd': did you mean 'gd'?"),
        ({"axes": {"method.parametrization": ["grunn"]}}, "unknown parametrization 'grunn': did you mean 'grun'?"),
        ({"axes": {"train.lr": ["fast"]}}, "cell .*-lrfast: train.lr: Value 'fast'"),
        ({"axes": {"train.lr": [-1]}}, "cell .*: train.lr=-1.0 must be greater than 0"),
        ({"unlearn": {"train": {"lrr": 1}}}, "unlearn: unknown option 'train.lrr': did you mean 'train.lr'?"),
        ({"unlearn": [1]}, "unlearn must map names to values"),
        ({"unlearn": {"model": {"path": "x"}}}, "unlearn: model.path is set by the sweep"),
        ({"evaluate": {"max_tokens": 1}}, "evaluate: unknown option 'max_tokens': did you mean 'max_new_tokens'?"),
        ({"evaluate": {"adapter": "x"}}, "evaluate: adapter is set by the sweep"),
        ({"evaluate": {"sets": ["validation"]}}, "evaluate.sets names validation"),
        ({"tune": {"gird": {}}}, "tune: unknown key 'gird': did you mean 'grid'?"),
        ({"tune": {"seed": [1]}}, r"tune.seed=\[1\] must be one number"),
        ({"tune": {"grid": {"train.lrr": [1]}}}, "tune.grid: unknown option 'train.lrr': did you mean 'train.lr'?"),
        ({"tune": {"grid": {"train.lr": {"fulll": [1]}}}}, "tune.grid.train.lr: unknown parametrization 'fulll'"),
        ({"tune": {"grid": {"train.lr": {"full": 1}}}}, "tune.grid: train.lr must list one value or more"),
        ({"tune": {"grid": {"seed": [1]}}}, "tune.grid: seed is an axis"),
        ({"tuned": {"gdd": {}}}, "tuned: unknown objective 'gdd': did you mean 'gd'?"),
        ({"tuned": {"gd": {"fulll": {}}}}, "tuned.gd: unknown parametrization 'fulll': did you mean 'full'?"),
        ({"tuned": {"gd": {"full": {"train.lrr": 1}}}}, "tuned.gd.full: unknown option 'train.lrr'"),
        ({"profile": "dmo"}, "unknown profile 'dmo'"),
    ],
)
def test_a_wrong_sweep_is_one_line_that_says_where(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plan_of(definition(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=dem"], "unknown sweep 'dem': did you mean 'demo'?"),
        (["sweep=nowhere.yaml"], "sweep file nowhere.yaml does not exist"),
        (["unlearn=[train.lrr=1]"], "unknown option 'train.lrr'"),
        (["unlearn=[seed=1]"], "seeds="),
        (["unlearn=[method.parametrization=full]"], "parametrizations="),
        (["unlearn=[output_dir=x]"], "output_dir is set by the sweep"),
        (["evaluate=[batch_sise=1]"], "unknown option 'batch_sise'"),
        (["evaluate=[reference=x]"], "reference is set by the sweep"),
        (["objectives=[gd,gd]"], "named twice"),
        (["launcher=sbatch"], "has no {command}"),
        (["launcher=sh -c '{command}'", "results_dir=my results"], "results_dir (my results)"),
        (["launcher=sh -c '{command}'", "results_dir=it's"], "results_dir (it's)"),
        (["--tune"], "no tune.grid"),
        (["--tuen"], "unknown flag --tuen"),
        (["model=./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_wrong_use_is_one_line_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: Captured
) -> None:
    given = arguments if arguments[0].startswith("sweep=") else [definition(tmp_path), *arguments]
    model = [] if arguments[0].startswith("model") else ["model=tiny"]
    assert main(["sweep", *given, *model]) == (1 if arguments[0].startswith("model") else 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert [path.name for path in tmp_path.iterdir() if path.name != "mine.yaml"] == []


def test_options_show_wrong_without_running(tmp_path: Path, capsys: Captured) -> None:
    assert main(["sweep", definition(tmp_path), "unlearn=[train.lrr=1]", "--print-config"]) == 2
    assert main(["sweep", definition(tmp_path), "--print-config"]) == 0
    assert "max_new_tokens" not in capsys.readouterr().out


# -- running ----------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_reports_and_is_found_again(
    models: list[str], tmp_path: Path, capsys: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    results = tmp_path / "r"
    command = ["sweep", definition(tmp_path), *models, "results_dir=r", "jobs=2"]
    assert main(command) == 0
    assert "5 of 5 done" not in caplog.text and "3 of 3 done" in caplog.text
    found = {result.name: result for result in find_results(results)}
    assert list(found) == ["before", "retain_only", "gd-full-s42", "gd-grun-s42"]
    assert [found[name].parametrization for name in ("gd-full-s42", "gd-grun-s42")] == ["full", "grun"]
    for result in found.values():
        assert "validation" not in result.evaluation["sets"] and "heldout" in result.evaluation["sets"]
    # A whole model is evaluated by itself, an adapter on the taught model; both against the retain-only one.
    full, grun = (found[name].evaluation for name in ("gd-full-s42", "gd-grun-s42"))
    assert (Path(full["model"]).name, full["adapter"]) == ("gd-full-s42", None)
    assert (grun["model"], Path(grun["adapter"]).name) == (models[0].removeprefix("model="), "gd-grun-s42")
    reference = found["retain_only"].evaluation["key"]
    assert {full["reference_key"], grun["reference_key"]} == {reference}
    assert (results / "summary.json").is_file() and "r/report.html" in capsys.readouterr().out
    cell = json.loads((results / "cells" / "gd-full-s42.json").read_text())
    assert cell["unlearn"]["train"]["lr"] == 0.01 and cell["evaluate"]["max_new_tokens"] == 4
    expected = {"hash": cell["hash"], "run_hash": cell["run_hash"], "state": "done", "error": None, "owned": True}
    assert expected.items() <= outcome(results, "gd-full-s42").items()

    def made() -> dict[str, int]:
        kept = ("run.json", ".outcome.json", "evaluation.json")
        return {str(path): path.stat().st_mtime_ns for path in results.rglob("*.json") if path.name.endswith(kept)}

    first = made()
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grun.report.make.make_report", asked.append)
        assert main([*command, "discard_models=true"]) == 0
    assert made() == first and len(asked) == 1
    assert not (results / "gd-full-s42" / "model.safetensors").exists()
    assert (results / "gd-grun-s42" / "adapter_model.safetensors").is_file()


def test_what_changed_runs_again_and_the_rest_does_not(models: list[str], tmp_path: Path, no_report: list[Any]) -> None:
    results = tmp_path / "r"
    axes = {**AXES, "method.parametrization": ["grun", "reft"]}
    common = [models[0], "results_dir=r"]
    assert main(["sweep", definition(tmp_path, axes=axes), *common]) == 0
    before = {name: outcome(results, name) for name in ("gd-grun-s42", "gd-reft-s42", "before")}
    run = (results / "gd-reft-s42" / "run.json").stat().st_mtime_ns
    changed = definition(tmp_path, axes=axes, tuned={"gd": {"grun": {"train.lr": 0.02}}})
    assert main(["sweep", changed, *common]) == 0
    assert outcome(results, "gd-reft-s42") == before["gd-reft-s42"]
    assert outcome(results, "before") == before["before"]
    assert outcome(results, "gd-grun-s42")["hash"] != before["gd-grun-s42"]["hash"]
    assert json.loads((results / "gd-grun-s42" / "run.json").read_text())["config"]["train"]["lr"] == 0.02
    # Where only the evaluation changed, nothing is trained again.
    assert main(["sweep", changed, *common, "evaluate=[max_new_tokens=5]"]) == 0
    assert (results / "gd-reft-s42" / "run.json").stat().st_mtime_ns == run
    assert outcome(results, "gd-reft-s42")["hash"] != before["gd-reft-s42"]["hash"]
    settings = json.loads((results / "evaluation" / "gd-reft-s42" / "evaluation.json").read_text())["settings"]
    assert settings["max_new_tokens"] == 5
    assert [config.results_dir for config in no_report] == ["r"] * 3


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(
    models: list[str], tmp_path: Path, no_report: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    results = tmp_path / "r"
    axes = {**AXES, "method.parametrization": ["grun"], "method.blocks": [[9], [1]]}
    command = ["sweep", definition(tmp_path, axes=axes), models[0], "results_dir=r"]
    assert main(command) == 1
    assert states(results) == {"before": "done", "gd-grun-s42-blocks_9_": "failed", "gd-grun-s42-blocks_1_": "done"}
    error = outcome(results, "gd-grun-s42-blocks_9_")["error"]
    assert "blocks [9]" in error and "4 blocks" in error
    assert f"failed: gd-grun-s42-blocks_9_: {error}" in caplog.text
    assert "2 done, 1 failed, 0 handed over" in caplog.text
    assert len(no_report) == 1  # of what there is
    caplog.clear()
    assert main(command) == 1
    assert "gd-grun-s42-blocks_9_ had failed" in caplog.text and "2 of 3 done before" in caplog.text


def test_what_lies_in_a_cells_folder_from_others_is_never_touched(
    models: list[str], tmp_path: Path, no_report: list[Any]
) -> None:
    foreign = tmp_path / "r" / "gd-grun-s42" / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["grun"]})
    for lr in (0.1, 0.2):  # other options, after it has failed
        assert main(["sweep", sweep, models[0], "results_dir=r", f"unlearn=[train.lr={lr}]"]) == 1
        assert "is not empty and holds no run" in outcome(tmp_path / "r", "gd-grun-s42")["error"]
    assert foreign.read_text() == "precious"


def test_damaged_state_is_said_and_done_again(
    models: list[str], tmp_path: Path, no_report: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of a cell that had kept its weights, and of one whose weights were removed, which is trained again."""
    results, name = tmp_path / "r", "gd-full-s42"
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["full"]})
    evaluation = results / "evaluation" / name / "evaluation.json"
    command = ["sweep", sweep, models[0], "results_dir=r"]
    assert main(command) == 0
    metrics = json.loads(evaluation.read_text())["sets"]
    damages: list[tuple[str, Path, bytes | None]] = [
        ("evaluation", evaluation, b"\xff\0"),
        ("", results / "cells" / f"{name}.json", b"[]"),
        ("", results / "cells" / f"{name}.handed_over.json", b"5"),
        ("evaluation", evaluation, None),
        ("outcome.json is damaged", results / "cells" / f"{name}.outcome.json", b"5"),
        ("outcome.json is damaged", results / "cells" / f"{name}.outcome.json", b'{"state": "done"}'),
    ]
    for said, path, data in damages:
        if data is None:
            assert main([*command, "discard_models=true"]) == 0
            assert not (results / name / "model.safetensors").exists()
            shutil.rmtree(path.parent)
        else:
            path.write_bytes(data)
        caplog.clear()
        assert main(command) == 0, path
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(lines) == (1 if said else 0) and said in "".join(lines)
        assert states(results) == {"before": "done", name: "done"}
        assert json.loads(evaluation.read_text())["sets"] == metrics


def test_after_a_kill_the_same_command_goes_on(models: list[str], tmp_path: Path, no_report: list[Any]) -> None:
    results = tmp_path / "r"
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["reft", "grun"]})
    command = ["sweep", sweep, models[0], "results_dir=r", "unlearn=[train.epochs=10]"]
    killed(lambda: main(command), lambda: any(results.glob("gd-grun-s42/checkpoints/checkpoint-*")))
    assert states(results) == {"before": "done", "gd-reft-s42": "done", "gd-grun-s42": "started"}
    first = outcome(results, "gd-reft-s42")
    assert main(command) == 0
    assert set(states(results).values()) == {"done"}
    assert outcome(results, "gd-reft-s42") == first
    assert json.loads((results / "gd-grun-s42" / "run.json").read_text())["resumed_from"] > 0
    assert len(no_report) == 1


def test_a_process_that_dies_is_a_failed_cell(models: list[str], tmp_path: Path, no_report: list[Any]) -> None:
    """Out of memory, say: it cannot write what became of it."""
    results = tmp_path / "r"

    def start(job: Job, *_: Any) -> Fork:
        fork = fork_of(job)
        while "started" not in states(results).values() and fork.poll() is None:
            time.sleep(0.001)
        os.kill(fork.pid, signal.SIGKILL)
        return fork

    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["grun"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "start", start)
        assert main(["sweep", sweep, models[0], "results_dir=r"]) == 1
    assert states(results) == {"before": "failed", "gd-grun-s42": "failed"}
    assert "signal 9" in outcome(results, "before")["error"] and "before.log" in outcome(results, "before")["error"]
    assert no_report == []


def test_models_that_are_not_given_are_taught(tmp_path: Path, no_report: list[Any]) -> None:
    tiny = {"path": "tiny", "tiny": {"hidden_size": 32, "blocks": 4, "intermediate_size": 64, "vocabulary": 600}}
    finetune = {"model": tiny, "train": {"epochs": 1, "save_steps": 0}}
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"base": "demo", "finetune": finetune}))
    axes = {**AXES, "method.parametrization": ["grun"]}
    assert main(["sweep", definition(tmp_path, profile=str(profile), axes=axes), "results_dir=r"]) == 0
    taught = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "models").iterdir())
    assert taught == ["profile-all", "profile-without_forget"]
    assert states(tmp_path / "r") == dict.fromkeys(["before", "retain_only", "gd-grun-s42"], "done")


# -- processes and launchers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [(None, max(1, running.processors() // 2)), ("7", 7)])
def test_jobs_share_the_processors_unless_told_otherwise(
    given: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real start
    monkeypatch.setattr(
        running, "job_command", lambda job: [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    )
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    job = Cell(tmp_path / "cells" / "one.json", "one", None, {}, {}, "nothing")
    job.file.parent.mkdir()
    process = running.start(job, None, 2)
    assert process is not None and process.wait() == 0
    assert job.sibling("log").read_text() == f"{expected}\n"


def test_a_launcher_that_returns_at_once_is_not_asked_twice(
    models: list[str], tmp_path: Path, no_report: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A queue: here a file of commands, which the test carries out."""
    results, queue = tmp_path / "r", tmp_path / "queue"
    submit = tmp_path / "submit.sh"
    submit.write_text(f'echo "$2" >>{queue}\n')
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["grun"]})
    command = ["sweep", sweep, models[0], "results_dir=r", f"launcher=sh {submit} --wrap '{{command}}'"]
    assert main(command) == 0
    assert "0 done, 0 failed, 2 handed over" in caplog.text and "resubmit=true" in caplog.text
    assert main(command) == 0
    assert main(command[:-1]) == 0  # nor carried out here
    jobs = queue.read_text().splitlines()
    assert jobs == [f"{sys.executable} -m grun sweep cell=r/cells/{name}.json" for name in ("before", "gd-grun-s42")]
    assert main(jobs[0].split()[3:]) == 0
    caplog.clear()
    assert main(command) == 0
    assert "1 done, 0 failed, 1 handed over" in caplog.text
    assert no_report == []
    assert main([*command, "resubmit=true"]) == 0
    assert queue.read_text().splitlines() == [*jobs, jobs[1]]
    for job in (jobs[1], jobs[1]):  # the second finds it done
        assert main(job.split()[3:]) == 0
    assert main(command) == 0
    assert set(states(results).values()) == {"done"} and len(no_report) == 1


def test_a_launcher_that_waits_collects_what_came_of_the_cells(
    models: list[str], tmp_path: Path, no_report: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as srun; the command comes through its single quotes as it is. Only one cell, since it is a real process."""
    monkeypatch.setenv("PYTHONPATH", str(Path(running.__file__).parents[2]))
    results = tmp_path / "r"
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["grun"], "method.blocks": [[9]]})
    assert main(["sweep", sweep, models[0], "results_dir=r"]) == 1  # before is there now
    assert main(["sweep", sweep, models[0], "results_dir=r", "launcher=sh -c '{command}'"]) == 1
    assert states(results) == {"before": "done", "gd-grun-s42-blocks_9_": "failed"}
    log = (results / "cells" / "gd-grun-s42-blocks_9_.log").read_text()
    assert log.count("error: ") == 1 and "Traceback" not in log  # the fork before wrote to this process's stderr
    assert main(["sweep", sweep, models[0], "results_dir=r", "launcher=exit 3 # {command}"]) == 1
    assert "the launcher ended with status 3" in outcome(results, "gd-grun-s42-blocks_9_")["error"]


def test_submitit_takes_jobs_and_they_write_what_came_of_them(
    models: list[str], tmp_path: Path, no_report: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Its local executor stands for a cluster. Only one cell, since it is a real process."""
    monkeypatch.setenv("PYTHONPATH", str(Path(running.__file__).parents[2]))
    results, name = tmp_path / "r", "gd-grun-s42"
    sweep = definition(tmp_path, axes={**AXES, "method.parametrization": ["grun"]})
    command = ["sweep", sweep, models[0], "results_dir=r"]
    assert main([*command, "launcher=true # {command}"]) == 0  # both cells are there, and wait
    assert main(["sweep", "cell=r/cells/before.json"]) == 0
    caplog.clear()
    assert main([*command, "launcher=submitit cluster=local timeout_min=5", "resubmit=true"]) == 0
    assert "1 done, 0 failed, 1 handed over" in caplog.text and no_report == []
    deadline = time.monotonic() + PATIENCE
    while states(results).get(name) != "done" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert main([*command, "launcher=submitit"]) == 0
    assert states(results) == {"before": "done", name: "done"} and len(no_report) == 1
    assert "answering" in (results / "cells" / f"{name}.log").read_text()
    assert list((results / "cells" / "submitit").glob("*_submitted.pkl"))


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("submitit cluster=locl", "AutoExecutor doesn't know any executor named locl"),
        ("submitit lasts=5", "lasts"),
        ("submitit timeout_min=soon", "timeout_min"),
        ("submitit local", "local is not key=value"),
    ],
)
def test_parameters_that_submitit_does_not_take_are_one_line(
    launcher: str, message: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sweep", definition(tmp_path), "model=tiny"]
    assert main([*command, f"launcher={launcher}"]) == 2
    assert f"error: launcher='{launcher}': " in (said := capsys.readouterr().err) and message in said
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*command, f"launcher={launcher}"]) == 2
    assert "pip install 'grun-unlearning[cluster]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


# -- identity ---------------------------------------------------------------------------------------------------------


def test_a_cells_hash_is_of_what_decides_its_result(models: list[str], tmp_path: Path) -> None:
    taught = Path(models[0].removeprefix("model="))
    folder = tmp_path / "copy"
    shutil.copytree(taught, folder)
    plan = plan_of(definition(tmp_path))
    planned = plan.cells[0].unlearn

    def hash_of(**more: Any) -> str:
        base = base_identity(str(folder), None)
        return make_cell(tmp_path, "x", planned, plan.evaluate, base, **{"discard": "nothing", **more}).hash

    first = hash_of()
    assert hash_of(discard="models") == first
    planned.cache.dir = "elsewhere"
    assert hash_of() == first
    planned.train.lr = 0.5
    assert hash_of() != first
    planned.train.lr = 0.01
    assert hash_of() == first
    weights = folder / "model.safetensors"
    os.utime(weights, (1, 1))
    assert hash_of() != first
    assert base_identity("some/model", "v1") == {"hub": "some/model", "revision": "v1"}


# -- tuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tried", "target", "expected"),
    [
        ([(0.0, 0.7), (0.04, 0.9), (0.5, 1.0)], 0.0, 1),  # forgotten, then useful
        ([(0.05, 0.9), (0.0, 0.8)], 0.0, 0),  # the margin belongs to it
        ([(0.15, 0.9), (0.1, 0.8)], 0.1, 0),  # whatever the rounding of 0.1 + 0.05
        ([(0.16, 0.9), (0.1, 0.8)], 0.1, 1),
        ([(0.04, 0.9), (0.02, 0.9), (0.03, 0.9)], 0.0, 1),  # a tie: the lower forget score
        ([(0.0, 0.9), (0.0, 0.9)], 0.0, 0),  # and then the first
        ([(0.5, 1.0), (0.3, 0.2), (0.4, 0.9)], 0.0, 1),  # none forgot: the lowest forget score
        ([(0.3, 0.2), (0.3, 0.9), (0.3, 0.9)], 0.0, 1),  # a tie: the more useful, then the first
        ([None, (0.9, 0.1), None], 0.0, 1),  # failed ones were not tried
        ([None, None], 0.0, None),
    ],
)
def test_the_rule_takes_the_most_useful_setting_that_forgets(
    tried: list[tuple[float, float] | None], target: float, expected: int | None
) -> None:
    assert choose([None if one is None else Tried(*one) for one in tried], target) == expected


def test_tuning_tries_every_setting_and_writes_what_it_chose(
    models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    axes = {**AXES, "method.parametrization": ["grun"], "seed": [1, 2]}
    grid = {"train.lr": {"grun": [0.01, 0.02]}, "method.rank": [4, 99]}
    sweep = definition(tmp_path, axes=axes, tune={"seed": 3, "grid": grid})
    assert main(["sweep", sweep, *models, "results_dir=r", "--tune"]) == 1  # rank 99 is more than the model's width
    folder = tmp_path / "r" / "tune"
    record = json.loads((folder / "tune.json").read_text())
    (cell,) = record["cells"]
    assert (cell["cell"], cell["seed"], record["metric"]) == ("gd-grun", 3, "fact_recall")
    names = [f"gd-grun-s3-lr{lr}-rank{rank}" for lr in (0.01, 0.02) for rank in (4, 99)]
    assert [one["name"] for one in cell["settings"]] == names
    tried = [one for one in cell["settings"] if one["error"] is None]
    assert [one["setting"]["method.rank"] for one in tried] == [4, 4]
    assert "rank 99" in cell["settings"][1]["error"]
    expected = choose([Tried(one["forget"], one["validation"]) for one in tried], record["retain_only"]["forget"])
    assert expected is not None and tried[expected]["chosen"] and cell["chosen"] == tried[expected]["setting"]
    evaluation = json.loads((folder / "evaluation" / names[0] / "evaluation.json").read_text())
    assert list(evaluation["sets"]) == ["forget", "validation"]
    assert evaluation["settings"]["continuations"] == ["answer"]
    assert evaluation["sets"]["forget"]["fact_recall"] == tried[0]["forget"]
    assert list((folder / names[0]).glob("*.safetensors")) == []  # the weights are not kept
    page = (folder / "tune.md").read_text()
    assert record["rule"] in page and page.count("**chosen**") == 1 and page.count("| failed |") == 2
    assert "gd-grun: 2 of 4 settings failed and count as not tried" in caplog.text

    # What it wrote is a sweep's `tuned` section.
    tuned = yaml.safe_load((folder / "tuned.yaml").read_text())
    read = read_sweep(definition(tmp_path, axes=axes, **tuned).removeprefix("sweep="))
    assert read.tuned == {"gd": {"grun": cell["chosen"]}}
    first = plan_of(definition(tmp_path, axes=axes, **tuned)).cells[0].unlearn
    assert (first.train.lr, first.method.rank) == tuple(cell["chosen"].values())
    assert not (tmp_path / "r" / "cells").exists()  # and it ran nothing else


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["model=x/y"], "give retain_model=FOLDER"),
        ({"unlearn": {}}, ["model=x/y", "retain_model=x/z"], "validation: ROWS"),
        ({}, ["parametrizations=[full]"], "tune.grid.train.lr has no values for full"),
        ({}, ["unlearn=[train.lr=1]"], "train.lr is what --tune chooses"),
    ],
)
def test_tuning_says_what_it_lacks(
    changes: dict[str, Any], arguments: list[str], message: str, tmp_path: Path, capsys: Captured
) -> None:
    axes = {**AXES, "method.parametrization": ["grun"]}
    sweep = definition(tmp_path, axes=axes, tune={"grid": {"train.lr": {"grun": [0.1]}}}, **changes)
    assert main(["sweep", sweep, *arguments, "--tune"]) == 2
    assert message in capsys.readouterr().err
