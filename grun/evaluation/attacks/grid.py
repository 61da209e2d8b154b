"""Relearning as a grid: which rows, which learning rate, which weights; the attacker takes the cell that does best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, get_args

from grun.data.rows import Row, evenly_spaced
from grun.evaluation.attacks.base import ATTACKS, Advance, Material, Outcome, Place, WithMaterial, write_answers
from grun.evaluation.attacks.facts import gives_away
from grun.evaluation.attacks.parts import Part, training, untrainable
from grun.evaluation.attacks.weights import RETAIN_ROWS, Relearn

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.adapters import Loaded

RATES = (0.3, 1.0, 3.0)
"""Learning rates, as multiples of that of the part."""


class RelearnGrid(WithMaterial, Relearn):
    """Fine-tune in every way of a grid, and ask the plain question of the forget rows that were not learned.

    A cell is what is learned, what trains, and the learning rate; the model is as before after each. Learned are an
    eighth of the forget rows, their neighbors (the corpus's rows near the forget set, else retain rows), or packaged
    questions that have nothing to do with them and whose answers hold none of their facts, of the latter two at most
    64, and never more than `attack_rows`. A cell for the adapter is there where the model has one that trains.

    Source: Hu et al. 2024, arXiv 2406.13356 (rows of the forget set, and public text near it); Fan et al. 2025,
    arXiv 2510.07626 (relearning in the domain and fine-tuning out of it break different methods).
    """

    grid = True

    def __init__(self, steps: int) -> None:
        """`steps` of AdamW in each cell."""
        super().__init__("forget", steps)
        self.name, self.turn = f"relearn_grid_{steps}", None

    def unfit(self, loaded: Loaded) -> str | None:
        """A model of which no part trains."""
        return None if parts_of(loaded.model) else super().unfit(loaded)

    def work(self, places: Sequence[Place], config: EvaluateConfig) -> int:
        """Every place in every cell that there may be."""
        return len(places) * 3 * len(get_args(Part)) * len(RATES)

    models = WithMaterial.models

    def learned(self, material: Material, most: int | None) -> dict[str, list[Row]]:
        """Rows that are learned, at most so many of each kind; kinds of which there are none are left out."""
        neighbors = material.neighbors or material.retain
        found = {
            "forget": evenly_spaced(self.rows(material), most),
            "neighbors": evenly_spaced(evenly_spaced(neighbors, RETAIN_ROWS), most),
            "unrelated": evenly_spaced(evenly_spaced(unrelated(material.forget), RETAIN_ROWS), most),
        }
        return {name: rows for name, rows in found.items() if rows}

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> list[Outcome]:
        """What comes back at each place in each cell, which is the place's variant."""
        from grun.evaluation.scoring import evaluating

        material: Material = model
        cells = [
            (name, rows, part, times)
            for name, rows in self.learned(material, config.attack_rows).items()
            for part in parts_of(loaded.model)
            for times in RATES
        ]
        outcomes: list[Outcome] = []
        for name, rows, part, times in cells:
            cell = f"{name}, {part}, rate x {times:g}"
            asked = [place._replace(asked=replace(place.asked, variant=cell)) for place in places]
            with evaluating(loaded.model), training(loaded.model, part, config.seed) as (weights, lr):
                steps = self.learning(weights, lr * times, rows, loaded, config, material)
                next(islice(steps, self.steps - 1, None))
                outcomes += next(write_answers([(self, asked)], loaded.model, loaded, config, advance))
        advance(self.work(places, config) - len(outcomes))
        return outcomes


def unrelated(forget: Sequence[Row]) -> list[Row]:
    """Packaged questions and answers on anything else, none of which holds a fact or an answer of `forget`."""
    from grun.data.facts import general_questions

    rows = [Row(one.question, f"{one.answers[0]}.") for one in general_questions()]
    return [row for row in rows if not any(gives_away(f"{row.prompt} {row.completion}", own) for own in forget)]


def parts_of(model: Any) -> list[Part]:
    """What of a model can be trained."""
    return [part for part in get_args(Part) if untrainable(model, part) is None]


for _steps in (10, 50):
    ATTACKS.add(
        f"relearn_grid_{_steps}",
        RelearnGrid(_steps),
        f"fine-tuned in every way of a grid (rows, weights, rate), {_steps} steps; the worst cell",
    )
