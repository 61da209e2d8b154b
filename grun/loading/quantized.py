"""Weights in few bits: bitsandbytes, which quantizes while a model is loaded, and GGUF files, which are unpacked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.options import ModelConfig
from grun.errors import ConfigError, ModelError
from grun.runtime.reading import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bitsandbytes_settings(config: ModelConfig) -> Any:
    """Settings for bitsandbytes: int8, or 4 bits computed in the type that model.dtype names."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantization needs bitsandbytes, which is not installed: pip install 'grun-unlearning[quantization]'"
        )
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    kind = "fp4" if config.quantization == "fp4" else "nf4"
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)


def try_kernels(model: PreTrainedModel, config: ModelConfig) -> None:
    """ModelError where this machine's kernels refuse the model's quantized layers, before any work is done on it."""
    import torch

    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"model.quantization={config.quantization}: the kernels on this machine refuse the layers of "
            f"{config.path!r} ({first_line(error)}); leave model.quantization out or take another kind"
        ) from error


def unpacking() -> dict[str, Any]:
    """What transformers is told besides, so that it unpacks the weights of a GGUF file."""
    import transformers

    # Older versions always unpack.
    return (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )


def gguf_source(config: ModelConfig, files: Sequence[Path]) -> tuple[str, dict[str, str]]:
    """Folder, or OWNER/NAME of the hub, and name of a GGUF file, whose weights are unpacked."""
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"model.path={config.path} holds several GGUF files ({names}); give one of them")
    if config.quantization is not None:
        raise ConfigError(
            f"model.quantization={config.quantization} is not for GGUF, whose weights are unpacked; leave it out"
        )
    (file,) = files
    if not file.is_file() and (file.is_absolute() or len(file.parts) != 3):
        raise ModelError(f"model.path={config.path}: no such file")
    return str(file.parent), {"gguf_file": file.name}
