"""A short identity of a model's weights that survives a change of storage type."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grun.runtime.devices import named_weights

SAMPLES = 64
"""Values sampled from each tensor."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (first 16 hex digits) over the names, shapes and sampled values of all parameters of `model`.

    Values are rounded to bfloat16 first, so that the same weights loaded in float32 and in bfloat16 agree.
    Quantized weights are another model and give another fingerprint.
    """
    return fingerprint_of({name: sample(name, parameter) for name, parameter in named_weights(model)})


def sample(name: str, parameter: Tensor) -> bytes:
    """What a fingerprint takes of one parameter."""
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to(device="cpu", dtype=torch.float32).to(torch.bfloat16)
    return f"{name}{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes()


def fingerprint_of(samples: Mapping[str, bytes]) -> str:
    """Fingerprint of the parameters of which these are the samples, by name."""
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()[:16]
