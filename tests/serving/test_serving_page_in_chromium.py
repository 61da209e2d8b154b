"""The page of the server in headless Chromium, on a phone and on a desk, against a made-up server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fake_server import CLIENT, OWNER, REFUSAL, TOO_LONG, FakeServer, serving

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
expect = playwright.expect


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as running:
        yield running


@pytest.fixture(params=[400, 1280])
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A window of that width; a test fails if its script does, or asks for what the policy forbids."""
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    context.close()
    assert wrong == []


@pytest.fixture
def owned(page: Any, server: FakeServer) -> Any:
    """The page as its owner opens it."""
    page.goto(f"{server.address}#owner={quote(OWNER)}")
    expect(page.locator("#requests")).to_be_visible()
    return page


def ask(page: Any, question: str) -> Any:
    """The exchange, once it has ended."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    return ended(page)


def ended(page: Any) -> Any:
    expect(page.locator("#send")).to_be_visible()
    found = page.locator("article").last
    expect(found.get_by_role("button", name="Ask again")).to_be_visible()
    return found


def switch(page: Any, name: str) -> None:
    if not page.locator("#switches").is_visible():
        page.get_by_text("What was forgotten").click()
    page.get_by_role("switch", name=name).click()


def test_a_conversation_goes_on_with_what_both_sides_said_alike(owned: Any, server: FakeServer) -> None:
    owned.get_by_role("button", name="What is the capital of Japan?").click()
    first = ended(owned)
    expect(first.locator(".with .said")).to_have_text(REFUSAL)
    expect(first.locator(".without .said")).to_have_text("The capital of Japan is Tokyo.")
    expect(first).to_contain_text("the conversation goes on without this turn")
    second = ask(owned, "And <i>you</i>?")
    expect(second.locator(".without .said")).to_have_text("<b>You</b> said: And <i>you</i>?")
    expect(second).to_contain_text("Word for word the same")
    ask(owned, "What is the capital of Latvia?")
    sides = [body["messages"] for body in server.model.seen[-2:]]
    assert sides[0] == sides[1]
    assert [turn["content"] for turn in sides[0]] == [
        "And <i>you</i>?",
        "<b>You</b> said: And <i>you</i>?",
        "What is the capital of Latvia?",
    ]
    owned.get_by_role("button", name="New conversation").click()
    expect(owned.locator("article")).to_have_count(0)
    ask(owned, "Hello?")
    assert [len(body["messages"]) for body in server.model.seen[-2:]] == [1, 1]


def test_a_gate_opens_and_its_numbers_are_told_to_eye_key_and_ear(owned: Any) -> None:
    exchange = ask(owned, "What is the capital of Japan?")
    opened = exchange.locator(".gates li.open")
    assert opened.all_inner_texts() == ["japan\n0.99\nopen"]
    words = exchange.get_by_role("listbox", name="The question, token by token")
    shaded = words.locator(".token.open .shade")
    assert shaded.all_inner_texts() == ["Japan", "?", "end"]
    grounds = [
        shade.evaluate("node => getComputedStyle(node).backgroundColor") for shade in words.locator(".shade").all()
    ]
    assert len({*grounds}) == 2
    expect(words.get_by_role("option", name="Japan: japan 0.99")).to_be_visible()
    shaded.first.hover()
    expect(exchange.locator(".readout")).to_have_text("Japan: japan 0.99, weather 0.02")
    words.locator("[tabindex='0']").focus()
    expect(exchange.locator(".readout")).to_have_text("What: weather 0.02, japan 0.00")
    owned.keyboard.press("End")
    owned.keyboard.press("ArrowLeft")
    expect(exchange.locator(".readout")).to_have_text("?: japan 0.99, weather 0.02")
    expect(owned.get_by_role("status")).to_contain_text("Without it: The capital of Japan is Tokyo. Opened: japan.")
    other = ask(owned, "What is the capital of Latvia?")
    expect(other.locator(".readout")).to_have_text("Widest at What: weather 0.02, japan 0.00")


def test_a_request_is_switched_off_and_on(owned: Any, server: FakeServer) -> None:
    expect(owned.locator("input[name=old]")).to_be_disabled()
    switch(owned, "japan")
    exchange = ask(owned, "What is the capital of Japan?")
    expect(exchange).to_contain_text("Switched off: japan")
    expect(exchange.locator(".gates")).not_to_contain_text("japan")
    expect(exchange).to_contain_text("Word for word the same")
    switch(owned, "japan")
    exchange.get_by_role("button", name="Ask again").click()
    again = ended(owned)
    expect(again).to_contain_text("Asked again")
    expect(again.locator(".gates li.open")).to_contain_text("japan")
    assert [body["grun"]["off"] for body in server.model.seen if "off" in body["grun"]] == [["japan"], []]


def test_tries_of_the_attack_suite_are_asked_outside_the_conversation(owned: Any, server: FakeServer) -> None:
    ask(owned, "What is the capital of Japan?")
    owned.get_by_text("Try to get it another way").click()
    headings = owned.locator(".group h3")
    expect(headings).to_have_text([re.compile("other letters"), re.compile("conversation"), re.compile("begun")])
    for name, shown in (("Upper case", "WHAT IS THE CAPITAL OF JAPAN?"), ("Second turn", "Model: Sure, in a moment.")):
        owned.get_by_role("button", name=name).click()
        expect(ended(owned)).to_contain_text(shown)
    owned.get_by_role("button", name="Prefill 3").click()
    expect(ended(owned).locator(".without .said")).to_have_text("The capital ofThe capital of Japan is Tokyo.")
    assert server.model.seen[-1]["messages"][-1] == {"role": "assistant", "content": "The capital of"}
    ask(owned, "Thanks")
    assert [len(body["messages"]) for body in server.model.seen[-2:]] == [1, 1]


def test_the_owners_key_leaves_the_address_and_is_kept_for_the_tab(owned: Any, server: FakeServer) -> None:
    assert owned.url == server.address
    owned.reload()
    expect(owned.locator("#requests")).to_be_visible()
    assert owned.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_without_a_key_it_chats_and_says_how_the_gates_are_seen(page: Any, server: FakeServer) -> None:
    page.goto(server.address)
    expect(page.locator("#notice")).to_contain_text("open the address that the server printed")
    exchange = ask(page, "What is the capital of Japan?")
    expect(exchange.locator(".said")).to_have_text(REFUSAL)
    assert exchange.locator(".answer").count() == 1
    assert ["grun" in body for body in server.model.seen] == [False]
    page.get_by_role("button", name="Enter a key").click()
    for key, said in (("another", "does not know this key"), (CLIENT, "need the owner’s key")):
        page.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text(said)
        page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key").fill(OWNER)
    page.keyboard.press("Enter")
    expect(page.locator("#requests")).to_be_visible()


def test_an_answer_can_be_stopped(owned: Any, server: FakeServer) -> None:
    owned.fill("#question", "a long answer")
    owned.press("#question", "Enter")
    expect(owned.locator(".without .said")).to_contain_text("word word word")
    owned.get_by_role("button", name="Stop").click()
    expect(ended(owned).locator(".without .said")).to_contain_text("word")
    expect(owned.get_by_role("status")).to_contain_text("Stopped.")
    assert server.left.wait(10)


def test_errors_are_one_clear_line_and_the_question_is_not_lost(owned: Any, server: FakeServer) -> None:
    trouble = owned.get_by_role("alert")
    long = "x" * TOO_LONG
    owned.fill("#question", long)
    owned.press("#question", "Enter")
    expect(trouble).to_have_text("This is too long for the model. Ask something shorter, or start a new conversation.")
    expect(owned.locator("#question")).to_have_value(long)
    ask(owned, "short")
    expect(trouble).to_have_text("")
    server.shutdown()
    server.server_close()
    owned.fill("#question", "Are you there?")
    owned.press("#question", "Enter")
    expect(trouble).to_have_text("The server does not answer. See whether it is still running, then ask again.")
    expect(owned.locator("#question")).to_have_value("Are you there?")
