"""From a profile and `key=value` arguments to a resolved config.

Order, later wins: the dataclasses' defaults; the profiles named in `base:`; the profile's shared sections (model, data,
seed); its section for the command; for `unlearn` its sections for the objective (`objectives`), for the parametrization
(`parametrizations`) and for the objective under that parametrization (`objectives` within it), for the design
(`designs`, `objectives` within it too); what is stored with the model, and then with the adapter or the store of
requests (`grun.loading.stored`); the arguments. Where a model or an adapter is given and nothing names a profile, there
is none.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from grun.config.checks import EVALUATION_COMPAT_OPTIONS, one_of
from grun.config.definitions import read_profile
from grun.config.options import BY_USER, source_of
from grun.config.values import (
    COMMANDS,
    SHARED,
    WITHOUT_PROFILE,
    describe,
    flat,
    flatten,
    merged,
    nested,
    parse,
    to_dict,
)
from grun.data.templates import OPTIONS
from grun.errors import ConfigError, unknown_name
from grun.loading.stored import TINY, Stored, given_with, of_model
from grun.method.parametrization import PARAMETRIZATIONS
from grun.objectives.terms import OBJECTIVES, TERMS, no_blocks

log = logging.getLogger(__name__)


def resolve(command: str, arguments: list[str], *, store: Path | None = None, quiet: bool = False) -> Any:
    """Config of `command` (an instance of its dataclass) for `key=value` arguments.

    Args:
        command: a name in `COMMANDS`.
        arguments: what the user sets.
        store: of requests that the result of `unlearn` goes into.
        quiet: log nothing of options in force that the user did not set.

    Raises:
        ConfigError: an option, a profile or a value is wrong, data are not named, or the store has another template.
    """
    return resolve_given(command, parse(arguments, COMMANDS[command]), store=store, quiet=quiet)


def resolve_given(command: str, given: DictConfig, *, store: Path | None = None, quiet: bool = False) -> Any:
    """`resolve` for options that are values already, nested by their sections."""
    schema = COMMANDS[command]
    if command in WITHOUT_PROFILE:
        for name in ("sweep", "sequence"):
            if name in schema.__dataclass_fields__ and given.get("model") is not None and name not in given:
                raise ConfigError(f"{name} is not named; the demo's is for the demo's model: set {name}=NAME")
        return merged(schema, given)
    layers = _layers(command, schema, given, store)
    config = merged(schema, *[nested(layer.options) for layer in layers])
    if not hasattr(config, "sources"):  # a report's, which reads no model
        return config
    for layer in layers:
        config.sources |= dict.fromkeys(layer.options, layer.source)
        for key, value in layer.options.items():
            if isinstance(value, dict):  # a mapping counts as a whole, and is not merged key by key
                setattr(config.data, key.removeprefix("data."), dict(value))
    if not quiet:
        _log_sources(schema, config, layers)
    return config


DESIGNS = ("published", "robust", "pooled")
"""GRUN's designs; what a profile sets for each stands in its section `designs`."""
OF_JOINT_GATES = (
    *("method.gate", "method.gate_bias", "method.gate_read", "method.gate_accumulate", "method.gate_fit"),
    *("method.edit_write", "method.beside", "loss.gate", "loss.gate_weight", "loss.gate_warmup_steps"),
    *("loss.retain_weight", "train.gate_pretraining", "compat", "quirks"),
)
"""Options of gates that are trained with their edits: who sets one of these means the published design."""
TEXTS = ("corpora", "lore", "muse")
"""Benchmarks of plain texts, which end no prompt where a pooled gate could be asked."""
STORABLE = (
    *("data.template", "data.system_prompt", "data.date", "model.dtype", "model.revision", "model.quantization"),
    *("method.parametrization", "method.blocks", "method.rank", "method.gate", "method.edit_write", "gate_threshold"),
)
"""Beginnings of options that a result names even where they are defaults."""
OF_FILES = ("data.forget", "data.retain", "data.path", "data.columns", "data.unknown")
"""Options that rows which are generated do not have."""
OF_PLACES = (
    *("output_dir", "overwrite", "adapter", "adapters", "with_base", "suffix", "reference"),
    *("cache.dir", "cache.memory_budget", "cache.disk_budget"),
)
"""Options that are places, and decide nothing that is measured."""


class Layer(NamedTuple):
    """Options that win over those of the layers before."""

    source: str
    options: dict[str, Any]
    """By their keys."""
    rows: dict[str, Any] = {}
    """Options of the rows of something stored; they count only where data.name is the same."""


def _layers(command: str, schema: type[Any], given: DictConfig, store: Path | None) -> list[Layer]:
    """Every source of options of a command; a later one wins."""
    known = {key for key, _, _ in describe(schema)}
    user = flatten(OmegaConf.to_container(given), known)
    adapter = given_with(user, store)
    path = user.get("model.path") or (adapter.options.get("model.path") if adapter else None)
    model = of_model(str(path)) if path else None
    is_given = path not in (None, TINY) or any(user.get(name) for name in ("adapter", "adapters"))
    profile, source = _profile_of(user, [stored for stored in (adapter, model) if stored], is_given)
    layers = _of_profile(command, schema, given, profile, known)
    if path is None and (path := _last(layers, "model.path")):
        model = of_model(str(path))
    if model is not None:
        what = f"stored with {model.what}"
        options = {key: value for key, value in model.options.items() if key != "model.dtype"}
        if _last(layers, "model.dtype") not in (None, "auto", dtype := model.options.get("model.dtype", "auto")):
            options["model.dtype"] = dtype
        # A profile that the user names may take other rows than those of the fine-tuning.
        layers.insert(0 if "profile" in user else len(layers), Layer(what, {}, model.rows))
        layers.append(Layer(what, options))
    if adapter is not None:
        _refuse_another_template(user, adapter)
        options = dict(adapter.options)
        if user.get("model.path", options.get("model.path")) != options.get("model.path"):
            options.pop("model.revision", None)  # of another model
        layers.append(Layer(f"stored with {adapter.what}", options, adapter.rows))
    if command == "evaluate":
        compat = user.get("compat") or _last(layers, "compat")
        layers.append(Layer(f"compat={compat}", flatten(EVALUATION_COMPAT_OPTIONS.get(str(compat), {}), known)))
    layers += [Layer(source, {"profile": profile}), Layer(BY_USER, user)]
    named = [layer for layer in layers if {"data.name"} & {*layer.options, *layer.rows}]
    of_demo = any(key.startswith("data.demo.") for layer in layers for key in layer.options)
    if is_given and not named and not of_demo and _reads_rows(command, user, layers):
        raise ConfigError(
            "data.name is not set, and neither the model nor an adapter says what it was taught; name the data: "
            "data.name=jsonl data.forget=FILE data.retain=FILE, or tofu, corpora (docs/formats.md)"
        )
    name = "demo" if of_demo and "data.name" not in user else _last(layers, "data.name", rows=True)
    unread = [key for key in OF_FILES if user.get(key) is not None]
    if unread and "data.name" not in user and (name or "demo") in ("demo", "lore"):
        raise ConfigError(
            f"{unread[0]} is not read by data.name={name or 'demo'}, which nobody set here; name the data: "
            "data.name=jsonl, tofu or corpora (docs/formats.md)"
        )
    return [_with_rows(layer, name, known) for layer in layers]


def _reads_rows(command: str, user: Mapping[str, Any], layers: Sequence[Layer]) -> bool:
    """Whether a command reads `data.name`."""
    if command == "calibrate":
        return user.get("rows") is None
    return command not in ("generate", "serve") and (_last(layers, "suite") or "answers") not in (
        "knowledge",
        "lm_eval",
    )


def _with_rows(layer: Layer, name: Any, known: Collection[str]) -> Layer:
    """The layer with its rows among its options, where they are of the data that are read."""
    if not layer.source.startswith("stored with"):
        return layer
    options = layer.options | (layer.rows if layer.rows.get("data.name") == name else {})
    return Layer(layer.source, {key: value for key, value in options.items() if key in known})


def _last(layers: Sequence[Layer], key: str, *, rows: bool = False) -> Any:
    """Value of an option in the last layer that has it, None if none has; `rows`: rows of what is stored count too."""
    found = [
        options[key] for layer in layers for options in (layer.options, layer.rows if rows else {}) if key in options
    ]
    return found[-1] if found else None


def _profile_of(user: Mapping[str, Any], stored: Sequence[Stored], is_given: bool) -> tuple[str | None, str]:
    """The profile in force and its source; None where a model or an adapter is given that names none."""
    if "profile" in user:
        return user["profile"], BY_USER
    for one in stored:
        if one.profile is not None:
            try:
                read_profile(one.profile)
                return one.profile, f"stored with {one.what}"
            except ConfigError as error:
                log.warning(
                    "%s was made with a profile that is not to be had, so defaults are in force: %s", one.what, error
                )
    return (None if is_given else "demo"), "default"


def _of_profile(
    command: str, schema: type[Any], given: DictConfig, name: str | None, known: Collection[str]
) -> list[Layer]:
    """A profile's layers; those of `designs` where there is none."""
    profile = read_profile(name or "designs")
    layers: list[Any] = [
        {shared: profile[shared] for shared in SHARED if shared in profile and shared in schema.__dataclass_fields__}
    ]
    section = dict(profile.get(command) or {})
    narrower = {kind: section.pop(kind, None) or {} for kind in ("objectives", "parametrizations", "designs")}
    layers.append(section)
    design = str(OmegaConf.select(given, "design") or "published")
    if command == "unlearn":
        chosen = merged(schema, section, given)
        if "design" not in given and not _takes_pooled(chosen, flatten(OmegaConf.to_container(given), known)):
            chosen.design = section["design"] = "published"
        layers += _narrower(narrower, chosen, str(name))
        one_of("design", design, DESIGNS)
        if design != "published" and design not in narrower["designs"]:
            raise ConfigError(
                f"profile {name} has no settings for design={design}; take one that has (demo, llama3.1), or add "
                "`base: designs` to yours"
            )
    return [Layer(f"profile {name}" if name else f"design={design}", flatten(layer, known)) for layer in layers]


def _takes_pooled(chosen: Any, user: Mapping[str, Any]) -> bool:
    """Whether a run can have the pooled design, which nobody asked for by name.

    It cannot without a gate, on plain texts, under a term that reads hidden states or needs retain rows, and with
    options of another gate.
    """
    preset = OBJECTIVES.get(chosen.objective) if chosen.objective in OBJECTIVES.names() else None
    term = None if preset is None else TERMS.get(chosen.loss.forget or preset.forget)
    return (
        PARAMETRIZATIONS.traits(chosen.method.parametrization).gated
        and chosen.data.name not in TEXTS
        and (term is None or (term.hidden is no_blocks and term.dual is None))
        and not set(OF_JOINT_GATES) & {*user}
    )


def _refuse_another_template(user: Mapping[str, Any], stored: Stored) -> None:
    """ConfigError where a request would be trained in another template than those that it will be in force with."""
    if not stored.what.startswith("store ") or "adapter" in user:
        return
    for key in (f"data.{name}" for name in OPTIONS):
        if key in user and user[key] not in ("auto", stored.options.get(key, user[key])):
            raise ConfigError(
                f"{key}={user[key]}: the requests of the {stored.what} are asked with {stored.options[key]}, and a "
                f"store has one template; leave {key} out"
            )


def _log_sources(schema: type[Any], config: Any, layers: Sequence[Layer]) -> None:
    """Log what the user did not set: stored options in force, and the profile's or the user's that differ from them."""
    otherwise: dict[str, Any] = {key: default for key, default, _ in describe(schema)}
    stored: dict[str, dict[str, Any]] = {}
    user: Mapping[str, Any] = layers[-1].options
    beneath: dict[str, Any] = {}
    for layer in layers[:-1]:
        if layer.source.startswith("stored with"):
            stored.setdefault(layer.source, {}).update(layer.options)
        else:
            beneath |= layer.options
    for source, said in stored.items():
        counts = {key: value for key, value in said.items() if config.sources.get(key) == source}
        if shown := {key: value for key, value in counts.items() if value != (otherwise | beneath)[key]}:
            log.info("%s, and in force: %s", source, _listed(shown))
        if lost := {key: beneath[key] for key in shown if beneath.get(key) is not None and key != "profile"}:
            log.warning("profile %s gives way to what is %s: %s", config.profile, source, _listed(lost))
    there: dict[str, Any] = {}
    for said in stored.values():
        there |= said
    unlike = {key: there[key] for key in user if key in there and there[key] != user[key]}
    said_elsewhere = ("model.path", "profile", *(f"data.{name}" for name in OPTIONS))
    if unlike := {key: value for key, value in unlike.items() if key not in said_elsewhere}:
        log.warning(
            "%s: set by you; %s is %s", _listed({key: user[key] for key in unlike}), list(stored)[-1], _listed(unlike)
        )
    if user.get("gate_threshold", 0) is None and there.get("gate_threshold") is not None:
        raise ConfigError("gate_threshold is unset, but the store has one of its own; gate_threshold=0 skips no edit")


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={'' if value is None else value}" for key, value in options.items())


def in_force(config: Any, template: Any = None) -> dict[str, dict[str, Any]]:
    """Options by where they came from, for a result: all that were set, and of the defaults those that can be stored.

    `template` is the one that was used, where it is known.
    """
    values = dict(flat(to_dict(config), type(config)))
    if template is not None:
        values |= {key: value for key, value in template.options().items() if value != "auto"}
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        source = source_of(config, key)
        if key not in OF_PLACES and (source != "default" or key.startswith(STORABLE)):
            found.setdefault(source, {})[key] = value
    return found


def _narrower(sections: dict[str, Any], chosen: Any, profile: str) -> list[dict[str, Any]]:
    """Options for the chosen objective, the chosen parametrization, that objective under it, and the chosen design."""

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
