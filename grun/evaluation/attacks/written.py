"""What an attacked model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.evaluation.attacks.base import Advance, Attack, came_back
from grun.evaluation.attacks.outcomes import Outcome, Place
from grun.evaluation.drawing import Draw
from grun.evaluation.generation import Answer, generate_answers

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded


def write_answers(
    attack: Attack, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
) -> list[Outcome]:
    """What the model answers at each place; drawn answers one draw after another, so that k takes no more memory.

    Arguments as of `Attack.read`, and the attack that it is of.
    """
    tokenizer = loaded.tokenizer
    samples = [place.asked.samples for place in places]
    passes: list[tuple[Draw | None, list[int]]] = [
        (None, [number for number, count in enumerate(samples) if not count])
    ]
    for draw in range(max(samples)):
        drawn = [number for number, count in enumerate(samples) if draw < count]
        passes.append((Draw(config.seed, draw, config.attack_temperature), drawn))
    answers: list[list[Answer]] = [[] for _ in places]
    for choice, numbers in passes:
        found = generate_answers(
            model,
            tokenizer,
            [places[number].asked.ids for number in numbers],
            config.batch_size,
            config.max_new_tokens,
            int(tokenizer.pad_token_id or 0),
            advance,
            draw=choice,
        )
        for number, answer in zip(numbers, found, strict=True):
            answers[number].append(answer)
    return [
        Outcome(attack, place, found, [came_back(one.text, place.asked) for one in found])
        for place, found in zip(places, answers, strict=True)
    ]
