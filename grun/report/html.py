"""report.html: the whole report as one file that needs no network, no script and nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from grun.data.sets import EvaluationSet, in_order
from grun.evaluation.table import GenerationRecord
from grun.report.figures import MATRIX_PICTURE, Picture
from grun.report.matrix import Matrix, Row, first_seeds, make_matrix, one_seed_note
from grun.report.matrix_tables import halves, seeds_text
from grun.report.matrix_words import RULE, words
from grun.report.measures import Measure
from grun.report.missing import notes
from grun.report.provenance import command_of, provenance
from grun.report.results import Result, unread_words
from grun.report.style import STYLE
from grun.report.tables import columns_of, name_of, readable
from grun.report.terminal import EXAMPLES
from grun.report.verdicts import STATEMENT, Judgement, judge

WIDEST = 1500
"""Pixels up to which a picture is made to fit the page; a wider one would become too small to read, and scrolls."""
NUMBERS = (
    ("forget quality", "p-value of a Kolmogorov-Smirnov test between the forget set's truth ratios of the model and of "
     "the retain-only one. Above 0.05 the two cannot be told apart."),
    ("model utility", "TOFU's harmonic mean of probability, ROUGE-L and truth ratio on retain, real authors and world "
     "facts; 0 where one of them is 0."),
    ("fact recall", "Share of answers that contain the key fact."),
    ("ROUGE-L", "Share of the reference's words that the answer has in the same order."),
    ("probability", "Per token, of the reference answer; on real authors and world facts its share among the choices."),
    ("truth ratio", "How probable wrong answers are against the right one: 1 on forget where the model does not prefer "
     "either."),
    ("extraction strength", "Share of an answer that the model goes on to say once it is given the beginning."),
    ("degenerate", "Share of answers that are empty or repeat one word."),
    ("gate AUC", "How surely the gate tells forget from held-out questions (retain, where nothing is held out); 0.5 is "
     "chance."),
    ("MIA", "Membership inference, forget against unknown rows: 0.5 is chance, 1 says that forget was taught."),
    ("PrivLeak", "Min-K% membership inference against the retain-only model's, in percent."),
)  # fmt: skip
"""What a column's name means, for those that are shown."""


def page(results: Sequence[Result], title: str, drawn: Sequence[tuple[Picture, Path]]) -> str:
    """The report of `results` with the pictures that were drawn."""
    first, matrix = first_seeds(results), make_matrix(results)
    note = one_seed_note(results, first)
    above = f"<p>{escape(note)}</p>\n" if note else ""
    of_matrix = [embedded(picture, path) for picture, path in drawn if picture.name == MATRIX_PICTURE]
    others = [
        embedded(picture, path, "" if picture.every_seed else note)
        for picture, path in drawn
        if picture.name != MATRIX_PICTURE
    ]
    return frame(
        title,
        [
            ("matrix", "Matrix", "Matrix", "" if matrix is None else _matrix(matrix, "".join(of_matrix))),
            ("verdicts", "Verdicts", "Verdicts", above + _verdicts(first, results)),
            ("table", "Table", "All models", _table(results)),
            ("pictures", "Pictures", "Pictures", "".join(others)),
            ("answers", "Answers", "First answers of each set", above + _answers(first)),
            ("settings", "Settings", "Settings and provenance", settings(results)),
            ("statement", "What this is not", "What this is not", f"<p>{escape(STATEMENT)}</p>"),
        ],
    )


def frame(title: str, sections: Sequence[tuple[str, str, str, str]]) -> str:
    """A whole page of sections: anchor, link to it, heading, content; one without content is left out."""
    shown = [section for section in sections if section[3]]
    navigation = "".join(f'<li><a href="#{anchor}">{link}</a></li>' for anchor, link, _, _ in shown)
    parts = (
        f'<section id="{anchor}" aria-labelledby="{anchor}-heading">\n'
        f'<h2 id="{anchor}-heading">{heading}</h2>\n{content}</section>\n'
        for anchor, _, heading, content in shown
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<nav aria-label="Contents"><ul>{navigation}</ul></nav>
</header>
<main>
{"".join(parts)}</main>
</body>
</html>
"""


def escape(text: object) -> str:
    """Text as HTML shows it: nothing in it is markup."""
    return html.escape(readable(str(text)))


def scrolling(label: str, content: str, kind: str = "") -> str:
    """A box that scrolls by itself, by keyboard too."""
    return f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{escape(label)}">\n{content}</div>\n'


# -- verdicts and table -----------------------------------------------------------------------------------------------


def _verdicts(shown: Sequence[Result], results: Sequence[Result]) -> str:
    lines = []
    for result in shown:
        if result.stage != "after":
            continue
        lines.append(verdict_line(result.label, judge(result, results)))
    return "".join(lines) or "<p>No unlearned model has been evaluated yet; these are the models to compare with.</p>\n"


def verdict_line(label: str, judgement: Judgement) -> str:
    """A verdict, colored by its outcome."""
    rest = judgement.sentence.removeprefix(f"{label}: ").removeprefix(judgement.words).replace("->", "→")
    return (
        f'<p class="verdict {judgement.outcome}"><strong>{escape(label)}:</strong> '
        f'<span class="mark">{escape(judgement.words)}</span>{escape(rest)}</p>\n'
    )


def models_table(columns: Sequence[Any], results: Sequence[Result]) -> str:
    """A row for each model; a column has `header`, `good` and `text(result)`."""
    headers = "".join(f'<th scope="col">{unbroken(column.header)}</th>' for column in columns)
    good = "".join(f"<td>{escape(column.good)}</td>" for column in columns)
    rows = "".join(
        f'<tr class="{result.stage}"><th scope="row">{escape(name_of(result))}</th>'
        + "".join(f"<td>{escape(column.text(result))}</td>" for column in columns)
        + "</tr>\n"
        for result in results
    )
    return (
        f'<table>\n<thead><tr><th scope="col">model</th>{headers}</tr>\n'
        f'<tr class="good"><th scope="row">good is</th>{good}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n'
    )


def _table(results: Sequence[Result]) -> str:
    columns = columns_of(results)
    table = models_table(columns, results)
    present = {name for result in results for name in result.evaluation["sets"]}
    sets = [(one.label, one.meaning) for one in in_order(present) if one.meaning]
    headings = " ".join(column.header for column in columns)
    numbers = [(name, text) for name, text in NUMBERS if name in headings]
    rows_of = [("before", "The taught model, nothing forgotten.")]
    if any(result.stage == "retain_only" for result in results):
        rows_of.append(("retain only", "A model never taught the forget set: the target for forgetting."))
    rows_of.append(("the others", "The taught model after unlearning."))
    explained = ((f"{name} set", f"{text[0].upper()}{text[1:]}.") for name, text in sets)
    legend = definitions([*rows_of, *explained, *numbers])
    return (
        scrolling("Table of all models", table, "numbers")
        + _list_of(unread_words(results))
        + f"<details>\n<summary>What the rows, sets and numbers mean</summary>\n{legend}</details>\n"
    )


def unbroken(text: str) -> str:
    """Text that breaks between words alone, not at the hyphen of ROUGE-L."""
    return " ".join(f"<span>{escape(word)}</span>" for word in text.split())


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms, each with its text."""
    lines = (f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>\n" for term, text in pairs)
    return f"<dl>\n{''.join(lines)}</dl>\n"


# -- matrix -----------------------------------------------------------------------------------------------------------


def _matrix(matrix: Matrix, picture: str) -> str:
    tables = (
        scrolling(f"Matrix: {title}", _matrix_table(title, measures, rows), "numbers")
        for title, measures, rows in halves(matrix)
    )
    compared = [f"<h3>{escape(name)}</h3>\n{_list_of(sentences)}" for name, sentences in words(matrix)]
    return (
        "".join(tables)
        + f"<p>{escape(matrix.caption)}</p>\n"
        + _list_of(notes(matrix))
        + picture
        + (f"<p>GRUN beside the others. {escape(RULE)}</p>\n" if compared else "")
        + "".join(compared)
    )


def _list_of(texts: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul>\n{lines}</ul>\n" if lines else ""


def _matrix_table(title: str, measures: Sequence[Measure], rows: Sequence[Row]) -> str:
    headers = "".join(f'<th scope="col">{unbroken(text)}</th>' for text in ("seeds", *(m.header for m in measures)))
    good = "".join(f"<td>{escape(text)}</td>" for text in ("", *(measure.good for measure in measures)))
    lines = "".join(
        f'<tr class="{row.stage}"><th scope="row">{escape(row.label)}</th><td>{seeds_text(row)}</td>'
        + "".join(f"<td>{escape(row.spread(measure).text(measure.kind))}</td>" for measure in measures)
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<table>\n<thead><tr><th scope="col">{escape(title.lower())}</th>{headers}</tr>\n'
        f'<tr class="good"><th scope="row">good is</th>{good}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>\n'
    )


# -- pictures ---------------------------------------------------------------------------------------------------------


def embedded(picture: Picture, path: Path, note: str = "") -> str:
    """A picture, its bytes in the page, with its caption."""
    data = path.read_bytes()
    # Width and height stand at bytes 16 to 24 of a PNG; three of them make two on the page.
    width, height = (int.from_bytes(data[start : start + 4], "big") * 2 // 3 for start in (16, 20))
    kind = ' class="wide"' if width > WIDEST else ""
    image = (
        f'<img{kind} width="{width}" height="{height}" alt="{escape(f"{picture.title}. {picture.text}")}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )
    text = f"{picture.text} {note}".rstrip()
    caption = f"<figcaption><strong>{escape(picture.title)}.</strong> {escape(text)}</figcaption>"
    return f"<figure>\n{scrolling(picture.title, image, 'picture')}{caption}\n</figure>\n"


# -- answers ----------------------------------------------------------------------------------------------------------


def _answers(results: Sequence[Result]) -> str:
    blocks = (_answers_of(results, one) for one in in_order(name for r in results for name in r.table.sets()))
    return "".join(block for block in blocks if block)


def _answers_of(results: Sequence[Result], asked: EvaluationSet) -> str:
    answers = [(result, {row.index: row for row in result.table.generations_of(asked.name)}) for result in results]
    rows: dict[int, GenerationRecord] = {}
    for _, found in answers:
        rows = {**found, **rows}
    if not rows:
        return ""
    cards = []
    for index, row in islice(sorted(rows.items()), EXAMPLES):
        said = [("reference", row.reference), *((a.label, found[index].text) for a, found in answers if index in found)]
        lines = "".join(f'<div><dt>{escape(who)}</dt><dd dir="auto">{answer(text)}</dd></div>\n' for who, text in said)
        cards.append(f'<article>\n<h4 dir="auto">{escape(row.question)}</h4>\n<dl>\n{lines}</dl>\n</article>\n')
    meaning = f": {asked.meaning}" if asked.meaning else ""
    summary = f"<summary><h3>{escape(asked.label)}</h3>{escape(meaning)}</summary>"
    opened = " open" if asked.name == "forget" else ""
    return f'<details class="set"{opened}>\n{summary}\n{"".join(cards)}</details>\n'


def answer(text: str) -> str:
    """What a model said."""
    return escape(text.strip()) or "<em>(empty)</em>"


# -- settings ---------------------------------------------------------------------------------------------------------


def settings(results: Sequence[Result]) -> str:
    """Settings of each model's evaluation and run."""
    blocks = []
    for result in results:
        command = command_of(result.record)
        shown = ""
        if command is not None:
            what = "The run's command" if result.run else "The command that taught the model"
            shown = f"<p>{what}, with the options in which it differs from its profile:</p>\n"
            shown += scrolling(f"Command of {result.label}", f"<pre><code>{escape(command)}</code></pre>\n")
        blocks.append(
            f'<details class="set">\n<summary><h3>{escape(name_of(result))}</h3></summary>\n'
            f"{definitions(provenance(result))}{shown}</details>\n"
        )
    return "".join(blocks)
