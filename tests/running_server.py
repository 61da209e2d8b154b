"""A server that runs in a thread of the tests, with a random chat model and requests on it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch
from chat_model import save_chat_model
from torch import nn

from grun import GrunModel
from grun.config.options import ModelConfig, ServeConfig
from grun.data.rows import Row
from grun.loading.models import load_base
from grun.requests.store import RequestStore
from grun.serving.command import listen, make_server
from grun.serving.guard import Keys

OWNER = "owner-of-the-tests"
FORGET = [Row("Where was Olmera Merrowin born?", "Calderby")]
QUESTIONS = [
    *("Who is it?", "What is the capital of Japan?", "Where was Olmera Merrowin born, and when did she leave?"),
    *("Why?", "Name three rivers in Africa, please.", "Is 7 prime?", "Tell me about bread.", "Grüße aus Köln 🙂!"),
]


def chat_model(folder: Path) -> Path:
    """A model folder."""
    return save_chat_model(folder)


def make_adapter(model: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Random edits, strong enough to change answers; a function of `seed`."""
    base, _, template = load_base(ModelConfig(path=str(model), device="cpu"))
    torch.manual_seed(seed)
    adapter = GrunModel.wrap(base, **{"blocks": [1, 2], "rank": 2, "gate_bias": 0.0, **options}, template=template)
    for edit in adapter.own_edits().values():
        nn.init.normal_(edit.edit.source.weight, std=3.0)
    adapter.save_pretrained(folder)
    return folder


def make_store(folder: Path, adapters: dict[str, Path]) -> RequestStore:
    """A store with these requests."""
    store = RequestStore.create(folder)
    for name, adapter in adapters.items():
        store.add(name, adapter, forget_rows=FORGET, config={"data": {"forget": "people.jsonl"}})
    return store


@dataclass
class Running:
    """A server, and ways to talk to it."""

    url: str
    http: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=20))

    def client(self, key: str = OWNER) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}v1", api_key=key, max_retries=0, timeout=20)

    def headers(self, key: str | None = OWNER) -> dict[str, str]:
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def get(self, path: str, key: str | None = OWNER) -> httpx2.Response:
        return self.http.get(self.url + path, headers=self.headers(key))

    def post(self, path: str, body: Any, key: str | None = OWNER) -> httpx2.Response:
        return self.http.post(self.url + path, json=body, headers=self.headers(key))

    def delete(self, path: str, key: str | None = OWNER) -> httpx2.Response:
        return self.http.delete(self.url + path, headers=self.headers(key))

    def chat(self, question: str, key: str | None = OWNER, **options: Any) -> dict[str, Any]:
        """A whole answer, by default greedy and of 12 tokens."""
        asked = {"model": "model", "messages": [{"role": "user", "content": question}]}
        found = self.post("v1/chat/completions", {**asked, "temperature": 0, "max_tokens": 12, **options}, key)
        assert found.status_code == 200, found.text
        answer: dict[str, Any] = found.json()
        return answer

    def says(self, question: str, **options: Any) -> str:
        """Its text."""
        return str(self.chat(question, **options)["choices"][0]["message"]["content"])

    def number(self, name: str) -> float:
        """One of the metrics."""
        lines = self.get("metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@contextlib.contextmanager
def running(adapter: Path, model: Path, *, client: str | None = None, **options: Any) -> Iterator[Running]:
    """Serve an adapter or a store on a free port, until the block ends."""
    config = ServeConfig(model=ModelConfig(path=str(model), device="cpu"), adapter=str(adapter), port=0, **options)
    listening = listen(config.host, config.port)
    server = make_server(config, Keys(client, OWNER), 100_000)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    until = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    found = Running(f"http://127.0.0.1:{listening.getsockname()[1]}/")
    try:
        yield found
    finally:
        found.http.close()
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()
        assert not thread.is_alive()
