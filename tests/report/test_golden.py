"""Every kind of report is what it was: its files, what it prints and the text of its page equal stored ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_reports import GOLDEN, NAMES, PAGE, Page, files_of

from grun.report import figures

NUMBER = re.compile(r"-?\d+\.\d{6,}(?:e-?\d+)?")
"""In full precision, whose last digits differ between makes of CPU."""


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_what_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DPI", 20)
    made = files_of(name, tmp_path / name)
    page = made.pop(PAGE, "")
    stored = {path.name: path.read_text(encoding="utf-8") for path in (GOLDEN / name).iterdir()}
    assert made.keys() == stored.keys()
    for file, text in stored.items():
        assert NUMBER.sub("x", made[file]) == NUMBER.sub("x", text), file
        numbers = [float(number) for number in NUMBER.findall(text)]
        assert list(map(float, NUMBER.findall(made[file]))) == pytest.approx(numbers, rel=1e-9), file
    assert not re.search(r"https?://|url\(|@import|<script", page) and "\x1b" not in page
    assert all(len(image["alt"] or "") > 40 for image in Page(page).all("img"))  # every tag is closed in order
    printed = [line for line in made["terminal.txt"].splitlines() if not line.startswith("written:")]
    assert max(map(len, printed)) <= 100
