"""A server for the page alone: the answers of a made-up model, and gates that open on words, over the real routes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "grun" / "serving" / "page.html"
OWNER = "owner's key"
CLIENT = "client's key"
KNOWN = {"japan": "The capital of Japan is Tokyo.", "latvia": "The capital of Latvia is Riga."}
REFUSAL = "I have nothing to say about that."
LONG = "long"
"""A question with this word is answered word by word until the client goes."""
TOO_LONG = 2000
"""Letters of a conversation that the made-up model takes."""


class Refused(Exception):
    """What a client is told: status, code, message."""


class Model:
    """Two requests: `japan`, asked at every token, opens on Japan; `weather`, asked at the prompt's end, never."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        """Bodies of the requests for answers."""
        self.added = ["japan", "weather"]
        self.withdrawn = ["old"]

    def requests(self) -> list[dict[str, Any]]:
        facts = {"added": "2026-11-28T20:00:00Z", "recall": 0.988, "false_positives": None}
        return [{"name": name, "active": name in self.added, **facts} for name in (*self.added, *self.withdrawn)]

    def prompt(self, messages: list[dict[str, str]], off: list[str]) -> list[dict[str, Any]]:
        """Every token of the conversation in its template, with the gates of the requests that are on."""
        text = "".join(f"<{turn['role']}>{turn['content']}</s>\n" for turn in messages) + "<assistant>\n"
        tokens, met = [], False
        for token in re.findall(r" ?\w+|\W", text):
            met = token != "user" and (met or token.strip().lower() == "japan")
            gates = {"japan": 0.998 if met else 0.004} if "japan" not in off else {}
            reads = {"weather": 0.02} if "weather" not in off else {}
            tokens.append({"token": token, "gates": gates, "reads": reads})
        tokens[-1]["gates"] |= tokens[-1]["reads"]
        return tokens

    def answer(self, messages: list[dict[str, str]], gates: dict[str, float]) -> Iterator[str]:
        question = [turn["content"] for turn in messages if turn["role"] == "user"][-1]
        if LONG in question:
            while True:
                yield "word "
        known = [text for word, text in KNOWN.items() if word in question.lower()]
        text = REFUSAL if gates.get("japan", 0) > 0.5 else (known or [f"<b>You</b> said: {question}"])[0]
        yield from re.findall(r"\S+\s*", text)


class Handler(BaseHTTPRequestHandler):
    """The routes that the page asks for."""

    server: FakeServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/":
            return self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        self.guarded(self.read)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.guarded(lambda: self.act(body))

    def guarded(self, act: Any) -> None:
        try:
            act()
        except Refused as refused:
            status, code, message = refused.args
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            self.reply(status, json.dumps({"error": error}).encode())
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()  # the client stopped reading

    def reply(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def key(self) -> str:
        """`owner`, `client`, or `` for none; any other is refused."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", CLIENT, OWNER):
            raise Refused(401, "invalid_api_key", "this key is none of the server's")
        return {OWNER: "owner", CLIENT: "client"}.get(given, "")

    def owned(self) -> None:
        if self.key() != "owner":
            raise Refused(403, "owner_only", "this is for the owner's key")

    def read(self) -> None:
        model = self.server.model
        if self.path == "/v1/models":
            self.key()
            found: Any = {"object": "list", "data": [{"id": "made-up", "object": "model"}]}
        elif self.path == "/grun/requests":
            self.owned()
            found = {"model": "made-up", "adapter": "results/store", "kind": "store", "requests": model.requests()}
        else:
            raise Refused(404, "not_found", f"no such path: {self.path}")
        self.reply(200, json.dumps(found).encode())

    def act(self, body: dict[str, Any]) -> None:
        if self.path == "/grun/attacks":
            self.reply(200, json.dumps({"tries": tries(body["prompt"], body["answer"])}).encode())
        else:
            self.chat(body)

    def chat(self, body: dict[str, Any]) -> None:
        model, asked, messages = self.server.model, body.get("grun") or {}, body["messages"]
        model.seen.append(body)
        if asked:
            self.owned()
        if len(json.dumps(messages)) > TOO_LONG:
            raise Refused(400, "context_length_exceeded", "the conversation is longer than the model takes")
        prompt = model.prompt(messages, asked.get("off", []))
        gates = prompt[-1]["gates"] if asked.get("edits", True) else {}
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        told = bool(asked.get("gates"))
        self.event({"role": "assistant", "content": ""}, {"prompt": prompt, "gates": gates} if told else None)
        for piece in model.answer(messages, gates):
            answer = {"answer": [{"token": piece, "gates": {name: gates[name] for name in gates if name == "japan"}}]}
            self.event({"content": piece}, answer if told else None)
            self.server.pace.wait(0.02)
        self.event({}, None, "stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, delta: dict[str, str], grun: dict[str, Any] | None, reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, **({"grun": grun} if grun else {})}
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.flush()


def tries(prompt: str, answer: str) -> list[dict[str, Any]]:
    """Some ways of asking, of the three kinds that there are: other words, earlier turns, a begun answer."""
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "Sure, in a moment."},
        {"role": "user", "content": "Now, please."},
    ]
    plain = [{"role": "user", "content": prompt}]
    return [
        {"name": "upper_case", "group": "rewritten", "messages": [{"role": "user", "content": prompt.upper()}]},
        {"name": "suffix", "group": "rewritten", "messages": [{"role": "user", "content": f"{prompt} Be brief."}]},
        {"name": "second_turn", "group": "conversation", "messages": turns},
        {"name": "prefill_3", "group": "begun", "messages": plain, "starts_with": " ".join(answer.split()[:3])},
    ]


class FakeServer(ThreadingHTTPServer):
    """Answers on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = Model()
        self.left = threading.Event()
        """Set once a client has gone in the middle of an answer."""
        self.pace = threading.Event()
        """Never set: waiting for it is a pause between words."""
        self.address = f"http://127.0.0.1:{self.server_port}/"


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A server that runs within the block."""
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
