"""What is said of an experiment with sequential requests: measures, verdicts, tables and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from made_suites import GRUN, IDS, RETRAIN, made_experiment

from grun.errors import RunError
from grun.experiments.sequential import pictures
from grun.experiments.sequential.results import Experiment, Method, Summary, read_experiment, summarize
from grun.experiments.sequential.tables import experiment_markdown, verdict


@pytest.fixture
def experiment() -> Experiment:
    return made_experiment()


def summaries(experiment: Experiment) -> list[Summary]:
    return [summarize(method, experiment) for method in experiment.methods]


def test_a_method_is_judged_by_its_last_step_and_by_what_came_back_on_the_way(experiment: Experiment) -> None:
    summary = summarize(GRUN, experiment)
    assert summary.forgotten == pytest.approx((0.25 + 0.1 + 0.0) / 3)
    assert summary.forgotten_worst == 0.25
    assert summary.at_floor == 2  # r2: 0.1 is the floor's 0.05 + 0.05; r3: 0; r1: 0.25 is too much
    assert summary.came_back == 0.4  # r1 after the second request; r2 and r3 were not asked for when they were higher
    assert summary.forgotten_paraphrased == 0.2
    assert summary.not_yet_asked == pytest.approx((0.9 + 1.0 + 0.7) / (1.0 + 0.8 + 0.8))
    assert summary.kept == {"retain": 0.8, "heldout": pytest.approx(0.75)}
    assert (summary.seconds, summary.saved_bytes, summary.peak_memory_bytes) == (4.0, 100, 30)


def test_gates_are_summed_up_by_whose_prompts_they_open_for(experiment: Experiment) -> None:
    summary = summarize(GRUN, experiment)
    assert summary.own_gates == pytest.approx((1.0 + 1.0 + 0.7) / 3)
    assert summary.others_gates == pytest.approx((0.5 + 0.0 + 0.0 + 0.25 + 0.0 + 0.0) / 6)
    assert summary.false_positives == pytest.approx((0.1 * 30 + 0.5 * 10) / 40)
    assert summarize(RETRAIN, experiment).false_positives is None


def test_an_experiment_under_way_speaks_of_the_requests_made_so_far(experiment: Experiment) -> None:
    summary = summarize(Method("full", GRUN.steps[:2]), experiment)
    assert summary.requests == 2
    assert summary.forgotten_worst == 0.4
    assert summary.forgotten_paraphrased is None  # those sets are of all requests


def test_without_a_retain_only_model_nothing_is_compared_with_it(experiment: Experiment) -> None:
    alone = Experiment(IDS, experiment.before, None, [GRUN])
    assert summarize(GRUN, alone).at_floor is None
    assert "|  | before | GRUN | good is |" in experiment_markdown(alone, summaries(alone), "title")


def test_the_verdict_names_the_worst_set_and_what_is_kept(experiment: Experiment) -> None:
    text = verdict(summarize(GRUN, experiment), experiment)
    assert text == (
        "GRUN: fact recall on the 3 forgotten sets 0.12 (worst 0.25; 2 of 3 at retain only + 0.05 or below); "
        "kept of before: 80% on retain, 75% on held-out."
    )


def test_the_heat_map_shows_recall_by_request_and_time_and_leaves_out_what_was_not_measured(
    experiment: Experiment,
) -> None:
    figure = pictures.heatmap(experiment)
    grun, retrain = (axes.images[0].get_array().filled(math.nan).tolist() for axes in figure.axes[:2])
    assert grun == [[1.0, 0.1, 0.4, 0.25], [1.0, 0.9, 0.0, 0.1], [0.8, 1.0, 0.7, 0.0]]
    assert [row[3] for row in retrain] == [0.0, 0.1, 0.05]
    assert all(math.isnan(row[1]) and math.isnan(row[2]) for row in retrain)
    line = figure.axes[0].lines[0]
    assert line.get_color() == "white"
    # Row 1 (the second request) is dark from the second step on, whose cell begins at 1.5.
    assert (1.5, 0.5) in list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert "gray was not measured" in figure.get_suptitle()


def test_utility_has_a_panel_a_set_with_a_line_a_method_and_the_models_to_compare_with(experiment: Experiment) -> None:
    figure = pictures.utility(experiment)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["retain", "held-out"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].lines}
    assert drawn == {"before": [0.8, 0.8], "retain only": [0.9, 0.9], "GRUN": [0.8, 0.8, 0.8, 0.6], "retrain": [0.8]}


def test_the_confusion_of_gates_is_drawn_where_there_are_gates(experiment: Experiment) -> None:
    figure = pictures.confusion(experiment)
    assert figure is not None
    values = figure.axes[0].images[0].get_array().tolist()
    assert values[0] == [0.9, 0.1, 0.1, 0.1, 0.1]
    assert pictures.confusion(Experiment(IDS, experiment.before, None, [RETRAIN])) is None


def test_there_is_no_report_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no step of any method"):
        read_experiment(tmp_path)
