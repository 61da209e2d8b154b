"""Misspelled words."""

from __future__ import annotations

from grun.data.augmentation import with_typos
from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material


class Typos(Attack):
    """Neighboring letters are swapped in three words: the question is still understood, its tokens are others.

    Reason: as `lower_case`, for a slip that every user makes.
    """

    name = "typos"
    needs = "questions with words in which two letters can be swapped"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The question with typos drawn for it; nothing where no word can have one."""
        question = with_typos(row.prompt or "", material.random(row.prompt or "").getrandbits(32))
        return [Asked(material.prompt(question, row.earlier), row)] if question != row.prompt else []


TYPOS = Typos()
