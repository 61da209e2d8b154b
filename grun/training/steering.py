"""Steering vectors: from what blocks give while a model answers to what they give while it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grun.data.encoding import EncodedRow, collate
from grun.method.edit import SteeringVector
from grun.method.model import GrunModel
from grun.method.plain import run_plain

ROWS = 8
"""Of one pass."""


@torch.no_grad()
def set_vectors(
    model: GrunModel, refused: Sequence[EncodedRow], answered: Sequence[EncodedRow], strength: float, pad_id: int
) -> None:
    """Set the vector of each edit of `model` to its share of a difference of two means of states at its block.

    Each is a mean over rows of the mean over the tokens of a row's answer, under the base. Every edit has the same
    share, `strength` divided by their number, since what one block adds stays in the states of those above.

    Args:
        model: whose edits are steering vectors; they do not train from then on.
        refused: prompts with a refusal.
        answered: the same prompts with their answers.
        strength: 1 adds the difference once, over all blocks.
        pad_id: id of padding, which is masked.

    Source: Lee et al. 2024, arXiv 2409.05907 (pairs of a prompt with either continuation, averaged over its tokens);
    the difference of means stands in place of the first principal component.
    """
    refusing, answering = (mean_states(model, rows, pad_id) for rows in (refused, answered))
    edits = model.own_edits()
    for block, edit in edits.items():
        assert isinstance(edit.edit, SteeringVector)
        edit.edit.vector.copy_(strength / len(edits) * (refusing[block] - answering[block]))
        edit.edit.requires_grad_(False)


def mean_states(model: GrunModel, rows: Sequence[EncodedRow], pad_id: int) -> dict[int, Tensor]:
    """By edited block the mean over rows of the mean over the tokens of a row's answer, float64 [hidden size]."""
    blocks, found = [*model.own_edits()], dict.fromkeys(model.own_edits(), torch.zeros(()))
    with model.disabled():
        for start in range(0, len(rows), ROWS):
            batch = collate(rows[start : start + ROWS], pad_id).to(model.device)
            output = run_plain(model.base, batch, blocks)
            share = output.answer / output.answer_counts.unsqueeze(1) / len(rows)  # [batch, length]
            for block in blocks:
                states = output.hidden(block)
                found[block] = found[block].to(states.device) + torch.einsum(
                    "bl,bld->d", share.to(states.device, torch.float64), states.double()
                )
    return found
