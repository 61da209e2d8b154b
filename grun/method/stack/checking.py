"""Whether the files of a request are still those that were added."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from grun.errors import AdapterError
from grun.method.stack.manifest import Base, Problem, Request
from grun.method.validation import is_real, read_regular, validate


def request_problems(request: Request, folder: Path, base: Base | None) -> list[Problem]:
    """What is wrong with a request: files missing, changed or further ones, links, an adapter of no use.

    Args:
        request: as the manifest has it.
        folder: of its files.
        base: that of the store.
    """
    if os.path.lexists(folder) and not is_real(folder, stat.S_ISDIR):
        return [Problem(request.id, f"{folder.name} is a link, or no folder; it is not followed")]
    there = sorted(os.listdir(folder)) if folder.exists() else []
    texts = [f"{name} is not a file of the manifest" for name in there if name not in request.files]
    links = False
    for name, expected in request.files.items():
        try:
            if hashlib.sha256(read_regular(folder / name)).hexdigest() != expected:
                texts.append(f"{name} was changed: its SHA-256 is not the manifest's")
        except FileNotFoundError:
            texts.append(f"{name} is missing")
        except AdapterError as error:
            links = True
            texts.append(str(error))
    if not links:
        try:
            config = validate(folder).config
        except AdapterError as error:
            texts.append(f"the adapter cannot be read: {error}")
        else:
            fingerprint = None if base is None else base.fingerprint
            if config.base_fingerprint != fingerprint:
                texts.append(
                    f"made on another base: fingerprint {config.base_fingerprint}, the store's is {fingerprint}"
                )
    return [Problem(request.id, text) for text in texts]
