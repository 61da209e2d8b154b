"""Which tokens of a pass count, from whatever stands for an attention mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grun.errors import ModelError

SHUT = -1000.0
"""What is added to a score that is masked is below this, whoever made the mask."""


def counting(mask: Any, rows: int, columns: int, past: int) -> Tensor | None:
    """1 for tokens that count, of the whole sequence or of this pass alone: [batch, past + columns or columns].

    A mask of [batch, 1, queries, keys], bool or added to scores, says whether each token may look at itself. Of a dict
    of masks by kind of layer that of full attention is read. None: all tokens count.

    Args:
        mask: what the model is given.
        rows: batch size.
        columns: tokens of this pass.
        past: tokens in the cache.

    Raises:
        ModelError: it cannot be read.
    """
    if isinstance(mask, Mapping):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows and mask.shape[1] >= columns:
        start = past if mask.shape[1] >= past + columns else mask.shape[1] - columns
        return mask[:, : start + columns]
    readable = isinstance(mask, Tensor) and mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
    if not readable or mask.shape[2] != columns or mask.shape[3] < columns or len(mask) not in (1, rows):
        given = f"{list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ModelError(
            f"the attention mask is {given}, for {rows} rows of {columns} tokens behind {past}; edits need one that is "
            "1 for tokens that count, [batch, tokens], or [batch, 1, queries, keys] of bool or added to scores"
        )
    keys = mask.shape[3]
    own = torch.arange(columns, device=mask.device) + (past if keys >= past + columns else keys - columns)
    at_itself = mask[:, 0].gather(2, own.expand(len(mask), -1).unsqueeze(2)).squeeze(2)  # [batch or 1, columns]
    seen = at_itself if mask.dtype == torch.bool else at_itself > SHUT
    return seen.long().expand(rows, -1) if len(mask) == 1 else seen.long()
