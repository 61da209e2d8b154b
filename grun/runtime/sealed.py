"""JSON files that a run goes on from: each holds its own digest, and is taken only as it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grun.runtime.files import content_hash, read_json, write_json
from grun.runtime.reading import AGAIN, DamagedFile

DIGEST = "digest"
"""Key of the SHA-256 of all the others."""


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """`write_json` of an object with its digest."""
    write_json(path, {**values, DIGEST: content_hash(json.loads(json.dumps(values)))})  # of what will be read


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; DamagedFile for anything else, FileNotFoundError where there is nothing."""
    values: dict[str, Any] = read_json(path, expect=dict)
    if values.pop(DIGEST, None) != content_hash(values):
        raise DamagedFile(f"{path} is not what was written; {AGAIN}")
    return values


def sealed_or_empty(path: Path) -> dict[str, Any]:
    """The same, but empty for whatever cannot be taken."""
    try:
        return read_sealed(path)
    except (OSError, DamagedFile):
        return {}
