"""A short identity of a model's weights that survives a change of storage type."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 64
"""Values sampled from each tensor."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (first 16 hex digits) over the names, shapes and sampled values of all parameters of `model`.

    Values are rounded to bfloat16 first, so that the same weights loaded in float32 and in bfloat16 agree.
    Quantized weights are another model and give another fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
