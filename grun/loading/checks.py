"""Checks of a resolved config that read the registries, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grun.config.checks import bytes_of, check_options, one_of, quirks_in_force
from grun.config.options import CommandConfig, DataConfig, EvaluateConfig, ModelConfig, UnlearnConfig
from grun.data.corpus import BENCHMARKS
from grun.data.sets import evaluation_sets
from grun.data.templates import PLACE, TEMPLATES
from grun.errors import ConfigError
from grun.loading.named import refuse_revision
from grun.method.actions import ACTIONS, EDIT
from grun.method.edits import EDITS, STEER
from grun.method.edits import UNTRAINED as UNTRAINED_EDITS
from grun.method.gate import BY_MEANS, GATES, KEYWORDS, UNTRAINED
from grun.method.parametrization import PARAMETRIZATIONS, traits_of
from grun.method.rules import WINDOWS, check_pool, check_rule, check_shares
from grun.objectives.objective import Objective, build_objective, learning
from grun.registry import registry


def check(config: Any) -> None:
    """ConfigError for the first unknown name, number out of range, or option that contradicts another."""
    check_options(config)
    if isinstance(getattr(config, "model", None), ModelConfig):
        refuse_revision(config.model)
    if isinstance(config, CommandConfig):
        one_of("data.name", config.data.name, tuple(BENCHMARKS.names()))
    if hasattr(config, "data"):
        _check_template(config.data.template)
    if isinstance(config, EvaluateConfig):
        for name in config.sets:
            one_of("evaluation set", name, tuple(evaluation_sets()))
        if config.attacks:
            attacks = registry("attacks")
            kinds = dict.fromkeys(attacks.get(name).access for name in attacks.names())
            for name in config.attacks:
                one_of("attack", name, (*attacks.names(), *kinds))
    if isinstance(config, UnlearnConfig):
        _check_unlearn(config)


def _check_unlearn(config: UnlearnConfig) -> None:
    method = config.method
    one_of("parametrization", method.parametrization, tuple(PARAMETRIZATIONS.names()))
    one_of("gate", method.gate, tuple(GATES.names()))
    one_of("edit", method.edit, tuple(EDITS.names()))
    one_of("action", method.action, tuple(ACTIONS.names()))
    if method.action != EDIT and (method.gate_fit != "logistic" or method.edit_write != "sticky"):
        raise ConfigError(
            f"method.action={method.action} needs a gate that is fitted, by itself, and holds for the whole answer: "
            "set design=pooled, or method.gate_fit=logistic and method.edit_write=sticky"
        )
    if method.edit in UNTRAINED_EDITS and method.gate_fit != "logistic":
        raise ConfigError(
            f"method.edit={method.edit} is not trained, and needs a gate that is fitted by itself: set design=pooled, "
            "or method.gate_fit=logistic"
        )
    if method.steer_strength != 1 and method.edit != STEER:
        raise ConfigError(f"method.steer_strength is for method.edit={STEER}; set that, or leave it out")
    if config.design != "published" and not PARAMETRIZATIONS.traits(method.parametrization).gated:
        raise ConfigError(
            f"design={config.design} concerns GRUN's gate, which method.parametrization={method.parametrization} does "
            "not have; leave it out"
        )
    if method.beside is not None and not traits_of(method).edits_blocks:
        raise ConfigError(
            f"method.beside concerns edits; method.parametrization={method.parametrization} changes the model itself: "
            "leave it out, and give model.path the model that is to forget more"
        )
    for name, blocks in (("blocks", method.blocks), ("gate_blocks", method.gate_blocks)):
        if method.action != EDIT and name == "blocks":  # which edits none
            continue
        if blocks is not None and (len(set(blocks)) < len(blocks) or not blocks):
            raise ConfigError(f"method.{name}={blocks} must name at least one block, each once")
        check_shares(blocks or (), f"method.{name}")
    check_rule(method.gate_read, method.gate_accumulate, method.edit_write)
    gated = traits_of(method).gated
    if method.gate_blocks is not None and not gated:
        raise ConfigError("method.gate_blocks needs a parametrization with a gate (grun); leave it out")
    check_pool(method.gate_blocks, method.gate_pool, method.gate_accumulate, method.gate, method.gate_read)
    check_fit(config)
    objective_of(config)
    if config.train.gate_pretraining and not (gated and config.train.engine == "cached"):
        raise ConfigError("train.gate_pretraining needs a parametrization with a gate, and train.engine=cached")
    if config.train.gate_pretraining and (method.gate_read != "last_prompt" or method.gate_blocks is not None):
        raise ConfigError(
            "train.gate_pretraining needs method.gate_read=last_prompt and no method.gate_blocks: it trains gates on "
            "the edited blocks' states of that token alone"
        )
    bytes_of("cache.memory_budget", config.cache.memory_budget)
    bytes_of("cache.disk_budget", config.cache.disk_budget)


def check_fit(config: UnlearnConfig) -> None:
    """ConfigError where a gate is to be fitted that cannot be, or an option of the fit has no effect."""
    method, data, augment = config.method, config.data, config.data.augment
    taught = objective_of(config).teacher  # which reads subjects too
    if data.subject_kind != "any" and not (data.subjects or (taught and data.group)):
        raise ConfigError(
            f"data.subject_kind={data.subject_kind} says what data.subjects are; name some, or leave it out"
        )
    if method.gate_keywords and method.gate != KEYWORDS:
        raise ConfigError(f"method.gate_keywords are for method.gate={KEYWORDS}; set that, or leave them out")
    if data.counterfactuals != DataConfig().counterfactuals and not taught:
        raise ConfigError(
            f"data.counterfactuals={data.counterfactuals} is for objective=counterfactual; set that, or leave it out"
        )
    if data.alternates != DataConfig().alternates and "alternate" not in objective_of(config).continuations:
        raise ConfigError(f"data.alternates={data.alternates} is for objective=altpo; set that, or leave it out")
    if method.gate_fit == "joint":
        if method.gate in UNTRAINED:
            raise ConfigError(
                f"method.gate={method.gate} follows from prompts or keywords and is not trained: set design=pooled, or "
                "method.gate_fit=logistic"
            )
        given: dict[str, Any] = {"method.false_positives": method.false_positives}
        given |= {f"data.{name}": getattr(data, name) for name in ("group", "gate_prompts", "gate_negatives")}
        of_names = ["gate_copies"] if traits_of(method).untrained else ["subjects", "gate_copies"]
        given |= {f"data.{name}": getattr(data, name) or None for name in of_names}
        for name, value in given.items():
            if value is not None and not (taught and name in ("data.group", "data.subjects")):
                raise ConfigError(f"{name}={value} is for method.gate_fit=logistic; set that, or leave it out")
        return
    if method.gate_blocks is None or method.gate not in ("linear", *UNTRAINED) or method.gate_read != "last_prompt":
        raise ConfigError(
            "method.gate_fit=logistic fits one linear gate for all edits, asked at the end of the prompt: set "
            f"method.gate_blocks, method.gate=linear (or {', '.join(UNTRAINED)}) and method.gate_read=last_prompt"
        )
    if method.gate in BY_MEANS and method.gate_pool == WINDOWS:
        raise ConfigError(
            f"method.gate={method.gate} follows from means of prompts, and gate_pool={WINDOWS} has many vectors of "
            "each: set method.gate_pool=mean (or last, max, maxmin)"
        )
    if method.gate_bias is not None:
        raise ConfigError("method.gate_bias has no effect with method.gate_fit=logistic, which sets it; leave it out")
    if bool(augment.forget_copies) != bool(augment.retain_copies) and not data.gate_copies:
        raise ConfigError(
            "method.gate_fit=logistic needs copies on both sides or on none, or the gate learns to tell copies from "
            "rows: set data.augment.forget_copies and data.augment.retain_copies, or data.gate_copies, which the gate "
            "is fitted to instead"
        )


def objective_of(config: UnlearnConfig) -> Objective:
    """Terms, weights and options that `objective` and `loss` ask for.

    A gate that is fitted has no term, and what keeps retain rows as they are is that it is shut on them: there is no
    retain term unless `loss.retain` names one. A parametrization that learns has an objective of its own.
    """
    if traits_of(config.method).learns:
        return learning()
    gated, loss = traits_of(config.method).gated, config.loss
    if config.method.gate_fit == "logistic":
        gated, loss = False, replace(loss, retain=loss.retain or "none")
    return build_objective(config.objective, loss, gated=gated, quirks=quirks_in_force(config))


def _check_template(name_or_text: str) -> None:
    if "{" not in name_or_text:
        one_of("template", name_or_text, ("auto", *TEMPLATES.names()))
    elif name_or_text.count(PLACE) != 1:
        raise ConfigError(f"data.template={name_or_text!r} must contain {PLACE} exactly once, or be a template's name")
