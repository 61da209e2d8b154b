"""Whether the files of a request are still those that were added."""

from __future__ import annotations

from pathlib import Path

from grun.errors import AdapterError
from grun.files import file_hash
from grun.method.adapter import AdapterConfig, read_weights
from grun.requests.manifest import Base, Problem, Request


def request_problems(request: Request, folder: Path, base: Base | None) -> list[Problem]:
    """What is wrong with a request: files missing, changed or further ones, an adapter not to be read or of no use.

    Args:
        request: as the manifest has it.
        folder: of its files.
        base: that of the store.
    """
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    texts = [f"{name} is missing" for name in request.files if name not in there]
    texts += [f"{name} is not a file of the manifest" for name in sorted(there - set(request.files))]
    texts += [
        f"{name} was changed: its SHA-256 is not the manifest's"
        for name, expected in request.files.items()
        if name in there and file_hash(folder / name) != expected
    ]
    try:
        config, _ = AdapterConfig.read(folder)
        read_weights(folder)
    except AdapterError as error:
        texts.append(f"the adapter cannot be read: {error}")
    else:
        expected = None if base is None else base.fingerprint
        if config.base_fingerprint != expected:
            texts.append(f"made on another base: fingerprint {config.base_fingerprint}, the store's is {expected}")
    return [Problem(request.id, text) for text in texts]
