"""`python -m grun list` and `info`: known names, and what a bug report needs."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from grun.config.definitions import described
from grun.config.options import CacheConfig
from grun.errors import ConfigError, unknown_name
from grun.registry import REGISTRIES, registry
from grun.runtime.places import user_cache

PACKAGED = ("profiles", "sweeps", "sequences")
"""Kinds of settings that come with the package."""
KINDS = (*REGISTRIES, *PACKAGED)


def list_names(kinds: Sequence[str]) -> None:
    """Print every name of some kinds, or of all, one a line with its description."""
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(unknown_name("kind", kind, list(KINDS)))
    for kind in kinds or KINDS:
        if len(kinds) != 1:
            print(f"# {kind}")
        for line in lines(kind):
            print(line)


def usage() -> str:
    """Line of the help: the kinds."""
    return f"python -m grun list [KIND ...]   kinds: {', '.join(KINDS)}"


def lines(kind: str) -> list[str]:
    """One line for each name of `kind`, names padded to one width."""
    found = known_names(kind)
    width = max(map(len, found), default=0)
    return [f"{name:<{width}}  {text}" for name, text in found.items()]


def known_names(kind: str) -> dict[str, str]:
    """The names of a kind, each with its description."""
    if kind in REGISTRIES:
        return {entry.name: entry.description for entry in registry(kind)}
    return described(kind.removesuffix("s"))


def info(arguments: Sequence[str]) -> None:
    """Print versions, devices and caches; there are no arguments."""
    from grun.runtime.runs import versions

    for name, version in versions().items():
        print(f"{name}: {version}")
    import torch

    print(f"platform: {platform.platform()}, {os.cpu_count()} processors, {torch.get_num_threads()} torch threads")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"devices: {', '.join(devices) if devices else 'cpu only'}")
    from huggingface_hub import constants

    print(f"hub cache: {constants.HF_HUB_CACHE} (offline: {constants.is_offline_mode()})")
    print(f"models by name: {user_cache() / 'models'} (GRUN_CACHE moves it; may be removed)")
    folder = Path(CacheConfig().dir or "")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"frozen-prefix cache: {folder.resolve()} ({size / 1e9:.2f} GB; may be removed)")
    print(f"TOFU data: {os.environ.get('GRUN_TOFU_DIR', 'GRUN_TOFU_DIR is not set; the hub is asked')}")
