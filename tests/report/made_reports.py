"""Every kind of report, made of results that are written by hand, and its files as they are compared.

`PYTHONPATH=.:tests python tests/report/made_reports.py` writes `tests/report/golden/`.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

from made_results import write_demo, write_matrix, write_tofu
from made_suites import (
    BEFORE,
    FLOOR,
    made_experiment,
    searched,
    write_attacked,
    write_knowledge,
    write_lines,
    write_seeds,
    write_withstood,
)

from grun.config.options import ReportConfig
from grun.experiments.sequential.results import summarize
from grun.experiments.sequential.tables import experiment_csv, experiment_markdown, printed
from grun.report import figures, make
from grun.report.make import make_report

PAGE = "report.html"
VOID = {"meta", "img", "br", "link", "input"}
GOLDEN = Path(__file__).parent / "golden"
FILES = (
    "summary.json",
    "table.csv",
    "table.md",
    "table.tex",
    "matrix.csv",
    "matrix.md",
    "matrix.tex",
    "table_runs.csv",
)


def demo(folder: Path) -> ReportConfig:
    return ReportConfig(results_dir=str(write_demo(folder)), profile="demo")


def tofu(folder: Path) -> ReportConfig:
    return ReportConfig(results_dir=str(write_tofu(folder, settings={"quirks": ["ratio_epsilon"]})), profile="mine")


def comparison(folder: Path) -> ReportConfig:
    runs = [write_tofu(folder / name, key=name) for name in ("a", "b")]
    shutil.rmtree(runs[1] / "evaluation" / "npo_full")
    return ReportConfig(results_dir=str(folder / "both"), runs=[str(run) for run in runs])


def matrix(folder: Path) -> ReportConfig:
    """With a cell that failed, and one of another's seeds."""
    failed = [*(f"npo-reft-s{seed}" for seed in (42, 43, 44)), "gd-lora-s44"]
    return ReportConfig(results_dir=str(write_matrix(folder, rows=10, left_out=failed)), profile="mine")


def matrix_tofu(folder: Path) -> ReportConfig:
    write_matrix(folder, rows=6, facts=False, objectives=["gd"], parametrizations=["lora", "grun"], seeds=[42, 43])
    return ReportConfig(results_dir=str(folder), profile="mine")


def attacks(folder: Path) -> ReportConfig:
    return ReportConfig(results_dir=str(write_withstood(folder)), profile="mine")


def attacks_seeds(folder: Path) -> ReportConfig:
    """Means over seeds, with attacks that search, read or have the weights."""
    ways = {"memorized": 1.0, "paraphrased": 0.8}
    more = {
        "adaptive": searched(0.0, 0.2, 0.3),
        "recognition": {"access": "read_out", "leak": 0.9, "worst": 1.0, "rows": 40, "variants": ways},
        "relearn_forget_50": {"access": "weights", "leak": 0.8, "worst": 0.8, "rows": 40},
    }
    write_attacked(folder, "before", BEFORE, more=more)
    write_attacked(folder, "retain_only", FLOOR)
    write_seeds(folder, "idk", *({**FLOOR, "few_shot": leaked, "worst": leaked} for leaked in (0.03, 0.12, 0.0)))
    write_seeds(folder, "gd", FLOOR, rank=8, more=more, gate=0.1)
    write_lines(folder / "evaluation" / "idk-s2", ("forget", "few_shot", 0.5, "town7"))
    return ReportConfig(results_dir=str(folder), profile="mine")


def knowledge(folder: Path) -> ReportConfig:
    return ReportConfig(results_dir=str(write_knowledge(folder)), profile="mine")


REPORTS: dict[str, Callable[[Path], ReportConfig]] = {
    made.__name__: made for made in (demo, tofu, comparison, matrix, matrix_tofu, attacks, attacks_seeds, knowledge)
}


SEQUENCE = "sequence"
NAMES = (*REPORTS, SEQUENCE)


def files_of(name: str, folder: Path) -> dict[str, str]:
    """The files of a report by name, what it prints as terminal.txt, and the text of its page as page.txt."""
    if name == SEQUENCE:
        return _sequence()
    config = REPORTS[name](folder)
    stdout = io.StringIO()
    with _without_legends(), contextlib.redirect_stdout(stdout):
        make_report(config)
    place = Path(config.results_dir or "")
    texts = {file: (place / file).read_text(encoding="utf-8") for file in FILES if (place / file).is_file()}
    texts["terminal.txt"] = _lines(stdout.getvalue())
    texts[PAGE] = (place / PAGE).read_text(encoding="utf-8")
    texts["page.txt"] = "".join(f"{' '.join(line)}\n" for line in Page(texts[PAGE]).lines if len(line) > 1)
    return {file: text.replace(str(folder), "RESULTS") for file, text in texts.items()}


@contextlib.contextmanager
def _without_legends() -> Iterator[None]:
    """Reports in which no word is explained: what metrics and attacks are is described in their own rooms."""
    explained = {
        name: replace(suite, legend=lambda results: [("word", "meaning")]) for name, suite in make.REPORTS.items()
    }
    with patch.dict(make.REPORTS, explained):
        yield


def _lines(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _sequence() -> dict[str, str]:
    experiment = made_experiment()
    summaries = [summarize(method, experiment) for method in experiment.methods]
    return {
        "table.csv": experiment_csv(experiment, summaries),
        "table.md": experiment_markdown(experiment, summaries, "3 requests"),
        "terminal.txt": _lines(printed(experiment, summaries)),
    }


class Page(HTMLParser):
    """A parsed page: tags with their attributes, text, tables, lines; a tag closed out of order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.lines: list[list[str]] = [[""]]
        """A line a block, cells of a row in one line, in front of each the tag."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append((tag, known))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.lines[-1].append("|")
        elif tag == "img":
            self.lines.append(["img", known.get("alt") or ""])
        elif tag not in ("span", "strong", "em", "code", "a"):
            self.lines.append([f"{tag}.{known['class']}" if known.get("class") else tag])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if data.strip():
            self.lines[-1].append(" ".join(data.split()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


if __name__ == "__main__":
    figures.DPI = 20
    with tempfile.TemporaryDirectory() as temporary:
        for name in sys.argv[1:] or NAMES:
            shutil.rmtree(GOLDEN / name, ignore_errors=True)
            (GOLDEN / name).mkdir(parents=True)
            for file, text in files_of(name, Path(temporary) / name).items():
                if file != PAGE:
                    (GOLDEN / name / file).write_text(text, encoding="utf-8")
