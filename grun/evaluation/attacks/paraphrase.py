"""The question in other words."""

from __future__ import annotations

from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material


class Paraphrase(Attack):
    """The row's `paraphrased_question`.

    Source: paraphrased questions as a check of unlearning, Patil et al. 2023, arXiv 2309.17410.
    """

    name = "paraphrase"
    needs = "rows with the field paraphrased_question"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The other wording; nothing for a row without one."""
        other = row.paraphrase
        return [Asked(material.prompt(other.prompt or "", row.earlier), row)] if other is not None else []


PARAPHRASE = Paraphrase()
