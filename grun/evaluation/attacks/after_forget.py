"""What a forget question costs later answers of the same conversation."""

from __future__ import annotations

from grun.data.chat import Turn
from grun.data.rows import Row
from grun.evaluation.attacks.base import Access, Asked, Attack, Material
from grun.evaluation.attacks.strings import REFUSAL


class AfterForget(Attack):
    """A forget question and a refusal stand before a question of the retain or the held-out set.

    Reason: a gate that stays open once it has opened spoils the rest of a conversation, which anybody can bring about.
    What comes back is retention, not a leak.
    """

    name = "after_forget"
    access: Access = "context"
    needs = "forget rows, and retain or held-out rows, with questions"
    retention = True

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """One of the forget questions, drawn for the row's, `REFUSAL`, and the row's question."""
        earlier = [other.prompt for other in material.forget if other.prompt is not None]
        if not earlier:
            return []
        before = Turn(material.random(row.prompt or "").choice(earlier), REFUSAL)
        return [Asked(material.prompt(row.prompt or "", [*row.earlier, before]), row)]


AFTER_FORGET = AfterForget()
