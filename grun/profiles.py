"""From a profile and `key=value` arguments to a resolved config.

Order, later wins: the dataclasses' defaults; the profiles named in `base:`; the profile's shared sections (model, data,
seed); its section for the command; for `unlearn` its sections for the objective (`objectives`), for the parametrization
(`parametrizations`) and for the objective under that parametrization (`objectives` within it), for the design
(`designs`, `objectives` within it too); the arguments.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Hashable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grun import config as options
from grun.checks import EVALUATION_COMPAT_OPTIONS, check_values, one_of
from grun.errors import ConfigError
from grun.reading import check_plain, first_line, parse_yaml, read_text
from grun.registry import unknown_name

COMMANDS: dict[str, type[Any]] = {
    "finetune": options.FinetuneConfig,
    "unlearn": options.UnlearnConfig,
    "evaluate": options.EvaluateConfig,
    "generate": options.GenerateConfig,
    "import": options.ImportConfig,
    "corpora": options.CorporaConfig,
    "report": options.ReportConfig,
    "sweep": options.SweepConfig,
    "sequential": options.SequentialConfig,
    "requests": options.RequestsConfig,
}
SHARED = ("model", "data", "seed")
WITHOUT_PROFILE = ("import", "corpora", "sweep", "sequential", "requests")
"""Commands that take nothing from profiles."""
DESIGNS = ("published", "robust")
"""GRUN's designs; what a profile sets for each stands in its section `designs`."""
SECTIONS = ("description", "base", *SHARED, *(name for name in COMMANDS if name not in WITHOUT_PROFILE))


def profile_names() -> dict[str, str]:
    """Packaged profiles and their one-line descriptions."""
    folder = resources.files("grun") / "configs"
    names = sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name: str(_read_profile(name).get("description", "")) for name in names}


def resolve(command: str, arguments: list[str]) -> Any:
    """Config of `command` (an instance of its dataclass) for `key=value` arguments; ConfigError names what is wrong."""
    schema = COMMANDS[command]
    given = _parse(arguments, schema)
    if command in WITHOUT_PROFILE:
        return _merged(schema, given)
    profile_name = str(OmegaConf.select(given, "profile") or _default(schema, "profile"))
    profile = _read_profile(profile_name)
    layers: list[Any] = [_only(profile, [name for name in SHARED if _has_field(schema, name)])]
    section = dict(profile.get(command) or {})
    narrower = {name: section.pop(name, None) or {} for name in ("objectives", "parametrizations", "designs")}
    layers.append(section)
    if command == "unlearn":
        layers += _narrower(narrower, _merged(schema, section, given), profile_name)
        _refuse_missing_design(str(OmegaConf.select(given, "design") or "published"), narrower["designs"], profile_name)
    if command == "evaluate":
        compat = OmegaConf.select(given, "compat") or section.get("compat")
        layers.append(EVALUATION_COMPAT_OPTIONS.get(str(compat), {}))
    layers.append({"profile": profile_name})
    return _merged(schema, *layers, given)


def _merged(schema: type[Any], *layers: Any) -> Any:
    """Instance of a config class: its defaults, then each layer over those before it."""
    try:
        merged = OmegaConf.merge(
            _structured(typing.cast(Hashable, schema)), *[OmegaConf.create(layer) for layer in layers]
        )
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        named = getattr(error, "full_key", None)
        raise ConfigError(_one_line(error) if named else f"{_culprit(schema, layers)}{_one_line(error)}") from error
    check_values(config)
    return config


def _culprit(schema: type[Any], layers: Sequence[Any]) -> str:
    """The option that OmegaConf could not take and does not name, as the beginning of a message."""
    for layer in layers:
        for key, _, _ in describe(schema):
            alone, value = OmegaConf.create({}), OmegaConf.select(OmegaConf.create(layer), key)
            if value is None:
                continue
            OmegaConf.update(alone, key, value)
            try:
                OmegaConf.merge(_structured(typing.cast(Hashable, schema)), alone)
            except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
                return f"{key}: "
    return ""


@functools.cache
def _structured(schema: Hashable) -> Any:
    """The config class for OmegaConf, which copies it when it merges; a sweep resolves dozens of configs."""
    return OmegaConf.structured(schema)


def to_dict(config: Any) -> dict[str, Any]:
    """A resolved config as plain values."""
    return dataclasses.asdict(config)


def from_dict(command: str, values: dict[str, Any], arguments: Sequence[str] = ()) -> Any:
    """Config of `command` from what `to_dict` gave, changed by `key=value` arguments."""
    check_plain(values, f"the options of {command}")
    return _merged(COMMANDS[command], values, _parse(arguments, COMMANDS[command]))


def to_yaml(config: Any) -> str:
    """A resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, default and help text of every option of a config class, nested ones as `section.key`."""
    documentation = _field_docs(typing.cast(Hashable, schema))
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            nested = typing.cast(type[Any], hints[field.name])
            if field.default_factory is dataclasses.MISSING:
                raise TypeError(f"{key} needs a default_factory")
            overrides = dataclasses.asdict(field.default_factory())
            for inner, default, text in describe(nested, f"{key}."):
                leaf: Any = overrides
                for part in inner[len(key) + 1 :].split("."):
                    leaf = leaf[part]
                yield inner, default if isinstance(leaf, dict) else leaf, text
        else:
            yield key, _default(schema, field.name), documentation.get(field.name, "")


@functools.cache
def _field_docs(schema: Hashable) -> dict[str, str]:
    """Docstrings that follow the fields of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for cls in reversed(typing.cast(type[Any], schema).__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _parse(arguments: Sequence[str], schema: type[Any]) -> DictConfig:
    known = [key for key, _, _ in describe(schema)]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"argument {argument!r} is not key=value")
        if key not in known:
            raise ConfigError(unknown_name("option", key, known))
    texts = {key for key, kind in _types(schema) if kind in (str, str | None)}
    given = OmegaConf.create({})
    for argument in arguments:
        key, _, value = argument.partition("=")
        OmegaConf.update(given, key, _value(key, value, verbatim=key in texts), merge=False)
    return given


def _types(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and type of every option."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _types(typing.cast(type[Any], kind), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def _value(key: str, text: str, *, verbatim: bool) -> Any:
    """Value of an argument; nothing, or null, means unset. Texts are taken as they are, so they may look like YAML."""
    if text in ("", "null"):
        return None
    check_plain(text, key)
    if verbatim:
        return text
    return parse_yaml(text, f"cannot read {key}={text if len(text) < 80 else text[:77] + '...'}")


def _narrower(sections: dict[str, Any], chosen: Any, profile: str) -> list[dict[str, Any]]:
    """Options for the chosen objective, the chosen parametrization, that objective under it, and the chosen design."""
    from grun.objectives.presets import OBJECTIVES
    from grun.parametrization import PARAMETRIZATIONS

    def named(options: Any, name: str, known: list[str], kind: str) -> dict[str, Any]:
        if not isinstance(options, dict):
            raise ConfigError(f"profile {profile}: unlearn.{kind}s must map names of {kind}s to options")
        for key in options:
            if key not in known:
                raise ConfigError(f"profile {profile}: " + unknown_name(kind, str(key), known))
        return dict(options.get(name) or {})

    of_objective = named(sections["objectives"], chosen.objective, OBJECTIVES.names(), "objective")
    method = chosen.method.parametrization
    of_method = named(sections["parametrizations"], method, PARAMETRIZATIONS.names(), "parametrization")
    within = named(of_method.pop("objectives", None) or {}, chosen.objective, OBJECTIVES.names(), "objective")
    of_design = named(sections["designs"], chosen.design, list(DESIGNS), "design")
    within_design = named(of_design.pop("objectives", None) or {}, chosen.objective, OBJECTIVES.names(), "objective")
    return [of_objective, of_method, within, of_design, within_design]


def _refuse_missing_design(design: str, designs: dict[str, Any], profile: str) -> None:
    """ConfigError for a design that is asked for and that the profile has no settings of."""
    one_of("design", design, DESIGNS)
    if design != "published" and design not in designs:
        raise ConfigError(
            f"profile {profile} has no settings for design={design}; take one that has (demo, llama3.1), or "
            "add `base: designs` to yours"
        )


def _read_profile(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A profile with its bases merged in; `name` is a packaged profile or a YAML file, `above` what it is a base of."""
    if name in above:
        raise ConfigError(f"profile {name} is a base of itself ({' -> '.join((*above, name))})")
    packaged = resources.files("grun") / "configs" / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"profile file {name} does not exist")
        text = read_text(path, ConfigError)
    elif packaged.is_file():
        text = packaged.read_text(encoding="utf-8")
    else:
        folder = resources.files("grun") / "configs"
        known = [entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")]
        raise ConfigError(unknown_name("profile", name, known) + "; or a file ending in .yaml")
    own = _parsed_yaml(text, f"profile {name}") or {}
    if not isinstance(own, dict):
        raise ConfigError(f"profile {name}: expected sections ({', '.join(SECTIONS)}), found {type(own).__name__}")
    for key in own:
        if key not in SECTIONS:
            raise ConfigError(f"profile {name}: " + unknown_name("section", str(key), list(SECTIONS)))
        if key not in ("description", "base", "seed") and not isinstance(own[key], dict | None):
            raise ConfigError(f"profile {name}: section {key} must hold options, not {own[key]!r}")
    own = {key: value for key, value in own.items() if value is not None}
    bases = own.pop("base", [])
    merged: Any = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        inherited = _read_profile(str(base), (*above, name))
        inherited.pop("description", None)
        merged = OmegaConf.merge(merged, inherited)
    container = OmegaConf.to_container(OmegaConf.merge(merged, own))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


_parsed_yaml = functools.cache(parse_yaml)
"""Content of a YAML text, which nobody changes."""


def _only(profile: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: profile[name] for name in names if name in profile}


def _has_field(schema: type[Any], name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(schema))


def _default(schema: type[Any], name: str) -> Any:
    field = next(field for field in dataclasses.fields(schema) if field.name == name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _one_line(error: BaseException) -> str:
    full_key = getattr(error, "full_key", None)
    text = first_line(error)
    if "is not a ListConfig" in text:
        text = "expected a list in brackets, such as [1,2]"
    return f"{full_key}: {text}" if full_key else text
