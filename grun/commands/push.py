"""`python -m grun push`: an adapter on the Hugging Face hub, with the numbers of its evaluations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grun.config.options import PushConfig
from grun.data.forget_text import refuse_forget_text, rows_of_run
from grun.data.jsonl import read_rows
from grun.data.sets import evaluation_sets, find_set
from grun.errors import AdapterError, ConfigError, RunError
from grun.evaluation.attacks.base import ATTACKS
from grun.evaluation.metrics import METRICS
from grun.evaluation.plan import EVALUATION_FILE
from grun.loading.hashing import adapter_hash
from grun.loading.named import MODELS
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE, find_adapter, peft_type, read_regular
from grun.method.saving import Figure, Leak, Sharing, adapter_files, own_texts, shared_config
from grun.method.validation import validate
from grun.report.attack_results import attack_label
from grun.runtime.files import make_folder, target, write_bytes
from grun.runtime.hub import check_name, push
from grun.runtime.records import Asked, Completed, Counts, Evaluation, Gate, Run, Share, read_record
from grun.runtime.runs import RUN_FILE

log = logging.getLogger(__name__)

SENT = (
    *("suite", "metrics_format", "counts", "sets", "overall", "gate", "reference"),
    *("attacks", "worst", "worst_of_prompts", "retention", "choices", "cloze", "perplexity"),
    *("results", "groups", "versions", "num_fewshot", "samples", "lm_eval"),
)
"""Keys of an evaluation.json that are sent: numbers, and the names of what was measured."""
WORST = ("worst_of_prompts", "worst")
FIELDS = (Evaluation, Gate, Share, Asked, Completed, Counts)


def push_adapter(config: PushConfig) -> list[str]:
    """Send what `config` names; the URL of the commit, or with output_dir that folder.

    Raises:
        ConfigError: an option is missing or wrong, or nobody knows what the adapter was made to forget.
        AdapterError: the adapter cannot be read, or is none of GRUN's.
        DataError: a file that was to be sent holds text of a forget row.
        RunError: an evaluation cannot be read, or is of another adapter.
        HubError: the hub refuses, or cannot be reached.
    """
    if config.adapter is None or (config.repo is None and config.output_dir is None):
        raise ConfigError("the command is: push adapter=FOLDER repo=OWNER/NAME; set both (or output_dir for repo)")
    if config.repo is not None:
        check_name(config.repo)
    folder = adapter_folder(config.adapter)
    if config.forget is not None:
        rows = read_rows(Path(config.forget).expanduser())
    else:
        rows = rows_of_run(folder, unchecked=config.unchecked)
    files, own = _files(folder, config)
    own += [PushConfig.commit_message]
    refuse_forget_text({**files, "commit_message": config.commit_message.encode()}, rows, own)
    if rows:
        log.info("no text of %d forget rows is in %s", len(rows), ", ".join(files))
    if config.output_dir is not None:
        return [str(_write(files, target(config.output_dir)))]
    return [
        push(
            files, str(config.repo), private=config.private, commit_message=config.commit_message,
            revision=config.revision,
        )
    ]  # fmt: skip


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, or the one adapter in a folder of results.

    Raises:
        AdapterError: there is none, or it is not of GRUN.
        ConfigError: there are several.
    """
    folder = find_adapter(name)
    inner = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    if not (folder / CONFIG_FILE).is_file() and inner:
        if len(inner) > 1:
            names = ", ".join(path.name for path in inner)
            raise ConfigError(f"{folder} holds several adapters ({names}); name one: adapter={inner[0]}")
        folder = inner[0]
    if (kind := peft_type(folder)) != "GRUN":
        hint = "push its requests' adapters" if kind == "STACK" else "push it with the library that wrote it"
        raise AdapterError(f"{folder} is of type {kind}, and no adapter of GRUN; {hint}")
    return folder


def _files(folder: Path, config: PushConfig) -> tuple[dict[str, bytes], list[str]]:
    """What is sent, by path in the repository, and the texts in it that are GRUN's own."""
    adapter = validate(folder)
    found = _evaluations(folder, config.evaluations)
    run = read_record(folder / RUN_FILE, Run) if (folder / RUN_FILE).is_file() else {}
    data = str(((run.get("config") or {}).get("data") or {}).get("name", "data"))
    figures = [figure for one in found.values() for figure in _figures(one, data, _before(folder, one))]
    leaks = [leak for one in found.values() for leak in _leaks(one)]
    name = adapter.config.base_model_name_or_path or ""
    base = config.base_model or (MODELS.get(name).hub if name in MODELS else None)
    sharing = Sharing(config.repo or "", config.license, base, figures, leaks)
    of_adapter = shared_config(adapter.config, config.base_model)
    files = adapter_files(of_adapter, read_regular(folder / WEIGHTS_FILE, follow=True), adapter.template, sharing)
    for path, one in found.items():
        sent = {key: one[key] for key in SENT if key in one}
        files[f"evaluation/{path}.json"] = (json.dumps(sent, indent=2) + "\n").encode()
    return files, [*own_texts(of_adapter), *_names()]


def _evaluations(folder: Path, further: Sequence[str]) -> dict[str, dict[str, Any]]:
    """evaluation.json of each evaluation of an adapter, by its suite; RunError where further ones are of another."""
    own, found = adapter_hash(folder), dict[str, dict[str, Any]]()
    beside = folder.resolve().parent / "evaluation"
    for place in [beside, *(Path(name).expanduser() for name in further)]:
        named = [place / EVALUATION_FILE, *sorted(place.glob(f"*/{EVALUATION_FILE}"))]
        named += sorted(place.glob(f"evaluation/*/{EVALUATION_FILE}"))
        read = [read_record(path, Evaluation) for path in named if path.is_file()]
        fitting = [one for one in read if one.get("identity", {}).get("adapter") == own]
        if not fitting and place != beside:
            raise RunError(f"evaluations: {place} holds none of {folder}, as it is now; evaluate that adapter first")
        for one in fitting:
            suite = one.get("suite", "answers")
            number = sum(name.startswith(suite) for name in found)
            found[f"{suite}-{number + 1}" if number else suite] = one
    return found


def _before(folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The sets of the evaluation of the base alone that lies beside, if it is of the same base and rows."""
    for path in sorted((folder.resolve().parent / "evaluation").glob(f"before*/{EVALUATION_FILE}")):
        before = read_record(path, Evaluation)
        alike = all(before.get(key) == evaluation.get(key) for key in ("suite", "data"))
        bases = [one.get("identity", {}).get("base") for one in (before, evaluation)]
        if alike and bases[0] == bases[1] and before.get("adapter") is None:
            return dict(before.get("sets", {}))
    return {}


def _figures(evaluation: dict[str, Any], data: str, before: dict[str, Any]) -> Iterator[Figure]:
    """Numbers that a card shows: of each set the metrics of a report, of lm-evaluation-harness's tasks all."""
    sets = evaluation.get("sets", {})
    for name in (name for name in evaluation_sets() if name in sets):
        for metric in find_set(name).metrics:
            if isinstance(value := sets[name].get(metric), int | float):
                of_base = before.get(name, {}).get(metric)
                yield Figure(data, name, metric, METRICS.get(metric).label, float(value), of_base)
    for task, metrics in evaluation.get("results", {}).items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and "stderr" not in metric:
                yield Figure(task, "", metric, metric.partition(",")[0], float(value))


def _leaks(evaluation: dict[str, Any]) -> Iterator[Leak]:
    """What came back under each attack, the worst cases last."""
    attacks = {**evaluation.get("attacks", {}), **{name: evaluation[name] for name in WORST if name in evaluation}}
    for name, found in attacks.items():
        if isinstance(share := found.get("leak"), int | float):
            interval = found.get("interval")
            pair = (float(interval[0]), float(interval[1])) if interval and len(interval) == 2 else None
            yield Leak(attack_label(name), float(share), pair, found.get("rows"))


def _write(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write files into a folder that is new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} holds something already; name a new folder as output_dir")
    for name, data in files.items():
        make_folder((folder / name).parent)
        write_bytes(folder / name, data)
    return folder


def _names() -> list[str]:
    """Names of sets, metrics, attacks and fields, which evaluations and their tables are made of."""
    sets = [text for one in evaluation_sets().values() for text in (one.name, one.label)]
    metrics = [text for name in METRICS.names() for text in (name, METRICS.get(name).label)]
    attacks = [attack_label(name) for name in (*ATTACKS.names(), *WORST)]
    return [*sets, *metrics, *attacks, *(key for kind in FIELDS for key in kind.__annotations__)]
