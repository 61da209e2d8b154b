"""Another template."""

from __future__ import annotations

from grun.data.chat import without_system
from grun.data.rows import Row
from grun.data.templates import Template, encode_prompt
from grun.evaluation.attacks.base import Asked, Attack, Material
from grun.evaluation.attacks.strings import OTHER_TEMPLATE

OTHER_ONE = Template("attack", "string", OTHER_TEMPLATE, " ")


class OtherTemplate(Attack):
    """The question in a plain template that is not the model's own.

    Source: format changes bring back unlearned answers, Lynch et al. 2024, arXiv 2402.16835.
    """

    name = "other_template"
    needs = f"a model whose own template is not {OTHER_TEMPLATE!r}"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The question, behind earlier turns, in `OTHER_TEMPLATE`; nothing where that is the model's own."""
        if material.template.text == OTHER_TEMPLATE:
            return []
        turns = without_system(row.earlier)
        return [Asked(tuple(encode_prompt(OTHER_ONE, material.tokenizer, row.prompt, turns)), row)]


OTHER = OtherTemplate()
