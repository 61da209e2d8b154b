"""A linear map from hidden states to the fact, learned on other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grun.data.rows import Row, evenly_spaced
from grun.errors import ModelError
from grun.evaluation.attacks.base import Advance, Asked, Material
from grun.evaluation.attacks.outcomes import Outcome, Place
from grun.evaluation.attacks.read_out import Attacked, ReadOut, before_fact, chosen_block, read_prompts
from grun.evaluation.generation import base_of

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded

MOST, MOST_HELD = 1024, 256
"""Rows that the map is fitted on and chosen by, at most, evenly spaced."""
STRENGTHS = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3)
"""Ridge strengths that are tried, in units of a centered state's mean squared length; of equals the first is taken."""


class LinearProbe(ReadOut):
    """The fact's first token, read from the hidden state before it by a linear map fitted on retain rows.

    The map goes to the rows of the output embedding, so it can name tokens that no retain row begins with. Block
    (`chosen_block`) and ridge strength are those that read held-out rows best, or a fourth of the retain rows where
    nothing is held out; forget rows do not count. Guessed is among all tokens with which a fact begins anywhere in
    the data (an answer, for a row without a fact), so chance is well above zero: compare with the retain-only model.

    Source: linear probes, Alain and Bengio 2016, arXiv 1610.01644; affine maps into the space that the head reads,
    Belrose et al. 2023, arXiv 2303.08112; as a check of unlearning, Lynch et al. 2024, arXiv 2402.16835.
    """

    name = "linear_probe"
    needs = "two or more retain rows with questions, and facts that begin with different tokens"

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The prompt and the answer up to its fact; nothing where all facts begin with the same token."""
        place = before_fact(row, material)
        others = (before_fact(other, material).next_id for other in material.retain)
        if len(material.retain) < 2 or not any(other != place.next_id for other in others):
            return []
        return [Asked(place.ids, row, given=place.given)]

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> list[Outcome]:
        """Whether the right next token is the first of all candidates."""
        attacked: Attacked = model
        material, tokenizer = attacked.material, loaded.tokenizer
        size, pad_id = config.batch_size, int(tokenizer.pad_token_id or 0)
        blocks = attacked.blocks
        next_id = {
            row: before_fact(row, material).next_id
            for row in (*(place.asked.row for place in places), *material.forget, *material.retain, *material.others)
        }
        candidates = sorted(set(next_id.values()))
        number = {token: index for index, token in enumerate(candidates)}
        head: Any = base_of(attacked.model).get_output_embeddings()
        if head is None:
            raise ModelError(
                "the model does not say which of its layers is the head; leave linear_probe out of attacks"
            )
        embedded = head.weight[candidates].detach().double().cpu()  # [candidates, hidden size]

        def known(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
            """States [blocks, rows, hidden size] and number of the right candidate [rows]."""
            prompts = [before_fact(row, material).ids for row in rows]
            read = read_prompts(attacked.model, prompts, blocks, size, pad_id)
            return (
                torch.stack([one.states for one in read], dim=1).double(),
                torch.tensor([number[next_id[row]] for row in rows]),
            )

        fitted, held = known_rows(material)
        (states, right), (held_states, held_right) = known(fitted), known(held)
        best = [choose_map(states[block], right, held_states[block], held_right, embedded) for block in blocks]
        block = chosen_block([one.success for one in best])
        found = read_prompts(attacked.model, [place.asked.ids for place in places], [block], size, pad_id, advance)
        guesses = best[block].map.guess(torch.cat([one.states for one in found]).double(), embedded)
        outcomes = []
        for place, one, guess in zip(places, found, guesses.tolist(), strict=True):
            token = candidates[guess]
            right = token == next_id[place.asked.row]
            outcomes.append(self.told_by(block, place, str(tokenizer.decode([token])).strip(), one.gates, right))
        return outcomes


class LinearMap(NamedTuple):
    """An affine map from hidden states to output embeddings, float64."""

    weight: Tensor
    """[hidden size, embedding size]"""
    center: Tensor
    """Mean of the states it was fitted on, [hidden size]."""
    target: Tensor
    """Mean of the embeddings it was fitted on, [embedding size]."""

    def guess(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Number of the candidate whose embedding, [candidates, size], is nearest by angle: [rows] for [rows, hidden].

        The angle is between differences from `target`: the shrinkage of ridge shortens what the map gives.
        """
        mapped = (states - self.center) @ self.weight
        return (normalize(mapped, dim=1) @ normalize(embedded - self.target, dim=1).T).argmax(dim=1)


class Chosen(NamedTuple):
    """A map, and the share of held-out rows that it reads rightly."""

    map: LinearMap
    success: float


def choose_map(states: Tensor, right: Tensor, held: Tensor, held_right: Tensor, embedded: Tensor) -> Chosen:
    """The ridge regression of `STRENGTHS` that reads held-out rows best.

    Minimizes |X W - Y|^2 + strength * s |W|^2 with centered states X and embeddings Y, s the mean squared length of
    a row of X; W = X' (X X' + strength * s)^-1 Y, by one decomposition of X X' for all strengths.

    Args:
        states: to fit on, float64, [rows, hidden size].
        right: number of each row's candidate, [rows].
        held: states to choose by, [held rows, hidden size].
        held_right: number of their candidates, [held rows].
        embedded: output embeddings of the candidates, [candidates, embedding size].
    """
    center, target = states.mean(dim=0), embedded[right].mean(dim=0)
    x, y = states - center, embedded[right] - target
    values, vectors = torch.linalg.eigh(x @ x.T)
    unit = x.square().sum(dim=1).mean().clamp_min(torch.finfo(x.dtype).tiny)
    turned = vectors.T @ y
    chosen = []
    for strength in STRENGTHS:
        weight = x.T @ (vectors @ (turned / (values.clamp_min(0) + strength * unit).unsqueeze(1)))
        found = LinearMap(weight, center, target)
        chosen.append(Chosen(found, float((found.guess(held, embedded) == held_right).double().mean())))
    return max(chosen, key=lambda one: one.success)


def known_rows(material: Material) -> tuple[list[Row], list[Row]]:
    """Rows to fit on and rows to choose by, of which no one is both."""
    retain = set(material.retain)
    held = [row for row in material.others if row not in retain]
    fitted = list(material.retain)
    if not held:
        held = fitted[::4]
        fitted = [row for number, row in enumerate(fitted) if number % 4]
    return evenly_spaced(fitted, MOST), evenly_spaced(held, MOST_HELD)


LINEAR_PROBE = LinearProbe()
