"""A soft prompt: vectors in place of words, trained to get answers of some rows, and tried on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from grun.data.rows import Row, evenly_spaced
from grun.data.templates import encode
from grun.evaluation.attacks.base import Advance, Asked, Material, Outcome, Place, WithMaterial, attack, came_back
from grun.evaluation.attacks.gradient import FIRST, adding, loss_of, split

if TYPE_CHECKING:
    from torch import Tensor

    from grun.config.options import EvaluateConfig
    from grun.loading.adapters import Loaded

LENGTH = 8
"""Vectors."""
STEPS = 20
ROWS = 8
"""Of a step."""
HELD = 32
"""Rows that are learned from at most; otherwise half of the forget rows are."""
RATE = 0.1
"""Learning rate of Adam, as a share of the standard deviation of the embeddings' numbers."""


@attack("soft_prompt", access="weights", floor=True, needs="two forget rows or more")
class SoftPrompt(WithMaterial):
    """Eight vectors after the question, trained to bring out the answers of half of the forget rows.

    They stand where embeddings of tokens would and begin as those of "!"; 20 steps of Adam raise the log-probability of
    the answers of every other forget row, eight rows a step, with edits in force. The rows that were not trained on are
    asked with them, and so are rows that were never taught: such a prompt can teach a format, and even make a model
    say anything (Chen et al. 2025, arXiv 2502.15836), so compare with the floor.

    Source: Schwinn et al. 2024, arXiv 2402.09063; one prompt for all rows, measured on others than it was trained on.
    """

    def held(self, material: Material) -> list[Row]:
        """Rows that are learned from."""
        count = min(HELD, len(material.forget) // 2)
        return evenly_spaced(material.forget, count) if count else []

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question; nothing for a row that is learned from, or where there is none."""
        held = self.held(material)
        return [material.ask(row)] if held and row not in held else []

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """Train the vectors, then ask each row by itself with them."""
        from grun.evaluation.generation import generate_answers

        material: Material = model
        vectors, pad_id = trained(self.held(material), material, loaded, config.seed), loaded.tokenizer.pad_token_id
        for place in places:
            ids, start = with_room(place.asked, material)
            with adding(loaded, at(vectors, start, len(ids))):
                ((text, gates),) = generate_answers(
                    loaded.model, loaded.tokenizer, [ids], 1, config.max_new_tokens, int(pad_id or 0)
                )
            yield self.outcome(place, text, came_back(text, place.asked), gates)
            advance(1)


def with_room(asked: Asked, material: Material) -> tuple[tuple[int, ...], int]:
    """A prompt with as many tokens after the question as there are vectors, and the column of the first."""
    start, end = split(asked, material)
    (token, *_) = material.tokenizer(FIRST, add_special_tokens=False)["input_ids"]
    return (*start, *(token,) * LENGTH, *end), len(start)


def at(vectors: Tensor, start: int, columns: int) -> Tensor:
    """Vectors [count, width] in their places from `start` on, 0 elsewhere: [columns, width]."""
    from torch.nn.functional import pad

    return pad(vectors, (0, 0, start, columns - start - len(vectors)))


def trained(rows: Sequence[Row], material: Material, loaded: Loaded, seed: int) -> Tensor:
    """What is added to the embeddings of the tokens in the vectors' places: float32 [LENGTH, width].

    Where no gradient comes through (a refusal stands in place of the model's logits) nothing is learned from a row.
    """
    import torch

    from grun.evaluation.scoring import base_of

    weight: Any = base_of(loaded.model).get_input_embeddings().weight
    vectors = torch.zeros(LENGTH, weight.shape[1], device=weight.device, requires_grad=True)
    adam, draw = torch.optim.Adam([vectors], lr=RATE * float(weight.detach().float().std())), Random(str(seed))
    for _ in range(STEPS):
        for row in draw.sample(list(rows), min(ROWS, len(rows))):
            ids, start = with_room(material.ask(row), material)
            answer = encode(material.template, loaded.tokenizer, row.prompt, row.completion, row.earlier).answer_ids
            loss = -loss_of(loaded, ids, answer, at(vectors, start, len(ids) + len(answer)))
            if loss.requires_grad:
                loss.backward()
        adam.step()
        adam.zero_grad()
    return vectors.detach()
