"""The page of the server as a file: it needs nothing but itself, runs nothing but itself, and can be read by anyone."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "grun" / "serving" / "page.html"
TEXT = PAGE.read_text(encoding="utf-8")
SMALLEST = 4.5
"""Contrast of text and ground, WCAG 2.2 AA."""
VOID = {"meta", "link", "input", "br"}


class Parsed(HTMLParser):
    """Every tag with its attributes, the tags around it, and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.around: list[list[str]] = []
        self.texts: list[str] = []
        self._open: list[int] = []
        self.feed(text)
        assert not self._open, f"never closed: {[self.tags[at][0] for at in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.around.append([self.tags[at][0] for at in self._open])
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self._open.append(len(self.tags) - 1)

    def handle_endtag(self, tag: str) -> None:
        at = self._open.pop()
        assert self.tags[at][0] == tag, f"</{tag}> closes <{self.tags[at][0]}>"

    def handle_data(self, data: str) -> None:
        for at in self._open:
            self.texts[at] += data

    def all(self, tag: str) -> list[int]:
        return [at for at, (name, _) in enumerate(self.tags) if name == tag]


PARSED = Parsed(TEXT)


def content(tag: str) -> str:
    (at,) = PARSED.all(tag)
    return PARSED.texts[at]


def policy() -> dict[str, list[str]]:
    (value,) = [values["content"] for _, values in PARSED.tags if values.get("http-equiv") == "Content-Security-Policy"]
    return {words[0]: words[1:] for words in map(str.split, (value or "").split(";"))}


def test_the_page_loads_nothing_from_elsewhere() -> None:
    assert {url for url in re.findall(r"\w+://[^\s'\"]*", TEXT)} == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.search(r"url\(|@import|\bimport\b", content("style") + content("script"))
    allowed = {"html", "head", "meta", "title", "link", "style", "script", "body"}
    allowed |= {"a", "header", "main", "aside", "div", "form", "p", "span", "h1", "h2", "ul", "li"}
    allowed |= {"button", "label", "input", "textarea", "details", "summary"}
    assert {tag for tag, _ in PARSED.tags} <= allowed
    for tag, values in PARSED.tags:
        assert not {"src", "srcset", "action", "formaction", "style"} & values.keys()
        assert not [name for name in values if name.startswith("on")], f"<{tag}> has a script of its own"
        assert tag != "link" or (values["href"] or "").startswith("data:image/svg+xml,")
        assert tag != "a" or (values["href"] or "").startswith("#")


def test_the_policy_lets_the_page_alone_run_and_only_the_server_be_asked() -> None:
    found = policy()
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(content(tag).encode()).digest()).decode()
        assert found.pop(directive) == [f"'sha256-{digest}'"], f"write sha256-{digest} into {directive} of {PAGE.name}"
    assert found == {
        "default-src": ["'none'"],
        "img-src": ["data:"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }


def test_nothing_that_comes_from_elsewhere_is_read_as_markup_or_code() -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|DOMParser|createContextualFragment"
    assert not re.search(rf"{ways}|\beval\b|\bFunction\(|srcdoc|localStorage|cookie", content("script"))
    assert "textContent" in content("script")


def test_every_control_has_a_name() -> None:
    labels = {values.get("for") for tag, values in PARSED.tags if tag == "label"}
    for at, (tag, values) in enumerate(PARSED.tags):
        if tag in ("input", "textarea"):
            assert values["id"] in labels or "label" in PARSED.around[at], values
        elif tag in ("button", "summary", "a", "label", "h1", "h2", "title"):
            assert PARSED.texts[at].strip(), f"<{tag}> {values} says nothing"
        elif tag in ("aside", "form") and values.get("id") != "key-form":
            assert values["aria-label"], values


def test_the_page_has_its_landmarks_and_a_place_for_what_is_announced() -> None:
    assert TEXT.startswith("<!doctype html>") and PARSED.tags[0] == ("html", {"lang": "en"})
    assert [len(PARSED.all(tag)) for tag in ("header", "main", "aside", "h1", "title")] == [1, 1, 1, 1, 1]
    metas = [values for tag, values in PARSED.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert {"name": "color-scheme", "content": "light dark"} in metas
    assert [values["id"] for _, values in PARSED.tags if values.get("aria-live") == "polite"] == ["status"]
    assert [values["id"] for _, values in PARSED.tags if values.get("role") == "alert"] == ["trouble"]
    assert content("a").startswith("Skip")


def test_what_the_script_looks_for_is_there_once() -> None:
    identifiers = [values["id"] for _, values in PARSED.tags if "id" in values]
    assert len(identifiers) == len({*identifiers})
    asked = {*re.findall(r"\bat\(\"([^\"]+)\"\)", content("script"))}
    assert len(asked) > 10 and asked <= {*identifiers}
    targets = {values["href"] for tag, values in PARSED.tags if tag == "a"}
    targets |= {f"#{values['for']}" for tag, values in PARSED.tags if tag == "label" and "for" in values}
    assert targets <= {f"#{name}" for name in identifiers}


def test_the_first_screen_says_what_this_is_in_two_sentences_and_offers_three_questions() -> None:
    (lead,) = [PARSED.texts[at] for at, (_, values) in enumerate(PARSED.tags) if values.get("class") == "lead"]
    assert len(re.findall(r"[.?!](?:\s|$)", lead)) == 2
    asked = [PARSED.texts[at] for at in PARSED.all("button") if "ul" in PARSED.around[at]]
    assert len(asked) == 3 and all(text.endswith("?") for text in asked)


def test_the_file_stays_small_and_its_lines_short() -> None:
    assert len(TEXT.encode()) < 48_000
    assert [line for line in TEXT.splitlines() if len(line) > 120] == []


# -- colors and motion ------------------------------------------------------------------------------------------------


def colors(scheme: str) -> dict[str, tuple[float, ...]]:
    """The custom colors of a scheme, each as red, green, blue from 0 to 1."""
    blocks = re.findall(r":root \{(.*?)\}", content("style"), re.DOTALL)
    chosen = blocks[["light", "dark"].index(scheme)]
    found = re.findall(r"--([\w-]+): #(\w\w)(\w\w)(\w\w);", chosen)
    return {name: tuple(int(part, 16) / 255 for part in parts) for name, *parts in found}


def luminance(color: tuple[float, ...]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """As WCAG 2.2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes_however_far_a_gate_is_open(scheme: str) -> None:
    found = colors(scheme)
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    for ink in ("ink", "soft", "accent", "bad"):
        for ground in ("ground", "card"):
            assert contrast(found[ink], found[ground]) >= SMALLEST, f"{ink} on {ground}"
    assert contrast(found["on-accent"], found["accent"]) >= SMALLEST
    assert contrast(found["edge"], found["ground"]) >= 3  # what shows where a field is
    (share,) = re.findall(r"calc\(var\(--gate\) \* ([\d.]+)%\)", re.sub(r"width:.*", "", content("style")))
    part = float(share) / 100
    shaded = tuple(part * a + (1 - part) * g for a, g in zip(found["accent"], found["ground"], strict=True))
    assert contrast(found["ink"], shaded) >= SMALLEST


def test_nothing_moves_for_those_who_do_not_want_it() -> None:
    style = content("style")
    start = style.index("@media (prefers-reduced-motion: no-preference)")
    block = style[start : style.index("\n}\n", start)]
    assert re.search(r"animation|transition", block)
    assert not re.search(r"animation|transition|@keyframes|scroll-behavior", style.replace(block, ""))
    assert "smooth" not in content("script")
