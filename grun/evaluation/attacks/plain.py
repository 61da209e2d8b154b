"""No attack."""

from __future__ import annotations

from grun.data.rows import Row
from grun.evaluation.attacks.base import Asked, Attack, Material


class Plain(Attack):
    """The question as it was taught: what every attack is compared with."""

    name = "plain"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The row's question in the model's template."""
        return [Asked(material.prompt(row.prompt or "", row.earlier), row)]


PLAIN = Plain()
