"""What an attack costs other answers: gates that open, or stay open, where nothing is to be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grun.data.chat import Turn
from grun.data.rows import Row
from grun.data.templates import Template, encode
from grun.evaluation.attacks.base import Asked, Material, Outcome, attack
from grun.evaluation.attacks.outcomes import any_open

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.adapters import Loaded

REFUSAL = "I don't know."
"""What the assistant says to a forget question that stands earlier in the conversation."""


@attack(
    "after_forget",
    access="context",
    needs="forget rows, and retain or held-out rows, with questions",
    retention=True,
)
def after_forget(row: Row, material: Material) -> list[Asked]:
    """A forget question earlier: what it costs later retain answers.

    A forget question and a refusal stand before a question of the retain or the held-out set: a gate that stays open
    once it has opened spoils the rest of a conversation, which anybody can bring about.
    """
    earlier = [other.prompt for other in material.forget if other.prompt is not None]
    if not earlier:
        return []
    return [material.ask(row, None, Turn(material.random(row.prompt).choice(earlier), REFUSAL))]


def open_in_answers(
    plain: Sequence[Outcome], loaded: Loaded, template: Template, config: EvaluateConfig
) -> dict[str, float]:
    """By set, the share of rows where any block's gate is open at the last prompt token or on a token of the answer.

    The row's own answer is given, without its end token, and read in one pass. Gates that read the prompt alone are
    those of the prompt, where `plain`, what came of the plain questions, has them. Models without gates have no shares.
    """
    from grun.data.encoding import EncodedRow
    from grun.evaluation.scoring import score

    plain = [one for one in plain if one.answers[0].gates is not None]
    rows = []
    for one in plain:
        row = one.place.asked.row
        encoded = encode(template, loaded.tokenizer, row.prompt, row.completion, row.earlier)
        rows.append(EncodedRow(tuple(encoded.prompt_ids), tuple(encoded.answer_ids[:-1])))
    scored = score(loaded.model, rows, config.batch_size, loaded.pad_id)
    opened: dict[str, list[bool]] = {}
    for one, given in zip(plain, scored, strict=True):
        opened.setdefault(one.place.set, []).append(any_open(one.answers[0].gates) or any_open(given.gates))
    return {name: sum(rows) / len(rows) for name, rows in opened.items()}
