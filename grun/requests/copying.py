"""Copies of adapters that are whole and on disk, or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from grun.data.rows import Row
from grun.files import write_bytes
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE
from grun.method.validation import read_regular

TEXT_FILE = "forget.jsonl"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
FILES = (*ADAPTER_FILES, TEXT_FILE)
"""All that a request's folder may hold; the text only where it is to be stored."""


def copy_files(
    source: Path,
    folder: Path,
    temporary: Path,
    *,
    names: Sequence[str] = ADAPTER_FILES,
    text: Sequence[Row] | None = None,
) -> None:
    """Copy an adapter's files to `folder`, which is not there yet and appears whole.

    Args:
        source: folder of the adapter.
        folder: new folder.
        temporary: its name until it is whole, beside it.
        names: files to copy, as far as they are there; whatever else lies there is left.
        text: rows to write beside them, one a line; None: none.

    Raises:
        AdapterError: one of them is a link, or no regular file. Nothing is written then.
    """
    contents = {name: read_regular(source / name) for name in names if os.path.lexists(source / name)}
    if text is not None:
        lines = [json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in text]
        contents[TEXT_FILE] = "".join(lines).encode()
    temporary.mkdir(parents=True)
    for name, data in contents.items():
        write_bytes(temporary / name, data)
    sync(temporary)
    os.rename(temporary, folder)
    sync(folder.parent)


def delete_files(folder: Path) -> None:
    """Delete what `copy_files` wrote, and the folder if nothing else lies in it; a link is left as it is."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        for cut_off in folder.glob(f".{name}.*.tmp"):
            cut_off.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
