"""How far gates are open at each token: what they read there, put together with what they read before."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvene_custom import Sites


def openings(logits: Tensor, sites: Sites | None, carry: Tensor | None, accumulate: str) -> Tensor:
    """Logit in force at each position read, or at the one before them where none is: [batch, positions or 1, ...].

    Args:
        logits: of gates at the positions read, [batch, positions read], or [batch, positions read, gates].
        sites: where this pass is read; None: `logits` are in force as they stand.
        carry: logit in force at the last token of the passes before, as `logits` with one position; None: shut.
        accumulate: none, or running_max: a gate is as open as at any token read since the last reset.
    """
    if sites is None or (accumulate == "none" and logits.shape[1] and bool(sites.read_mask.all())):
        return logits
    shut = logits.new_full((len(logits), 1, *logits.shape[2:]), -torch.inf)
    before = shut if carry is None else carry.to(logits)
    if logits.shape[1] == 0:
        return before
    read = _like(sites.read_mask, logits)
    if accumulate == "none":
        return torch.where(read, logits, before if sites.read is not sites.write else shut)
    counted = logits.masked_fill(~read, -torch.inf)
    if sites.reset is None or not bool(sites.reset.any()):
        return torch.maximum(counted.cummax(dim=1).values, before)
    turn = _like(sites.reset.long().cumsum(dim=1), logits)  # [batch, positions, ...]
    opening = torch.maximum(counted.masked_fill(turn > 0, -torch.inf).cummax(dim=1).values, before)
    for number in range(1, int(turn.max()) + 1):
        of_turn = counted.masked_fill(turn != number, -torch.inf).cummax(dim=1).values
        opening = torch.where(turn == number, of_turn, opening)
    return opening


def _like(values: Tensor, logits: Tensor) -> Tensor:
    """Values [batch, positions] with as many dimensions as `logits`."""
    return values.unsqueeze(2) if logits.dim() == 3 else values
