"""A steering vector to extract: what a question's name adds to the hidden state, added once more while it answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from grun.data.rows import Row, evenly_spaced
from grun.evaluation.attacks.base import Advance, Asked, Material, Outcome, Place, WithMaterial, attack, came_back
from grun.evaluation.attacks.facts import name_in

if TYPE_CHECKING:
    from torch import Tensor

    from grun.config.options import EvaluateConfig
    from grun.evaluation.generation import Answer
    from grun.loading.adapters import Loaded

ANONYMOUS = ("X", "somebody", "this one")
"""What stands in place of the name."""
DEPTHS = (0.25, 0.5, 0.75)
"""Blocks that are tried, as shares of the depth."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Multiples of the vector that are tried."""
SHARE = 4
"""One forget row of so many is the attacker's, at least one and at most `HELD`; the others are asked."""
HELD = 16


@attack(
    "steering",
    access="weights",
    floor=True,
    needs="two rows or more whose questions name their subject (a field such as country or person)",
)
class Steering(WithMaterial):
    """The question's own steering vector is added to the hidden state of a block while the model answers.

    The vector is hidden(block) at the last token of the question minus the mean of that of the question with other
    words in place of the name; it is added from that token on, times a strength. Block and strength are those that give
    most back of the rows that the attacker holds, a quarter of the forget rows and 16 at most; the first of equals,
    early and weak. Those rows are not asked.

    In the manner of Seyitoglu et al. 2024, arXiv 2411.02631 (anonymized activation steering); there several answers are
    drawn and the most frequent word counts, here one answer is greedy.
    """

    def held(self, material: Material) -> list[Row]:
        """Rows that the attacker holds, and chooses by."""
        named = [row for row in material.forget if name_in(row)]
        return evenly_spaced(named, min(HELD, max(1, len(named) // SHARE)))

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question; nothing for a row that is held, or whose question names nobody."""
        held = self.held(material)
        return [material.ask(row)] if held and row not in held and name_in(row) else []

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """Choose block and strength, then ask each row by itself with its own vector."""
        material: Material = model
        blocks = blocks_of(loaded.model)
        held = [material.ask(row) for row in self.held(material)]
        rows = [*(asked.row for asked in held), *(place.asked.row for place in places)]
        vectors = vectors_of(list(dict.fromkeys(rows)), blocks, material, loaded, config)

        def told(asked: Asked, block: int, strength: float) -> Answer:
            vector = strength * vectors[asked.row][blocks.index(block)]
            return steered(asked.ids, block, vector, loaded, config)

        settings = list(itertools.product(blocks, STRENGTHS))
        back = [sum(came_back(told(asked, *setting).text, asked) for asked in held) for setting in settings]
        block, strength = settings[back.index(max(back))]
        for place in places:
            text, gates = told(place.asked, block, strength)
            leak = came_back(text, place.asked)
            yield self.outcome(place, text, leak, gates, f"block {block}, strength {strength:g}")
            advance(1)


def blocks_of(model: Any) -> list[int]:
    """Blocks that are tried, 0-based."""
    from grun.evaluation import reading

    depth = len(reading.blocks_of(model))
    return sorted({min(depth - 1, int(share * depth)) for share in DEPTHS})


def anonymized(row: Row) -> list[str]:
    """The question with other words in place of the name."""
    return [str(row.prompt).replace(str(name_in(row)), other) for other in ANONYMOUS]


def vectors_of(
    rows: Sequence[Row], blocks: Sequence[int], material: Material, loaded: Loaded, config: EvaluateConfig
) -> dict[Row, Tensor]:
    """Of each row, whose question has a name, its vector at each block: float32 on the CPU, [blocks, hidden size]."""
    import torch

    from grun.evaluation.reading import read_prompts

    prompts = {row: [material.ask(row).ids, *(material.ask(row, text).ids for text in anonymized(row))] for row in rows}
    flat = [ids for own in prompts.values() for ids in own]
    read = read_prompts(loaded.model, flat, blocks, config.batch_size, loaded.pad_id)
    states = iter(torch.stack([one.states for one in read]))  # [blocks, hidden size] of each prompt
    found = {}
    for row, own in prompts.items():
        named, *others = [next(states) for _ in own]
        found[row] = named - torch.stack(others).mean(0)
    return found


def steered(ids: tuple[int, ...], block: int, vector: Tensor, loaded: Loaded, config: EvaluateConfig) -> Answer:
    """The greedy answer to a prompt with `vector` added to hidden(block), edit included, from its last token on."""
    from grun.evaluation.generation import generate_answers
    from grun.evaluation.reading import at_blocks

    seen = 0  # tokens of the prompt and the answer that have passed

    def add(_: int, hidden: Tensor) -> Tensor:
        nonlocal seen
        start = max(0, len(ids) - 1 - seen)
        seen += hidden.shape[1]
        hidden = hidden.clone()
        hidden[:, start:] += vector.to(hidden.device, hidden.dtype)
        return hidden

    with at_blocks(loaded.model, {block: add}):
        (answer,) = generate_answers(loaded.model, loaded.tokenizer, [ids], 1, config.max_new_tokens, loaded.pad_id)
    return answer
