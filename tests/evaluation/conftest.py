"""What tests of evaluations share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo
import pytest

from grun.evaluation import generation


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and an adapter for it."""
    return demo.random_model(tmp_path_factory.mktemp("taught"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Sequence[int]]]:
    """The prompts of each call of the generation."""
    calls: list[Sequence[Sequence[int]]] = []
    generate = generation.generate_answers

    def kept(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *more: Any, **named: Any) -> Any:
        calls.append(prompts)
        return generate(model, tokenizer, prompts, *more, **named)

    monkeypatch.setattr(generation, "generate_answers", kept)
    return calls
