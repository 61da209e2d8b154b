"""report.html and the tables beside it: one file, safe, complete, and saying the same as summary.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from made_reports import Page
from made_results import KNOWN, write_evaluation, write_run, write_tofu

from grun.config.options import ReportConfig
from grun.report import figures
from grun.report.answers import ANSWER_SUITE
from grun.report.make import make_report
from grun.report.page import Block, Section, page
from grun.report.provenance import command_of
from grun.report.results import find_results
from grun.report.tables import shown as shown_number
from grun.report.verdict import STATEMENT

NASTY = '<script>alert("1")</script><img src=x onerror=alert(2)> & \x00\x1b[2J'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOFU's results with markup in every answer, and the report of them."""
    folder = tmp_path_factory.mktemp("results") / "a_b & 100%"
    write_tofu(folder, text=lambda text: text + NASTY, settings={"quirks": ["ratio_epsilon"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 20)
        make_report(ReportConfig(results_dir=str(folder), profile="tofu_small"))
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def test_the_page_needs_nothing_but_itself(text: str, parsed: Page) -> None:
    assert not re.search(r"https?://|url\(|@import", text)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "src") or (value or "").startswith(("#", "data:image/png;base64,")), value
    assert len(parsed.all("img")) == 5


def test_the_page_is_laid_out_for_every_reader(text: str, parsed: Page) -> None:
    assert text.startswith("<!doctype html>")
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert {"name": "color-scheme", "content": "light dark"} in parsed.all("meta")
    assert [len(parsed.all(tag)) for tag in ("header", "main", "h1", "title")] == [1, 1, 1, 1]
    assert all(len(image["alt"] or "") > 40 for image in parsed.all("img"))
    scrolling = [box for box in parsed.all("div") if (box.get("class") or "").startswith("scroll")]
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in scrolling)
    # every table and picture scrolls in a box of its own
    assert len(scrolling) >= len(parsed.all("table")) + len(parsed.all("img"))
    sizes = re.findall(r"font(?:-size)?: (?:[\d]+ )?([\d.]+)(px|rem)", text)
    assert len(sizes) >= 8 and all(float(size) * (16 if unit == "rem" else 1) >= 14 for size, unit in sizes)
    anchors = {link["href"] for link in parsed.all("a")}
    sections = [f"#{section['id']}" for section in parsed.all("section")]
    first = ["#examples", "#verdicts", "#matrix", "#table"]
    assert sections == [*first, "#pictures", "#settings", "#statement"]
    assert anchors == set(sections)
    assert STATEMENT in parsed.text


def test_what_models_and_users_say_is_text(text: str, parsed: Page) -> None:
    assert "<script" not in text and "onerror=alert(2)>" not in text
    assert '<script>alert("1")</script><img src=x onerror=alert(2)> & \N{REPLACEMENT CHARACTER}' in parsed.text
    assert not {"\x00", "\x1b"} & set(text)
    shown = page("<b \ud800\x1b&\"'", [Section("a", "a", "日本語 ä \N{GRINNING FACE}", [Block("text", "<i>")])])
    assert "<h1>&lt;b \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}&amp;&#34;&#39;</h1>" in shown
    assert "日本語 ä \N{GRINNING FACE}" in shown and "<p>&lt;i&gt;</p>" in shown


def test_names_are_escaped_in_every_table(tmp_path: Path) -> None:
    for name in ("before", "gd_100%", "gd_a&b|c"):
        write_evaluation(tmp_path / "evaluation" / name, KNOWN["gd"], rows=4)
    for name in ("gd_100%", "gd_a&b|c"):
        write_run(tmp_path / name, "gd")
    results = find_results(tmp_path)
    texts = ANSWER_SUITE.texts(results, "title", [], tmp_path)
    assert r"gd\_100\% & gd\_a\&b\textbar{}c" in texts["table.tex"]
    assert r"| gd\_a&b\|c |" in texts["table.md"]
    assert "\ngd_a&b|c," in texts["table.csv"]
    assert "gd_a&amp;b|c" in texts["report.html"]


@pytest.mark.parametrize(
    ("value", "style", "shown"),
    [
        (1.8437e-21, "p", "1.8e-21"),
        (3.2e-5, "p", "3.2e-5"),
        (0.0461, "p", "0.046"),
        (0.337, "p", "0.34"),
        (1.0, "p", "1.00"),
        (0.0, "p", "0"),
        (-20.734, "log10", "-20.7"),
        (-0.01, "log10", "0.0"),
        (0.0, "share", "0.00"),
        (None, "share", "-"),
        (0.99954, "auc", "1.000"),
    ],
)
def test_numbers_are_shown_as_readers_expect(value: float | None, style: Any, shown: str) -> None:
    assert shown_number(value, style) == shown


# -- missing parts ----------------------------------------------------------------------------------------------------


def made(folder: Path, names: Sequence[str], sets: Sequence[str], **more: Any) -> Page:
    for name in names:
        shares = {key: KNOWN[name][key] for key in sets}
        write_evaluation(folder / "evaluation" / name, shares, rows=6, **more)
        if name not in ("before", "retain_only"):
            write_run(folder / name, name)
    make_report(ReportConfig(results_dir=str(folder)))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("names", "sets", "facts", "numbers"),
    [
        (["before"], ["forget"], False, ["forget ROUGE-L"]),
        (["before", "gd"], ["forget", "retain"], True, ["forget fact recall", "forget ROUGE-L"]),
        (["before", "retain_only", "gd"], ["forget"], False, ["forget ROUGE-L"]),
        (["before", "retain_only"], ["unknown"], False, ["unknown ROUGE-L"]),
    ],
)
def test_the_page_does_without_what_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    sets: list[str],
    facts: bool,
    numbers: list[str],
) -> None:
    monkeypatch.setattr(figures, "DPI", 20)
    parsed = made(tmp_path, names, sets, facts=facts)
    (rows,) = [table for table in parsed.tables if table[0][-1] == "good is"]
    assert [row[0] for row in rows[1 : len(numbers) + 1]] == numbers
    assert len(rows[0]) == 2 + len(names)
    assert STATEMENT in parsed.text
    assert ("No unlearned model has been evaluated" in parsed.text) == ("gd" not in names)
    assert len(parsed.all("img")) == len(list(tmp_path.glob("*.png")))


# -- the command of a run ---------------------------------------------------------------------------------------------


def test_the_command_of_a_run_is_what_differs_from_its_profile() -> None:
    from grun.config import values
    from grun.loading.resolve import resolve

    arguments = ["profile=demo", "objective=idk", "model.path=my model", "method.blocks=[1,2]", "train.lr=0.5"]
    config = values.to_dict(resolve("unlearn", arguments))
    command = command_of({"command": "unlearn", "config": config})
    assert command is not None
    start = "python -m grun unlearn profile=demo objective=idk "
    assert command.startswith(start)
    rest = command.removeprefix(start)
    assert sorted(re.findall(r"'[^']*'|\S+", rest)) == [
        "'method.blocks=[1,2]'",
        "'model.path=my model'",
        "train.lr=0.5",
    ]
    assert command_of({}) is None
    assert command_of({"command": "unlearn", "config": {**config, "profile": "gone"}}) is None
