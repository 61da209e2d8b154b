"""Fine-tuning by an attacker, on rows that are run as far as what trains can change them, without padding."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from grun.cache.cached import CachedEngine
from grun.cache.engine import freezer_for
from grun.cache.packed import PackedModel
from grun.cache.trial import CHECKED_ROWS, tolerance, tried
from grun.cache.unpadded import token_logprobs
from grun.data.encoding import Batch, EncodedRow, collate
from grun.errors import ModelError
from grun.evaluation.scoring import base_of
from grun.method.host import EditedModel
from grun.method.model import GrunModel

log = logging.getLogger(__name__)

MAX_NORM = 1.0
"""Norm that gradients are clipped to."""

Loss = Callable[[Batch], Tensor]
"""Minus the log-probability of all answer tokens of a batch, with gradients."""


def fine_tune(
    model: Any,
    weights: Sequence[nn.Parameter],
    rows: Sequence[EncodedRow],
    *,
    lr: float,
    batch_size: int,
    micro_batch_size: int,
    pad_id: int,
    seed: str,
) -> Iterator[int]:
    """Train `weights` of `model`, in place, to give the answers of `rows`, at least one; the steps taken after each.

    AdamW without weight decay at one rate, no dropout (the model is in evaluation mode and stays there), the mean over
    the answer tokens of a batch. Weights train in the type they have. Every process of a run trains the same.

    Args:
        batch_size: rows of a step; where there are fewer, all of them.
        micro_batch_size: rows of a pass; without effect on gradients, rounding aside.
        seed: of the rows' order.
    """
    for weight in weights:
        weight.requires_grad_(True)
    loss = loss_of(model, weights, rows, pad_id)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for done, chosen in enumerate(_batches(rows, batch_size, seed), start=1):
        total = sum(len(row.answer_ids) for row in chosen)
        for start in range(0, len(chosen), micro_batch_size):
            batch = collate(chosen[start : start + micro_batch_size], pad_id).to(model.device)
            (loss(batch) / total).backward()
        torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield done


def loss_of(model: Any, weights: Sequence[nn.Parameter], rows: Sequence[EncodedRow], pad_id: int) -> Loss:
    """The loss of batches of `rows`: of edits from what they leave as it is, computed once, of other models unpadded.

    Whether that gives what the model's own pass gives is tried on the longest rows; where not, that pass is taken, and
    a line reports it. It is taken too where the base beside edits trains.
    """
    own = partial(_own_loss, model)
    edits = {id(weight) for weight in model.parameters()} if isinstance(model, GrunModel) else None
    if edits is not None and any(id(weight) not in edits for weight in weights):
        return own
    batch = collate(sorted(rows, key=len)[-CHECKED_ROWS:], pad_id).to(model.device)

    def make() -> Loss:
        return _cached(model, rows) if edits is not None else _unpadded(model)

    def compared(fast: Loss) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = zip(*(_with_gradient(loss, batch, weights) for loss in (fast, own)), strict=True)
        return dict(zip(("loss", "gradient"), pairs, strict=True))

    # transformers' own loss is float32 at most
    trial = tried(make, compared, max(tolerance(base_of(model).dtype), tolerance(torch.float32)))
    if trial.fast is not None:
        return trial.fast
    log.info("whole padded rows are learned, since passes over less do not fit this model: %s", trial.problem)
    return own


def _own_loss(model: Any, batch: Batch) -> Tensor:
    """By the model itself. The gate threshold of edits is left out, since no edit trains where it skips all."""
    with no_threshold(model):
        out = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        )
    loss: Tensor = out.loss * int((batch.labels != -100).sum())
    return loss


def _cached(model: GrunModel, rows: Sequence[EncodedRow]) -> Loss:
    """By the blocks that edits can change, on the tokens that they can change."""
    if model.pooled is not None and model.rule.read == "every_token":
        raise ModelError("the cached engine knows no pooled gate that is asked at every token")
    packed = PackedModel(model.base)
    shards = freezer_for(model, packed, last_answer_token=False).shards(sorted(set(rows), key=len))
    frozen = {row: shard.row(index) for shard in shards for index, row in enumerate(shard.rows)}
    engine = CachedEngine(model, packed, frozen)

    def loss(batch: Batch) -> Tensor:
        with no_threshold(model):
            return -engine.run({"answer": batch})["answer"].token_logprobs.sum()

    return loss


def _unpadded(model: Any) -> Loss:
    """By all blocks, without padding, and the head on answers alone."""
    packed = PackedModel(base_of(model))
    return lambda batch: -token_logprobs(packed, batch).sum()


@contextlib.contextmanager
def no_threshold(model: Any) -> Iterator[None]:
    """Within the block no edit is skipped, however little its gate is open."""
    threshold = model.gate_threshold if isinstance(model, EditedModel) else None
    if threshold is not None:
        model.gate_threshold = None
    try:
        yield
    finally:
        if threshold is not None:
            model.gate_threshold = threshold


def _with_gradient(loss: Loss, batch: Batch, weights: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a batch, float64 [1] and [all weights], on the CPU."""
    value = loss(batch)
    found = torch.autograd.grad(value, list(weights), allow_unused=True)
    pairs = zip(found, weights, strict=True)
    parts = [(torch.zeros_like(own) if one is None else one).flatten().double().cpu() for one, own in pairs]
    return value.detach().double().reshape(1).cpu(), torch.cat(parts)


def _batches(rows: Sequence[EncodedRow], size: int, seed: str) -> Iterator[list[EncodedRow]]:
    """Passes over the rows without end, each in an order of its own; the last batch of a pass may be smaller."""
    draw = Random(seed)
    while True:
        left = draw.sample(list(rows), len(rows))
        while left:
            yield left[:size]
            left = left[size:]
