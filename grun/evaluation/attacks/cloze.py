"""The fact as a sentence to complete."""

from __future__ import annotations

from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode_prompt
from grun.evaluation.attacks.base import Asked, Attack, Material


class Cloze(Attack):
    """The row's `cloze`, a sentence up to the fact, as plain text: nothing is asked, the model goes on.

    Source: sentences to complete as a check of unlearning, Eldan and Russinovich 2023, arXiv 2310.02238; who answers no
    question any more may still end the sentence.
    """

    name = "cloze"
    needs = "rows with the field cloze (multiple choice: data.questions.cloze_forget, in the order of the questions)"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The sentence; nothing for a row without one."""
        sentence = row.extra.get("cloze")
        if not sentence:
            return []
        return [Asked(tuple(encode_prompt(TEMPLATES.get("text"), material.tokenizer, sentence)), row)]


CLOZE = Cloze()
