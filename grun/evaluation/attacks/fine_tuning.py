"""A few steps of fine-tuning, as an attacker with the weights takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from grun.data.encoding import EncodedRow, collate
from grun.method.host import EditedModel

if TYPE_CHECKING:
    from torch import nn

MAX_NORM = 1.0
"""Norm that gradients are clipped to."""


def fine_tune(
    model: Any,
    weights: Sequence[nn.Parameter],
    rows: Sequence[EncodedRow],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    micro_batch_size: int,
    pad_id: int,
    seed: str,
    advance: Callable[[int], None],
) -> None:
    """Train `weights` of `model`, in place, to say the answers of `rows`.

    AdamW without weight decay at one rate, no dropout (the model is in evaluation mode and stays there), the mean over
    the answer tokens of a batch. Weights train in the type they have. Every process of a run trains the same.

    Args:
        model: a transformers causal model, or a GrunModel; its gate threshold is left out, since no edit trains where
            it skips all.
        weights: what trains.
        rows: at least one.
        steps: optimizer steps.
        lr: learning rate.
        batch_size: rows of a step; where there are fewer, all of them.
        micro_batch_size: rows of a pass; without effect on gradients, rounding aside.
        pad_id: id at padded positions.
        seed: of the rows' order.
        advance: called after each step.
    """
    import torch

    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    threshold = model.gate_threshold if isinstance(model, EditedModel) else None
    if threshold is not None:
        model.gate_threshold = None
    try:
        for chosen in _batches(rows, batch_size, steps, seed):
            total = sum(len(row.answer_ids) for row in chosen)
            for start in range(0, len(chosen), micro_batch_size):
                part = chosen[start : start + micro_batch_size]
                batch = collate(part, pad_id).to(model.device)
                loss = model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
                ).loss
                (loss * (sum(len(row.answer_ids) for row in part) / total)).backward()
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            advance(1)
    finally:
        if threshold is not None:
            model.gate_threshold = threshold


def _batches(rows: Sequence[EncodedRow], size: int, steps: int, seed: str) -> Iterator[list[EncodedRow]]:
    """Passes over the rows, each in an order of its own; the last batch of a pass may be smaller."""
    draw = Random(seed)
    left: list[EncodedRow] = []
    for _ in range(steps):
        left = left or draw.sample(list(rows), len(rows))
        yield left[:size]
        left = left[size:]
