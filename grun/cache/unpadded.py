"""Whole rows one after another, without padding, for training all weights: the head runs where a token is labeled.

Passes are those of `grun.cache.packed`: transformers' own modules, with attention within each row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from grun.cache.attention import Pack
from grun.cache.packed import PackedModel
from grun.cache.trial import CHECKED_ROWS, tolerance, tried
from grun.data.encoding import Batch, EncodedRow, collate
from grun.errors import DataError
from grun.method.parametrization import at_answers
from grun.method.plain import answer_logprobs, run_plain
from grun.runtime import sharding

log = logging.getLogger(__name__)


def token_logprobs(packed: PackedModel, batch: Batch) -> Tensor:
    """Log-probability of each labeled token, at least float32, 0 elsewhere: [batch, length], as `run_plain` gives it.

    `batch` is padded on the right.
    """
    answer, attended = batch.labels != -100, batch.attention_mask != 0
    if not all(row.prompt_ids for row in batch.encoded):
        raise DataError("a row has an answer but no token before it; the tokenizer needs a beginning-of-text token")
    lengths = [len(row) for row in batch.encoded]
    pack = Pack(lengths, [0] * len(lengths), {}, batch.labels.device)
    hidden, _ = packed.run(pack, batch.input_ids[attended])
    before = answer.roll(-1, dims=1)[attended]  # tokens that predict a labeled one
    return at_answers(answer, answer_logprobs(packed.logits(hidden[before]), batch.labels[answer]))


def unpadded(
    model: Any,
    rows: Sequence[EncodedRow],
    pad_id: int,
    forward: AbstractContextManager[object],
    *,
    recompute: bool,
) -> PackedModel | None:
    """`model` for `token_logprobs`, sharing its weights; None, and a line in the log, where that does not fit it.

    The two ways are compared on the longest of `rows` in training mode, within `forward`, so a model with dropout,
    which these passes leave out, does not fit. Neither do weights that are cut among processes. With `recompute` blocks
    run again in the backward pass.
    """
    if sharding.asked_for():
        log.info("rows are padded, since weights are cut among processes")
        return None
    batch = collate(sorted(rows, key=len)[-CHECKED_ROWS:], pad_id).to(model.device)

    def compared(packed: PackedModel) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return {"log-probabilities": (token_logprobs(packed, batch), run_plain(model, batch).token_logprobs)}

    training = model.training
    model.train()
    try:
        with forward:
            close = tolerance(model.dtype, rounded=torch.is_autocast_enabled(model.device.type))
            trial = tried(lambda: PackedModel(model, recompute=recompute), compared, close)
    finally:
        model.train(training)
    if trial.fast is None:
        log.warning("rows are padded, since passes without padding do not fit this model: %s", trial.problem)
    return trial.fast
