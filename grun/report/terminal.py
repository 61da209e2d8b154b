"""The report as it is printed: a table, what it means, a verdict for each run, some answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from grun.data.sets import evaluation_sets, find_set, in_order
from grun.report.matrix import Matrix, first_seeds, has_many_runs, make_matrix, one_seed_note
from grun.report.matrix_words import words
from grun.report.missing import notes
from grun.report.results import Result, has_facts, has_utility, main_metric, unread_words
from grun.report.tables import Column, columns_by_key, name_of, readable
from grun.report.verdicts import STATEMENT, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

EXAMPLES = 5
"""Questions shown of each set."""
WIDTH = 100
"""Columns of the printed report where stdout is no terminal."""
SHOWN = (
    *("forget.fact_recall", "forget.rouge_l", "forget_paraphrase.fact_recall", "retain.fact_recall"),
    *("retain.rouge_l", "heldout.fact_recall", "heldout.rouge_l", "unknown.rouge_l", "forget.degenerate", "gate.auc"),
)
"""Columns of the printed table."""
SHOWN_WITH_UTILITY = {
    "reference.forget_quality": "forget\nquality",
    "overall.model_utility": "model\nutility",
    "forget.rouge_l": "forget\nROUGE-L",
    "forget.probability": "forget\nprob.",
    "forget.truth_ratio": "forget\ntruth\nratio",
    "forget.extraction_strength": "extr.\nstr.",
    "retain.rouge_l": "retain\nROUGE-L",
    "real_authors.rouge_l": "authors\nROUGE-L",
    "world_facts.rouge_l": "facts\nROUGE-L",
    "heldout.rouge_l": "held-out\nROUGE-L",
    "gate.auc": "gate\nAUC",
}
"""The same where TOFU's model utility is known, with headers that fit."""
NUMBERS = {
    "reference.forget_quality": (
        "forget quality",
        "p of a KS test against the target's truth ratios; above 0.05 is good",
    ),
    "overall.model_utility": ("model utility", "TOFU's mean of what is kept; 0 where one part is lost"),
    "fact_recall": ("fact recall", "share of answers that contain the key fact"),
    "rouge_l": ("ROUGE-L", "share of the reference's words in the answer, in the same order"),
    "forget.probability": ("prob.", "probability per token of the reference answer"),
    "forget.truth_ratio": ("truth ratio", "wrong answers against the right one; good is as on the target"),
    "forget.extraction_strength": ("extr. str.", "share of an answer that follows once its beginning is given"),
    "degenerate": ("degenerate", "share of answers that are empty or repeat one word; low is good"),
    "gate.auc": ("gate AUC", "how surely the gate tells forget from held-out; 1: always, 0.5: by chance"),
}
"""Legend of the numbers, by column or metric."""


def print_report(console: Console, results: Sequence[Result], title: str) -> None:
    """Print the table, what it means, a verdict for each run, and the first answers before and after.

    Where there are many runs of a matrix, it is printed instead, with what it says in words.
    """
    from rich.text import Text

    def line(text: str = "", style: str = "") -> None:
        console.print(Text(text, style=style))

    matrix, first = make_matrix(results), first_seeds(results)
    many = has_many_runs(results)
    if matrix is not None and many:
        from grun.report.terminal_matrix import matrix_table

        console.print(matrix_table(matrix, title))
        line(matrix.caption)
    else:
        console.print(_rich_table(results, title))
    print_words(console, _legend(results))
    for note in unread_words(results) if matrix is None else notes(matrix):
        line(note)
    if not many:
        line()
        for result in first:
            if result.stage == "after":
                line(verdict(result, results))
    if matrix is not None:
        _print_words(console, matrix)
    line()
    line(STATEMENT, "bold")
    for set_name in ("forget", "heldout"):
        _print_examples(console, first, set_name, 1 if many else EXAMPLES)
    if len(first) < len(results):
        line(one_seed_note(results, first))


def _columns(results: Sequence[Result]) -> list[tuple[Column, str]]:
    """Columns of the printed table with their headers; those without a number are left out."""
    facts, utility = has_facts(results), has_utility(results) and not has_facts(results)
    known, named = columns_by_key(), {key.split(".")[0] for key in (*SHOWN, *SHOWN_WITH_UTILITY)}
    further = [name for name, one in evaluation_sets().items() if one.is_result and name not in named]
    keys = [*(SHOWN_WITH_UTILITY if utility else SHOWN), *(f"{name}.{main_metric(results)[0]}" for name in further)]
    headers = SHOWN_WITH_UTILITY if utility else {}
    return [
        (known[key], headers.get(key, known[key].header.replace(" ", "\n")))
        for key in keys
        if key in known
        and any(known[key].value(result) is not None for result in results)
        # ROUGE-L on retain and held-out rows stands in for fact recall only where a corpus has no facts.
        and not (facts and key in ("retain.rouge_l", "heldout.rouge_l"))
    ]


def _rich_table(results: Sequence[Result], title: str) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = _columns(results)
    narrow = len(columns) > 9
    table = RichTable(
        title=Text(title),
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE_HEAD,
        padding=0 if narrow else (0, 1, 0, 0),
    )
    table.add_column("model", overflow="fold")  # the only one that gives way to a narrow screen
    for _, header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        name = result.label if narrow and result.stage == "retain_only" else name_of(result)
        table.add_row(Text(name), *(column.text(result) for column, _ in columns))
    return table


def _legend(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Lines of the legend: what they are about (named once), the word explained, what it means."""
    rows = [("before", "the taught model, nothing forgotten")]
    if any(result.stage == "retain_only" for result in results):
        rows.append(("retain only", "a model never taught the forget set: the target for forgetting"))
    rows.append(("the others", "the taught model after unlearning with that objective"))
    present = {name for result in results for name in result.evaluation["sets"]}
    sets = [(one.label, one.meaning) for one in in_order(present)]
    keys = {text for column, _ in _columns(results) for text in (column.key, column.metric)}
    numbers = [entry for key, entry in NUMBERS.items() if key in keys]
    good = [
        ("forget", "low, as on the target row; so too in other words"),
        ("retain", "high, as before; so too held-out"),
    ]
    lines = []
    for topic, entries in (("rows", rows), ("sets", sets), ("numbers", numbers), ("good is", good)):
        lines += [(topic if not number else "", *entry) for number, entry in enumerate(entries)]
    return lines


def _print_words(console: Console, matrix: Matrix) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for objective, sentences in words(matrix):
        console.print()
        console.print(Text(f"{objective}: GRUN beside the others", style="bold"))
        for sentence in sentences:
            console.print(Padding(Text(sentence), (0, 0, 0, 2)))


def _print_examples(console: Console, results: Sequence[Result], set_name: str, count: int) -> None:
    from rich.text import Text

    shown = [result for result in results if result.stage != "retain_only"]
    answers = {
        result.name: {record.index: record for record in result.table.generations_of(set_name)} for result in shown
    }
    questions = list(next(filter(None, answers.values()), {}).values())[:count]
    if not questions:
        return
    asked = find_set(set_name)
    console.print()
    console.print(
        Text(
            f"First {len(questions)} {asked.label} question{'s' * (len(questions) > 1)}: {asked.meaning}",
            style="bold",
        )
    )
    for record in questions:
        of_models = [(r.label, answers[r.name][record.index].text) for r in shown if record.index in answers[r.name]]
        print_said(console, record.question, [("reference", record.reference), *of_models])


def print_words(console: Console, rows: Iterable[Sequence[str]]) -> None:
    """Print a legend: rows of as many texts each, in columns."""
    from rich.table import Table as RichTable
    from rich.text import Text

    words = RichTable.grid(padding=(0, 2, 0, 0))
    for texts in rows:
        words.add_row(*map(Text, texts))
    console.print(words)


def print_said(console: Console, question: str, said: Sequence[tuple[str, str]]) -> None:
    """Print a question and, indented below it, who said what, a line each."""
    from rich.table import Table as RichTable
    from rich.text import Text

    console.print(_one_line(question))
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    width = 2 + max(len(who) for who, _ in said)  # indented by two
    grid.add_column(justify="right", no_wrap=True, min_width=width, style="dim")
    for who, text in said:
        grid.add_row(Text(who), _one_line(text))
    console.print(grid)


def _one_line(text: str) -> Text:
    from rich.text import Text

    return Text(" ".join(readable(text).split()) or "(empty)")
