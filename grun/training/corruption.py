"""Noise on prompts: how strong it must be for the model to know as little of an answer as without its question."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from grun.data.encoding import EncodedRow, collate
from grun.method.edit import SteeringVector
from grun.method.model import GrunModel
from grun.method.plain import run_plain
from grun.training.steering import ROWS

log = logging.getLogger(__name__)

STRENGTHS = tuple(2.0**power for power in range(-3, 8))
"""What is tried, as multiples of the states' root mean square."""


@torch.no_grad()
def set_noise(model: GrunModel, answered: Sequence[EncodedRow], seed: int, pad_id: int) -> float:
    """Set the one edit of `model` to normal noise of the weakest strength that is enough; the strength.

    That is enough which leaves the answers no more probable (mean over rows of the mean log-probability a token) than
    they are after another row's prompt, without noise: a model that was never taught the fact would guess as well. If
    none is, the one that leaves least is taken. The noise is one vector for all tokens, so that neither a cache nor the
    rows beside it change an answer.

    Args:
        model: whose edit is noise and whose gate is fitted; the edit does not train from then on.
        answered: prompts to forget, with their answers.
        seed: of the noise.
        pad_id: id of padding, which is masked.

    Source: Liu et al. 2024, arXiv 2406.07933 (strength by a search without gradients, towards what a model knows that
    was never taught; there embeddings are corrupted, by a classifier of its own, and a row has a draw a token).
    """
    ((block, intervention),) = model.own_edits().items()
    assert isinstance(intervention.edit, SteeringVector)
    vector = intervention.edit.vector
    half = len(answered) // 2
    others = [
        replace(row, prompt_ids=other.prompt_ids)
        for row, other in zip(answered, [*answered[half:], *answered[:half]], strict=True)
    ]
    was_training = model.training
    model.eval()  # in which shut gates leave everything as it is
    try:
        with model.disabled():
            wanted, size = mean_logprob(model, others, pad_id), _size(model, answered[:ROWS], block, pad_id)
        noise = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed)).to(vector)
        left = {}
        for strength in STRENGTHS:
            vector.copy_(strength * size * noise)
            left[strength] = mean_logprob(model, answered, pad_id)
            if left[strength] <= wanted:
                break
    finally:
        model.train(was_training)
    chosen = min(left, key=lambda strength: left[strength])
    vector.copy_(chosen * size * noise)
    intervention.edit.requires_grad_(False)
    log.info(
        "noise of %g times the states leaves forget answers at %.2f nats a token; after another question it is %.2f",
        *(chosen, left[chosen], wanted),
    )
    return chosen


def mean_logprob(model: GrunModel, rows: Sequence[EncodedRow], pad_id: int) -> float:
    """Mean over rows of the mean log-probability of an answer's tokens, nats, with the edits if they act."""
    total = 0.0
    for start in range(0, len(rows), ROWS):
        batch = collate(rows[start : start + ROWS], pad_id).to(model.device)
        more = {"prompt_lengths": batch.prompt_lengths} if model.active else {}
        output = run_plain(model.base, batch, **more)
        total += float((output.answer_logprobs / output.answer_counts).sum())
    return total / len(rows)


def _size(model: GrunModel, rows: Sequence[EncodedRow], block: int, pad_id: int) -> float:
    """Median over tokens of the root mean square of a block's states."""
    output = run_plain(model.base, collate(rows, pad_id).to(model.device), [block])
    return float(output.hidden(block)[output.attended].float().pow(2).mean(dim=1).sqrt().median())
