"""A model whose blocks stay in their files: each is read when it is run, so neither the GPU nor RAM holds them all.

accelerate's hooks do the reading. The embeddings, the head and whatever else stands beside the blocks is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.options import ModelConfig, UnlearnConfig
from grun.errors import ConfigError, ModelError
from grun.method.parametrization import traits_of
from grun.runtime.devices import lies_elsewhere, pick_device
from grun.runtime.memory import free_memory
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ROOM = 0.9
"""Share of the free memory up to which weights are loaded whole: states and kernels need some too."""
BYTES = {"F64": 8, "F32": 4}
"""Bytes of a value by its type in a safetensors file; others that models are stored in have 2."""


def files_to_stream(config: UnlearnConfig, source: str, gguf: bool) -> dict[str, str]:
    """The file of each tensor where blocks are to stay in their files, else nothing.

    `cache.build` says it or, where that is auto, what memory is free. ConfigError where it is asked for and cannot be.
    """
    if config.cache.build == "whole":
        return {}
    obstacle = _obstacle(config, gguf)
    files = {} if obstacle else weight_map(source, config.model.revision)
    if not files:
        if config.cache.build == "stream":
            raise ConfigError(f"cache.build=stream: {obstacle or f'{source} has no safetensors files'}")
        return {}
    if config.cache.build == "stream":
        return files
    size, device = _size(files, config.model.dtype), pick_device(config.model.device)
    free = {"RAM": free_memory(), **({str(device): free_memory(device)} if device.type == "cuda" else {})}
    short = [name for name, there in free.items() if there is not None and size > ROOM * there]
    if short:
        log.info(
            "the weights take %.1f GB, and %s: blocks are read from their files when they are run (cache.build=stream)",
            size / 1e9, " and ".join(f"{(free[name] or 0) / 1e9:.1f} GB of {name} are free" for name in short),
        )  # fmt: skip
    return files if short else {}


def _obstacle(config: UnlearnConfig, gguf: bool) -> str | None:
    """Why the blocks of a model cannot stay in their files."""
    if not traits_of(config.method).edits_blocks:
        return f"method.parametrization={config.method.parametrization} trains weights, which must be loaded"
    if config.train.engine == "plain":
        return "train.engine=plain runs all blocks in every step; leave it out"
    if config.model.quantization is not None:
        return "model.quantization quantizes weights that are loaded; leave one of the two out"
    if config.model.device_map is not None:
        return "model.device_map=auto loads all blocks; leave one of the two out"
    return "a GGUF file is unpacked as a whole; give safetensors" if gguf else None


def file_of(source: str, name: str, revision: str | None) -> str | None:
    """Path of a file of a folder or hub model, which is downloaded; None where it has none, or cannot be reached."""
    from transformers.utils import cached_file

    quietly = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    path: str | None = cached_file(source, name, revision=revision, **quietly)
    return path


def weight_map(source: str, revision: str | None) -> dict[str, str]:
    """The safetensors file of each tensor of a folder or hub model, which is downloaded; empty where it has none."""
    from safetensors import safe_open
    from transformers.utils.hub import get_checkpoint_shard_files

    index = file_of(source, "model.safetensors.index.json", revision)
    if index is not None:
        files, about = get_checkpoint_shard_files(source, index, revision=revision)
        paths = {Path(file).name: file for file in files}
        return {name: paths[file] for name, file in about["weight_map"].items()}
    single = file_of(source, "model.safetensors", revision)
    if single is None:
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def load_streamed(config: ModelConfig, source: str, files: Mapping[str, str]) -> PreTrainedModel:
    """Model in evaluation mode, computing on the device of `config`, whose blocks lie in the files of `source`.

    `files`: of its tensors, see `weight_map`.

    ModelError where the files hold the tensors by other names than the model, as some mixtures of experts do.
    """
    from accelerate import init_empty_weights
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, set_module_tensor_to_device
    from transformers import AutoConfig, AutoModelForCausalLM

    device = pick_device(config.device)
    about = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if getattr(about, "quantization_config", None) is not None:
        raise ModelError(
            f"{source} holds quantized weights, whose blocks cannot stay in their files: set cache.build=whole"
        )
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            about,
            dtype=about.dtype if config.dtype == "auto" else config.dtype,
            trust_remote_code=config.trust_remote_code,
            **({"attn_implementation": config.attention} if config.attention else {}),
        )
    model.tie_weights()
    path, blocks = find_blocks(model)
    _check_names(model, files, source)
    floats = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    as_model = {"dtype": str(model.dtype).removeprefix("torch.")}
    of_files = {
        name: {"safetensors_file": file, **(as_model if name in floats else {})} for name, file in files.items()
    }
    stored = OffloadedWeightsLoader(index=of_files)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in files and not (name.startswith(f"{path}.") and tensor.is_meta):
            value = stored[name].to(tensor.dtype)
            set_module_tensor_to_device(model, name, device, value=value.clone() if device.type == "cpu" else value)
        elif not tensor.is_meta:
            set_module_tensor_to_device(model, name, device)
    model.tie_weights()
    for number, block in enumerate(blocks):
        weights = PrefixedDataset(stored, f"{path}.{number}.")
        skipped = getattr(model, "_skip_keys_device_placement", None)
        add_hook_to_module(
            block,
            AlignDevicesHook(device, offload=True, weights_map=weights, place_submodules=True, skip_keys=skipped),
        )
    model.name_or_path = model.config.name_or_path = source
    model.hf_device_map = {"": device, **{f"{path}.{number}": "disk" for number in range(len(blocks))}}
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def load_blocks(model: PreTrainedModel, first: int) -> None:
    """Load the blocks from number `first` on for good; nothing happens where they are loaded already."""
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    path, blocks = find_blocks(model)
    for number in range(first, len(blocks)):
        block: Any = blocks[number]
        if not lies_elsewhere(block):
            continue
        hook = block._hf_hook
        remove_hook_from_module(block)
        for name, _ in list(block.named_parameters()):
            value: Tensor = hook.weights_map[name]
            on_cpu = hook.execution_device.type == "cpu"  # mapped, so it would be read again and again
            set_module_tensor_to_device(block, name, hook.execution_device, value=value.clone() if on_cpu else value)
        placed: Any = model.hf_device_map
        placed.pop(f"{path}.{number}", None)


def _check_names(model: Any, files: Mapping[str, str], source: str) -> None:
    """ModelError where a tensor of the model is in no file, or the blocks of the files have further ones."""
    own = dict(model.named_parameters())
    path = find_blocks(model)[0]
    missing = sorted(own.keys() - files.keys())
    further = sorted(name for name in files.keys() - {*own, *dict(model.named_buffers())} if name.startswith(path))
    if missing or further:
        what = f"{missing[0]} is missing" if missing else f"{further[0]} is no tensor of the model"
        raise ModelError(
            f"the blocks of {source} cannot stay in their files, which hold tensors by other names than the model "
            f"({what}); set cache.build=whole"
        )


def _size(files: Mapping[str, str], dtype: str) -> float:
    """Bytes of the weights as `dtype`."""
    from safetensors import safe_open

    name, path = next(iter(files.items()))
    with safe_open(path, framework="pt") as file:
        stored = BYTES.get(file.get_slice(name).get_dtype(), 2)
    size = sum(os.path.getsize(file) for file in {*files.values()})
    wanted = stored if dtype == "auto" else {"float64": 8, "float32": 4}.get(dtype, 2)
    return size * wanted / stored
