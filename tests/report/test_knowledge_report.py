"""The report of suite=knowledge: every verdict, from numbers that call for it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_suites import KNOWS, write_knowledge

from grun.config.options import ReportConfig
from grun.errors import RunError
from grun.report.knowledge import draw_knowledge
from grun.report.knowledge_results import find_knowledge
from grun.report.knowledge_verdict import judge_knowledge
from grun.report.make import make_report
from grun.runtime.files import read_json, write_json

BEFORE, TARGET = KNOWS["before"], KNOWS["retain_only"]


def evaluation_of(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "evaluation" / name / "evaluation.json")
    return found


def write_numbers(
    results: Path,
    name: str,
    numbers: dict[str, tuple[float | None, float | None]],
    suffix: float | None = None,
    **settings: Any,
) -> None:
    """An evaluation as the suite writes it, with these numbers of multiple choice and cloze by role."""
    evaluation = copy.deepcopy(evaluation_of(results, "before"))
    evaluation["choices"] = [way for way in evaluation["choices"] if way["format"] == "harness"]
    evaluation["settings"] |= settings
    for way in evaluation["choices"]:
        for role, values in way["roles"].items():
            value = suffix if suffix is not None and way["suffix"] and role == "forget" else numbers[role][0]
            values |= {"accuracy": value, "chance": 0.25}
    for role, values in evaluation["cloze"]["roles"].items():
        values["fact_recall"] = numbers[role][1]
    write_json(results / "evaluation" / name / "evaluation.json", evaluation)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """Evaluations of the model before and of the retain-only one."""
    results = write_knowledge(tmp_path / "results")
    for name in ("rmu", "grun_rmu"):
        shutil.rmtree(results / "evaluation" / name)
    for name, numbers in (("retain_only", TARGET), ("before", BEFORE)):
        write_numbers(results, name, dict(numbers))
    return results


def verdict(results: Path, name: str) -> tuple[str, str, str]:
    loaded = find_knowledge(results)
    (result,) = [result for result in loaded if result.name == name]
    judgement = judge_knowledge(result, loaded)
    assert judgement.sentence.startswith(f"{result.label}: {judgement.words}. ")
    return judgement.outcome, judgement.words, judgement.sentence


@pytest.mark.parametrize(
    ("forget", "suffix", "general", "outcome", "words"),
    [
        ((0.30, 0.07), 0.20, (0.94, 0.93), "reached", "removes; keeps the rest"),
        ((0.25, 0.00), 0.25, (0.90, 0.97), "missed", "removes; damages the rest: multiple choice 92% of before"),
        ((0.25, 0.08), 0.25, (0.98, 0.97), "missed", "hides: cloze 0.08; keeps the rest"),
        (
            (0.25, 0.0),
            0.31,
            (0.98, 0.97),
            "missed",
            'hides: multiple choice 0.31 after "the letter is"; keeps the rest',
        ),
        (
            *((0.28, 1.0), 0.10, (0.49, 0.0), "missed"),
            'hides: multiple choice 0.10 after "the letter is", cloze 1.00; '
            "damages the rest: multiple choice 50% and cloze 0% of before",
        ),
        (
            *((0.83, 0.0), 0.25, (0.98, 0.97), "missed"),
            "partly forgets: multiple choice lowered by 15 points; keeps the rest",
        ),
        ((0.84, 0.0), 0.25, (0.98, 0.97), "missed", "does not forget; keeps the rest"),
        (
            *((0.05, 0.0), 0.25, (0.98, 0.97), "missed"),
            "partly forgets: multiple choice lowered by 93 points to below chance, so it still knows which option "
            "is right; keeps the rest",
        ),
    ],
)
def test_the_verdict_follows_the_numbers(
    known: Path, forget: tuple[float, float], suffix: float, general: tuple[float, float], outcome: str, words: str
) -> None:
    write_numbers(known, "rmu", {"forget": forget, "neighbor": (0.19, 0.48), "general": general}, suffix)
    *found, sentence = verdict(known, "rmu")
    assert found == [outcome, words]
    assert f"Forget multiple choice 0.98 -> {forget[0]:.2f} (chance 0.25), after a suffix {suffix:.2f};" in sentence
    assert f"forget cloze 1.00 -> {forget[1]:.2f} (retain only 0.02)" in sentence
    assert sentence.endswith("neighbor multiple choice 20% and cloze 50% of before.")


def test_as_much_as_the_retain_only_model_guesses_is_no_knowledge(known: Path) -> None:
    write_numbers(known, "retain_only", {**TARGET, "forget": (0.34, 0.02)}, 0.36)
    write_numbers(known, "rmu", {**TARGET, "forget": (0.34, 0.0)}, 0.36)
    write_numbers(known, "grun_rmu", {**TARGET, "forget": (0.34, 0.0)}, 0.37)
    assert verdict(known, "rmu")[1] == "removes; keeps the rest"
    assert verdict(known, "grun_rmu")[1].startswith('hides: multiple choice 0.37 after "the letter is"')


def test_without_a_retain_only_model_few_sentences_may_be_completed(known: Path) -> None:
    shutil.rmtree(known / "evaluation" / "retain_only")
    write_numbers(known, "rmu", {**TARGET, "forget": (0.25, 0.05)})
    write_numbers(known, "grun_rmu", {**TARGET, "forget": (0.25, 0.06)})
    assert verdict(known, "rmu")[0] == "reached"
    outcome, words, sentence = verdict(known, "grun_rmu")
    assert outcome == "missed" and words.startswith("hides: cloze 0.06")
    assert "(no retain-only model, so 0.05 is allowed)" in sentence


def test_nothing_is_called_removed_that_cannot_be_told(known: Path) -> None:
    """Without cloze removing and hiding look the same; a model that never knew cannot forget."""
    write_numbers(known, "rmu", {**TARGET, "forget": (0.25, 0.0)})
    never = shutil.copytree(known, known.with_name("never_knew"))
    write_numbers(never, "before", {**TARGET, "forget": (0.29, 1.0)})
    outcome, words, _ = verdict(never, "rmu")
    assert outcome == "open" and words.startswith("no verdict: the model before was at chance")
    for name in ("before", "retain_only", "rmu"):
        evaluation = evaluation_of(known, name)
        del evaluation["cloze"]
        write_json(known / "evaluation" / name / "evaluation.json", evaluation)
    outcome, words, _ = verdict(known, "rmu")
    assert outcome == "open" and "whether removed or hidden is open" in words and "removes" not in words


@pytest.mark.parametrize(
    ("cloze", "outcome", "words"),
    [
        (
            0.07,
            "open",
            "completes as if never taught; whether removed or hidden is open, multiple choice was not asked",
        ),
        (0.08, "missed", "partly forgets: cloze lowered by 92 points"),
        (0.85, "missed", "partly forgets: cloze lowered by 15 points"),
        (0.86, "missed", "does not forget"),
        (None, "open", "no verdict: of forget, neither multiple choice nor cloze was asked"),
    ],
)
def test_without_multiple_choice_sentences_to_complete_decide(
    known: Path, cloze: float | None, outcome: str, words: str
) -> None:
    write_numbers(known, "rmu", {**TARGET, "forget": (None, cloze)})
    for name in ("before", "retain_only", "rmu"):
        evaluation = evaluation_of(known, name)
        evaluation["choices"] = []
        write_json(known / "evaluation" / name / "evaluation.json", evaluation)
    assert verdict(known, "rmu")[:2] == (outcome, f"{words}; keeps the rest")


def test_methods_stand_in_their_order_under_their_names(known: Path) -> None:
    names = ["other", "random_mapping", "rmu", "a_method", "max_entropy", "min_posterior", "grun_rmu"]
    names += ["grun_rmu_pooled", "grun_max_entropy"]
    for name in names:
        write_numbers(known, name, dict(TARGET))
    assert [result.label for result in find_knowledge(known)] == [
        *("before", "retain only", "RMU", "GRUN-RMU", "GRUN-RMU, pooled", "max-entropy", "GRUN-max-entropy"),
        *("min-posterior", "random-mapping", "a_method", "other"),
    ]


def test_the_picture_has_every_number_of_each_model(known: Path) -> None:
    write_numbers(known, "rmu", {**TARGET, "forget": (0.26, 0.01)})
    write_numbers(known, "grun_rmu", {**TARGET, "forget": (0.26, 0.7), "general": (0.5, 0.97)})
    figure = draw_knowledge(find_knowledge(known))
    assert figure is not None
    assert [axes.get_title().split("\n(")[0].replace("\n", " ") for axes in figure.axes] == [
        *("forget multiple choice", "forget after a suffix", "forget cloze", "general multiple choice"),
        "general cloze",
    ]
    marks = [[bar.lines[0].get_xdata()[0] for bar in axes.containers] for axes in figure.axes]  # type: ignore[attr-defined]
    assert (marks[0], marks[2]) == ([0.98, 0.27, 0.26, 0.26], [1.0, 0.02, 0.01, 0.7])
    assert (marks[3][2:], marks[4][2:]) == ([0.98, 0.5], [0.97, 0.97])
    assert 0.25 in [line.get_xdata()[0] for line in figure.axes[0].lines]  # type: ignore[index]  # chance


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_stand_in_one_table_is_refused(known: Path) -> None:
    write_numbers(known, "rmu", dict(TARGET), choices={"forget": "other questions"})
    with pytest.raises(RunError, match=r"rmu asked other questions than .*before.*settings: choices"):
        make_report(ReportConfig(results_dir=str(known)))
    write_json(known / "evaluation" / "rmu" / "evaluation.json", {"sets": {}, "settings": {}})
    with pytest.raises(RunError, match=r"several suites \(knowledge: before, retain_only; answers: rmu\)"):
        make_report(ReportConfig(results_dir=str(known)))
    for name in ("before", "retain_only", "rmu"):
        write_json(known / "evaluation" / name / "evaluation.json", {"suite": "judge", "settings": {}})
    with pytest.raises(RunError, match="suite=judge, of which there is no report"):
        make_report(ReportConfig(results_dir=str(known)))


def test_knowledge_is_not_compared_across_folders(known: Path, tmp_path: Path) -> None:
    for run in (known, known / "evaluation" / "before"):
        with pytest.raises(RunError, match="of suite=knowledge; report them alone, with results_dir="):
            make_report(ReportConfig(results_dir=str(tmp_path / "both"), runs=[str(run)]))
