"""Relearning as a grid: which rows, which learning rate, which weights; the attacker takes the cell that does best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from grun.data.rows import Row, evenly_spaced
from grun.evaluation.attacks.base import ATTACKS, Advance, Material, Outcome, Place, WithMaterial, write_answers
from grun.evaluation.attacks.facts import gives_away
from grun.evaluation.attacks.weights import (
    ADAPTER_LR,
    LR_TIMES_WIDTH,
    RETAIN_ROWS,
    Relearn,
    is_quantized,
    linear_layers,
    own_weights,
    put_back,
)

if TYPE_CHECKING:
    from torch import nn

    from grun.config.options import EvaluateConfig
    from grun.loading.adapters import Loaded

Part = Literal["adapter", "lora", "all"]
"""What trains: the model's own adapter (GRUN, ReFT, LoRA), a new LoRA beside it, or every weight."""
RATES = (0.3, 1.0, 3.0)
"""Learning rates, as multiples of that of the part."""
RANK = 8
"""Of the new LoRA."""
LORA_TIMES = 10
"""Learning rate of a LoRA, as a multiple of that of whole models."""


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
        return None if parts_of(loaded) else super().unfit(loaded)

    def work(self, places: Sequence[Place], config: EvaluateConfig) -> int:
        """Every place in every cell that there may be."""
        return len(places) * 3 * len(get_args(Part)) * len(RATES)

    @contextlib.contextmanager
    def models(
        self, attacks: Sequence[Relearn], loaded: Loaded, config: EvaluateConfig, material: Material
    ) -> Iterator[Iterator[Any]]:
        """The same; it is alone."""
        yield iter([material])

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
            for part in parts_of(loaded)
            for times in RATES
        ]
        outcomes: list[Outcome] = []
        for name, rows, part, times in cells:
            cell = f"{name}, {part}, rate x {times:g}"
            asked = [place._replace(asked=replace(place.asked, variant=cell)) for place in places]
            with evaluating(loaded.model), training(loaded, part, config.seed) as (weights, lr):
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


def parts_of(loaded: Loaded) -> list[Part]:
    """What of a model can be trained."""
    import torch

    from grun.evaluation.scoring import base_of
    from grun.method.actions import EDIT
    from grun.method.model import GrunModel
    from grun.method.stack.stack import GrunStack

    model, base = loaded.model, base_of(loaded.model)
    if isinstance(model, GrunStack):
        return []
    wide = base.dtype != torch.float16
    own = model.config.action == EDIT if isinstance(model, GrunModel) else wide and bool(adapter_weights(model))
    adapter: list[Part] = ["adapter"] if own else []
    return [*adapter, "lora", "all"] if wide and not is_quantized(model) else adapter


def adapter_weights(model: Any) -> list[nn.Parameter]:
    """Those of GRUN's or ReFT's edits, or of PEFT's adapter layers; none of a model without an adapter."""
    from grun.method.model import GrunModel

    if isinstance(model, GrunModel):
        return list(model.parameters())
    own = {id(weight) for weight in own_weights(model)}
    return [weight for weight in model.parameters() if weight.is_floating_point() and id(weight) not in own]


@contextlib.contextmanager
def training(loaded: Loaded, part: Part, seed: int) -> Iterator[tuple[list[nn.Parameter], float]]:
    """The weights of a part, and its learning rate; after the block the model is as before, bit for bit."""
    from grun.evaluation.scoring import base_of
    from grun.method.host import hidden_size_of
    from grun.method.model import GrunModel

    model, base = loaded.model, base_of(loaded.model)
    edits = isinstance(model, GrunModel)
    lr = LR_TIMES_WIDTH / hidden_size_of(base)
    if part == "lora":
        with frozen(model), low_rank(base, seed) as weights:
            yield weights, lr * LORA_TIMES
        return
    weights = adapter_weights(model) if part == "adapter" or edits else []
    if part == "adapter":
        lr = ADAPTER_LR if edits else lr * LORA_TIMES
    else:
        weights = [*own_weights(base), *weights]
    with frozen(model), put_back(weights):
        yield weights, lr


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Within the block no weight of a model, or of its base, asks for a gradient until it is told to."""
    from grun.evaluation.scoring import base_of

    flags = [(weight, weight.requires_grad) for one in (base_of(model), model) for weight in one.parameters()]
    try:
        for weight, _ in flags:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, trainable in flags:
            weight.requires_grad_(trainable)


@contextlib.contextmanager
def low_rank(base: Any, seed: int) -> Iterator[list[nn.Parameter]]:
    """Within the block every linear layer of the blocks has B A added to its weight, of rank `RANK`; all B and A.

    B begins at zero, A is normal with the variance 1 / its columns; both are float32 at least. The layer's own weight
    stays.

    Source: Hu et al. 2021, arXiv 2106.09685; here alpha is the rank, so the scale is 1.
    """
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    class Added(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            dtype, (rows, columns) = torch.promote_types(weight.dtype, torch.float32), weight.shape
            drawn = torch.randn(RANK, columns, generator=generator) / columns**0.5
            self.a = nn.Parameter(drawn.to(weight.device, dtype))
            self.b = nn.Parameter(torch.zeros(rows, RANK, device=weight.device, dtype=dtype))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + (self.b @ self.a).to(weight.dtype)

    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(base)
    orders = [list(layer._parameters) for layer in layers]
    added = []
    try:
        for layer in layers:
            added.append(Added(layer.weight))
            parametrize.register_parametrization(layer, "weight", added[-1])
        yield [weight for one in added for weight in (one.a, one.b)]
    finally:
        for layer, names in zip(layers, orders, strict=True):
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for name in names:  # the order in which they stand
                layer._parameters[name] = layer._parameters.pop(name)


for _steps in (10, 50):
    ATTACKS.add(
        f"relearn_grid_{_steps}",
        RelearnGrid(_steps),
        f"fine-tuned in every way of a grid (rows, weights, rate), {_steps} steps; the worst cell",
    )
