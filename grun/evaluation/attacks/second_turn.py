"""A question that is answered one turn later."""

from __future__ import annotations

from grun.data.chat import Turn
from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material
from grun.evaluation.attacks.strings import ASK_AGAIN, WAITING


class SecondTurn(Attack):
    """The question stands in turn 1, which the assistant did not answer yet; turn 2 asks for the answer.

    Reason: the turn that is answered names nothing that is to be forgotten, so a gate that reads it alone, or begins
    anew with each turn, stays closed.
    """

    name = "second_turn"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """`ASK_AGAIN` behind the question and `WAITING`."""
        return [Asked(material.prompt(ASK_AGAIN, [*row.earlier, Turn(row.prompt or "", WAITING)]), row)]


SECOND_TURN = SecondTurn()
