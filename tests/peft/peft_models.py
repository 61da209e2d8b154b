"""Adapters of every design, as GrunModel makes them, and what they answer."""

from __future__ import annotations

from typing import Any

import torch
from edited_models import PUBLISHED, ROBUST, strong, wrapped
from tiny import PAD, padded, random_rows, tiny
from torch import Tensor, nn

from grun import GrunModel

BATCH = padded(random_rows([5, 11, 7]), "left")
PROMPTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
_POOLED = {"rule": ("last_prompt", "none", "sticky"), "gate_blocks": (0, 1), "gate_pool": "maxmin"}
DESIGNS: dict[str, dict[str, Any]] = {
    "published": {"rule": PUBLISHED, "blocks": (1, 3)},
    "robust": {"rule": ROBUST, "blocks": (1, 3), "gate": "noisy_mlp_3", "reset_ids": (7, 9)},
    "pooled": {**_POOLED, "blocks": (1, 3), "rank": 2},
    "refusing": {**_POOLED, "action": "refuse", "answer_ids": (11, 12, 13, 9)},
}


def made(design: str, **options: Any) -> GrunModel:
    """An adapter whose answers are not the base's; the same arguments give the same one."""
    model = strong(wrapped(**{**DESIGNS[design], **options}))
    if design == "refusing":
        model.keep_threshold(0.0)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**PROMPTS).logits
    return found


@torch.no_grad()
def answers(model: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(**PROMPTS, max_new_tokens=6, do_sample=False, pad_token_id=PAD).tolist()
    return found


BARE = logits(tiny())
