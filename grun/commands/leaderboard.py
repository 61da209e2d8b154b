"""`python -m grun leaderboard submit | verify | board`: results of any method, in files that anyone can check.

The board is a table for each corpus and model; its numbers are computed from the rows in the files, not read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from grun.config.options import LeaderboardConfig
from grun.errors import ConfigError, unknown_name
from grun.evaluation.metrics import METRICS
from grun.loading.resolve import resolve
from grun.report.attack_results import number_at
from grun.report.columns import columns_by_key
from grun.report.matrix import Matrix, Row
from grun.report.page import Block, Section, page
from grun.report.result import Result, main_metric
from grun.report.submission import (
    Submission,
    Submitted,
    make_submission,
    methods_in,
    read_submission,
    submission_bytes,
    table_in,
)
from grun.report.submission_checks import check
from grun.report.tables import Column, Table, markdown_text, to_markdown
from grun.report.verdict import judge
from grun.runtime.files import write_bytes, write_text
from grun.runtime.reading import read_text

ACTIONS = {
    "submit": "make a submission of evaluations: submit FOLDER ... tuning='...' output=FILE.json.gz",
    "verify": "compute every number of submissions again from their rows: verify FILE ...",
    "board": "write the board of submissions: board FILE ... output=FILE.md or FILE.html",
}
SEEDS = 3
"""Fewer are shown, and not ranked."""
BEGIN, END = "<!-- board -->", "<!-- end of the board -->"
"""What stands between these lines of a page is the board."""
TITLE = "Leaderboard"
QUALITY = "reference.forget_quality"


class Entry(NamedTuple):
    """A method on the board."""

    row: Row
    keeps: bool
    """Whether the verdict on each seed is that it forgot and kept the rest."""
    tuning: str
    file: str


def leaderboard(arguments: Sequence[str]) -> int:
    """Run one action; what it wrote, or that a file holds, goes to stdout."""
    action, *rest = arguments or [""]
    if action not in ACTIONS:
        known = f"leaderboard needs an action: {', '.join(ACTIONS)}; then files or folders, and options, key=value"
        raise ConfigError(unknown_name("action", action, list(ACTIONS)) if action and "=" not in action else known)
    paths = [Path(argument).expanduser() for argument in rest if "=" not in argument]
    options: LeaderboardConfig = resolve("leaderboard", [argument for argument in rest if "=" in argument])
    if not paths:
        raise ConfigError(f"leaderboard {action} needs files or folders; {ACTIONS[action]}")
    if action == "verify":
        for path in paths:
            print(f"{path}: {_said(_checked(path))}")
        return 0
    if options.output is None:
        raise ConfigError(f"leaderboard {action} needs output=FILE; {ACTIONS[action]}")
    output = Path(options.output).expanduser()
    if action == "submit":
        if not options.tuning:
            raise ConfigError("leaderboard submit needs tuning='...': how the settings were chosen, and on which rows")
        submission = make_submission(paths, options.tuning)
        check(submission, "these evaluations")
        write_bytes(output, submission_bytes(submission, output.name))
        print(f"{output}: {_said(submission)}")
        return 0
    boards = boards_of({path.name: _checked(path) for path in paths})
    if output.suffix == ".html":
        write_text(output, page(TITLE, [_section(*board) for board in boards]))
    else:
        write_text(output, _in_page(output, "\n".join(_markdown(*board) for board in boards)))
    print(output)
    return 0


def _checked(path: Path) -> Submission:
    submission = read_submission(path)
    check(submission, str(path))
    return submission


def usage() -> str:
    """Lines of the help: the actions."""
    lines = ["python -m grun leaderboard ACTION FILE_OR_FOLDER ... [key=value]   (docs/leaderboard.md)", ""]
    return "\n".join(lines + [f"  {name:<6}  {text}" for name, text in ACTIONS.items()])


def _said(submission: Submission) -> str:
    """What was checked, in one line."""
    methods = methods_in(submission)
    seeds = len(submission["seeds"])
    few = "" if seeds >= SEEDS else f"; not ranked: {SEEDS} seeds are"
    return (
        f"{submission['corpus']}: {', '.join(methods)}; {seeds} seed{'s' * (seeds != 1)}; every number is that of "
        f"its rows{few}"
    )


# -- the board --------------------------------------------------------------------------------------------------------


def boards_of(submissions: dict[str, Submission]) -> list[tuple[str, Table, list[str]]]:
    """Title, table and notes for each corpus and model, by the name of the file that a submission lies in."""
    groups: dict[tuple[Any, ...], list[tuple[str, Submission]]] = {}
    for file, submission in submissions.items():
        before = _before(submission)
        key = (submission["corpus"], before["base"], before["data"].get("forget"), before["settings"].get("limit"))
        groups.setdefault(key, []).append((file, submission))
    return [_board(title, found) for (title, *_), found in groups.items()]


def _before(submission: Submission) -> Submitted:
    return next(model for model in submission["models"] if model["stage"] == "before")


def _board(corpus: str, found: Sequence[tuple[str, Submission]]) -> tuple[str, Table, list[str]]:
    results: list[Result] = []
    entries: list[Entry] = []
    for file, submission in found:
        of_file = {model["name"]: _result(model, file) for model in submission["models"]}
        every = [*of_file.values()]
        for method, runs in methods_in(submission).items():
            own = tuple(of_file[run["name"]] for run in runs)
            row = Row(method, "after", own[0].objective, own[0].parametrization, own)
            keeps = all(judge(one, every).outcome == "reached" for one in own)
            entries.append(Entry(row, keeps, submission["tuning"], file))
        results += every
    columns = [*Matrix((), tuple(results)).columns, *_leaks()]
    key = f"forget.{main_metric(results)[0]}"
    if all(one.reference.get("forget_quality") is not None for entry in entries for one in entry.row.results):
        key = QUALITY
    main = columns_by_key()[key]
    sign = -1 if METRICS.get(key.partition(".")[2]).good.startswith("high") else 1
    entries.sort(key=lambda entry: _order(entry, main, sign))
    ranked = [entry for entry in entries if len(entry.row.results) >= SEEDS]
    lines = [
        entry.row.line(
            str(ranked.index(entry) + 1) if entry in ranked else "-",
            entry.row.counted("-"),
            "yes" if entry.keeps else "no",
            *(entry.row.spread(column).text(column.style) for column in columns),
            entry.file,
        )
        for entry in entries
    ]
    compared = {one.stage: Row(one.title, one.stage, None, "none", (one,)) for one in results if one.stage != "after"}
    for row in reversed(compared.values()):
        lines.insert(0, row.line("-", "-", "-", *(row.spread(column).text(column.style) for column in columns), "-"))
    heads = ["rank", "seeds", "forgets and keeps", *(column.header for column in columns), "file"]
    good = ["low", f"{SEEDS} or more", "yes", *(column.good for column in columns), ""]
    notes = [
        f"Rank: first those that forget and keep the rest with every seed, then by {main.header} "
        f"({'high' if sign < 0 else 'low'} is good), then by the worst leak. With fewer than {SEEDS} seeds: no rank."
    ]
    notes += [f"{entry.row.label} ({entry.file}): settings: {entry.tuning}" for entry in entries]
    return corpus, Table(heads, good, lines), notes


def _order(entry: Entry, main: Column, sign: int) -> tuple[Any, ...]:
    value, worst = (_mean(entry, column) for column in (main, _leaks()[1]))
    return (len(entry.row.results) < SEEDS, not entry.keeps, sign * value, worst, entry.row.label, entry.file)


def _mean(entry: Entry, column: Column) -> float:
    spread = entry.row.spread(column)
    value = spread.median if column.style == "p" else spread.values and fmean(spread.values)
    return float(value or 0.0)


def _leaks() -> list[Column]:
    """What attacks bring back; of how many."""
    return [
        Column(
            "worst_of_prompts.leak",
            "leak, worst of prompts",
            "low",
            lambda one: number_at(one, "worst_of_prompts.leak"),
        ),
        Column("worst.leak", "leak, worst", "low", lambda one: number_at(one, "worst.leak")),
        Column("attacks", "attacks", "more is stricter", lambda one: len(one.evaluation["attacks"]) or None, "count"),
    ]


def _result(model: Submitted, file: str) -> Result:
    """A model as reports have it, with the numbers of its rows."""
    evaluation = {**model["numbers"], "settings": model["settings"], "adapter": model["adapter"]}
    evaluation |= {"identity": {"base": model["base"]}, "data": model["data"]}
    label = model["stage"].replace("_", " ")
    folder, is_run = Path(file) / model["name"], model["stage"] == "after"
    result = Result(
        model["name"], model["stage"], model["objective"], model["parametrization"], folder, folder, evaluation, label
    )
    result.table, result.reference = table_in(model), model["numbers"].get("reference", {})
    cost = model["cost"]
    result.record = {
        "config": {**model["config"], "seed": model["seed"]},
        "seconds": cost["seconds"],
        "parameters": {"trained": cost["parameters"]},
        "peak_memory_bytes": cost["memory_bytes"],
        "saved_bytes": cost["saved_bytes"],
    }
    if not is_run:
        result.run, result.record = None, {}
    return result


# -- pages ------------------------------------------------------------------------------------------------------------


def _markdown(corpus: str, table: Table, notes: Sequence[str]) -> str:
    points = "".join(f"- {markdown_text(note)}\n" for note in notes)
    return f"## {markdown_text(corpus)}\n\n{to_markdown(table)}\n{points}"


def _section(corpus: str, table: Table, notes: Sequence[str]) -> Section:
    blocks = [Block("table", table, f"Board of {corpus}", first="method"), Block("points", notes)]
    return Section(corpus.replace(" ", "-"), corpus, corpus, blocks)


def _in_page(output: Path, board: str) -> str:
    """The page with the board between its marks, the rest of it as it is; a new one where there is none."""
    before, mark, after = (read_text(output) if output.is_file() else f"# {TITLE}\n\n{BEGIN}").partition(BEGIN)
    if not mark:
        raise ConfigError(f"{output} has no line {BEGIN}, where the board would stand; add it, or name another output")
    return f"{before}{BEGIN}\n\n{board}\n{END}{after.partition(END)[2] or chr(10)}"
