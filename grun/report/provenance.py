"""Where a number comes from: the settings of an evaluation and of its run, and the command that repeats the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from grun.errors import GrunError
from grun.report.results import Result


def provenance(result: Result) -> list[tuple[str, str]]:
    """Terms and values of one model: of its evaluation, then of its run, as far as they are known."""
    return [(term, value) for term, value in (*_of_evaluation(result), *_of_run(result)) if value]


def _of_evaluation(result: Result) -> Iterator[tuple[str, str]]:
    evaluation = result.evaluation
    identity, settings = evaluation.get("identity", {}), evaluation.get("settings", {})
    template = evaluation.get("template") or settings.get("template") or {}
    seconds = evaluation.get("seconds", {})
    yield "evaluation", str(result.folder)
    yield "model", str(evaluation.get("model") or "")
    yield "base weights", " ".join(str(identity[key]) for key in ("base", "dtype", "quantization") if identity.get(key))
    yield "adapter", str(evaluation.get("adapter") or "")
    if template:
        yield "template", f"{template.get('name')}: {template.get('text') or template.get('kind')}"
    yield "system prompt", str(template.get("system_prompt") or "")
    left_out = ("sets", "quirks", "template", "choices", "cloze", "texts", "rows", "examples")  # or hashes of questions
    yield "evaluation settings", _listed({key: value for key, value in settings.items() if key not in left_out})
    yield "quirks in evaluation", ", ".join(result.quirks) or "none"
    counts = {name: count.get("rows") for name, count in evaluation.get("counts", {}).items()}
    yield "rows", _listed(counts)
    if "total" in seconds:
        yield "evaluated in", f"{seconds['total']:.0f} s"
    yield "evaluated by", f"grun {identity['version']}" if identity.get("version") else ""


def _of_run(result: Result) -> Iterator[tuple[str, str]]:
    record = result.record
    task = "unlearning" if result.run else "teaching"
    yield "run", str(result.run or "")
    yield "profile", str(record.get("profile") or "")
    yield "objective", str(result.objective or "")
    yield "weights of the terms", _listed(record.get("terms") or {})
    yield "parametrization", result.parametrization if result.run else ""
    if record:
        yield f"quirks in {task}", ", ".join(record.get("quirks") or []) or "none"
    parameters = record.get("parameters")
    yield "parameters", _listed(parameters) if isinstance(parameters, dict) else str(parameters or "")
    yield "steps", str(record.get("steps") or "")
    if isinstance(record.get("seconds"), int | float):
        yield f"{task} took", f"{record['seconds']:.0f} s"
    if isinstance(record.get("peak_memory_bytes"), int | float):
        yield "peak memory", f"{record['peak_memory_bytes'] / 2**20:.0f} MiB"
    yield "device", str(record.get("device") or "")
    yield "versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())


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
