"""What pooled gates would say along a prompt, told beside what gates say where they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, chat_model, make_adapter, make_store, running

from grun.config.options import ModelConfig
from grun.data.templates import TEMPLATES, encode_prompt
from grun.loading.models import load_base

QUESTIONS = ("What is the capital of Japan?", "Why?")
POOLED: dict[str, Any] = {"blocks": [2], "gate_blocks": [0, 1], "edit_write": "sticky"}
DESIGNS: dict[str, dict[str, Any]] = {
    "maxmin": {**POOLED, "gate_pool": "maxmin"},
    "mean": {**POOLED, "gate_pool": "mean"},
    "published": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of each design, and a store of all."""
    folder = tmp_path_factory.mktemp("served")
    model = chat_model(folder / "model")
    adapters = {name: make_adapter(model, folder / name, 3, **own) for name, own in DESIGNS.items()}
    make_store(folder / "store", adapters)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    """The store."""
    with running(folder / "store", folder / "model") as found:
        yield found


def gates_of(server: Running, prompt: list[int]) -> dict[str, float]:
    """Gates at the last token of a prompt of these ids."""
    body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0, "grun": {"gates": True}}
    found: dict[str, float] = server.post("v1/completions", body).json()["choices"][0]["grun"]["prompt"][-1]["gates"]
    return found


def encoded(folder: Path) -> list[list[int]]:
    """Ids of the questions in the model's template."""
    _, tokenizer, _ = load_base(ModelConfig(path=str(folder / "model"), device="cpu"))
    return [encode_prompt(TEMPLATES.get("chat"), tokenizer, question) for question in QUESTIONS]


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_reads_are_the_gates_of_the_prompt_that_ends_there(server: Running, folder: Path, number: int) -> None:
    question, ids = QUESTIONS[number], encoded(folder)[number]
    *before, last = server.chat(question, grun={"gates": True})["choices"][0]["grun"]["prompt"]
    assert last["gates"].keys() == DESIGNS.keys() and "reads" not in last
    assert [token["gates"] for token in before] == [{} for _ in before]
    for count, token in enumerate(before, 1):
        asked = gates_of(server, ids[:count])
        assert token["reads"] == {name: pytest.approx(asked[name], abs=1e-5) for name in ("maxmin", "mean")}
    assert len({token["reads"]["mean"] for token in before}) > 3


def test_reads_beside_longer_prompts_are_those_of_one_alone(server: Running, folder: Path) -> None:
    alone = [server.chat(question, grun={"gates": True})["choices"][0]["grun"]["prompt"] for question in QUESTIONS]
    body = {"model": "model", "prompt": encoded(folder), "max_tokens": 2, "temperature": 0, "grun": {"gates": True}}
    choices = server.post("v1/completions", body).json()["choices"]
    for prompt, choice in zip(alone, choices, strict=True):
        for one, other in zip(prompt, choice["grun"]["prompt"], strict=True):
            assert one.get("reads", {}) == pytest.approx(other.get("reads", {}), abs=1e-5)


def test_an_adapter_served_alone_tells_them_too(folder: Path) -> None:
    with running(folder / "maxmin", folder / "model") as server:
        prompt = server.chat(QUESTIONS[0], grun={"gates": True})["choices"][0]["grun"]["prompt"]
        assert all(token["reads"].keys() == {"maxmin"} for token in prompt[:-1])
        off = server.chat(QUESTIONS[0], grun={"gates": True, "off": ["maxmin"]})["choices"][0]["grun"]["prompt"]
        assert not any("reads" in token for token in off)
    with running(folder / "published", folder / "model") as server:
        prompt = server.chat(QUESTIONS[0], grun={"gates": True})["choices"][0]["grun"]["prompt"]
        assert not any("reads" in token for token in prompt)
