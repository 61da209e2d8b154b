"""Evaluations: load, score, generate, write tables and the metrics computed from them.

The folder of one holds `evaluation.json` and the files of `table.py`; it is whole or absent. While it is made, what is
done so far lies in a private folder within, from which the same command goes on after a kill. Several adapters of one
base are scored together (`evaluate_adapters`); each gets the folder it would get alone.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.checks import adapter_name, quirks_in_force
from grun.config.options import EvaluateConfig
from grun.data.templates import Template
from grun.errors import ConfigError, RunError
from grun.evaluation.items import answer_questions, questions, score_items
from grun.evaluation.measure import measure
from grun.evaluation.plan import EVALUATION_FILE, Plan, begin, make_plan, previous_in
from grun.evaluation.probe import asked_first
from grun.evaluation.table import Table
from grun.loading.checks import check
from grun.loading.resolve import in_force
from grun.runtime import processes
from grun.runtime.files import holding, staged, taken, write_json, writing
from grun.runtime.ownership import LISTED, listing
from grun.runtime.reading import DamagedFile
from grun.runtime.records import Evaluation, read_record

if TYPE_CHECKING:
    from grun.evaluation.generation import Answer
    from grun.loading.adapters import Loaded


@processes.connected()
@holding()
def evaluate(config: EvaluateConfig, output_dir: Path) -> dict[str, Any]:
    """Evaluate a model on every set of the corpus and return what `evaluation.json` in output_dir then holds.

    Where the table of the same model, adapter, rows, template, settings and code is there already, only the metrics
    are computed from it; anything else there is a RunError unless config.overwrite.
    """
    check(config)
    if config.adapters:
        raise ConfigError("adapters: several adapters are evaluated by evaluate_adapters")
    return _evaluate({output_dir: config}, together=False)[str(output_dir)]


@processes.connected()
@holding()
def evaluate_adapters(config: EvaluateConfig, output_dir: Path) -> dict[str, dict[str, Any]]:
    """Evaluate every one of config.adapters on the base, and the base, into output_dir/NAME; results by folder.

    GRUN adapters are scored together, those of other kinds are evaluated one after another. What a folder holds in the
    end is what `evaluate` would write for that adapter alone, so an evaluation that is there already is found. Scores
    may differ by rounding: which blocks are shared depends on the lowest block that an adapter of the list edits.
    """
    check(config)
    singles, others = single_evaluations(config, output_dir)
    gated = {folder: single for folder, single in singles.items() if folder not in others}
    results = _evaluate(gated, together=True) if gated else {}
    if others and processes.is_first():
        print(f"evaluated one after another, since only GRUN adapters share passes: {len(others)}", file=sys.stderr)
    results |= {str(folder): evaluate(singles[folder], folder) for folder in others}
    return {str(folder): results[str(folder)] for folder in singles}


def single_evaluations(config: EvaluateConfig, output_dir: Path) -> tuple[dict[Path, EvaluateConfig], list[Path]]:
    """The evaluation of each of config.adapters, and of the base, by its folder; and the folders of other than GRUN's.

    The base counts with GRUN's adapters, which can be put on a model and taken off.
    """
    from grun.method.adapter import STACK, find_adapter, peft_type

    alone = replace(config, adapters=[], suffix=None, with_base=None)
    named = {adapter_name(adapter): replace(alone, adapter=adapter) for adapter in config.adapters}
    if config.with_base:
        named = {config.with_base: replace(alone, gate_threshold=None)} | named
    singles = {output_dir / f"{name}{config.suffix or ''}": single for name, single in named.items()}
    kinds = {folder: peft_type(find_adapter(single.adapter)) for folder, single in singles.items() if single.adapter}
    others = {folder: kind for folder, kind in kinds.items() if kind != "GRUN"}
    without_gates = {folder: kind for folder, kind in others.items() if kind != STACK}
    if without_gates and config.gate_threshold is not None:
        folder, kind = next(iter(without_gates.items()))
        raise ConfigError(
            f"gate_threshold needs GRUN adapters; {singles[folder].adapter} is of type {kind}, which has no gates"
        )
    return singles, list(others)


def _evaluate(configs: Mapping[Path, EvaluateConfig], *, together: bool) -> dict[str, dict[str, Any]]:
    """Results by folder of one model, or `together` of GRUN adapters and their base, which differ by adapter alone."""
    from grun.data.corpus import load_corpus
    from grun.loading.adapters import load_model

    started = time.monotonic()
    configs = {folder: asked_first(config) for folder, config in configs.items()}
    config = next(iter(configs.values()))
    previous = processes.of_first(lambda: {folder: previous_in(folder, config.overwrite) for folder in configs})
    with processes.first_goes_first():  # before the model: a misspelled file is found before minutes of loading
        reference = None if config.reference is None else read_evaluation(Path(config.reference))
        corpus = load_corpus(config.data)
    adapter, threshold = (None, None) if together else (config.adapter, config.gate_threshold)
    plans = []
    with processes.agreed():
        model = load_model(config.model, adapter, strict=config.strict, gate_threshold=threshold)
        for folder, single in configs.items():
            loaded = model
            if together and single.adapter is not None:
                loaded = with_adapter(model, single)
                loaded.model.unwrap()
            plans.append(make_plan(single, folder, loaded, corpus, previous[folder]))
    results = carry_out(plans, reference, time.monotonic() - started)
    return {str(plan.folder): result for plan, result in zip(plans, results, strict=True)}


def with_adapter(base: Loaded, config: EvaluateConfig) -> Loaded:
    """The base with the GRUN adapter of `config` on it, until it is unwrapped."""
    from grun.loading.adapters import Loaded
    from grun.loading.hashing import adapter_hash
    from grun.method.adapter import find_adapter
    from grun.method.model import GrunModel

    folder = find_adapter(str(config.adapter))
    model = GrunModel.from_pretrained(base.model, folder, strict=config.strict)
    if config.gate_threshold is not None:
        model.gate_threshold = config.gate_threshold
    identity = base.identity | {"adapter": adapter_hash(folder)}
    return Loaded(model, base.tokenizer, model.template or base.template, identity)


def carry_out(plans: Sequence[Plan], reference: tuple[str, Table] | None, loading: float) -> list[dict[str, Any]]:
    """Results of `plans`, whose models share a base; `loading` seconds went before, which they share too."""
    from grun.evaluation.shared_scoring import first_edited

    results: dict[Path, dict[str, Any]] = {}
    for plan in plans:
        if plan.previous is not None:
            results[plan.folder] = _measured_again(plan, plan.previous, reference)
    for tokens in dict.fromkeys(plan.tokens for plan in plans):  # templates may differ
        alike = [plan for plan in plans if plan.tokens == tokens]
        waiting = [plan for plan in alike if plan.previous is None]
        if not waiting:
            continue
        processes.of_first(functools.partial(_begin, waiting))
        started = time.monotonic()
        tables = score_items(
            [plan.subject for plan in waiting],
            waiting[0].tokenizer,
            waiting[0].items,
            waiting[0].config,
            [plan.journals for plan in waiting],
            # Of those that are there already too, so that a kill changes no rounding.
            first=first_edited([plan.subject for plan in alike]),
        )
        scoring = (time.monotonic() - started) / len(waiting)
        answered: dict[tuple[int, ...], Answer] = {}
        for plan, table in zip(waiting, tables, strict=True):
            seconds = {"load": loading / len(plans), "score": scoring}
            results[plan.folder] = _answer_and_write(plan, table, answered, reference, seconds)
    return [results[plan.folder] for plan in plans]


def _begin(plans: Sequence[Plan]) -> None:
    for plan in plans:
        begin(plan.folder, plan.replaces)


def _answer_and_write(
    plan: Plan,
    table: Table,
    answered: dict[tuple[int, ...], Answer],
    reference: tuple[str, Table] | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Answer the questions and write the folder.

    `answered` are answers of earlier adapters to prompts they opened no gate for; those of this one are added.
    """
    started = time.monotonic()
    config = plan.config
    closed = _closed(plan, table)
    known = {prompt: answered[prompt] for prompt in closed if prompt in answered}
    with plan.subject.put_on() as model:
        answers = answer_questions(table, model, plan.tokenizer, plan.sets, plan.items, config, plan.journals, known)
    answered |= {prompt: answers[prompt] for prompt in closed}
    seconds["generate"] = time.monotonic() - started
    return processes.of_first(lambda: _write(plan, table, reference, seconds))


def _write(plan: Plan, table: Table, reference: tuple[str, Table] | None, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the folder, in one process; what evaluation.json then holds."""

    def fill(new: Path) -> dict[str, Any]:
        table.write(new)
        # From what was written, so that the same table gives the same numbers later.
        return measure(Table.read(new), quirks_in_force(plan.config), reference)

    return write_evaluation(plan.folder, _head(plan), fill, seconds | {"total": sum(seconds.values())})


def write_evaluation(
    folder: Path, head: dict[str, Any], fill: Callable[[Path], dict[str, Any]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write a whole folder: files, by `fill` into the folder that it is given, and evaluation.json, which is returned.

    It has `head`, what `fill` returns, and the seconds that were spent.
    """
    with writing(folder), staged(folder, whole=True) as new:
        result = head | fill(new) | {"seconds": {name: round(spent, 3) for name, spent in seconds.items()}}
        result[LISTED] = listing(new)
        write_json(new / EVALUATION_FILE, result)
    return result


def _measured_again(plan: Plan, previous: dict[str, Any], reference: tuple[str, Table] | None) -> dict[str, Any]:
    """The evaluation that is there, with the metrics as they are computed today."""
    tell_found(plan.folder)
    measured = measure(Table.read(plan.folder), quirks_in_force(plan.config), reference)
    kept = {LISTED: previous[LISTED]} if LISTED in previous else {}
    result = {**_head(plan), **kept, **measured, "seconds": previous.get("seconds", {})}
    if result != previous and processes.is_first():
        with taken(plan.folder, adopt=[EVALUATION_FILE]):
            write_json(plan.folder / EVALUATION_FILE, result)
    return result


def tell_found(folder: Path) -> None:
    """Say on stderr that nothing is evaluated again."""
    if processes.is_first():
        print(f"already evaluated: {folder}", file=sys.stderr)


def _head(plan: Plan) -> dict[str, Any]:
    return head_of(plan.config, plan.key, plan.inputs, plan.inputs["template"])


def head_of(
    config: EvaluateConfig, key: str, inputs: dict[str, Any], template: dict[str, Any] | None
) -> dict[str, Any]:
    """What evaluation.json begins with: key, model, adapter, what the result depends on, and where options are from."""
    sources = in_force(config, None if template is None else Template.from_dict(template))
    return {"key": key, "model": config.model.path, "adapter": config.adapter, **inputs, "in_force": sources}


def _closed(plan: Plan, table: Table) -> set[tuple[int, ...]]:
    """Prompts whose answers are the base's: all of its own, and those that no gate opens for.

    Of a design that may open at a later token none.
    """
    if plan.subject.edited is None:
        return {question.prompt_ids for question in questions(plan.sets, plan.items)}
    threshold = plan.subject.threshold
    if threshold is None:
        return set()
    shut = {(record.set, record.index) for record in table.gates if max(record.gates.values()) < threshold}
    return {question.prompt_ids for question in questions(plan.sets, plan.items) if question[:2] in shut}


def read_evaluation(folder: Path) -> tuple[str, Table]:
    """Key and table of an evaluation on disk; RunError if there is none."""
    path = folder / EVALUATION_FILE
    try:
        key = read_record(path, Evaluation, ("key",))["key"]
    except DamagedFile as error:
        raise RunError(
            f"reference={folder}: no evaluation there ({error}); evaluate a model that was never taught the forget set "
            "with output_dir set to that folder first"
        ) from error
    return str(key), Table.read(folder)
