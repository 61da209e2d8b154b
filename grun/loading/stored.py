"""Options stored with an adapter, a model or a store of requests; they win over every default."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.config.values import flatten
from grun.data import templates
from grun.data.templates import Template
from grun.errors import ConfigError
from grun.loading.named import MODELS
from grun.runtime.files import read_json

log = logging.getLogger(__name__)

TINY = "tiny"
"""Value of `model.path` that asks for the small Llama."""
TAUGHT = (
    *("name", "path", "forget", "retain", "retain_rows", "unknown", "unknown_rows", "refused_rows", "teach_general"),
    *("allow_overlap", "columns", "demo", "lore", "countries", "text.jsonl", "text.min_characters"),
)
"""Options of `data` that decide which rows a model was fine-tuned on; `FORGOTTEN` adds those of unlearning."""
SECTIONS = ("demo.", "lore.", "countries.", "text.")
FORGOTTEN = (*TAUGHT, "heldout", "validation")


@dataclass(frozen=True)
class Stored:
    """Options by their keys."""

    what: str
    """Such as "adapter results/mine"."""
    options: dict[str, Any]
    """All but those of the rows."""
    rows: dict[str, Any]
    """data.*: which rows it was fine-tuned on or made to forget."""
    profile: str | None
    """Profile that it was made with."""


def of_model(path: str) -> Stored | None:
    """What is stored with the weights in a folder.

    None for a hub id, whose files are not here, and for a model that is called by its name, whose folder may be made
    later: nothing is stored with it.
    """
    folder = Path(path).expanduser()
    if path == TINY or path in MODELS or not folder.is_dir():
        return None
    run = _run(folder, ("finetune", "unlearn"))
    template = templates.load(folder)
    options = {} if template is None else template.options()
    weights = _read(folder / "config.json")
    if isinstance(dtype := weights.get("dtype", weights.get("torch_dtype")), str):
        options["model.dtype"] = dtype
    return _stored(f"model {path}", options, run, TAUGHT if run.get("command") == "finetune" else FORGOTTEN)


def of_adapter(name: str) -> Stored | None:
    """What is stored with an adapter or a store of requests; None for a hub id, which is read when it is loaded."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    from grun.method.adapter import CONFIG_FILE, STACK_FILE

    if (folder / STACK_FILE).is_file():
        return of_store(folder)
    values = _read(folder / CONFIG_FILE)
    template = _template(values) or templates.load(folder)
    options = _base(values.get("base_model_name_or_path"), values.get("base_revision", values.get("revision")))
    run = _run(folder, ("unlearn",))
    options = {**_loading(run, values), **options, **_named(template)}
    return _stored(f"adapter {name}", options, run, FORGOTTEN)


def of_store(folder: Path, *, rows: bool = True, without: str | None = None) -> Stored | None:
    """What the requests in force agree on, and the store's own settings; None where it holds none.

    `rows`: whether the rows of its requests are asked for; a further request has its own. `without`: id of a request
    that does not count.
    """
    from grun.method.stack.manifest import Manifest

    manifest = Manifest.read(folder)
    others = [request for request in manifest.requests if request.id != without]
    active = [request for request in others if request.state == "active"] or others
    if manifest.base is None or not active:
        return None
    parts = []
    for request in active:
        values = _read(folder / "requests" / request.folder / "adapter_config.json")
        run = {"config": request.config, "profile": request.config.get("profile")}
        options = {**_loading(run, values), **_named(_template(values))}
        parts.append(_stored(f"request {request.id}", options, run, FORGOTTEN if rows else ()))
    found = _agreed(f"store {folder}", parts)
    options = {**_base(manifest.base.name, manifest.base.revision), **found.options}
    options["gate_threshold"] = manifest.gate_threshold
    return dataclasses.replace(found, options=options, profile=found.profile if rows else None)


def given_with(options: Mapping[str, Any], store: Path | None = None) -> Stored | None:
    """What is stored with the adapters or the store that options name."""
    if isinstance(options.get("adapter"), str):
        return of_adapter(options["adapter"])
    if isinstance(several := options.get("adapters"), list) and several:
        parts = [part for name in several if (part := of_adapter(str(name))) is not None]
        return _agreed(f"adapters {', '.join(map(str, several))}", parts) if len(parts) == len(several) else None
    beside = options.get("method.beside")
    store = store or (Path(beside).expanduser() if isinstance(beside, str) else None)
    return of_store(store, rows=False) if store is not None and (store / "stack.json").is_file() else None


def _agreed(what: str, parts: Sequence[Stored]) -> Stored:
    """Options that all of `parts` share; a warning where bases differ. A template that differs stays each adapter's."""

    def alike(every: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        first, *rest = every
        return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in rest)}

    options = alike(part.options for part in parts)
    for key in ("model.path", "model.dtype", "model.quantization"):
        first = next((part for part in parts if key in part.options), parts[0])
        for other in (part for part in parts if part.options.get(key) != first.options.get(key)):
            log.warning(
                "%s: trained with %s=%s (%s) and %s (%s); what you set, or else the default, counts for all", what, key,
                first.options.get(key), first.what, other.options.get(key), other.what,
            )  # fmt: skip
            break
    if any("data.template" in part.options for part in parts) and "data.template" not in options:
        options = {key: value for key, value in options.items() if not key.startswith("data.")}
        options["data.template"] = "auto"
    profile = parts[0].profile if len({part.profile for part in parts}) == 1 else None
    rows = alike(part.rows for part in parts)
    if rows.get("data.name") == "jsonl" and "data.forget" not in rows:
        rows = {}  # a file each: which rows are meant, the profile may say
    return Stored(what, options, rows, profile)


def _stored(what: str, options: dict[str, Any], run: Mapping[str, Any], names: Sequence[str]) -> Stored:
    config = run.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    rows: dict[str, Any] = {}
    if isinstance(data, dict):
        flat = flatten(data, SECTIONS)
        rows = {f"data.{key}": value for key, value in flat.items() if {key, key.partition(".")[0]} & set(names)}
    profile = run.get("profile")
    return Stored(what, options, rows, profile if isinstance(profile, str) else None)


def _template(values: Mapping[str, Any]) -> Template | None:
    """Of adapter_config.json; None where it is damaged, which is an error when the adapter is loaded."""
    with contextlib.suppress(ConfigError):
        return None if values.get("template") is None else Template.from_dict(values["template"])
    return None


def _named(template: Template | None) -> dict[str, Any]:
    return {} if template is None else template.options()


def _base(path: Any, revision: Any) -> dict[str, Any]:
    found = {"model.path": path} if isinstance(path, str) else {}
    return found | ({"model.revision": revision} if found and isinstance(revision, str) else {})


def _loading(run: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """How the base was loaded when an adapter was trained, which decides its states.

    `run` holds the options of its training, `adapter` (adapter_config.json) the type that the weights had.
    """
    config = run.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    asked = model if isinstance(model, dict) else {}
    found = {f"model.{name}": asked[name] for name in ("dtype", "quantization") if name in asked}
    if found.get("model.dtype", "auto") == "auto" and isinstance(dtype := adapter.get("base_dtype"), str):
        found["model.dtype"] = dtype
    return found


def _run(folder: Path, commands: Sequence[str]) -> dict[str, Any]:
    run = _read(folder / "run.json", whole=True)
    return run if run.get("command") in commands else {}


def _read(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """A JSON object; empty where there is none, or where it is damaged, which `whole` makes a ConfigError."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        if whole and not isinstance(error, FileNotFoundError):
            raise ConfigError(f"{path} is damaged ({error}), which says what was trained; restore it") from error
        return {}
    return values if isinstance(values, dict) else {}
