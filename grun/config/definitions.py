"""Definitions in YAML, those that come with the package and those of a user: profiles, sweeps, sequences."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from grun.config.values import SECTIONS
from grun.errors import ConfigError, unknown_name
from grun.runtime.reading import parse_yaml, read_text


def packaged_names(kind: str) -> list[str]:
    """Names of the packaged definitions of a kind (profile, sweep, sequence)."""
    folder = resources.files("grun.config") / f"{kind}s"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def described(kind: str) -> dict[str, str]:
    """Packaged definitions of a kind and their one-line descriptions."""
    return {name: str(read_definition(kind, name).get("description", "")) for name in packaged_names(kind)}


def read_definition(kind: str, name: str) -> dict[str, Any]:
    """A packaged definition of a kind, or the file `name` that ends in .yaml; ConfigError says what is wrong in it."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"{kind} file {name} does not exist")
        text = read_text(path, ConfigError)
    elif name in packaged_names(kind):
        text = (resources.files("grun.config") / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(unknown_name(kind, name, packaged_names(kind)) + "; or a file ending in .yaml")
    return mapping(f"{kind} {name}", copy.deepcopy(_parsed_yaml(text, f"{kind} {name}")))


def mapping(where: str, value: Any) -> dict[str, Any]:
    """`value` as a mapping with names as keys, an empty one for None; ConfigError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must map names to values, not {value!r}")
    return {str(key): content for key, content in value.items()}


def read_profile(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A profile with its bases merged in; `name` is a packaged profile or a YAML file, `above` what it is a base of."""
    if name in above:
        raise ConfigError(f"profile {name} is a base of itself ({' -> '.join((*above, name))})")
    own = read_definition("profile", name)
    for key in own:
        if key not in SECTIONS:
            raise ConfigError(f"profile {name}: " + unknown_name("section", key, list(SECTIONS)))
        if key not in ("description", "base", "seed") and not isinstance(own[key], dict | None):
            raise ConfigError(f"profile {name}: section {key} must hold options, not {own[key]!r}")
    own = {key: value for key, value in own.items() if value is not None}
    bases = own.pop("base", [])
    merged: Any = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        inherited = read_profile(str(base), (*above, name))
        inherited.pop("description", None)
        merged = OmegaConf.merge(merged, inherited)
    container: Any = OmegaConf.to_container(OmegaConf.merge(merged, own))
    return {str(key): value for key, value in container.items()}


_parsed_yaml = functools.cache(parse_yaml)
