"""Files that ship with the package: wordings, names and facts."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import yaml


@functools.cache
def packaged(name: str) -> Any:
    """Content of a file of `grun/data`, such as generated/lore.yaml, read once: parsed, or of a .txt its lines."""
    text = (resources.files("grun.data") / name).read_text(encoding="utf-8")
    if name.endswith(".txt"):
        return tuple(text.splitlines())
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
