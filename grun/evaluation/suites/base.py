"""Evaluations other than the table of answers: what they have in common, from the config to the folder.

A suite declares what its result depends on and measures a loaded model. Its folder holds `evaluation.json` and the
suite's own lines; it is whole or absent, and found again by its key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.options import EvaluateConfig
from grun.data.templates import Template
from grun.data.templates import in_force as template_in_force
from grun.evaluation.evaluate import head_of, single_evaluations, tell_found, with_adapter, write_evaluation
from grun.evaluation.items import memory_advice
from grun.evaluation.plan import CODE, begin, code_hash, previous_in, same_evaluation
from grun.evaluation.probe import asked_first
from grun.evaluation.table import lines_of
from grun.loading.checks import check
from grun.registry import Registry
from grun.runtime import processes
from grun.runtime.files import content_hash, holding, write_text
from grun.runtime.memory import enough_memory
from grun.runtime.progress import progress
from grun.runtime.records import SUITE_FORMAT
from grun.version import __version__

if TYPE_CHECKING:
    from grun.evaluation.generation import Answer
    from grun.loading.adapters import Loaded

SUITE_CODE = (
    *CODE,
    "data/choices.py",
    "data/words.py",
    "data/augmentation.py",
    "evaluation/*.py",
    "evaluation/metrics/*.py",
    "evaluation/attacks/*.py",
    "evaluation/suites/*.py",
)
"""Sources that decide a suite's result, relative to the package."""


@dataclass
class Measured:
    """What a suite found out about a model."""

    results: dict[str, Any]
    """What evaluation.json holds after the key and the inputs."""
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Records of further files, by file name."""


class Suite:
    """One kind of evaluation; the constructor loads its data."""

    in_template: bool = True
    """Whether it asks in the template alone, with what a guardrail puts in front of it."""

    def __init__(self, config: EvaluateConfig) -> None:
        """`config` names the suite."""
        self.config = config

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """What the result depends on besides model, adapter and code, for JSON."""
        raise NotImplementedError

    def measure(self, loaded: Loaded) -> Measured:
        """Ask the model; several processes do so together."""
        raise NotImplementedError

    def accept(self, result: dict[str, Any]) -> None:
        """RunError where a written evaluation is not what the config asks for; by default everything is accepted."""

    def template(self, loaded: Loaded) -> Template:
        """The template in force."""
        return template_in_force(self.config, loaded.template, loaded.tokenizer)

    def answers(self, loaded: Loaded, prompts: Sequence[Sequence[int]], doing: str) -> list[Answer]:
        """Greedy answers to prompts, token ids; `doing` is shown meanwhile."""
        from grun.evaluation.generation import generate_answers

        size, longest = self.config.batch_size, self.config.max_new_tokens
        with self.enough_memory(doing), progress(doing, len(prompts)) as advance:
            return generate_answers(loaded.model, loaded.tokenizer, prompts, size, longest, loaded.pad_id, advance)

    def enough_memory(self, doing: str) -> AbstractContextManager[None]:
        """Where memory ends within the block, the error names `doing` and what takes less."""
        return enough_memory(doing, memory_advice(self.config))


SUITES: Registry[type[Suite]] = Registry("suite")
for _name, _place, _description in (
    ("knowledge", "knowledge:KnowledgeSuite", "multiple choice, cloze and perplexity"),
    ("attacks", "attacks:AttackSuite", "what comes back of the forget set under attack"),
    ("lm_eval", "lm_harness:HarnessSuite", "tasks of lm-evaluation-harness"),
    ("judge", "judge:JudgeSuite", "share of unsafe answers, as a judge sees it"),
):
    SUITES.add(_name, f"grun.evaluation.suites.{_place}", _description)


@processes.connected()
@holding()
def evaluate_suite(config: EvaluateConfig, output_dir: Path) -> dict[str, dict[str, Any]]:
    """Evaluate a model, or each of config.adapters and the base, by config.suite; each evaluation.json, by its folder.

    GRUN's adapters are put on one base, one after another; for others the model is loaded again. An evaluation of the
    same model, adapter, data, settings and code that is there already is found, not repeated; anything else there is a
    RunError unless config.overwrite.
    """
    check(config)
    config = asked_first(config)
    singles, others = {output_dir: config}, [output_dir]
    if config.adapters:
        singles, others = single_evaluations(config, output_dir)
    previous = processes.of_first(lambda: {folder: previous_in(folder, config.overwrite) for folder in singles})
    with processes.first_goes_first():  # before the model: a misspelled file is found before minutes of loading
        suite = SUITES.get(config.suite)(config)
    results, started = {}, time.monotonic()
    for folder, loaded in _models(singles, others):
        results[folder] = carry_out(suite, singles[folder], folder, loaded, previous[folder], started)
        started = time.monotonic()
    for result in results.values():
        suite.accept(result)
    return {str(folder): results[folder] for folder in singles}


def _models(singles: Mapping[Path, EvaluateConfig], others: Sequence[Path]) -> Iterator[tuple[Path, Loaded]]:
    """Each model by its folder: GRUN's adapters on one base, which they are put on in turn, then `others` alone."""
    from grun.loading.adapters import load_model

    base = None
    for folder, config in singles.items():
        if folder in others:
            continue
        if base is None:
            with processes.agreed():
                base = load_model(config.model, None, strict=config.strict, gate_threshold=None)
        if config.adapter is None:
            yield folder, base
            continue
        loaded = with_adapter(base, config)
        try:
            yield folder, loaded
        finally:
            loaded.model.unwrap()
    del base
    for folder in others:
        config = singles[folder]
        with processes.agreed():
            found = load_model(config.model, config.adapter, strict=config.strict, gate_threshold=config.gate_threshold)
        yield folder, found


def carry_out(
    suite: Suite,
    config: EvaluateConfig,
    folder: Path,
    loaded: Loaded,
    previous: dict[str, Any] | None,
    started: float,
) -> dict[str, Any]:
    """The evaluation of one model, found in `folder` or made there."""
    if not suite.in_template:
        loaded.refuse_guarded(f"suite={config.suite}")
    identity = {**loaded.identity, "version": __version__, "format": SUITE_FORMAT, "code": code_hash(SUITE_CODE)}
    settings = suite.settings(loaded) | {"gate_threshold": config.gate_threshold}
    inputs = {"suite": config.suite, "identity": identity, "settings": settings}
    key = content_hash(inputs)
    found = same_evaluation(folder, previous, key, inputs, config.overwrite)
    if found is not None:
        tell_found(folder)
        return found
    processes.of_first(lambda: begin(folder, config.overwrite))
    ready = time.monotonic()
    measured = suite.measure(loaded)
    now = time.monotonic()
    seconds = {"load": ready - started, "measure": now - ready, "total": now - started}

    def fill(new: Path) -> dict[str, Any]:
        for name, records in measured.lines.items():
            write_text(new / name, lines_of(records))
        return measured.results

    head = head_of(config, key, inputs, settings.get("template"))
    return processes.of_first(lambda: write_evaluation(folder, head, fill, seconds))
