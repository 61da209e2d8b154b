"""The matrix report: cells over seeds, their spread and cost, what is said of them, and the picture."""

from __future__ import annotations

import csv
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import write_cell, write_evaluation, write_matrix, write_run
from matplotlib.container import ErrorbarContainer

from grun.config.options import ReportConfig
from grun.report import figures, make
from grun.report.answers import ANSWER_SUITE
from grun.report.compared import compare, standings
from grun.report.distributions import gate_histograms
from grun.report.left_and_kept import left_and_kept
from grun.report.make import make_report
from grun.report.matrix import Matrix, Spread, first_seeds, make_matrix, matrix_csv
from grun.report.results import find_results
from grun.report.rows_figure import COLORS
from grun.report.tables import Column
from grun.runtime.files import read_json, taken, write_bytes, write_json

ROWS = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two objectives, four parametrizations, three seeds; one cell failed, and one seed of another."""
    folder = tmp_path_factory.mktemp("matrix")
    failed = [f"npo-reft-s{seed}" for seed in (42, 43, 44)]
    return write_matrix(folder, rows=ROWS, left_out=[*failed, "gd-lora-s44"])


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tofu")
    return write_matrix(folder, rows=12, facts=False, objectives=["gd"], parametrizations=["lora", "grun"])


def matrix_of(folder: Path) -> Matrix:
    matrix = make_matrix(find_results(folder))
    assert matrix is not None
    return matrix


# -- cells and numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ((0.1, 0.2, 0.3), "share", "0.20 ± 0.10"),
        ((0.5,), "share", "0.50"),
        ((), "share", "-"),
        ((0.04, 0.5, 1e-5), "p", "0.040 (1.0e-5 to 0.50)"),
        ((0.04,), "p", "0.040"),
        ((1e6, 1e6), "whole", "1,000,000"),
        ((9.5, 10.5), "seconds", "10.0 ± 0.7"),
        ((100.0, 300.0), "seconds", "200 ± 141"),
        ((440_000.0, 440_000.0), "size", "0.440"),
        ((2.0**30, 2.0**30 + 2**21), "memory", "1,025 ± 1"),
    ],
)
def test_a_spread_is_told_as_readers_expect(values: tuple[float, ...], kind: str, text: str) -> None:
    assert Spread(values).text(kind) == text  # type: ignore[arg-type]


def test_runs_of_other_settings_or_of_the_same_seed_are_no_seeds_of_one_cell(tmp_path: Path) -> None:
    write_matrix(tmp_path, rows=4, objectives=["gd"], parametrizations=["lora"])
    for name, rank in (("wide-s42", 16), ("wide-s43", 16), ("again", 8)):
        write_evaluation(tmp_path / "evaluation" / name, {"forget": 0.0}, rows=4)
        write_cell(tmp_path / name, "gd", "lora", 43 if name.endswith("43") else 42, rank=rank)
    cells = matrix_of(tmp_path).cells
    found = {tuple(result.name for result in row.results) for row in cells}
    assert found == {("gd-lora-s42", "gd-lora-s43", "gd-lora-s44"), ("wide-s42", "wide-s43"), ("again",)}
    assert len({row.label for row in cells}) == 3


def test_one_parametrization_with_one_seed_is_no_matrix_and_an_older_matrix_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "DPI", 20)
    write_matrix(tmp_path, rows=4, objectives=["gd", "npo"], parametrizations=["grun"], seeds=[42])
    old = [tmp_path / f"matrix.{ending}" for ending in ("md", "csv", "tex")] + [tmp_path / "left_and_kept.png"]
    with taken(tmp_path):
        for path in old:
            write_bytes(path, b"of an older report")
    make_report(ReportConfig(results_dir=str(tmp_path)))
    assert not any(path.exists() for path in old)
    assert 'id="matrix"' not in (tmp_path / "report.html").read_text()
    assert [result.label for result in find_results(tmp_path)][2:] == ["GD", "NPO"]


def test_labels_tell_parametrizations_and_seeds_apart_only_where_they_differ(made: Path) -> None:
    results = find_results(made)
    assert {"GD LoRA s42", "GD LoRA s43", "NPO GRUN s44"} <= {result.label for result in results}
    shown = first_seeds(results)
    assert [result.label for result in shown][2:] == [
        *("GD full", "GD LoRA", "GD ReFT", "GD GRUN", "NPO full", "NPO LoRA", "NPO GRUN")
    ]
    assert all(result.seed == 42 for result in shown[2:])


# -- what is missing --------------------------------------------------------------------------------------------------


def test_seeds_without_an_evaluation_and_cells_that_failed_are_noted(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    write_json(folder / "cells" / "npo-reft-s42.outcome.json", {"state": "failed", "error": "out of memory"})
    write_json(folder / "cells" / "npo-lora-s42.outcome.json", {"state": "done"})
    assert matrix_of(folder).notes() == [
        "GD LoRA: seed 44 has no evaluation.",
        "NPO ReFT: no evaluated run.",
        "npo-reft-s42 failed: out of memory.",
    ]


def test_an_adapter_whose_weights_were_removed_is_reported_all_the_same(tmp_path: Path) -> None:
    write_matrix(tmp_path, rows=4, objectives=["gd"], parametrizations=["lora", "grun"], seeds=[42])
    path = tmp_path / "evaluation" / "gd-grun-s42" / "evaluation.json"
    write_json(path, {**read_json(path), "adapter": "gone", "identity": {"base": "b1", "adapter": "a hash"}})
    (tmp_path / "gd-grun-s42" / "adapter_config.json").write_text("{}")
    assert len(find_results(tmp_path)) == 4


def test_seconds_that_leave_out_what_an_earlier_run_computed_are_noted(tmp_path: Path) -> None:
    write_matrix(tmp_path, rows=4, objectives=["gd"], parametrizations=["lora", "grun"], seeds=[42, 43])
    for seed, found in ((42, 0), (43, 7)):
        path = tmp_path / f"gd-grun-s{seed}" / "run.json"
        write_json(path, {**read_json(path), "cache": {"found": found}})
    (note,) = matrix_of(tmp_path).notes()
    assert note.endswith("which their seconds leave out: GD GRUN 1 of 2.")


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_csv_holds_every_runs_raw_numbers_and_their_statistics(made: Path) -> None:
    matrix = matrix_of(made)
    lines = list(csv.DictReader(io.StringIO(matrix_csv(matrix))))
    for row in matrix.rows:
        of_row = [line for line in lines if line["row"] == row.label]
        runs = [line for line in of_row if line["statistic"] == "run"]
        assert [line["name"] for line in runs] == [result.name for result in row.results]
        assert [line["seed"] for line in runs] == [str(seed) for seed in row.seeds] or row.stage != "after"
        statistics = {line["statistic"]: line for line in of_row if line["statistic"] != "run"}
        assert list(statistics) == ["n", "mean", "sd", "median", "lowest", "highest"]
        for measure in matrix.columns:
            values = [float(line[measure.key]) for line in runs if line[measure.key]]
            assert int(statistics["n"][measure.key]) == len(values)
            if values:
                # repr gives every digit back; the sums differ by rounding alone
                assert float(statistics["mean"][measure.key]) == pytest.approx(np.mean(values), rel=1e-12)
            if len(values) > 1:
                expected = np.std(values, ddof=1)
                assert float(statistics["sd"][measure.key]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
            else:
                assert statistics["sd"][measure.key] == ""


# -- words ------------------------------------------------------------------------------------------------------------

SHARE = Column("heldout.fact_recall", "held-out fact recall", "high", "share", lambda result: None)
SECONDS = Column("cost.seconds", "seconds", "low", "seconds", lambda result: None)
LEFT_OVER = Column(
    "forget_paraphrase.fact_recall", "paraphrase fact recall", "low, as retain only", "share", lambda _: None
)
PARAMETERS = Column("cost.parameters", "trained parameters", "low", "whole", lambda result: None)


@pytest.mark.parametrize(
    ("ours", "theirs", "measure", "standing"),
    [
        # deviations 0.01 and 0.01 against differences of 0.03 and 0.015
        ((0.89, 0.90, 0.91), (0.86, 0.87, 0.88), SHARE, "ahead"),
        ((0.86, 0.87, 0.88), (0.89, 0.90, 0.91), SHARE, "behind"),
        ((0.89, 0.90, 0.91), (0.875, 0.885, 0.895), SHARE, "within the spread"),
        ((0.9,), (0.1, 0.1), SHARE, "one seed"),
        ((0.9,), (0.9,), SHARE, "equal"),
        ((1.0, 1.1), (5.0, 5.1), SECONDS, "ahead"),
        ((0.2, 0.2), (0.0, 0.01), LEFT_OVER, "behind"),  # what is left of the forget set in other words
        ((5.0,), (1.0,), PARAMETERS, "behind"),  # a count needs no second seed
        ((), (1.0,), SHARE, "-"),
    ],
)
def test_a_difference_counts_beyond_both_deviations_together(
    ours: tuple[float, ...], theirs: tuple[float, ...], measure: Column, standing: str
) -> None:
    assert compare(Spread(ours), Spread(theirs), measure) == standing


def test_grun_is_compared_with_each_other_parametrization(tmp_path: Path) -> None:
    heldout = {"grun": 0.9, "lora": 0.5, "reft": 0.875}
    write_matrix(tmp_path, rows=40, objectives=["gd"], parametrizations=[*heldout], heldout=heldout)
    ((title, table),) = standings(matrix_of(tmp_path))
    assert title == "GD: GRUN against the others" and list(table.headers) == ["LoRA", "ReFT"]
    found = {line.label: line.cells for line in table.lines}
    assert found["forgets as far as the target (GRUN: yes)"] == ["yes", "no"]
    assert found["held-out fact recall"] == ["ahead", "within the spread"]
    assert found["retain fact recall"] == ["equal", "equal"]
    assert found["trained parameters"] == found["size on disk"] == ["ahead", "behind"]


# -- page, terminal, picture ------------------------------------------------------------------------------------------


def test_the_picture_has_a_row_for_each_cell_with_its_spread(made: Path) -> None:
    matrix = matrix_of(made)
    figure = left_and_kept(matrix.results)
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row.label for row in matrix.rows]
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["forget", "paraphrase", "retain", "held-out"]
    bars = [found for found in figure.axes[3].containers if isinstance(found, ErrorbarContainer)]
    assert len(bars) == 9
    column = matrix.column("heldout.fact_recall")
    assert column is not None
    spreads = [row.spread(column) for row in matrix.rows]
    assert [bar.lines[0].get_xdata()[0] for bar in bars] == [spread.mean for spread in spreads]
    colors = [bar.lines[0].get_color() for bar in bars]
    assert [colors.count(COLORS[kind]) for kind in ("full", "lora", "reft", "grun")] == [2, 2, 1, 2]


def test_the_picture_of_a_corpus_without_facts_has_model_utility_and_forget_quality(tofu: Path) -> None:
    figure = left_and_kept(find_results(tofu))
    assert figure is not None
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert titles[0] == "forget ROUGE-L (good is left)" and titles[-2] == "model utility (good is right)"
    assert figure.axes[-1].get_xlim()[0] <= -3.0


# -- several folders, and the validation set --------------------------------------------------------------------------


def test_seeds_in_several_folders_are_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make.REPORTS, "answers", replace(ANSWER_SUITE, pictures=()))
    for folder, seeds in (("a", [42, 43]), ("b", [44])):
        write_matrix(tmp_path / folder, rows=4, objectives=["gd"], parametrizations=["lora", "grun"], seeds=seeds)
    runs = [str(tmp_path / folder) for folder in ("a", "b")]
    make_report(ReportConfig(results_dir=str(tmp_path / "out"), runs=runs))
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "matrix.csv").read_text())))
    runs_of = [line["name"] for line in lines if line["row"] == "GD GRUN" and line["statistic"] == "run"]
    assert runs_of == ["a/gd-grun-s42", "a/gd-grun-s43", "b/gd-grun-s44"]


def test_the_validation_set_has_a_name_a_meaning_and_a_color(tmp_path: Path) -> None:
    shares = {"forget": 1.0, "retain": 1.0, "validation": 0.75, "heldout": 1.0}
    write_evaluation(tmp_path / "evaluation" / "before", shares, rows=4)
    write_evaluation(tmp_path / "evaluation" / "gd", shares, rows=4, gated=True)
    write_run(tmp_path / "gd", "gd")
    results = find_results(tmp_path)
    texts = ANSWER_SUITE.texts(results, "title", [], tmp_path)
    assert "settings were chosen by it" in texts["report.html"]
    assert "validation.fact_recall" in texts["table.csv"].splitlines()[0]
    figure = gate_histograms(results)
    assert figure is not None
    assert "validation" in {axes.get_title() for axes in figure.axes}
