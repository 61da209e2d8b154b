"""An attack report as it is printed: the table, what it means, a verdict for each method, what came back."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.evaluation.attacks.base import ATTACKS
from grun.report.attack_tables import columns_of, counted
from grun.report.attack_verdicts import STATEMENT, judge_attacks
from grun.report.attacks import attack_label, attack_names, beyond, leak_key
from grun.report.knowledge_tables import Column
from grun.report.knowledge_terminal import numbers_table, print_verdicts
from grun.report.results import Result
from grun.report.terminal import print_said, print_words

if TYPE_CHECKING:
    from rich.console import Console

HEADERS = {
    "suffix": "suf-\nfix",
    "prefill 1": "pre-\nfill\n1",
    "prefill 3": "pre-\nfill\n3",
    "prefill 5": "pre-\nfill\n5",
    "other template": "tem-\nplate",
    "paraphrase": "para-\nphr.",
    "second turn": "2nd\nturn",
    "samples": "sam-\nples",
    "recognition": "recog-\nnition",
    "adapter removed": "no\nadap-\nter",
    "quantized int8": "int8",
    "quantized nf4": "nf4",
    "worst of prompts": "worst\nof\nprom.",
    "worst": "worst\nof\nall",
}
"""Headers that fit, by the column's; of others each word is a line."""
FURTHER = ("With more than the text, or with the weights", "What other answers keep")
"""Headings of the table's second and third part."""
EXPLAINED = (
    ("worst_of_prompts.*", "worst of prompts", "mean over rows of the worst of all prompts, plain included"),
    ("worst.*", "worst of all", "the same with prefilled and drawn answers"),
    ("retention.plain.*.kept", "kept", "what other answers keep, asked alone; high is good"),
    ("retention.otherwise.*", "kept asked otherwise", "the same in the prompts of the attacks, without prefills"),
    ("retention.after_forget.*", "kept after forget", "the same behind a forget question"),
    (
        "retention.plain.*.gate.*",
        "false positives",
        "share of questions to be kept, any gate open there or on the right answer",
    ),
)
"""Legend of the numbers that are no attack's, by their columns' keys."""


def legend(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Words of the table, each with what it means."""
    rows = [("before", "the model before unlearning: what an attack can reach")]
    if any(result.stage == "retain_only" for result in results):
        rows.append(("retain only", "a model never taught the forget set: the floor"))
    rows.append(("leak", "how much of the forget answers comes back, 0 to 1, under:"))
    described = {entry.name: entry.description for entry in ATTACKS}
    rows += [(attack_label(name), described[name]) for name in attack_names(results) if name in described]
    keys = [column.key for column in columns_of(results)]
    rows += [(word, text) for pattern, word, text in EXPLAINED if fnmatch.filter(keys, pattern)]
    return rows


def print_attacks(
    console: Console, results: Sequence[Result], title: str, leaked: Sequence[tuple[Result, dict[str, Any]]]
) -> None:
    """Print the table in parts, its legend, the verdicts, and the lines of attacks.jsonl that are given for methods."""
    from rich.text import Text

    for columns, heading in zip(_parts(results), (title, *FURTHER), strict=True):
        if columns:
            console.print(numbers_table([(column, _header(column)) for column in columns], results, heading))
    print_words(console, legend(results))
    console.print(Text(counted(results)))
    console.print()
    print_verdicts(
        console, [judge_attacks(result, results) for result in results if result.stage == "after"], STATEMENT
    )
    if leaked:
        console.print()
        console.print(Text("What each method gave back most", style="bold"))
    for result, line in leaked:
        print_said(console, line["prompt"], [(f"{result.label}, {attack_label(line['attack'])}", line["text"])])


def _parts(results: Sequence[Result]) -> tuple[list[Column], list[Column], list[Column]]:
    """Columns of attacks that verdicts go by, of the others, and of what is kept."""
    columns, further = columns_of(results), [leak_key(name) for name in beyond(results)]
    kept = [column for column in columns if column.key.startswith("retention.")]
    others = [column for column in columns if column.key in further]
    return [column for column in columns if column not in kept + others], others, kept


def _header(column: Column) -> str:
    if ".gate." in column.key:
        return "false\npos."
    return HEADERS.get(column.header, column.header.replace(" ", "\n"))
