"""What all tests of the cache need."""

import pytest
from torch import nn


@pytest.fixture(autouse=True)
def softmax_in_the_models_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own softcapped attention takes its softmax in float32, also in a float64 model."""
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, **_: scores.softmax(dim))
