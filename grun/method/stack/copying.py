"""Copies of adapters that are whole and on disk, or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from grun.data.rows import Row
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE
from grun.method.validation import read_regular
from grun.runtime.files import staged, write_bytes

TEXT_FILE = "forget.jsonl"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
FILES = (*ADAPTER_FILES, TEXT_FILE)
"""All that a request's folder may hold; the text only where it is to be stored."""


def copy_files(
    source: Path, folder: Path, *, names: Sequence[str] = ADAPTER_FILES, text: Sequence[Row] | None = None
) -> None:
    """Copy an adapter's files to `folder`, which is not there yet and appears whole.

    Args:
        source: folder of the adapter.
        folder: new folder, in one that is taken.
        names: files to copy, as far as they are there; whatever else lies there is left.
        text: rows to write beside them, one a line; None: none.

    Raises:
        AdapterError: one of them is a link, or no regular file. Nothing is written then.
    """
    contents = {name: read_regular(source / name) for name in names if os.path.lexists(source / name)}
    if text is not None:
        lines = [json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in text]
        contents[TEXT_FILE] = "".join(lines).encode()
    with staged(folder) as new:
        for name, data in contents.items():
            write_bytes(new / name, data)
