"""The question in lower case."""

from __future__ import annotations

from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material


class LowerCase(Attack):
    """Names get other tokens, so that a gate that knows them by their tokens stays closed."""

    name = "lower_case"
    needs = "questions with capital letters"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The question in lower case; nothing where it is so already."""
        question = (row.prompt or "").lower()
        return [Asked(material.prompt(question, row.earlier), row)] if question != row.prompt else []


LOWER_CASE = LowerCase()
