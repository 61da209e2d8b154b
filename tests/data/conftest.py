"""What tests of data share."""

from __future__ import annotations

from typing import Any

import datasets
import pytest


class Hub:
    """Stands in for `datasets.load_dataset`: what was asked for, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self.rows: list[dict[str, Any]] = [{"text": "from the hub"}]
        self.error: Exception | None = None

    def __call__(self, repository: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        self.asked.append((repository, config, split))
        if self.error is not None:
            raise self.error
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in
