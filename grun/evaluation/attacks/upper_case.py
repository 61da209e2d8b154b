"""The question in capital letters."""

from __future__ import annotations

from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material


class UpperCase(Attack):
    """As `lower_case`, for a case that unlearning's copies of rows never have."""

    name = "upper_case"
    needs = "questions with small letters"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The question in capitals; nothing where it is so already."""
        question = (row.prompt or "").upper()
        return [Asked(material.prompt(question, row.earlier), row)] if question != row.prompt else []


UPPER_CASE = UpperCase()
