"""`python -m grun import`: a GRUN adapter made of the files that the published GRUN code wrote."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grun.config.checks import require
from grun.config.options import ImportConfig, ModelConfig
from grun.config.values import to_dict
from grun.data.templates import TEMPLATES, Template
from grun.errors import AdapterError
from grun.loading.models import load_weights, stored_template
from grun.method.adapter import AdapterConfig
from grun.method.fingerprint import fingerprint
from grun.method.gate import GATES
from grun.method.saving import write_adapter
from grun.method.validation import shape_of, validate
from grun.runtime.files import file_hash, target
from grun.runtime.runs import identity, write_whole

log = logging.getLogger(__name__)

FILES = "intkey_*.bin"
NAME = re.compile(r"intkey_layer[._](\d+)[._]comp[._]block_output[._]unit[._]pos[._]nunit[._]1#\d+\.bin")
"""Name of a file with the block's number; pyvene 0.1.8 and later write `_` where earlier ones wrote `.`."""
GATE_KEY = re.compile(r"gate_func\.(?:(\d+)\.)?(weight|bias)")
PUBLISHED_GATES = ("linear", "mlp_3", "mlp_5")
TOLERANCE = 1e-3
"""Largest |R^T R - 1| that is taken for rounding: float32 leaves 1e-6, bfloat16 some 1e-4."""
ROTATION = "rotate_layer"
PARAMETRIZED = (f"{ROTATION}.parametrizations.weight.original", f"{ROTATION}.parametrizations.weight.0.base")
"""How torch.nn.utils.parametrizations.orthogonal stores a rotation: X [hidden size, rank], B [hidden size]^2."""
NO_WEIGHTS = ("embed_dim", "interchange_dim")
"""Sizes that pyvene keeps among the tensors."""


@dataclass(frozen=True)
class UpstreamLayer:
    """Tensors of one block, all float32."""

    rotation: Tensor
    """R, orthonormal columns, [hidden size, rank]."""
    weight: Tensor
    """W, [rank, hidden size]."""
    bias: Tensor
    """b, [rank]."""
    gate: str
    """Name in `grun.method.gate.GATES`."""
    gate_weights: list[Tensor]
    """Weight and bias of each linear layer of the gate, in order."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream it was trained on."""
        return self.rotation.shape[0]

    @property
    def rank(self) -> int:
        """Rank of the edit."""
        return self.rotation.shape[1]


def import_adapter(config: ImportConfig) -> Path:
    """Read upstream's files, check them against the base, and return the folder of the adapter made of them.

    Raises:
        ConfigError: an option is missing or unknown.
        ModelError: the base cannot be loaded.
        AdapterError: the files are missing or damaged, contradict each other, or do not fit the base.
        RunError: the output folder holds something else.
    """
    require(config, "import upstream=FOLDER model=BASE output_dir=DIR", "upstream", "model", "output_dir")
    named = None if config.template is None else TEMPLATES.get(config.template)
    folder = target(str(config.output_dir))
    files = find_files(Path(str(config.upstream)).expanduser())
    layers = {block: read_layer(path) for block, path in files.items()}
    _check_alike(layers, files)
    source = ModelConfig(
        path=config.model, revision=config.revision, device="cpu", trust_remote_code=config.trust_remote_code
    )
    base = load_weights(source)
    _check_fit(layers, files, *shape_of(base)[:2])
    template = named or stored_template(source)
    hashes = {path.name: file_hash(path) for path in files.values()}
    run_identity = identity(
        to_dict(config),
        base=fingerprint(base),
        upstream=hashes,
        template=None if template is None else template.to_dict(),
    )
    write = partial(_write, config, layers, base, template, run_identity)
    write_whole(folder, run_identity, write, overwrite=config.overwrite)
    return folder


def _write(
    config: ImportConfig,
    layers: dict[int, UpstreamLayer],
    base: Any,
    template: Template | None,
    run_identity: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Write the adapter and read it back; what run.json says of it."""
    first = next(iter(layers.values()))
    weights = adapter_weights(layers)
    adapter = AdapterConfig(
        blocks=list(layers),
        rank=first.rank,
        gate=first.gate,
        hidden_size=first.hidden_size,
        depth=shape_of(base)[1],
        base_model_name_or_path=getattr(base.config, "_name_or_path", "") or None,
        base_revision=getattr(base.config, "_commit_hash", None),
        base_fingerprint=run_identity["base"],
    )
    write_adapter(folder, adapter, weights, template)
    validate(folder, shape_of(base))
    log.info("imported blocks %s, rank %d, gate %s", adapter.blocks, adapter.rank, adapter.gate)
    return {
        "command": "import",
        "objective": "upstream",
        "parametrization": "reft" if first.gate == "none" else "grun",
        "config": to_dict(config),
        "upstream": run_identity["upstream"],
        "base_fingerprint": run_identity["base"],
        "parameters": {"trained": sum(tensor.numel() for tensor in weights.values())},
    }


def find_files(folder: Path) -> dict[int, Path]:
    """Upstream's file of each block, by block; AdapterError if there is none, or one that cannot be placed."""
    if not folder.is_dir():
        raise AdapterError(f"upstream={folder}: no such folder")
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(FILES)):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise AdapterError(
                f"{path} does not edit one position of a block's output; only files named such as "
                "intkey_layer.20.comp.block_output.unit.pos.nunit.1#0.bin can be imported"
            )
        block = int(match[1])
        if block in found:
            raise AdapterError(
                f"{folder}: {found[block].name} and {path.name} edit the same block {block}; leave one of them"
            )
        found[block] = path
    if not found:
        below = sorted({str(path.parent) for path in folder.glob(f"*/{FILES}")})
        hint = f"; there are some in {below[0]}" if below else ""
        raise AdapterError(f"{folder} holds no file intkey_layer...#0.bin of the published GRUN code{hint}")
    return dict(sorted(found.items()))


def read_layer(path: Path) -> UpstreamLayer:
    """Tensors of one of upstream's files; AdapterError if it is damaged."""
    try:
        stored: Any = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}): it is damaged, or holds Python objects, "
            "which are never loaded; save the state dict again"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise AdapterError(f"{path} holds no state dict, that is tensors by name; save it with torch.save(state_dict)")
    tensors = {str(name).removeprefix("learned_source."): value for name, value in stored.items()}
    for name in NO_WEIGHTS:
        tensors.pop(name, None)
    broken = next((name for name, value in tensors.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise AdapterError(f"{path}: {broken!r} holds numbers that are not finite; training had broken down")
    rotation = _take_rotation(tensors, path)
    parts = {name: _take(tensors, name, path) for name in ("weight", "bias")}
    gate, gate_weights = _take_gate(tensors, rotation.shape[0], path)
    if tensors:
        raise AdapterError(f"{path}: unknown tensor {sorted(tensors)[0]!r}; this kind of file cannot be imported")
    hidden_size, rank = rotation.shape
    if parts["weight"].shape != (rank, hidden_size) or parts["bias"].shape != (rank,):
        raise AdapterError(
            f"{path}: rotate_layer {list(rotation.shape)} needs weight {[rank, hidden_size]} and bias {[rank]}, found "
            f"{list(parts['weight'].shape)} and {list(parts['bias'].shape)}"
        )
    off = float((rotation.mT @ rotation - torch.eye(rank)).abs().max())
    if off > TOLERANCE:
        raise AdapterError(
            f"{path}: the columns of rotate_layer are not orthonormal (off by {off:.2g}, at most {TOLERANCE:g}); "
            "upstream's training with weight decay, or on from a loaded file, damages them: train it again"
        )
    return UpstreamLayer(rotation, parts["weight"], parts["bias"], gate, gate_weights)


def adapter_weights(layers: dict[int, UpstreamLayer]) -> dict[str, Tensor]:
    """Tensors as in adapter_model.safetensors, by name."""
    weights: dict[str, Tensor] = {}
    for block, layer in layers.items():
        weights[f"edits.{block}.edit.rotation"] = layer.rotation
        weights[f"edits.{block}.edit.source.weight"] = layer.weight
        weights[f"edits.{block}.edit.source.bias"] = layer.bias
        names = _gate_parameters(layer.gate, layer.hidden_size)
        for (name, _), value in zip(names, layer.gate_weights, strict=True):
            weights[f"edits.{block}.gate.{name}"] = value
    return weights


def _take(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise AdapterError(f"{path}: tensor {name!r} is missing; the file needs weight, bias and rotate_layer")
    return tensors.pop(name).float()


def _take_rotation(tensors: dict[str, Tensor], path: Path) -> Tensor:
    """R as it is, or computed from what torch's orthogonal parametrization stores."""
    if all(name in tensors for name in PARAMETRIZED):
        original, base = (_take(tensors, name, path) for name in PARAMETRIZED)
        rotation = _parametrized(original, base, path)
    else:
        plain = f"{ROTATION}.weight"
        rotation = _take(tensors, plain if plain in tensors else ROTATION, path)
    if rotation.dim() != 2 or not 1 <= rotation.shape[1] <= rotation.shape[0]:
        raise AdapterError(f"{path}: rotate_layer {list(rotation.shape)} is no matrix [hidden size, rank]")
    return rotation


def _parametrized(original: Tensor, base: Tensor, path: Path) -> Tensor:
    from torch.nn.utils.parametrizations import orthogonal

    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(*original.shape))

    if original.dim() != 2 or base.shape != (original.shape[0], original.shape[0]):
        raise AdapterError(f"{path}: rotate_layer's original {list(original.shape)} and base {list(base.shape)} differ")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        layer: Any = orthogonal(Rotation(), use_trivialization=True)
        layer.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
        rotation: Tensor = layer.weight.detach().clone()
    return rotation


def _take_gate(tensors: dict[str, Tensor], hidden_size: int, path: Path) -> tuple[str, list[Tensor]]:
    """Name and tensors of the gate, known by the shapes of its linear layers; ("none", []) where there is none."""
    found: dict[tuple[int, int], Tensor] = {}
    for name in list(tensors):
        if match := GATE_KEY.fullmatch(name):
            found[int(match[1] or 0), ("weight", "bias").index(match[2])] = tensors.pop(name).float()
    if not found:
        return "none", []
    values = [found[place] for place in sorted(found)]
    shapes = [tuple(value.shape) for value in values]
    for gate in PUBLISHED_GATES:
        if shapes == [shape for _, shape in _gate_parameters(gate, hidden_size)]:
            return gate, values
    raise AdapterError(
        f"{path}: tensors of shapes {', '.join(str(list(shape)) for shape in shapes)} make none of the gates "
        f"{', '.join(PUBLISHED_GATES)} on hidden size {hidden_size}; it cannot be imported"
    )


def _gate_parameters(gate: str, hidden_size: int) -> Sequence[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters of one of our gates."""
    with torch.device("meta"):
        module = GATES.get(gate)(hidden_size)
    return [] if module is None else [(name, tuple(value.shape)) for name, value in module.named_parameters()]


def _check_alike(layers: dict[int, UpstreamLayer], files: dict[int, Path]) -> None:
    """AdapterError if blocks differ in what an adapter has only one of."""
    (first, one), *others = layers.items()
    for block, other in others:
        for what in ("hidden_size", "rank", "gate"):
            if getattr(one, what) != getattr(other, what):
                raise AdapterError(
                    f"{files[first].parent}: blocks {first} and {block} differ in their {what.replace('_', ' ')} "
                    f"({getattr(one, what)} and {getattr(other, what)}); an adapter has one for all blocks"
                )


def _check_fit(layers: dict[int, UpstreamLayer], files: dict[int, Path], hidden_size: int, depth: int) -> None:
    """AdapterError if the base is no model that these files were trained on."""
    for block, layer in layers.items():
        if layer.hidden_size != hidden_size:
            raise AdapterError(
                f"{files[block]}: made for hidden size {layer.hidden_size}, the base has {hidden_size}; name the model "
                "that it was trained on"
            )
        if block >= depth:
            raise AdapterError(
                f"{files[block]}: block {block} lies beyond the base's {depth} blocks, 0..{depth - 1}; name the model "
                "that it was trained on"
            )
