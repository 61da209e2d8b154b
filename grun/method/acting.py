"""Where an action on logits acts: in rows whose gate is open, from the token after the prompt on."""

from __future__ import annotations

import torch
from torch import Tensor

from grun.errors import ModelError
from grun.method.actions import Act
from grun.method.pooled_sites import PooledSites


def acted(logits: Tensor, sites: PooledSites, opening: Tensor, threshold: float, act: Act) -> Tensor | None:
    """Logits of a pass after an action; None where no row is open after its prompt, and they stay as they are.

    Args:
        logits: as the model's output embeddings give them, [rows, columns or the last ones of them, vocabulary].
        sites: of this pass, with `places`.
        opening: gate logit in force, [rows, 1].
        threshold: probability from which on a gate is open.
        act: the action.

    Raises:
        ModelError: the logits are of columns that cannot be told.
    """
    assert sites.places is not None and sites.answered is not None
    is_open = torch.sigmoid(opening) >= threshold
    open_places = sites.places.masked_fill(~(sites.answered & is_open), -1).to(logits.device)
    kept = sites.logits_to_keep
    if isinstance(kept, Tensor):
        open_places = open_places[:, kept.to(logits.device)]
    elif kept:
        open_places = open_places[:, -kept:]
    if logits.shape[:2] != open_places.shape:
        raise ModelError(
            f"logits of shape {list(logits.shape)} in a pass of {list(sites.places.shape)} rows and tokens: which of "
            "them they belong to is unknown, so a refusal cannot take their place"
        )
    chosen = open_places >= 0
    if not bool(chosen.any()):
        return None
    changed = logits.clone()
    changed[chosen] = act(logits[chosen], open_places[chosen]).to(logits.dtype)
    return changed
