"""Copies of adapters that are whole and on disk, or absent."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from grun.data.rows import Row
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
TEXT_FILE = "forget.jsonl"


def copy_adapter(adapter: Path, folder: Path, text: Sequence[Row] | None) -> None:
    """Copy the files of an adapter to `folder`, which is not there yet; it appears whole, under its name.

    Args:
        adapter: folder as `GrunModel.save_pretrained` writes it; whatever else lies there is left.
        folder: new folder.
        text: rows to write beside them, one a line; None: none.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, temporary / name)
    if text is not None:
        lines = [json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in text]
        (temporary / TEXT_FILE).write_text("".join(lines), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    os.rename(temporary, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
