"""Whether a GRUN adapter can be put in force: what importing, loading, adding to a store and verifying all ask."""

from __future__ import annotations

import functools
import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grun.data.templates import Template
from grun.errors import AdapterError
from grun.method.adapter import (
    CONFIG_FILE,
    LARGEST_ID,
    WEIGHTS_FILE,
    AdapterConfig,
    check_fits,
    read_regular,
    read_weights,
)
from grun.method.edits import EDITS, LOREFT
from grun.method.gate import GATES, make_gate
from grun.method.gating import LinearGate, WindowsGate
from grun.method.precision import float32_by_default

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types in which an adapter's numbers may be stored."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read and found sound."""

    config: AdapterConfig
    template: Template | None
    weights: dict[str, Tensor]
    """By name as in the state of a `GrunModel`."""


def validate(
    folder: Path, shape: tuple[int, int, int] | None = None, *, digests: Mapping[str, str] | None = None
) -> Adapter:
    """The GRUN adapter in `folder`, every field and tensor of it checked.

    Args:
        folder: as `GrunModel.save_pretrained` writes it; further files are not looked at.
        shape: `shape_of` the base it is to go on; None: what can be known without one is checked.
        digests: SHA-256 of each file that must be there, as a file itself and no link; None: not known.

    Raises:
        AdapterError: names the file, the field or tensor, what was found and what was expected.
    """
    files: dict[str, bytes] = {}
    if digests is not None:
        if unknown := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in digests]:
            raise AdapterError(f"{folder / unknown[0]}: no digest is known of it; restore the manifest from a copy")
        if not is_real(folder, stat.S_ISDIR):
            raise AdapterError(f"{folder} is no folder, or a link to one; `requests verify` tells more")
        files = {name: _as_digested(folder / name, digest) for name, digest in digests.items()}
    config, template = AdapterConfig.read(folder, files.get(CONFIG_FILE))
    if shape is not None:
        check_fits(config, *shape, folder)
    weights = read_weights(folder, files.get(WEIGHTS_FILE))
    check_tensors(config, weights, folder / WEIGHTS_FILE)
    return Adapter(config, template, weights)


def shape_of(base: PreTrainedModel) -> tuple[int, int, int]:
    """Hidden size, number of decoder blocks and of token ids."""
    from grun.method.host import hidden_size_of
    from pyvene_custom import find_blocks
    from pyvene_custom.blocks import text_config

    vocabulary = getattr(text_config(base), "vocab_size", None) or LARGEST_ID
    return hidden_size_of(base), len(find_blocks(base)[1]), vocabulary


def is_real(path: Path, kind: Any) -> bool:
    """Whether a path is there, no link, and of a kind: `stat.S_ISREG` or `stat.S_ISDIR`."""
    try:
        return bool(kind(path.lstat().st_mode))
    except OSError:
        return False


def _as_digested(path: Path, digest: str) -> bytes:
    """Bytes of a file of a store; AdapterError unless they have the digest."""
    try:
        data = read_regular(path)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing, and the store's manifest names it; restore it from a copy") from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise AdapterError(
            f"{path} was changed: its SHA-256 is {found[:16]}..., the manifest's {digest[:16]}...; restore it from a "
            "copy, or add the request again"
        )
    return data


def check_tensors(config: AdapterConfig, weights: Mapping[str, Tensor], path: Path | str) -> None:
    """AdapterError names the first tensor at `path` that is missing, one too many, or of another shape or type."""
    makers = GATES.get(config.gate), EDITS.get(config.edit)
    gate = config.gate, config.gate_size, config.gate_pool
    edit = config.edit, config.hidden_size, config.rank, config.activation
    shared = config.gate_blocks is not None
    expected = _expected(None if shared else gate, edit, makers)
    wanted = {f"edits.{block}.{name}": of for block in config.blocks for name, of in expected.items()}
    if shared:
        wanted |= {f"pooled.{name}": of for name, of in _expected(gate, None, makers).items()}
    for name in sorted({*weights, *wanted}):
        shape, dtype = wanted.get(name, (None, None))
        tensor = weights.get(name)
        if tensor is not None and shape == tuple(tensor.shape):
            if tensor.dtype in FLOATS if dtype in FLOATS else tensor.dtype == dtype:
                continue
        found = "nothing" if tensor is None else f"{_short(tensor.dtype)} {list(tensor.shape)}"
        right = "no such tensor" if shape is None else f"{'floats' if dtype in FLOATS else _short(dtype)} {list(shape)}"
        raise AdapterError(
            f"{path}: weights do not match {CONFIG_FILE}, first at {name!r}: found {found}, expected {right}; save the "
            "adapter again"
        )


@functools.lru_cache(maxsize=64)
def _expected(
    gate: tuple[str, int, str] | None, edit: tuple[str, int, int, str | None] | None, makers: Any
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor, by name, of a gate (see `make_gate`), of an edit, or of one block's both.

    Of an edit name, hidden size, rank and activation are given; `makers`, of gate and edit, may change under a name.
    """
    from transformers.activations import ACT2FN

    def made() -> nn.ModuleDict:
        parts: dict[str, Any] = {"gate": None if gate is None else make_gate(*gate)}
        if edit is not None:
            name, size, rank, activation = edit
            parts["edit"] = EDITS.get(name)(size, rank, None if activation is None else ACT2FN[activation])
        return nn.ModuleDict(parts)

    try:
        with torch.device("meta"):  # whatever sizes a file states, nothing is allocated
            parts = made()
        read = parts["gate"]
        known = isinstance(read.window if isinstance(read, WindowsGate) else read, LinearGate | None)
    except (NotImplementedError, RuntimeError):
        known = False
    if not known or (edit is not None and edit[0] != LOREFT):
        # A gate or edit that computes with its numbers while it is made is another one on meta, or none.
        with torch.random.fork_rng(devices=[]), float32_by_default():
            parts = made()
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parts.state_dict().items()}


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
