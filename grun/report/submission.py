"""A submission to the leaderboard: one file with all that its numbers come from, made of evaluation folders.

`grun.report.submission_checks` computes every number again and refuses what does not hold.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from grun.data.rows import Row
from grun.errors import DataError, RunError
from grun.evaluation.attacks.base import ATTACKS, Asked, Outcome, Place
from grun.evaluation.attacks.outcomes import by_attack, leak_of, worst_of
from grun.evaluation.measure import measure
from grun.evaluation.metrics import reference_metrics
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table, shorten
from grun.report.attack_results import ASKED
from grun.report.labels import run_label
from grun.report.result import Result
from grun.report.results import EVALUATION_FILE, lines_in, read_evaluation, refuse_other_models
from grun.runtime.files import content_hash
from grun.runtime.reading import parse_json, typed
from grun.runtime.records import ATTACKS_FILE, Attempt, Evaluation, read_record

FORMAT = 1
LARGEST = 2**28
"""Bytes that a submission may have once it is decompressed: somebody else wrote it."""
RULES = ("objective", "design", "method", "loss", "train", "compat", "quirks")
"""Parts of a run's options that a submission holds; the others name folders of the machine that ran it."""


class Attempted(TypedDict):
    """What one way of asking for one forget row gave back: a line of attacks.jsonl without its texts."""

    attack: str
    index: int
    variant: str
    leaks: list[float]
    curve: list[float]
    gates: dict[int, float] | None


class Submitted(TypedDict):
    """One evaluated model."""

    name: str
    stage: Literal["before", "retain_only", "after"]
    objective: str | None
    parametrization: str
    seed: int | None
    base: str | None
    adapter: str | None
    data: dict[str, str]
    settings: dict[str, Any]
    asked: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    cost: dict[str, float | None]
    scores: list[ScoreRecord]
    generations: list[GenerationRecord]
    gates: list[GateRecord]
    attempts: list[Attempted]
    numbers: dict[str, Any]


class Submission(TypedDict):
    """The file."""

    format: int
    corpus: str
    tuning: str
    seeds: list[int]
    models: list[Submitted]
    hash: str


def table_in(model: Submitted) -> Table:
    """The scored table of a model."""
    return Table(model["scores"], model["generations"], model["gates"])


def models_at(submission: Submission, stage: str) -> list[Submitted]:
    """The models of a stage."""
    return [model for model in submission["models"] if model["stage"] == stage]


def result_of(model: Submitted, file: str = "") -> Result:
    """A model as reports have it, with the numbers of its rows; `file` is where it lies."""
    evaluation = {**model["numbers"], "settings": model["settings"], "adapter": model["adapter"]}
    evaluation |= {"identity": {"base": model["base"]}, "data": model["data"]}
    label, folder = model["stage"].replace("_", " "), Path(file) / model["name"]
    run = folder if model["stage"] == "after" else None
    attributes = (model["name"], model["stage"], model["objective"], model["parametrization"])
    result = Result(*attributes, folder, run, evaluation, label)
    result.table, result.reference = table_in(model), model["numbers"].get("reference", {})
    cost = model["cost"]
    result.record = {
        "config": {**model["config"], "seed": model["seed"]},
        "seconds": cost.get("seconds"),
        "parameters": {"trained": cost.get("parameters")},
        "peak_memory_bytes": cost.get("memory_bytes"),
        "saved_bytes": cost.get("saved_bytes"),
    }
    return result


def methods_in(submission: Submission) -> dict[str, list[Submitted]]:
    """The runs by what readers call their method, each by seed."""
    found: dict[str, list[Submitted]] = {}
    for model in sorted(models_at(submission, "after"), key=lambda model: model["seed"] or 0):
        design = result_of(model).design
        label = run_label(model["objective"] or "", model["parametrization"], design=design)
        found.setdefault(label, []).append(model)
    return found


def numbers_of(model: Submitted, target: Submitted | None) -> dict[str, Any]:
    """Every number of a model, from its rows: `measure`, its leaks, and against the retain-only model where given."""
    table, quirks = table_in(model), tuple(model["settings"].get("quirks") or ())
    found = measure(table, quirks)
    if target is not None and model["stage"] == "after":
        found["reference"] = reference_metrics(table, table_in(target), quirks)
    outcomes = [_outcome(one) for one in model["attempts"]]
    found["attacks"] = {name: leak_of(some) for name, some in by_attack(outcomes).items()}
    numbers: dict[str, Any] = shorten(json.loads(json.dumps(found | worst_of(outcomes))))
    return numbers


class _Written(NamedTuple):
    """An answer of which the gates alone are known; `grun.evaluation.generation.Answer` would load torch."""

    gates: dict[int, float] | None


def _outcome(one: Attempted) -> Outcome:
    place = Place("forget", one["index"], Asked((), Row("", ""), variant=one["variant"]))
    answers: list[Any] = [_Written(one["gates"])]
    return Outcome(ATTACKS.get(one["attack"]), place, answers, one["leaks"], tuple(one["curve"]))


# -- making -----------------------------------------------------------------------------------------------------------


def make_submission(folders: Iterable[Path], tuning: str) -> Submission:
    """The submission of every evaluation in the folders and below them.

    Evaluations of suite=answers are its models; those of suite=attacks belong to the model of the same weights.

    Raises:
        RunError: a folder holds no evaluation, or a file is damaged.
    """
    results: dict[Any, Result] = {}
    attacked: dict[Any, Path] = {}
    for folder in folders:
        paths = sorted(path for path in folder.rglob(EVALUATION_FILE) if ".grun" not in path.parts)
        if not paths:
            raise RunError(f"{folder} holds no {EVALUATION_FILE}; name results folders or evaluations")
        for path in paths:
            record = read_record(path, Evaluation, ("identity", "settings"))
            who = tuple(record["identity"].get(key) for key in ("base", "adapter", "quantization"))
            if record.get("suite") == "attacks":
                attacked[who] = path.parent
            elif "suite" not in record and who not in results:
                results[who] = read_evaluation(path.parent)
    refuse_other_models([*results.values()])
    models = [_submitted(result, attacked.get(who)) for who, result in results.items()]
    target = next((model for model in models if model["stage"] == "retain_only"), None)
    for model in models:
        model["numbers"] = numbers_of(model, target)
    seeds = sorted({model["seed"] for model in models if model["seed"] is not None})
    configs = [result.record["config"] for result in results.values() if "config" in result.record]
    data: dict[str, Any] = configs[0].get("data", {}) if configs else {}
    corpus = f"tofu {data['forget']}" if data.get("name") == "tofu" else str(data.get("name", ""))
    asked = next((result.evaluation.get("model") for result in results.values() if result.stage == "before"), None)
    corpus += f" on {Path(asked).name}" if asked else ""
    made = Submission(format=FORMAT, corpus=corpus, tuning=tuning, seeds=seeds, models=models, hash="")
    made["hash"] = hash_of(made)
    return made


def _submitted(result: Result, attacks: Path | None) -> Submitted:
    record, identity, settings = result.record, result.evaluation["identity"], result.evaluation["settings"]
    config = record.get("config") or {}
    is_run = result.stage == "after"
    lines = [] if attacks is None else [*lines_in(attacks / ATTACKS_FILE, Attempt)]
    asked = {} if attacks is None else read_record(attacks / EVALUATION_FILE, Evaluation)["settings"]
    return Submitted(
        name=result.name,
        stage=result.stage,  # type: ignore[typeddict-item]
        objective=result.objective,
        parametrization=result.parametrization,
        seed=result.seed if is_run else None,
        base=identity.get("base"),
        adapter=identity.get("adapter"),
        data=result.evaluation.get("data", {}),
        settings=settings,
        asked={key: asked[key] for key in (*ASKED, "queries") if key in asked},
        config={key: config[key] for key in RULES if key in config and is_run},
        versions=record.get("versions") or {},
        cost={
            "seconds": record.get("seconds"),
            "parameters": (record.get("parameters") or {}).get("trained"),
            "memory_bytes": record.get("peak_memory_bytes"),
            "saved_bytes": record.get("saved_bytes"),
        },
        scores=result.table.scores,
        generations=result.table.generations,
        gates=result.table.gates,
        attempts=[
            Attempted(
                attack=line["attack"],
                index=line["index"],
                variant=line.get("variant", ""),
                leaks=line.get("leaks", [line["leak"]]),
                curve=line.get("curve", []),
                gates=line.get("gates") and {int(block): gate for block, gate in line["gates"].items()},
            )
            for line in lines
            if line["set"] == "forget"
        ],
        numbers={},
    )


def _plain(submission: Submission) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(submission, default=asdict))


def hash_of(submission: Submission) -> str:
    """SHA-256 (hex) of all but the hash itself."""
    return content_hash({key: value for key, value in _plain(submission).items() if key != "hash"})


# -- reading and writing ----------------------------------------------------------------------------------------------


def submission_bytes(submission: Submission, name: str) -> bytes:
    """The file's content; compressed where its name ends with .gz."""
    data = json.dumps(_plain(submission), ensure_ascii=False).encode()
    return gzip.compress(data, mtime=0) if name.endswith(".gz") else data


def read_submission(path: Path) -> Submission:
    """What lies in a file, not checked yet; DataError names the file and the field of another type."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise DataError(f"{path} holds more than {LARGEST >> 20} MiB, which no submission does")
        text = data.decode()
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a submission ({error}); name a file that submit wrote") from error
    submission: Submission = typed(
        Submission, parse_json(text, str(path), DataError, finite=False), str(path), DataError
    )
    return submission
