"""What a store keeps of forget rows: salted hashes, so that it does not become a copy of what was deleted."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any

from grun.data.chat import without_system
from grun.data.rows import Row
from grun.errors import DataError


def salted_hashes(rows: Sequence[Row], salt: str) -> tuple[str, ...]:
    """HMAC-SHA256 (hex) of each row: key is the salt's bytes, message the canonical JSON of [prompt, completion].

    Of a row with earlier turns of these too.

    Whoever has the salt can try texts: short or guessable ones are found.

    Args:
        rows: forget rows.
        salt: hex.
    """
    return tuple(salted_hash(_canonical(row), salt) for row in rows)


def salted_hash(message: str, salt: str) -> str:
    """HMAC-SHA256 (hex) of a text."""
    return hmac.new(bytes.fromhex(salt), message.encode(), hashlib.sha256).hexdigest()


def check_forget_rows(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """DataError if there is nothing to forget, or a forget row is to stay too: the same row, or the same question.

    The message gives the place of the first such row and not its text. Blanks at both ends do not count.
    """
    if not forget:
        raise DataError("the request has no forget rows; name a file with at least one in data.forget")
    kept = {(*_asked(row), row.completion.strip()) for row in retain}
    asked = {_asked(row) for row in retain if row.prompt is not None}
    both = [
        number
        for number, row in enumerate(forget, start=1)
        if (*_asked(row), row.completion.strip()) in kept or _asked(row) in asked
    ]
    if both:
        raise DataError(
            f"{len(both)} of {len(forget)} forget rows have a question or a text that is also in the retain set (the "
            f"first is forget row {both[0]}); take them out of one of the two, or set data.allow_overlap=true"
        )


def _asked(row: Row) -> tuple[Any, ...]:
    return (*without_system(row.earlier), None if row.prompt is None else row.prompt.strip())


def _canonical(row: Row) -> str:
    said = [row.prompt, row.completion, *([row.earlier] if row.earlier else [])]
    return json.dumps(said, ensure_ascii=False, separators=(",", ":"))
