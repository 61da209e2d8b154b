"""An experiment's results as they lie on disk, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.data.sets import evaluation_sets
from grun.errors import RunError
from grun.evaluation.plan import EVALUATION_FILE
from grun.experiments.sequential.chain import Chain
from grun.experiments.sequential.definition import METHODS
from grun.experiments.sequential.files import BEFORE, RETAIN_ONLY, ExperimentFiles
from grun.experiments.sequential.measuring import KEPT, measured
from grun.experiments.sweep.tuning import TOLERANCE


@dataclass(frozen=True)
class Method:
    """The steps of one method."""

    name: str
    steps: list[dict[str, Any]]
    """Records by number, ascending; see `grun.experiments.sequential.steps`."""

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last step."""
        return self.steps[-1]


@dataclass(frozen=True)
class Experiment:
    """All methods of a results folder that have steps."""

    ids: list[str]
    """Requests in their order."""
    before: dict[str, Any]
    """Recall of the model that knows everything, as `grun.experiments.sequential.measuring.measured` gives it."""
    floor: dict[str, Any] | None
    """The same of the model that was never taught any request."""
    methods: list[Method]

    @property
    def metric(self) -> str:
        """fact_recall or rouge_l."""
        return str(self.before["metric"])

    @property
    def kept_sets(self) -> list[str]:
        """Evaluated sets that are to stay as they are."""
        kept = [name for name, one in evaluation_sets().items() if one.is_result and one.good == "high"]
        return [name for name in kept if name in self.before["sets"]]


def read_experiment(results: Path) -> Experiment:
    """What lies in a results folder; RunError if there is no step of any method."""
    files, methods, requests = ExperimentFiles(results), [], {}
    for name in METHODS:
        if not files.chain(name).is_file():
            continue
        chain = Chain.read(files.chain(name))
        requests = chain.requests
        found = [chain.read_step(id) for id in requests if chain.step(id).is_file()]
        if found:
            methods.append(Method(name, found))
    if not methods:
        raise RunError(f"{results} holds no step of any method; run `python -m grun sequential` first")
    floor = None
    if (files.evaluation(RETAIN_ONLY) / EVALUATION_FILE).is_file():
        floor = measured(files.evaluation(RETAIN_ONLY), requests)
    return Experiment(list(requests), measured(files.evaluation(BEFORE), requests), floor, methods)


@dataclass(frozen=True)
class Summary:
    """What a method comes to, after its last step; None where it cannot be said."""

    method: str
    requests: int
    """Number of the last step."""
    forgotten: float
    """Mean recall over the requests made so far."""
    forgotten_worst: float
    """Highest recall of one of them."""
    forgotten_paraphrased: float | None
    """Recall of the whole forget set asked in other words, once all requests are made."""
    at_floor: int | None
    """Requests whose recall is at most the retain-only model's + 0.05."""
    came_back: float
    """Highest recall that any request had at any step from its own on."""
    not_yet_asked: float | None
    """Recall of requests before they are made relative to the model before, mean over steps."""
    kept: dict[str, float]
    """Set -> recall relative to the model before; 1 where that was 0."""
    own_gates: float | None
    """Share of a request's prompts where its own widest gate is above 0.5, mean over requests."""
    others_gates: float | None
    """The same of the gates of another request."""
    false_positives: float | None
    """Share of retain and held-out prompts where any gate is above 0.5."""
    seconds: float | None
    """Of training a request, mean."""
    saved_bytes: float | None
    """Of what training a request writes, mean."""
    peak_memory_bytes: int | None
    """Of the method's process."""


def summarize(method: Method, experiment: Experiment) -> Summary:
    """What `method` comes to."""
    last, ids = method.last, experiment.ids
    asked = ids[: last["number"]]
    recall = {name: float(last["recall"][name]) for name in asked}
    gates = last["gates"]
    floor = None if experiment.floor is None else experiment.floor["recall"]
    waiting = [
        (step["recall"][name], experiment.before["recall"][name])
        for step in method.steps
        for name in ids[step["number"] :]
    ]
    known = sum(before for _, before in waiting)
    return Summary(
        method=method.name,
        requests=len(asked),
        forgotten=_mean(list(recall.values())) or 0.0,
        forgotten_worst=max(recall.values()),
        forgotten_paraphrased=last["sets"].get("forget_paraphrase") if len(asked) == len(ids) else None,
        at_floor=None if floor is None else sum(recall[name] <= floor[name] + TOLERANCE for name in asked),
        came_back=max(step["recall"][name] for step in method.steps for name in ids[: step["number"]]),
        not_yet_asked=sum(value for value, _ in waiting) / known if known else None,
        kept={
            name: last["sets"][name] / before if (before := experiment.before["sets"][name]) else 1.0
            for name in experiment.kept_sets
        },
        own_gates=None if gates is None else _mean([gates["open"][name][name] for name in asked]),
        others_gates=None if gates is None else _mean(
            [gates["open"][name][other] for name in asked for other in asked if name != other]
        ),
        false_positives=None if gates is None else _false_positives(gates),
        seconds=_mean([step["seconds"]["train"] for step in method.steps]),
        saved_bytes=_mean([step["saved_bytes"] for step in method.steps]),
        peak_memory_bytes=max((step["peak_memory_bytes"] or 0 for step in method.steps), default=0) or None,
    )  # fmt: skip


def _false_positives(gates: Mapping[str, Any]) -> float | None:
    rows = {name: gates["rows"][name] for name in KEPT if name in gates["rows"]}
    if not rows:
        return None
    return float(sum(gates["any_open"][name] * count for name, count in rows.items()) / sum(rows.values()))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
