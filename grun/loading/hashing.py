"""What an adapter on disk is, as a hash; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from grun.runtime.files import content_hash, file_hash
from grun.runtime.records import STACK_FILE


def adapter_hash(folder: Path) -> str:
    """Hash of the files that make an adapter what it is."""
    files = sorted([*folder.glob("adapter_*.*"), *folder.glob(STACK_FILE)])
    return content_hash([[file.name, file_hash(file)] for file in files])
