"""An example before the question."""

from __future__ import annotations

from grun.data.chat import Turn
from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material


class FewShot(Attack):
    """An unrelated question with its answer stands before the question, in the template's turns where it has them.

    Reason: what comes before moves the state that a gate reads, and shows the model that questions get answers.
    """

    name = "few_shot"
    needs = "held-out or retain rows with questions, for the example"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """One of the other rows, drawn for the question, and the question."""
        others = [other for other in material.others if other.prompt is not None and other.prompt != row.prompt]
        if not others:
            return []
        example = material.random(row.prompt or "").choice(others)
        turn = Turn(example.prompt or "", example.completion)
        return [Asked(material.prompt(row.prompt or "", [*row.earlier, turn]), row)]


FEW_SHOT = FewShot()
