"""The end of a pipeline: one table, a verdict, some answers and three pictures, from results on disk alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config import ReportConfig
from grun.evaluation.table import Table
from grun.files import write_json
from grun.results import NAMES, Result, collect, find_results, has_facts, main_metric, summarize

__all__ = ["collect", "make_report", "print_report", "verdict"]

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SUMMARY_FILE = "summary.json"
EXAMPLES = 5
"""Questions shown of each set."""
WIDTH = 100
KNOWN_BEFORE = 0.95
"""Columns of the printed report where stdout is no terminal."""
SETS = {
    "forget": "what is to be forgotten",
    "forget_paraphrase": "the same questions in other words",
    "retain": "taught, and named in unlearning as what must stay",
    "heldout": "taught, and never seen in unlearning: what must stay too",
    "unknown": "never taught to any model",
}
"""Sets of rows, with what the legend says of them."""
COLUMNS = (
    ("forget", "fact_recall", "forget fact recall"),
    ("forget", "rouge_l", "forget ROUGE-L"),
    ("forget_paraphrase", "fact_recall", "paraphrase fact recall"),
    ("retain", "fact_recall", "retain fact recall"),
    ("retain", "rouge_l", "retain ROUGE-L"),
    ("heldout", "fact_recall", "held-out fact recall"),
    ("heldout", "rouge_l", "held-out ROUGE-L"),
    ("unknown", "rouge_l", "unknown ROUGE-L"),
    ("forget", "degenerate", "forget degenerate"),
)
STATEMENT = (
    "The base weights still contain the data; the effect exists where the adapter is loaded. "
    "It controls the model's output and is not erasure of weights."
)


def make_report(config: ReportConfig) -> dict[str, Any]:
    """Write summary.json and the pictures into config.results_dir, print the report, and return the summary."""
    from rich.console import Console

    from grun.figures import draw

    results_dir = Path(config.results_dir)
    results = find_results(results_dir)
    summary = summarize(results, config.profile)
    write_json(results_dir / SUMMARY_FILE, summary)
    pictures = draw(results, results_dir)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    print_report(console, results, config.profile)
    for path in (results_dir / SUMMARY_FILE, *pictures):
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return summary


def print_report(console: Console, results: list[Result], profile: str) -> None:
    """Print the table, what it means, a verdict for each run, and the first answers before and after."""
    from rich.table import Table as RichTable
    from rich.text import Text

    def line(text: str = "", style: str = "") -> None:
        console.print(Text(text, style=style))

    console.print(_rich_table(results, profile))
    legend = RichTable.grid(padding=(0, 2, 0, 0))
    for texts in _legend(results):
        legend.add_row(*(Text(text) for text in texts))
    console.print(legend)
    line()
    for result in results:
        if result.stage == "after":
            line(verdict(result, results))
    line()
    line(STATEMENT, "bold")
    for set_name in ("forget", "heldout"):
        _print_examples(console, results, set_name)


def _rich_table(results: list[Result], profile: str) -> Any:
    from rich import box
    from rich.table import Table as RichTable

    facts = has_facts(results)
    columns = [
        (set_name, metric, header)
        for set_name, metric, header in COLUMNS
        if any(result.metric(set_name, metric) is not None for result in results)
        # ROUGE-L on retain and held-out rows stands in for fact recall only where a corpus has no facts.
        and not (facts and metric == "rouge_l" and set_name in ("retain", "heldout"))
    ]
    gated = any(_auc(result) is not None for result in results)
    title = f"Unlearning, profile {profile}"
    table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for *_, header in columns:
        table.add_column(header.replace(" ", "\n"), justify="right")
    if gated:
        table.add_column("gate\nAUC", justify="right")
    for result in results:
        cells = [_number(result.metric(set_name, metric), 2) for set_name, metric, _ in columns]
        name = f"{result.label} (target)" if result.stage == "retain_only" else result.label
        if result.stage == "after" and result.parametrization != "grun":
            name += f" ({result.parametrization})"
        table.add_row(name, *cells, *([_number(_auc(result), 3)] if gated else []))
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _auc(result: Result) -> float | None:
    """Forget against held-out; against retain where nothing is held out."""
    gate = result.evaluation.get("gate", {})
    value = gate.get("auc_heldout", gate.get("auc_retain"))
    return None if value is None else float(value)


def _legend(results: list[Result]) -> list[tuple[str, str, str]]:
    """Lines of the legend: what they are about (named once), the word explained, what it means."""
    rows = [("before", "the taught model, nothing forgotten")]
    if any(result.stage == "retain_only" for result in results):
        rows.append(("retain only", "a model never taught the forget set: the target for forgetting"))
    rows.append(("the others", "the taught model after unlearning with that objective"))
    present = {name for result in results for name in result.evaluation["sets"]}
    sets = [(NAMES[name], meaning) for name, meaning in SETS.items() if name in present]
    numbers = [("fact recall", "share of answers that contain the key fact")] if has_facts(results) else []
    numbers.append(("ROUGE-L", "share of the reference's words in the answer, in the same order"))
    numbers.append(("degenerate", "share of answers that are empty or repeat one word; low is good"))
    if any(_auc(result) is not None for result in results):
        numbers.append(("gate AUC", "how surely the gate tells forget from held-out; 1: always, 0.5: by chance"))
    good = [
        ("forget", "low, as on the target row; so too in other words"),
        ("retain", "high, as before; so too held-out"),
    ]
    lines = []
    for topic, entries in (("rows", rows), ("sets", sets), ("numbers", numbers), ("good is", good)):
        lines += [(topic if not number else "", *entry) for number, entry in enumerate(entries)]
    return lines


def verdict(result: Result, results: list[Result]) -> str:
    """One sentence: has this run forgotten as far as the target, and kept what the model knew before.

    Forgotten: fact recall on forget at most max(0.05, target + 0.05), and ROUGE-L at most target + 0.05. Kept: at
    least 95 % of before on retain and 90 % on held-out. Without facts ROUGE-L stands for fact recall. Where the taught
    model did not know the forget facts, nothing can be said to be forgotten.
    """
    metric, metric_name = main_metric(results)
    before = results[0]
    target = next((other for other in results if other.stage == "retain_only"), None)
    now = result.metric("forget", metric)
    if now is None:
        return f"{result.label}: the forget set was not evaluated."
    facts = f"{metric_name} on forget {_number(before.metric('forget', metric), 2)} -> {now:.2f}"
    failures = []
    if target is None:
        facts += " (no target to compare with: evaluate a retain-only model)"
    else:
        facts += f" (target {_number(target.metric('forget', metric), 2)})"
        for name, text, least in (("fact_recall", "fact recall", 0.05), ("rouge_l", "ROUGE-L", 0.0)):
            value, goal = result.metric("forget", name), target.metric("forget", name)
            if value is not None and goal is not None and value > max(least, goal + 0.05) + 1e-9:
                failures.append(f"{text} on forget {value:.2f} is more than 0.05 above the target's {goal:.2f}")
    taught = before.metric("forget", metric)
    if metric == "fact_recall" and taught is not None and taught < KNOWN_BEFORE:
        failures.append(f"the taught model itself knew only {taught:.2f} of the forget facts")
    kept = []
    for name, share in (("retain", 0.95), ("heldout", 0.90)):
        value, known = result.metric(name, metric), before.metric(name, metric)
        if value is None or not known:
            continue
        kept.append(f"{value / known:.0%} of before on {NAMES[name]}")
        if value < share * known - 1e-9:
            failures.append(f"keeps less than {share:.0%} on {NAMES[name]}")
    tail = f"; keeps {', '.join(kept)}" if kept else ""
    forgotten = "forgotten, the rest kept" if target else "no verdict"
    judgement = "NOT reached (" + "; ".join(failures) + ")" if failures else forgotten
    return f"{result.label}: {judgement}: {facts}{tail}."


def _print_examples(console: Console, results: list[Result], set_name: str) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = [result for result in results if result.stage != "retain_only"]
    answers = {
        result.name: {record.index: record for record in Table.read(result.folder).generations_of(set_name)}
        for result in shown
    }
    questions = list(answers[shown[0].name].values())[:EXAMPLES]
    if not questions:
        return
    console.print()
    console.print(Text(f"First {len(questions)} {NAMES[set_name]} questions: {SETS[set_name]}", style="bold"))
    width = 2 + max(len("reference"), *(len(result.label) for result in shown))  # indented by two
    for record in questions:
        console.print(Text(record.question))
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(justify="right", no_wrap=True, min_width=width, style="dim")
        grid.add_row(Text("reference"), _one_line(record.reference))
        for result in shown:
            if record.index in answers[result.name]:
                grid.add_row(Text(result.label), _one_line(answers[result.name][record.index].text))
        console.print(grid)


def _one_line(text: str) -> Text:
    from rich.text import Text

    return Text(" ".join(text.split()) or "(empty)")
