"""Configs as values: from `key=value` arguments and mappings to a config class, and back."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import typing
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grun.config import options
from grun.config.checks import check_values
from grun.config.options import BY_USER
from grun.errors import ConfigError, unknown_name
from grun.runtime.reading import check_plain, first_line, parse_yaml

COMMANDS: dict[str, type[Any]] = {
    "finetune": options.FinetuneConfig,
    "unlearn": options.UnlearnConfig,
    "evaluate": options.EvaluateConfig,
    "generate": options.GenerateConfig,
    "serve": options.ServeConfig,
    "calibrate": options.CalibrateConfig,
    "push": options.PushConfig,
    "import": options.ImportConfig,
    "corpora": options.CorporaConfig,
    "report": options.ReportConfig,
    "meta": options.MetaConfig,
    "sweep": options.SweepConfig,
    "sequential": options.SequentialConfig,
    "requests": options.RequestsConfig,
    "cache": options.CacheCommandConfig,
    "leaderboard": options.LeaderboardConfig,
}
SHARED = ("model", "data", "seed")
WITHOUT_PROFILE = ("push", "import", "corpora", "meta", "sweep", "sequential", "requests", "cache", "leaderboard")
"""Commands that take nothing from profiles."""
SECTIONS = ("description", "base", *SHARED, *(name for name in COMMANDS if name not in WITHOUT_PROFILE))


def flat(values: Any, schema: type[Any]) -> dict[str, Any]:
    """What `to_dict` gave, by the keys of options."""
    return flatten(values, {key for key, _, _ in describe(schema)})


def flatten(values: Any, known: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Options by their keys; what is no section of options stays as it is."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        section = isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known)
        found |= flatten(value, known, f"{key}.") if section else {key: value}
    return found


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `flatten`."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return found


def merged(schema: type[Any], *layers: Any) -> Any:
    """Instance of a config class: its defaults, then each layer over those before it."""
    try:
        merged = OmegaConf.merge(
            _structured(typing.cast(Hashable, schema)), *[OmegaConf.create(layer) for layer in layers]
        )
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        named = str(getattr(error, "full_key", None) or "")
        if named.isdigit():  # a place in a list
            raise ConfigError(f"{_culprit(schema, layers)}{first_line(error)}") from error
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
    """A resolved config as plain values, without where they came from."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "sources"}


def with_sources(config: Any) -> dict[str, Any]:
    """A resolved config as plain values, with where they came from, for another process."""
    return to_dict(config) | {"sources": dict(config.sources)}


def from_dict(command: str, values: dict[str, Any], arguments: Sequence[str] = ()) -> Any:
    """Config of `command` from what `to_dict` or `with_sources` gave, changed by `key=value` arguments."""
    check_plain(values, f"the options of {command}")
    values = dict(values)
    sources = values.pop("sources", {})
    schema = COMMANDS[command]
    given = parse(arguments, schema)
    config = merged(schema, values, given)
    if sources:
        user = flat(OmegaConf.to_container(given), schema)
        config.sources = {**sources, **dict.fromkeys(user, BY_USER)}
    return config


def argument(value: Any) -> str:
    """A value as `parse` reads it in key=value."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def to_yaml(config: Any) -> str:
    """A resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


class Option(NamedTuple):
    """One option of a config class."""

    key: str
    """Nested ones as section.key."""
    default: Any
    text: str
    """Help text: the docstring that follows the field."""
    kind: Any
    """Type."""


def describe(schema: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """Key, default and help text of every option of a config class, nested ones as `section.key`."""
    return ((option.key, option.default, option.text) for option in options_of(schema))


def options_of(schema: type[Any]) -> list[Option]:
    """Every option of a config class, with the defaults that this class gives to nested ones."""
    return _options_in(schema(), "")


def _options_in(config: Any, prefix: str) -> list[Option]:
    schema: Any = type(config)
    texts, hints = _field_docs(schema), typing.get_type_hints(schema)
    found: list[Option] = []
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _options_in(value, f"{key}.")
        elif not field.metadata.get("omegaconf_ignore"):
            found.append(Option(key, value, texts.get(field.name, ""), hints[field.name]))
    return found


@functools.cache
def _field_docs(schema: Any) -> dict[str, str]:
    """Docstrings that follow the fields of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):  # without object
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


def parse(arguments: Sequence[str], schema: type[Any]) -> DictConfig:
    """`key=value` arguments as options of a config class; ConfigError for one that is none."""
    kinds = {option.key: option.kind for option in options_of(schema)}
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"argument {argument!r} is not key=value")
        if key not in kinds:
            raise ConfigError(unknown_name("option", key, list(kinds), "--help"))
    given = OmegaConf.create({})
    for argument in arguments:
        key, _, value = argument.partition("=")
        OmegaConf.update(given, key, _value(key, value, verbatim=kinds[key] in (str, str | None)), merge=False)
    return given


def _value(key: str, text: str, *, verbatim: bool) -> Any:
    """Value of an argument; nothing, or null, means unset. Texts are taken as they are, so they may look like YAML."""
    if text in ("", "null"):
        return None
    check_plain(text, key)
    if verbatim:
        return text
    return parse_yaml(text, f"cannot read {key}={text if len(text) < 80 else text[:77] + '...'}")


def _one_line(error: BaseException) -> str:
    full_key = getattr(error, "full_key", None)
    text = first_line(error)
    if "is not a ListConfig" in text:
        text = "expected a list in brackets, such as [1,2]"
    if "incompatible container types" in text:
        text = "a list in brackets, [a,b], stands for names in braces, {name: value}, or the reverse; see --help"
    return f"{full_key}: {text}" if full_key else text
