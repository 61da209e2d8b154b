"""`python -m grun leaderboard submit | verify | board`: results of any method, in files that anyone can check.

The board is a table for each corpus and model; its numbers are computed from the rows in the files, not read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from grun.config.options import LeaderboardConfig
from grun.errors import ConfigError, unknown_name
from grun.evaluation.metrics import METRICS
from grun.loading.resolve import resolve
from grun.report.columns import columns_by_key
from grun.report.matrix import Matrix, Row
from grun.report.result import Result, main_metric
from grun.report.results import number_at
from grun.report.submission import (
    Submission,
    make_submission,
    methods_in,
    models_at,
    read_submission,
    result_of,
    submission_bytes,
)
from grun.report.submission_checks import check
from grun.report.tables import Column, Table, markdown_points, markdown_text, to_markdown
from grun.report.verdict import judge
from grun.runtime.files import write_bytes, write_text
from grun.runtime.reading import read_text

ACTIONS = {
    "submit": "make a submission of evaluations: submit FOLDER ... tuning='...' output=FILE.json.gz",
    "verify": "compute every number of submissions again from their rows: verify FILE ...",
    "board": "write the board of submissions: board FILE ... output=FILE.md",
}
SEEDS = 3
"""Fewer are shown, and not ranked."""
BEGIN, END = "<!-- board -->", "<!-- end of the board -->"
"""What stands between these lines of a page is the board."""
QUALITY = "reference.forget_quality"
LEAKS = [
    Column("worst_of_prompts.leak", "leak, worst of prompts", "low", partial(number_at, key="worst_of_prompts.leak")),
    Column("worst.leak", "leak, worst", "low", partial(number_at, key="worst.leak")),
    Column("attacks", "attacks", "more is stricter", lambda one: len(one.evaluation["attacks"]) or None, "count"),
]
"""What attacks bring back; of how many."""


class Entry(NamedTuple):
    """A method on the board."""

    row: Row
    keeps: bool
    """Whether the verdict on each seed is that it forgot and kept the rest."""
    tuning: str
    file: str

    @property
    def ranked(self) -> bool:
        """Whether it has seeds enough."""
        return len(self.row.results) >= SEEDS


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
    write_text(output, _in_page(output, boards_of({path.name: _checked(path) for path in paths})))
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


def boards_of(submissions: dict[str, Submission]) -> str:
    """A table and notes for each corpus and model as Markdown, by the file that a submission lies in."""
    groups: dict[tuple[Any, ...], dict[str, Submission]] = {}
    for file, submission in submissions.items():
        (before,) = models_at(submission, "before")
        key = (submission["corpus"], before["base"], before["data"].get("forget"), before["settings"].get("limit"))
        groups.setdefault(key, {})[file] = submission
    boards = []
    for (corpus, *_), found in groups.items():
        table, notes = _board(found)
        boards.append(f"## {markdown_text(corpus)}\n\n{to_markdown(table)}\n{markdown_points(notes)}")
    return "\n".join(boards)


def _board(found: dict[str, Submission]) -> tuple[Table, list[str]]:
    results: list[Result] = []
    entries: list[Entry] = []
    for file, submission in found.items():
        of_file = {model["name"]: result_of(model, file) for model in submission["models"]}
        results += of_file.values()
        for method, runs in methods_in(submission).items():
            own = tuple(of_file[run["name"]] for run in runs)
            row = Row(method, "after", own[0].objective, own[0].parametrization, own)
            keeps = all(judge(one, [*of_file.values()]).outcome == "reached" for one in own)
            entries.append(Entry(row, keeps, submission["tuning"], file))
    columns = [*Matrix((), tuple(results)).columns, *LEAKS]
    compared = all(one.reference.get("forget_quality") is not None for entry in entries for one in entry.row.results)
    main = columns_by_key()[QUALITY if compared else f"forget.{main_metric(results)[0]}"]
    high = METRICS.get(main.key.partition(".")[2]).good.startswith("high")

    def order(entry: Entry) -> tuple[Any, ...]:
        value, worst = (entry.row.spread(column).center(column.style) or 0.0 for column in (main, LEAKS[1]))
        return (not entry.ranked, not entry.keeps, -value if high else value, worst, entry.row.label, entry.file)

    lines = [
        Row(one.title, one.stage, None, "none", (one,)).line(
            *("-", "-", "-"), *(column.text(one) for column in columns), "-"
        )
        for one in {one.stage: one for one in results if one.stage != "after"}.values()
    ]
    entries.sort(key=order)
    for number, entry in enumerate(entries, start=1):
        rank, kept = str(number) if entry.ranked else "-", "yes" if entry.keeps else "no"
        cells = (entry.row.spread(column).text(column.style) for column in columns)
        lines.append(entry.row.line(rank, entry.row.counted("-"), kept, *cells, entry.file))
    heads = ["rank", "seeds", "forgets and keeps", *(column.header for column in columns), "file"]
    good = ["low", f"{SEEDS} or more", "yes", *(column.good for column in columns), ""]
    notes = [
        f"Rank: first those that forget and keep the rest with every seed, then by {main.header} "
        f"({'high' if high else 'low'} is good), then by the worst leak. With fewer than {SEEDS} seeds: no rank."
    ]
    notes += [f"{entry.row.label} ({entry.file}): settings: {entry.tuning}" for entry in entries]
    return Table(heads, good, lines), notes


def _in_page(output: Path, board: str) -> str:
    """The page with the board between its marks, the rest of it as it is; a new one where there is none."""
    before, mark, after = (read_text(output) if output.is_file() else f"# Leaderboard\n\n{BEGIN}").partition(BEGIN)
    if not mark:
        raise ConfigError(f"{output} has no line {BEGIN}, where the board would stand; add it, or name another output")
    return f"{before}{BEGIN}\n\n{board}\n{END}{after.partition(END)[2] or chr(10)}"
