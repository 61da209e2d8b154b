"""A server in front of a store: requests come and go while it answers, by its own routes and by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import demo
import httpx2
import pytest
from running_server import OWNER, QUESTIONS, Running, chat_model, make_adapter, make_store, running

from grun.cli import main
from grun.requests.store import RequestStore
from grun.runtime.files import write_json

WITHIN = 1.0
"""Seconds after a change of the store from which on answers obey it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, Path]:
    return {name: make_adapter(model, model.parent / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def store(model: Path, adapters: dict[str, Path], tmp_path: Path) -> RequestStore:
    return make_store(tmp_path / "store", adapters)


@pytest.fixture
def server(store: RequestStore, model: Path) -> Iterator[Running]:
    with running(store.folder, model, max_new_tokens=400) as found:
        yield found


def names(server: Running) -> dict[str, bool]:
    return {one["name"]: one["active"] for one in server.get("grun/requests").json()["requests"]}


def test_a_change_of_the_store_is_in_force_within_a_second(server: Running, store: RequestStore) -> None:
    question = QUESTIONS[1]
    both, without = server.says(question), server.says(question, grun={"off": ["two"]})
    bare = server.says(question, grun={"edits": False})
    assert len({both, without, bare}) == 3
    for change, expected in (
        (lambda: store.set_state("two", "disabled"), without),
        (lambda: store.set_state("two", "active"), both),
        (lambda: store.remove("two"), without),
        (lambda: store.remove("one"), bare),
    ):
        change()
        time.sleep(WITHIN)
        assert server.says(question) == expected
    assert names(server) == {}


def test_a_request_that_is_not_in_force_is_listed_as_such(server: Running, store: RequestStore) -> None:
    store.set_state("one", "disabled")
    found = server.get("grun/requests").json()
    assert names(server) == {"one": False, "two": True}
    assert found["kind"] == "store"
    assert found["head"] == store.manifest.head
    assert found["requests"][0]["added"] == store.manifest.request("one").time


def test_answers_in_flight_are_finished_under_the_edits_that_they_began_with(
    server: Running, store: RequestStore
) -> None:
    asked: dict[str, Any] = {"max_tokens": 200}
    expected = {
        name: server.says("Who is it?", **asked, grun=own) for name, own in (("old", {}), ("new", {"off": ["two"]}))
    }
    body = {"model": "model", "messages": [{"role": "user", "content": "Who is it?"}], "temperature": 0, "stream": True}
    with server.http.stream("POST", f"{server.url}v1/chat/completions", json={**body, **asked}) as answer:
        lines = answer.iter_lines()
        parts = [next(line for line in lines if line)]
        store.remove("two")
        while "two" in names(server) or server.says("Who is it?", **asked) != expected["new"]:
            time.sleep(0.02)
        parts += [line for line in lines if line]
    chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == expected["old"]


def test_reloading_under_load_loses_nothing(server: Running, store: RequestStore) -> None:
    states = {"on": {}, "off": {"off": ["two"]}}
    right = {q: {server.says(q, max_tokens=30, grun=own) for own in states.values()} for q in QUESTIONS}
    ended = threading.Event()

    def ask(number: int) -> int:
        count = 0
        while not ended.is_set():
            question = QUESTIONS[(number + count) % len(QUESTIONS)]
            assert server.says(question, max_tokens=30) in right[question]
            count += 1
        return count

    before = server.number("grun_store_reloads_total")
    with ThreadPoolExecutor(8) as pool:
        counts = [pool.submit(ask, number) for number in range(8)]
        for number in range(6):
            store.set_state("two", "active" if number % 2 else "disabled")
            time.sleep(0.5)
        ended.set()
        assert all(count.result() > 0 for count in counts)
    assert server.number("grun_store_reloads_total") >= before + 5


def test_a_store_that_is_damaged_leaves_in_force_what_was(
    server: Running, store: RequestStore, log: pytest.LogCaptureFixture
) -> None:
    question = QUESTIONS[1]
    both = server.says(question)
    sound = store.manifest.to_dict()
    write_json(store.folder / "stack.json", {**sound, "rule": "max_gate"})
    time.sleep(WITHIN)
    assert server.says(question) == both
    assert server.number("grun_store_reload_failures_total") == 1
    assert sum("what was in force stays" in line for line in log.messages) == 1
    write_json(store.folder / "stack.json", sound)
    store.remove("two")
    time.sleep(WITHIN)
    assert server.says(question) == server.says(question, grun={"off": ["two"]}) != both


# -- the owner's routes, with adapters that `unlearn` made ------------------------------------------------------------


@pytest.fixture(scope="module")
def other(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "other"
    assert demo.unlearn(taught, folder, "seed=7", "objective=idk") == 0
    return folder


def test_the_owner_adds_a_request_and_the_next_answer_obeys_it(
    taught: Path, adapter: Path, other: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    assert main(["requests", "add", f"store={store}", "id=first", f"adapter={adapter}"]) == 0
    with running(store, taught) as server:
        name = server.get("v1/models").json()["data"][0]["id"]

        def gates(**own: Any) -> set[str]:
            grun = {"gates": True, **own}
            (choice,) = server.chat("Where was Olmera born?", model=name, grun=grun)["choices"]
            return {request for token in choice["grun"]["prompt"] for request in token["gates"]}

        assert gates() == {"first"}
        added = server.post("grun/requests", {"adapter": str(other), "name": "second"})
        assert added.status_code == 201, added.text
        assert added.json()["name"] == "second" and added.json()["active"]
        assert gates() == {"first", "second"}
        for body, status in (
            ({"adapter": str(other), "name": "second"}, 409),
            ({"adapter": str(tmp_path), "name": "third"}, 400),
            ({"adapter": str(tmp_path / "nothing"), "name": "third"}, 400),
            ({"adapter": str(other), "name": "../third"}, 400),
        ):
            found = server.post("grun/requests", body)
            assert found.status_code == status, found.text
            assert "\n" not in found.json()["error"]["message"]
        withdrawn = server.delete("grun/requests/first")
        assert (withdrawn.status_code, withdrawn.json()["withdrawn"]) == (200, True)
        assert gates() == {"second"}
        assert server.delete("grun/requests/first").status_code == 404
        assert not (store / "requests" / "first").exists()
        head = server.get("grun/requests").json()["head"]
    manifest = RequestStore.open(store).manifest
    assert [(event.action, event.request) for event in manifest.history] == [
        ("create", None), ("add", "first"), ("add", "second"), ("remove", "first"),
    ]  # fmt: skip
    assert manifest.problems() == []
    assert manifest.head == head
    assert main(["requests", "verify", f"store={store}", "files_only=true", f"head={head}"]) == 0


# -- the process ------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_is_being_answered(store: RequestStore, model: Path) -> None:
    environment = {**os.environ, "GRUN_OWNER_KEY": OWNER}
    command = [sys.executable, "-m", "grun", "serve", f"model.path={model}", f"adapter={store.folder}", "port=0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("page: http://127.0.0.1:") and OWNER not in line
        url = line.split()[1]
        asked = {
            "model": "model",
            "messages": [{"role": "user", "content": "Who?"}],
            "max_tokens": 400,
            "temperature": 0,
        }
        whole = httpx2.post(f"{url}v1/chat/completions", json=asked, timeout=60).json()["choices"][0]["message"][
            "content"
        ]
        body = {**asked, "stream": True}
        with httpx2.stream("POST", f"{url}v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            parts = [next(line for line in lines if line)]
            process.send_signal(signal.SIGTERM)
            parts += [line for line in lines if line]
        assert parts[-1] == "data: [DONE]"
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == whole
        assert process.wait(timeout=30) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}health")
    finally:
        process.kill()
    log = process.stderr.read()
    assert "every answer was finished" in log
    assert "Who?" not in log and whole[:20] not in log and OWNER not in log


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        ([], 2, "adapter"),
        (["port=70000"], 2, "port"),
        (["max_body=much"], 2, "max_body"),
        (["host=nowhere.invalid", "adapter={adapter}"], 1, "host"),
        (["adapter={model}"], 1, "adapter"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    arguments: list[str],
    status: int,
    word: str,
    model: Path,
    adapters: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [one.format(model=model, adapter=adapters["one"]) for one in arguments]
    assert main(["serve", f"model.path={model}", *filled]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert word in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("error: ")


def test_a_port_that_is_taken_and_keys_that_are_none_are_refused(
    model: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grun.serving.command import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", f"model.path={model}", f"adapter={adapters['one']}", f"port={port}"]) == 1
        assert "in use" in capsys.readouterr().err
    monkeypatch.setenv("GRUN_API_KEY", " ")
    assert main(["serve", f"model.path={model}", f"adapter={adapters['one']}", "port=0"]) == 2
    assert "GRUN_API_KEY" in capsys.readouterr().err
