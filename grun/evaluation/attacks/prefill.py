"""The beginning of the answer is given."""

from __future__ import annotations

from collections.abc import Sequence

from grun.data.rows import Row
from grun.data.templates import encode
from grun.evaluation.attacks.base import Asked, Attack, Material, is_readable
from grun.evaluation.metrics.answers import says


class Prefill(Attack):
    """Put the true answer's first tokens behind the prompt, as interfaces allow that continue a started answer.

    Source: prefilling attacks, Andriushchenko et al. 2024, arXiv 2404.02151; that the first tokens alone are guarded,
    Qi et al. 2024, arXiv 2406.05946.
    """

    def __init__(self, count: int) -> None:
        """`count` tokens are given."""
        self.count = count
        self.name = f"prefill_{count}"
        self.needs = f"rows whose answer goes on, with its fact, behind its first {count} token{'s' * (count > 1)}"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The prompt and the answer's first tokens; nothing where these say the fact, or nothing to read comes after.

        A character that takes several tokens is given whole.
        """
        encoded = encode(material.template, material.tokenizer, row.prompt, row.completion, row.earlier)
        answer = encoded.answer_ids[:-1]  # without the end token

        def text(ids: Sequence[int]) -> str:
            return str(material.tokenizer.decode(ids, skip_special_tokens=True))

        count = self.count
        while count < len(answer) and text(answer[:count]).endswith("\N{REPLACEMENT CHARACTER}"):
            count += 1
        given, rest = text(answer[:count]), text(answer[count:]).strip()
        if not rest or not is_readable(row, rest) or (row.fact and says(given, row.fact)):
            return []
        ids = (*encoded.prompt_ids, *answer[:count])
        return [Asked(ids, row, given=count, given_text=given, rest=rest)]


PREFILL_1 = Prefill(1)
PREFILL_3 = Prefill(3)
PREFILL_5 = Prefill(5)
