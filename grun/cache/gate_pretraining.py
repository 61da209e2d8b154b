"""Gates trained before anything is edited: logistic regression on states that are computed once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from grun.cache.cached import CachedEngine
from grun.cache.prefix import by_tokens
from grun.data.encoding import EncodedRow

log = logging.getLogger(__name__)

LEARNING_RATE = 1e-3
ROWS_PER_PASS = 256


def pretrain_gates(
    engine: CachedEngine, forget: Sequence[EncodedRow], retain: Sequence[EncodedRow], steps: int
) -> dict[int, float]:
    """Train each gate to open on the prompts of `forget` and not on those of `retain`, on the untouched model's states.

    Minimizes the mean of binary cross-entropy over forget rows (target 1) and over retain rows (target 0), half
    each, with AdamW over all rows at a time. Once the edits act, gates above the first one read edited states.

    Returns the loss of each block's gate in the last step.
    """
    pieces = [piece for rows in (forget, retain) for piece in by_tokens(rows, lambda _: 1, ROWS_PER_PASS)]
    passes = [engine.prompt_states(piece) for piece in pieces]
    losses = {}
    for block, edit in engine.edits.items():
        if edit.gate is None:
            continue
        states = torch.cat([found[block] for found in passes]).to(next(edit.parameters()).dtype)  # [rows, width]
        target = torch.cat((states.new_ones(len(forget)), states.new_zeros(len(retain))))
        weight = torch.where(target == 1, 0.5 / len(forget), 0.5 / len(retain))
        optimizer = torch.optim.AdamW(edit.gate.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = edit.gate(states).squeeze(-1)
            loss = binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        losses[block] = float(loss.detach())
    log.info("gates before training: %s", ", ".join(f"block {b}: loss {loss:.4f}" for b, loss in losses.items()))
    return losses
