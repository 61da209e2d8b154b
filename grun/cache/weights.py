"""Identity of a model's weights, all of them: a cache of what a model computes must not outlive a change of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grun.loading.fetching import located
from grun.method.fingerprint import fingerprint
from grun.runtime.files import content_hash, file_hash, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY_FILE = "weights.json"
PIECES = 64
"""Pieces of a file that are read again at each call."""
PIECE = 4096
"""Bytes of each."""
CHUNK = 1 << 24
"""Values of a tensor that are hashed at a time."""


def cache_identity(
    base: PreTrainedModel, source: str | Path | None, folder: Path | None, code: Sequence[str], **more: Any
) -> dict[str, Any]:
    """What decides the values of a cache in `folder`; its rows are known by their tokens, so by the template too.

    Args:
        base, source, folder: see `weights_hash`; without a folder nothing is hashed, since nothing is looked up.
        code: names of the files in this folder that compute the values.
        more: what else decides them.
    """
    if folder is None:
        return {}
    import transformers

    here = Path(__file__).parent
    return {
        "weights": weights_hash(base, source, folder),
        "dtype": str(base.dtype),
        "transformers": transformers.__version__,
        "code": content_hash([file_hash(here / name) for name in code]),
        **more,
    }


def weights_hash(base: PreTrainedModel, source: str | Path | None, memory: Path | None) -> str:
    """Identity (SHA-256, hex) of a model's weights, by which models of the same name differ.

    It covers the files the model was loaded from, byte by byte, or all tensors in memory where there are none; and
    the fingerprint of the parameters as they are now, their types and their quantization, so that a model changed
    after loading is another model (as far as the values that the fingerprint samples show it).

    Args:
        base: the loaded model.
        source: name, folder or hub id that it was loaded from; None: it was made in memory.
        memory: folder whose weights.json remembers hashes of files, so that a file of unchanged path, size, time and
            sampled bytes is not read whole again; None: nothing is remembered.
    """
    files = weight_files(base, source)
    quantization: Any = getattr(base.config, "quantization_config", None)
    return content_hash(
        {
            "weights": _hash_of_files(files, memory) if files else _hash_of_tensors(base),
            "fingerprint": fingerprint(base),
            "dtypes": {name: str(parameter.dtype) for name, parameter in base.named_parameters()},
            "quantization": str(getattr(base, "quantization_method", None)),
            "quantization_config": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
        }
    )


def weight_files(base: PreTrainedModel, source: str | Path | None) -> list[Path]:
    """The files that hold the weights: a GGUF file, *.safetensors, else *.bin, else *.gguf.

    None if `source` is no name, no folder and no cached hub id.
    """
    if source is None:
        return []
    folder = Path(located(str(source))).expanduser()
    if folder.is_file():  # GGUF
        return [folder]
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        revision = getattr(base.config, "_commit_hash", None)
        try:
            folder = Path(snapshot_download(str(source), revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no hub id
            return []
    return next(filter(None, (sorted(folder.glob(kind)) for kind in ("*.safetensors", "*.bin", "*.gguf"))), [])


def _hash_of_files(files: list[Path], memory: Path | None) -> str:
    path = memory / MEMORY_FILE if memory else None
    remembered = _read(path)
    known = dict(remembered)
    hashes = []
    for file in files:
        now: dict[str, Any] = _signature(file)  # before the whole: a file changed meanwhile is read again next time
        key = str(file.resolve())
        entry = known.get(key)
        if not isinstance(entry, dict) or entry != {**now, "sha256": entry.get("sha256")}:
            entry = known[key] = {**now, "sha256": file_hash(file)}
        hashes.append([file.name, entry["sha256"]])
    if path is not None and known != remembered:
        with contextlib.suppress(OSError):
            if is_memory(path) or not os.path.lexists(path):  # a file of the user's stays, and costs time alone
                write_json(path, {**_read(path), **known})
    return content_hash(hashes)


def is_memory(path: Path) -> bool:
    """Whether a file is one that remembers hashes, which its content shows."""
    entries = _read(path).values()
    keys = {"size", "mtime_ns", "sample", "sha256"}
    return bool(entries) and not path.is_symlink() and all(isinstance(e, dict) and e.keys() == keys for e in entries)


def _read(path: Path | None) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        values = read_json(path) if path is not None else {}
        return values if isinstance(values, dict) else {}
    return {}


def _signature(path: Path) -> dict[str, Any]:
    """Size, time of change and a hash of evenly spread pieces, which cost little to read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        last = max(0, status.st_size - PIECE)
        for start in sorted({last * index // (PIECES - 1) for index in range(PIECES)}):
            file.seek(start)
            digest.update(file.read(PIECE))
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": digest.hexdigest()}


def _hash_of_tensors(model: PreTrainedModel) -> str:
    """All of parameters, buffers, and what layers of quantized weights save besides."""
    digest = hashlib.sha256()
    found: dict[str, Any] = {**dict(model.named_buffers()), **model.state_dict()}
    for name, tensor in sorted(found.items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for chunk in tensor.detach().reshape(-1).split(CHUNK):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
