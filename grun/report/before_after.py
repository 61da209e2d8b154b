"""What a reader sees first: questions, and what each model answered; then how much is left of each set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.data.rows import evenly_spaced
from grun.data.sets import EvaluationSet, in_order
from grun.report.figures import clean, colors_of, new_figure, plain
from grun.report.page import Block, Section, picture_block
from grun.report.result import Result, after, main_metric, sets_of
from grun.report.tables import GOOD_IS, Line, Table, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grun.report.figures import Drawn

MOST = 4
"""Unlearned models that are shown; with more, a reader has the matrix."""
EXAMPLES = 2
"""Questions of each set."""
LONGEST = 90
"""Characters of an answer that are shown."""
PICTURE = "sets.png"
WANTED = {"low": "should go", "high": "should stay", "same": "guessed"}
GOOD = {"low": "low: forgotten", "high": "as before: kept", "same": "as before"}


def compared(results: Sequence[Result]) -> list[Result]:
    """The model before, and the first unlearned ones; none where one of the two is missing."""
    before = [result for result in results if result.stage == "before"][:1]
    unlearned = after(results)[:MOST]
    return [*before, *unlearned] if before and unlearned else []


def asked_sets(results: Sequence[Result]) -> list[EvaluationSet]:
    """Sets of questions that were evaluated, without those that settings were chosen by."""
    named = [one for one in in_order(sets_of(results)) if not one.for_tuning]
    return [one for one in named if any(result.table.generations_of(one.name) for result in results)]


def before_after_section(results: Sequence[Result], drawn: Drawn) -> Section:
    """Examples of each set with all answers, the share of right answers, and the picture of it."""
    models = compared(results)
    if not models:
        return Section("examples", "Before and after", "Before and after", [])
    blocks = [
        Block("text", "Questions, the answer before, and the answers after unlearning. All are greedy answers."),
        Block("table", example_table(models), "Questions and answers before and after", "question"),
        Block("text", f"By set, in percent, {_meaning(results)}"),
        Block("table", share_table(models), "Right answers by set", "set"),
        *[picture_block(picture, path) for picture, path in drawn if picture.name == PICTURE],
    ]
    return Section("examples", "Before and after", "Before and after", blocks)


def _meaning(results: Sequence[Result]) -> str:
    if main_metric(results)[0] == "fact_recall":
        return "how many answers hold what a right answer must hold."
    return "how many words of the right answers come back."


def example_table(models: Sequence[Result]) -> Table:
    """Some questions of each set, what the set is in a line above them, and an answer a model."""
    lines = []
    for one in asked_sets(models):
        answers = [{row.index: row for row in model.table.generations_of(one.name)} for model in models]
        common = [index for index in sorted(answers[0]) if all(index in found for found in answers)]
        if common:
            lines.append(Line(_title(one), [], "group"))
        for index in evenly_spaced(common, EXAMPLES):
            said = [_short(found[index].text) for found in answers]
            lines.append(Line(_short(answers[0][index].question, 2 * LONGEST), said, "text"))
    return Table([model.label for model in models], [], lines)


def _title(one: EvaluationSet) -> str:
    return f"{one.label}: {one.meaning}" if one.meaning else one.label


def _short(text: str, longest: int = LONGEST) -> str:
    words = " ".join(text.split())
    return (words if len(words) <= longest else f"{words[:longest].rsplit(' ', 1)[0]} …") or "(empty)"


def share_table(models: Sequence[Result]) -> Table:
    """The main metric in percent: a line a set, a column a model, the last one which way is good."""
    metric = main_metric(models)[0]
    lines = []
    for one in asked_sets(models):
        values = [model.metric(one.name, metric) for model in models]
        if any(value is not None for value in values):
            lines.append(Line(one.label, [*(shown(value, "percent") for value in values), GOOD[one.good]]))
    return Table([*(model.label for model in models), GOOD_IS], [], lines)


def sets_figure(results: Sequence[Result]) -> Figure | None:
    """Bars of the main metric: a group a set, a bar a model; None where nothing was unlearned or too much."""
    models = compared(results)
    if not models or len(after(results)) > MOST:
        return None
    metric, label = main_metric(results)
    sets = [one for one in asked_sets(models) if any(model.metric(one.name, metric) is not None for model in models)]
    height = 0.8 / len(models)
    figure = new_figure(8.0, 1.2 + 0.24 * len(sets) * len(models))
    axes, colors = figure.add_subplot(), colors_of(results)
    for number, model in enumerate(models):
        values = [model.metric(one.name, metric) or 0.0 for one in sets]
        places = [place + (number - (len(models) - 1) / 2) * height for place in range(len(sets))]
        axes.barh(places, values, height=0.9 * height, color=colors[model.name], label=plain(model.label))
    clean(axes, "x", xlim=(0, 1.02), xlabel=f"{label} (share of right answers)")
    names = [f"{one.label}\n({WANTED[one.good]})" for one in sets]
    axes.set_yticks(range(len(sets)), names)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False, fontsize=10)
    return figure
