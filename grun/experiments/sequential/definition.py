"""An experiment's YAML file: which requests there are, which methods serve them, and with which options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grun.config.definitions import mapping, read_definition
from grun.config.values import flatten
from grun.errors import ConfigError
from grun.experiments.options import keys_of, known, section

METHODS = {
    "grun": "an adapter a request, all of them stacked on the untouched model",
    "full": "all weights, trained further at every request",
    "lora": "a new LoRA at every request, merged into the model before the next",
    "retrain": "a new model, fine-tuned without all that was asked for so far",
}
SECTIONS = (
    *("description", "profile", "requests", "data", "methods", "unlearn", "methods_options", "evaluate"),
    *("retrain_at", "rule", "independent", "earlier_as_retain", "subject_kind"),
)


@dataclass(frozen=True)
class OwnRequest:
    """A request whose rows stand in a file of the user's."""

    id: str
    forget: str
    """JSONL file, relative to data.path; of plain texts what `data.forget` names."""


@dataclass
class Sequence:
    """What an experiment's file holds, checked for unknown keys; options are flat, `section.key`."""

    name: str
    description: str = ""
    profile: str | None = None
    """None: what a given model was taught with, demo where none is given."""
    requests: int | list[OwnRequest] = 1
    """Into how many the forget set is cut, or the requests themselves."""
    data: dict[str, Any] = field(default_factory=dict)
    """Options `data.*` of fine-tuning, unlearning and evaluation."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    unlearn: dict[str, Any] = field(default_factory=dict)
    """Options of every method's unlearning."""
    methods_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method -> options of unlearning."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of every evaluation."""
    retrain_at: list[int] = field(default_factory=list)
    """Requests after which the method retrain trains a model, from 1, -1 for the last; empty: every one."""
    rule: str = "sum"
    """How the stack combines edits, a name of `grun.method.stack.combination.RULES`."""
    independent: bool = True
    """Whether a GRUN request is trained on the untouched model, or with the earlier ones in force."""
    earlier_as_retain: bool = False
    """Whether forget rows of earlier requests are retain rows of a GRUN request."""
    subject_kind: str | None = None
    """What requests are about (`data.subject_kind`): those whom a GRUN request's rows name are then its subjects, in
    whose names its gate is asked."""


def read_sequence(name: str) -> Sequence:
    """A packaged experiment, or the file `name` that ends in .yaml; ConfigError names what is wrong in it."""
    where = f"sequence {name}"
    content = read_definition("sequence", name)
    known(where, "section", content, SECTIONS)
    given = {key: value for key, value in content.items() if value is not None}
    if "requests" not in given:
        raise ConfigError(f"{where}: requests is missing; give a number, or a list of {{id: NAME, forget: FILE}}")
    kinds: dict[str, type] = dict.fromkeys(("description", "profile", "rule", "subject_kind"), str)
    kinds |= {"independent": bool, "earlier_as_retain": bool}
    for key, kind in kinds.items():
        if key in given and not isinstance(given[key], kind):
            raise ConfigError(f"{where}: {key} is {given[key]!r}; expected {kind.__name__}")
    of_methods = mapping(f"{where}: methods_options", given.get("methods_options"))
    known(f"{where}: methods_options", "method", of_methods, METHODS)
    retrain_at = given.get("retrain_at", [])
    if not isinstance(retrain_at, list) or not all(isinstance(at, int) for at in retrain_at):
        raise ConfigError(f"{where}: retrain_at is {retrain_at!r}; expected a list of whole numbers")
    return Sequence(
        name=Path(name).stem,
        **{key: given[key] for key in kinds if key in given},
        requests=_requests(where, given["requests"]),
        data=flatten(mapping(f"{where}: data", given.get("data")), keys_of("unlearn"), "data."),
        methods=check_methods(where, given.get("methods", list(METHODS))),
        unlearn=section(f"{where}: unlearn", given.get("unlearn"), "unlearn", "experiment"),
        methods_options={
            method: section(f"{where}: methods_options.{method}", options, "unlearn", "experiment")
            for method, options in of_methods.items()
        },
        evaluate=section(f"{where}: evaluate", given.get("evaluate"), "evaluate", "experiment"),
        retrain_at=retrain_at,
    )


def check_methods(where: str, methods: Any) -> list[str]:
    """`methods`; ConfigError unless it is a list of known names, each once."""
    if not isinstance(methods, list) or not methods:
        raise ConfigError(f"{where}: methods must list one name or more, not {methods!r}")
    known(where, "method", methods, METHODS)
    if twice := [name for name in methods if methods.count(name) > 1]:
        raise ConfigError(f"{where}: methods names {twice[0]} twice")
    return methods


def _requests(where: str, value: Any) -> int | list[OwnRequest]:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: requests is {value!r}; give a number, or a list of {{id: NAME, forget: FILE}}")
    for entry in value:
        texts = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("id", "forget"))
        if not texts or len(entry) > 2:
            raise ConfigError(f"{where}: a request is {entry!r}; expected {{id: NAME, forget: FILE}}")
    return [OwnRequest(entry["id"], entry["forget"]) for entry in value]
