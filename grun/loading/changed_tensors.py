"""Tensors of a model with new values, as an adapter on disk: what unlearning of a few weights leaves behind.

A folder holds adapter_config.json (`peft_type` "TENSORS"), adapter_model.safetensors (the new values, in the type of
the model) and README.md. Putting it on a base replaces those tensors of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grun.errors import AdapterError
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE, check_base, check_finite, peft_type, read_weights
from grun.method.fingerprint import fingerprint
from grun.runtime.files import read_json, write_bytes, write_json, write_text
from grun.runtime.reading import typed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

KIND = "TENSORS"
"""`peft_type` of such an adapter."""
FORMAT_VERSION = 1


def save_changed(folder: Path, tensors: Mapping[str, Tensor], *, base_name: str | None, base_fingerprint: str) -> None:
    """Write weights first and the config last, each under a temporary name and then renamed.

    Args:
        folder: made if it is not there.
        tensors: new values by full parameter name.
        base_name: hub id or folder of the base.
        base_fingerprint: `grun.method.fingerprint` of the base before the change.
    """
    from safetensors.torch import save

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(folder / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
    write_text(folder / "README.md", _model_card(base_name, base_fingerprint, list(tensors)))
    write_json(
        folder / CONFIG_FILE,
        {
            "peft_type": KIND,
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": base_name,
            "base_fingerprint": base_fingerprint,
            "tensors": list(tensors),
        },
    )


def put_changed(base: PreTrainedModel, folder: Path, *, strict: bool = False) -> None:
    """Replace the tensors of `base` that the adapter holds, in place, in the type of `base`.

    Raises:
        AdapterError: the adapter is damaged or does not fit the base; or, if `strict`, it was trained on other weights
            (else that is a warning).
    """
    import torch

    config = _read_config(folder)
    values = read_weights(folder)
    if set(values) != set(config.tensors):
        raise AdapterError(f"{folder} holds other tensors than {CONFIG_FILE} names; copy the whole adapter folder")
    if getattr(base, "quantization_method", None) is not None:
        raise AdapterError(f"{folder} replaces whole weights, and this base is quantized; unset model.quantization")
    own = dict(base.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            there = f"has shape {list(own[name].shape)}" if name in own else "is not there"
            raise AdapterError(
                f"{folder} does not go on this base: {name}, of shape {list(value.shape)}, {there}; it was trained on "
                f"{config.base_model_name_or_path}"
            )
        if not value.is_floating_point():
            raise AdapterError(
                f"{folder / WEIGHTS_FILE}: tensor {name!r} is {value.dtype}, and no floats; save it again"
            )
        values[name] = value.to(own[name].dtype)
    check_finite(values, folder / WEIGHTS_FILE)  # in the type of the base too
    check_base(config.base_fingerprint, config.base_model_name_or_path, fingerprint(base), strict=strict)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


@dataclass
class _Config:
    peft_type: str
    format_version: int
    base_model_name_or_path: str | None
    base_fingerprint: str | None
    tensors: list[str]


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG_FILE
    if peft_type(folder) != KIND:
        raise AdapterError(f"{path}: peft_type is not {KIND}; load it with the library that wrote it")
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format version {values.get('format_version')}, not {FORMAT_VERSION}; use the GRUN that wrote it"
        )
    config: _Config = typed(_Config, values, str(path), AdapterError)
    return config


def _model_card(base_name: str | None, base_fingerprint: str, tensors: list[str]) -> str:
    base = base_name or "unknown"
    listed = "\n".join(f"- `{name}`" for name in tensors)
    return f"""---
library_name: grun
tags: [unlearning]
---

# Changed tensors for `{base}`

New values of these weights, trained so that the model no longer answers from the data to forget (base fingerprint
`{base_fingerprint}`):

{listed}

```python
from grun.loading.changed_tensors import put_changed
put_changed(base_model, Path("THIS_FOLDER"))
```

**Limits.** The base weights still contain the data: the effect exists only where these tensors are put in place. Less
is said from the data; that is not erasure.
"""
