"""A few words behind the question."""

from __future__ import annotations

from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material
from grun.evaluation.attacks.strings import SUFFIXES


class Suffix(Attack):
    """Move the last prompt token, at which GRUN's published gate reads and its edit writes.

    Reason: the tokens before an answer are then others than in unlearning, while any user may write them.
    """

    name = "suffix"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The question with each of `SUFFIXES` behind it."""
        return [
            Asked(material.prompt(f"{row.prompt}{suffix}", row.earlier), row, variant=suffix) for suffix in SUFFIXES
        ]


SUFFIX = Suffix()
