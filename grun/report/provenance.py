"""Where a number comes from: the settings of an evaluation and of its run, and the command that repeats the run."""

from __future__ import annotations

import shlex
from typing import Any

from grun.errors import GrunError
from grun.report.results import Result


def provenance(result: Result) -> list[tuple[str, str]]:
    """Terms and values of one model: of its evaluation, then of its run, as far as they are known."""
    evaluation, record = result.evaluation, result.record
    identity, settings = evaluation.get("identity", {}), evaluation.get("settings", {})
    template = evaluation.get("template") or settings.get("template") or {}
    left_out = ("sets", "quirks", "template", "choices", "cloze", "texts", "rows", "examples")  # or hashes of questions
    task = "unlearning" if result.run else "teaching"
    parameters, memory = record.get("parameters"), record.get("peak_memory_bytes")
    found = {
        "evaluation": result.folder,
        "model": evaluation.get("model"),
        "base weights": " ".join(str(identity[key]) for key in ("base", "dtype", "quantization") if identity.get(key)),
        "adapter": evaluation.get("adapter"),
        "template": template and f"{template.get('name')}: {template.get('text') or template.get('kind')}",
        "system prompt": template.get("system_prompt"),
        "evaluation settings": _listed({key: value for key, value in settings.items() if key not in left_out}),
        "quirks in evaluation": ", ".join(result.quirks) or "none",
        "rows": _listed({name: count.get("rows") for name, count in evaluation.get("counts", {}).items()}),
        "evaluated in": _seconds(evaluation.get("seconds", {}).get("total")),
        "evaluated by": identity.get("version") and f"grun {identity['version']}",
        "run": result.run,
        "profile": record.get("profile"),
        "objective": result.objective,
        "weights of the terms": _listed(record.get("terms") or {}),
        "parametrization": result.run and result.parametrization,
        f"quirks in {task}": record and (", ".join(record.get("quirks") or []) or "none"),
        "parameters": _listed(parameters) if isinstance(parameters, dict) else parameters,
        "steps": record.get("steps"),
        f"{task} took": _seconds(record.get("seconds")),
        "peak memory": f"{memory / 2**20:.0f} MiB" if isinstance(memory, int | float) else None,
        "device": record.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
    }
    return [(term, str(value)) for term, value in found.items() if value]


def _seconds(value: Any) -> str | None:
    return f"{value:.0f} s" if isinstance(value, int | float) else None


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items() if value is not None)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def command_of(record: dict[str, Any]) -> str | None:
    """The command that repeats a run: its options as far as they differ from what its profile now gives.

    None where run.json holds no config or its profile is not to be had.
    """
    from grun.config import values
    from grun.loading.resolve import resolve

    command, config = record.get("command"), record.get("config")
    if command not in values.COMMANDS or not isinstance(config, dict):
        return None
    given = [f"{key}={config[key]}" for key in ("profile", "objective") if config.get(key)]
    try:
        there = resolve(command, given if config.get("profile") else [*given, "profile="], quiet=True)
        profile = values.flat(values.to_dict(there), type(there))
    except GrunError:
        return None
    options = values.flat(config, type(there))
    changed = {key: options[key] for key in profile if key in options and options[key] != profile[key]}
    given += [f"{key}={values.argument(value)}" for key, value in changed.items()]
    return shlex.join(["python", "-m", "grun", command, *given])
