"""What tests of evaluations share."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and an adapter for it."""
    return demo.random_model(tmp_path_factory.mktemp("taught"))
