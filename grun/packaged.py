"""Definitions in YAML, those that come with the package and those of a user: sweeps, sequences of requests."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from grun.errors import ConfigError
from grun.reading import parse_yaml, read_text
from grun.registry import unknown_name


def packaged_names(kind: str) -> list[str]:
    """Names of the packaged definitions of a kind (sweep, sequence)."""
    folder = resources.files("grun") / "configs" / f"{kind}s"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_definition(kind: str, name: str) -> dict[str, Any]:
    """A packaged definition of a kind, or the file `name` that ends in .yaml; ConfigError says what is wrong in it."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"{kind} file {name} does not exist")
        text = read_text(path, ConfigError)
    elif name in packaged_names(kind):
        text = (resources.files("grun") / "configs" / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(unknown_name(kind, name, packaged_names(kind)) + "; or a file ending in .yaml")
    return mapping(f"{kind} {name}", parse_yaml(text, f"{kind} {name}"))


def mapping(where: str, value: Any) -> dict[str, Any]:
    """`value` as a mapping with names as keys, an empty one for None; ConfigError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must map names to values, not {value!r}")
    return {str(key): content for key, content in value.items()}
