"""`python -m grun unlearn`: train a parametrization so that a model forgets."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from grun.cache.cached import CachedEngine
from grun.cache.engine import use_cached
from grun.cache.features import kept_features, kept_fits
from grun.cache.folder import Use
from grun.cache.gate_pretraining import pretrain_gates
from grun.cache.reference import use_reference, use_teacher
from grun.cache.store import Completed
from grun.commands.results import finish_training
from grun.config.checks import quirks_in_force
from grun.config.options import MethodConfig, UnlearnConfig
from grun.config.values import to_dict
from grun.data import templates
from grun.data.augmentation import PromptVariation
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import EncodedRow
from grun.data.follow_ups import conversations
from grun.data.rows import Row, are_texts
from grun.data.templates import user_turn_ids
from grun.errors import ConfigError, RunError
from grun.evaluation.probe import asked_first
from grun.loading.checks import check, objective_of
from grun.loading.hashing import adapter_hash
from grun.loading.models import context_length, load_base
from grun.method.actions import EDIT
from grun.method.adapter import CONFIG_FILE, STACK_FILE, WEIGHTS_FILE
from grun.method.edits import CORRUPT, UNTRAINED
from grun.method.fingerprint import fingerprint
from grun.method.gate import KEYWORDS
from grun.method.gated import Grun
from grun.method.guardrail import Guard
from grun.method.model import resolve_blocks
from grun.method.parametrization import PARAMETRIZATIONS, Learner, Parametrization, traits_of
from grun.method.rules import PROMPT, WINDOWS
from grun.objectives.objective import Objective
from grun.runtime import processes, sharding
from grun.runtime.devices import input_device
from grun.runtime.files import holding, staged, target, writing
from grun.runtime.memory import peak_memory_bytes
from grun.runtime.runs import claim, identity, is_finished
from grun.training.corruption import set_noise
from grun.training.counterfactual import encode_counterfactuals, subjects_of
from grun.training.gate_fit import GateFit, Prompts, fit_gate
from grun.training.gate_prompts import GatePrompts, check_given, collect, copies, read_subjects, sides
from grun.training.keywords import keywords, spelled
from grun.training.recomputation import recompute_blocks
from grun.training.steering import set_vectors
from grun.training.step_log import Look
from grun.training.train import TrainResult, train
from grun.training.unlearning import UnlearnRows, UnlearnTask, encode_unlearn_rows
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)


@dataclass
class Unlearning:
    """One run: what is trained on which rows, and the folder of the result."""

    config: UnlearnConfig
    """With the blocks of this model."""
    quirks: list[str]
    objective: Objective
    parametrization: Parametrization
    corpus: Corpus
    base: Any
    tokenizer: Any
    template: templates.Template
    folder: Path
    identity: dict[str, Any]
    """What decides the result."""
    prompts: GatePrompts = field(default_factory=GatePrompts)
    """What a gate is fitted on besides rows."""
    gate: GateFit | None = None
    """How the gate was fitted; None: it is trained."""
    seconds: float = 0.0
    """Of setting what is not trained, beside the gate."""
    parameters: dict[str, int] = field(default_factory=dict)
    """How many are "trained", and how many the "base" has, once they are counted."""
    finished: bool = False
    """Whether the folder held this very run already, so that nothing was trained."""

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return len(find_blocks(self.base)[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return min(self.config.data.max_length or 2**30, context_length(self.base))


@processes.connected()
@holding()
def unlearn(config: UnlearnConfig) -> Path:
    """Run `config` and return the folder of the result; a finished run of the same config is found, not repeated."""
    check(config)
    make_parametrization(config, quirks_in_force(config))  # first: its package may be missing
    config = asked_first(config)
    with processes.first_goes_first():  # the others find what it downloads
        corpus = load_corpus(config.data)
        check_rows(corpus, config)
    folder = target(config.output_dir or f"results/{config.label()}/{config.objective}")
    with processes.agreed():
        base, tokenizer, stored = load_base(config.model, config)
        run = prepare(config, corpus, base, tokenizer, stored, folder)
    train_and_save(run)
    return folder


def prepare(
    config: UnlearnConfig, corpus: Corpus, base: Any, tokenizer: Any, stored: templates.Template | None, folder: Path
) -> Unlearning:
    """A run on a loaded model; nothing of the model is changed yet.

    Args:
        config: checked; where it names no blocks, the published depths are taken; shares of the depth become numbers.
        corpus: whose forget set is to go; the retain set is to stay.
        base: a transformers model.
        tokenizer: of the model.
        stored: template that belongs to the model; None: it has none.
        folder: of the result.
    """
    template = templates.in_force(config, stored, tokenizer)
    method, sources, depth = config.method, config.sources, len(find_blocks(base)[1])
    if method.action != EDIT:  # which edits none
        method = replace(method, blocks=[])
    elif traits_of(method).edits_blocks:
        if method.blocks is None:
            sources = sources and {**sources, "method.blocks": "default"}
        method = replace(method, blocks=[*resolve_blocks(method.blocks, depth)])
    if method.gate == KEYWORDS:  # which reads none, and remembers whether there was one
        method = replace(method, gate_blocks=[0], gate_pool="max")
    elif method.gate_blocks is not None:
        method = replace(method, gate_blocks=[*resolve_blocks(method.gate_blocks, depth, "gate_blocks")])
    if method.action == EDIT and method.edit == CORRUPT and method.gate_blocks is not None:
        method = replace(method, blocks=method.gate_blocks[-1:], edit_write=PROMPT)
    config = replace(config, method=method, sources=sources)
    quirks = quirks_in_force(config)
    prompts = collect(corpus, config.data) if config.method.gate_fit == "logistic" else GatePrompts()
    data = corpus.hashes() | prompts.hashes()
    run_identity = identity(
        to_dict(config), base=fingerprint(base), data=data, template=template.to_dict(), quirks=quirks
    )
    if config.method.beside is not None:
        run_identity["beside"] = adapter_hash(Path(config.method.beside).expanduser())
    parametrization = make_parametrization(config, quirks)
    return Unlearning(
        config, quirks, objective_of(config), parametrization, corpus, base, tokenizer, template, folder, run_identity,
        prompts,
    )  # fmt: skip


def train_and_save(run: Unlearning, *, save: bool = True) -> None:
    """Train what `run` prepared, or find it finished in its folder; save=False keeps the result in memory only."""
    config, folder = run.config, run.folder
    run.finished = processes.of_first(lambda: is_finished(folder, run.identity, overwrite=config.overwrite))
    if run.finished:
        return
    with processes.agreed():
        task = None
        if traits_of(config.method).untrained:
            _guard(run)
        else:
            task = _task(run)
    processes.of_first(lambda: claim(folder, run.identity, overwrite=config.overwrite))
    completed = None
    if task is None:
        result = TrainResult(0, 0.0, peak_memory_bytes(), 0)
    elif run.gate is not None and not _trains(config.method):
        result = TrainResult(0, run.gate.seconds + run.seconds, peak_memory_bytes(), 0)
    else:
        completed = choose_engine(run, task)
        result = train(task, config.train, folder, config.seed, _look(run, task), smaller=_smaller(config))
        if traits_of(config.method).learns:
            cast(Learner, run.parametrization).take_away()
    if save:
        _save(run, task, completed, result)


def _task(run: Unlearning) -> UnlearnTask:
    """The rows in tokens, and the parametrization on the model, newly initialized."""
    config, base, parametrization = run.config, run.base, run.parametrization
    how = (run.tokenizer, run.template, run.longest, config.data)
    rows = encode_unlearn_rows(run.corpus, *how, seed=config.seed, alternates=_alternates(run))
    if run.objective.teacher:
        rows = replace(rows, counterfactuals=encode_counterfactuals(run.corpus, *how, seed=config.seed))
    if isinstance(parametrization, Grun) and config.method.action != EDIT:
        refusal = templates.encode(run.template, run.tokenizer, templates.PROBE, run.corpus.refusals[0])[1]
        parametrization.answer_ids = refusal
    else:
        check_blocks(run.objective, config.method, run.depth, later_edits="rmu_hidden_state_index" in run.quirks)
    if isinstance(parametrization, Grun) and config.method.gate == KEYWORDS:
        parametrization.keyword_ids = spelled(keywords(config, run.corpus), run.tokenizer)
    run.parameters["base"] = sum(parameter.numel() for parameter in base.parameters())
    torch.manual_seed(config.seed)
    parametrization.prepare(base, run.template, turn_ids=user_turn_ids(run.template, run.tokenizer))
    if config.train.gradient_checkpointing:
        recompute_blocks(find_blocks(base)[1])
    if config.method.gate_fit == "logistic":
        run.gate = _fitted_gate(run, rows)
    if config.method.action == EDIT and config.method.edit in UNTRAINED:
        started, pad_id = time.monotonic(), int(run.tokenizer.pad_token_id)
        if config.method.edit == CORRUPT:
            set_noise(parametrization.model, rows.answers, config.seed, pad_id)
        else:
            set_vectors(parametrization.model, rows.refusals, rows.answers, config.method.steer_strength, pad_id)
        run.seconds = round(time.monotonic() - started, 2)
    parameters = (parameter for _, parameter in parametrization.trainable_parameters() if parameter.requires_grad)
    trained = sum(parameter.numel() for parameter in parameters)
    run.parameters["trained"] = trained
    log.info(
        "unlearning with %s/%s: %d forget and %d retain rows, %s trained parameters (%.4f %% of the model's)",
        config.method.parametrization, config.objective, len(rows.answers), len(rows.retain), f"{trained:,}",
        100 * trained / run.parameters["base"],
    )  # fmt: skip
    return UnlearnTask(
        parametrization,
        run.objective,
        rows,
        config,
        pad_id=int(run.tokenizer.pad_token_id),
        device=input_device(base),
        fixed_pairing="retain_fixed_pairing" in run.quirks,
        depth=run.depth,
    )


def _alternates(run: Unlearning) -> list[list[str]]:
    """Other answers of the model to forget rows, if the objective reads them."""
    if "alternate" not in run.objective.continuations:
        return []
    from grun.evaluation.alternates import draw_alternates

    config, asked = run.config, (run.tokenizer, run.template, run.corpus.forget)
    return draw_alternates(run.base, *asked, count=config.data.alternates, seed=config.seed)


def _guard(run: Unlearning) -> None:
    """Put a guardrail around the model; the run's template is then the guarded one."""
    guard = run.parametrization
    assert isinstance(guard, Guard)
    guard.read(run.corpus, read_subjects(run.config.data.subjects))
    guard.prepare(run.base, run.template)
    run.template = guard.template
    run.parameters |= {"base": sum(parameter.numel() for parameter in run.base.parameters()), "trained": 0}
    asked = max(run.corpus.forget, key=lambda row: len(row.prompt or ""))
    taken = len(templates.encode_prompt(run.template, run.tokenizer, asked.prompt, asked.earlier))
    if taken >= run.longest:
        raise ConfigError(
            f"method.parametrization={run.config.method.parametrization}: a question then takes {taken} tokens, and a "
            f"row has {run.longest} at most; lower method.guardrail.examples, or give a shorter method.guardrail.text"
        )


def _fitted_gate(run: Unlearning, rows: UnlearnRows) -> GateFit:
    """Fit the gate for all edits."""
    forget, retain = gate_prompts(run, rows)
    model = run.parametrization.model
    counts = {f"{side}_{source}": count for side, source, count in run.prompts.counts(_of_gate(run, rows))}
    read, keep = kept_features(model, run.config, _noted(run)), kept_fits(model, run.config, _noted(run))
    fitted = fit_gate(model, forget, retain, run.config.method, read, _second_turns(run), keep)
    return replace(fitted, sources=counts)


def gate_prompts(run: Unlearning, rows: UnlearnRows) -> tuple[Prompts, Prompts]:
    """What a gate is fitted to open on, and to stay shut on: prompts of rows, and prompts without answers."""
    forget, retain = sides(_of_gate(run, rows), run.prompts, lambda row: _prompt(run, row))
    if run.config.data.gate_copies:
        more = _gate_copies(run, rows)
        forget, retain = forget.with_copies(more[0]), retain.with_copies(more[1])
    return forget, replace(retain, always=[*retain.always, *_bare_starts(run)])


def _prompt(run: Unlearning, row: Row) -> EncodedRow | None:
    """The prompt of a row; None where it is longer than a row may be."""
    ids = templates.encode_prompt(run.template, run.tokenizer, row.prompt, row.earlier)
    return EncodedRow(tuple(ids), ()) if len(ids) <= run.longest else None


def _second_turns(run: Unlearning) -> tuple[Prompts, Prompts] | None:
    """Turns that only ask for an answer, and others; None for a gate that reads one turn, or knows none."""
    if run.config.method.gate_pool != WINDOWS or not run.parametrization.model.config.reset_ids:
        return None
    asked = (row for side in (run.prompts.forget, run.prompts.retain) for source in side.values() for row, _ in source)
    found = []
    for made in conversations([*run.corpus.forget, *run.corpus.retain, *asked, *run.prompts.always]):
        known = [(prompt, unit) for row, unit in made if (prompt := _prompt(run, row)) is not None]
        found.append(Prompts([prompt for prompt, _ in known], [unit for _, unit in known]))
    return found[0], found[1]


def _of_gate(run: Unlearning, rows: UnlearnRows) -> UnlearnRows:
    """Rows that a gate is fitted on: `data.gate_copies` take the place of copies of questions, which stand last."""
    if not run.config.data.gate_copies:
        return rows
    forget, retain = (None if are_texts(own) else len(own) for own in (run.corpus.forget, run.corpus.retain))
    return replace(
        rows, answers=rows.answers[:forget], forget_units=rows.forget_units[:forget],
        retain=rows.retain[:retain], retain_units=rows.retain_units[:retain],
    )  # fmt: skip


def _gate_copies(run: Unlearning, rows: UnlearnRows) -> tuple[Prompts, Prompts]:
    """Copies of both sides that `data.gate_copies` names."""
    data, examples = run.config.data, sorted(run.corpus.retain, key=lambda row: (row.prompt or "", row.completion))
    vary = PromptVariation(data.augment, run.tokenizer, run.template, run.longest, examples, run.config.seed)
    return copies(run.corpus, rows, run.prompts, vary, data.gate_copies)


def _bare_starts(run: Unlearning) -> list[EncodedRow]:
    """First tokens of what is to stay, without a template: where plain text begins, the gate stays shut."""
    rows = (*run.corpus.retain, *run.prompts.shut)
    texts = dict.fromkeys(str(row.prompt).split(maxsplit=1)[0] for row in rows if row.prompt and row.prompt.strip())
    ids = (run.tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in texts)
    return [EncodedRow(start, ()) for start in dict.fromkeys(map(tuple, ids)) if start]


def choose_engine(run: Unlearning, task: UnlearnTask) -> Completed | None:
    """Give `task` the cached engine, or else stored references of the untouched model; what was kept, None: nothing.

    A teacher's predictions are stored with either.
    """
    config, base, reference = run.config, run.base, run.objective.reference
    completed, noted = None, _noted(run)
    pad_id = int(run.tokenizer.pad_token_id)
    with processes.agreed():
        taught = use_teacher(task, base, config, pad_id=pad_id, use=noted)
    if config.train.engine == "cached":
        with processes.agreed():
            completed = use_cached(task, config, noted)
    if config.train.gate_pretraining:
        if not isinstance(task.engine, CachedEngine):
            raise RunError(
                "train.gate_pretraining needs the cached engine, which does not fit this model; leave it out"
            )
        asked = run.objective.continuations[0]  # of forget rows; idk reads no answer, and keeps no states of any
        pretrain_gates(task.engine, task.rows(asked), task.rows("retain"), config.train.gate_pretraining)
    if completed is None:
        with processes.agreed():
            completed = use_reference(task, base, reference, config, pad_id=pad_id, use=noted)
    runs_base = (completed is None and reference != "none") or (taught is None and run.objective.teacher)
    traits = traits_of(config.method)
    reads_base = traits.learns or (traits.changes_weights and runs_base)
    sharding.check_possible(looks=bool(config.train.monitor_epochs), needs_reference=reads_base)
    return completed if taught is None else taught if completed is None else taught + completed


def _look(run: Unlearning, task: UnlearnTask) -> Look | None:
    """What is looked at from time to time, if `train.monitor_epochs` asks for it."""
    options = run.config.train
    if not options.monitor_epochs or traits_of(run.config.method).learns:  # what is seen then is the opposite
        return None
    from grun.evaluation.monitor import Monitor

    monitor = Monitor(
        run.parametrization.model,
        run.tokenizer,
        run.template,
        run.corpus,
        rows=options.monitor_rows,
        max_length=run.longest,
    )
    return Look(monitor.look, options.monitor_epochs * task.steps // options.epochs)


def _save(run: Unlearning, task: UnlearnTask | None, completed: Completed | None, result: TrainResult) -> None:
    """Write the adapter or the model, and run.json, which marks the folder as complete."""
    config, folder, objective = run.config, run.folder, run.objective
    is_trained = task is not None and _trains(config.method)
    action = config.method.edit if config.method.action == EDIT else config.method.action
    unnamed = task is None or traits_of(config.method).learns
    with processes.agreed(), writing(folder):
        if processes.is_first():
            with staged(folder) as new:
                run.parametrization.save(new)
                if not (new / CONFIG_FILE).exists():  # a whole model needs its tokenizer
                    run.tokenizer.save_pretrained(new)
    about = {
        "command": "unlearn",
        "objective": None if unnamed else config.objective if is_trained else action,
        "terms": {side: objective.weights[side] for side in objective.terms} if is_trained else {},
        "parametrization": config.method.parametrization,
        "quirks": run.quirks,
        "data": run.identity["data"],
        "base_fingerprint": run.identity["base"],
        "parameters": {name: run.parameters[name] for name in ("trained", "base")},
        **({} if run.gate is None else {"gate_fit": dataclasses.asdict(run.gate)}),
        "saved_bytes": saved_bytes(folder),
        "engine": None if task is None else task.engine.name,
        "cache": None if completed is None else dataclasses.asdict(completed),
        "device": str(run.base.device),
    }
    finish_training(folder, config, run.template, result, about, before=completed.seconds if completed else 0.0)


def _trains(method: MethodConfig) -> bool:
    """Whether anything is trained beside a gate."""
    return method.action == EDIT and method.edit not in UNTRAINED


def _noted(run: Unlearning) -> Use:
    """What a cache notes of this run: a store of requests trains each in its folder `training/ID`."""
    folder = run.folder.resolve()
    store = folder.parent.parent
    of_store = folder.parent.name == "training" and (store / STACK_FILE).is_file()
    request, stored_in = (folder.name, str(store)) if of_store else (None, None)
    return Use(str(folder), run.config.model.path, run.identity["data"], request, stored_in)


def _smaller(config: UnlearnConfig) -> list[str]:
    """Other options than those of training that take less memory."""
    if traits_of(config.method).changes_weights:
        return ["method.parametrization=lora"]
    return ["model.quantization=4bit"] if config.model.quantization is None else []


def make_parametrization(config: UnlearnConfig, quirks: Sequence[str]) -> Parametrization:
    """New parametrization for `config`; `quirks` are those in force."""
    return PARAMETRIZATIONS.get(config.method.parametrization).make(config, quirks)


def saved_bytes(folder: Path) -> int:
    """Bytes of the weights of a result, an adapter's or a whole model's."""
    found = [*folder.glob(WEIGHTS_FILE), *folder.glob("model*.safetensors")]
    return sum(path.stat().st_size for path in found)


def check_rows(corpus: Corpus, config: UnlearnConfig) -> None:
    """ConfigError where the corpus lacks what a term of the objective, or a gate that is fitted, reads.

    DataError for files of prompts that cannot be read.
    """
    objective, data = objective_of(config), config.data
    if traits_of(config.method).untrained:
        if are_texts(corpus.forget):
            raise ConfigError(
                "guardrails stand before questions, and the forget set is plain texts; give rows of questions"
            )
        return
    fitted = config.method.gate_fit == "logistic"
    if not corpus.retain and "retain" in objective.continuations:
        raise ConfigError(
            "there are no retain rows, but a retain or gate term reads them; name data.retain, or take a gate that is "
            "fitted (design=pooled, no loss.retain) with data.subjects or data.gate_negatives"
        )
    if fitted and not (corpus.retain or corpus.retain_prompts or data.subjects or data.gate_negatives):
        raise ConfigError(
            "a gate is fitted, and nothing says where it stays shut: give retain rows (data.retain), names of what is "
            "to be forgotten (data.subjects), or a file of other prompts (data.gate_negatives)"
        )
    if fitted and are_texts(corpus.forget):
        raise ConfigError(
            "a gate that is fitted is asked at the end of a question, and the forget set is plain texts: set "
            "design=published, or give rows with questions"
        )
    check_given(data)
    if config.method.gate == KEYWORDS:
        keywords(config, corpus)
    if objective.teacher and are_texts(corpus.forget):
        raise ConfigError(
            "objective=counterfactual asks forget questions about others, but the forget set is plain texts; choose "
            "another objective (rmu, npo, max_entropy), or give rows with questions"
        )
    if objective.teacher:
        subjects_of(corpus, data)
    if fitted and not corpus.retain and data.augment.forget_copies and not data.gate_copies:
        raise ConfigError("there are no retain rows to copy; set data.augment.forget_copies and retain_copies to 0")
    if are_texts(corpus.forget) and {"refusal", "alternate"} & {*objective.continuations}:
        raise ConfigError(
            "the objective gives forget questions other answers, but the forget set is plain texts; choose another "
            "objective (rmu, npo, max_entropy), or give rows with questions"
        )
    if not corpus.refusals and "refusal" in objective.continuations:
        raise ConfigError("there are no refusals, but the objective has a term that reads them; name data.refusals")


def check_blocks(objective: Objective, method: MethodConfig, depth: int, *, later_edits: bool) -> None:
    """ConfigError for a state that no block has, for edits that none of the states read can train.

    Args:
        objective: its terms may read states of blocks.
        method: its edits may lie above those.
        depth: the model's blocks.
        later_edits: let edits stay that nothing trains, as published.
    """
    states = objective.hidden(depth)
    if not states:
        return
    if max(states) >= depth:
        raise ConfigError(
            f"loss.rmu_block: the objective reads the output of block {max(states)}, but the model has {depth} blocks, "
            f"0 to {depth - 1}"
        )
    if later_edits or not traits_of(method).edits_blocks:
        return
    blocks = resolve_blocks(method.blocks, depth)
    if min(blocks) > max(states):
        raise ConfigError(
            f"method.blocks={method.blocks}: the objective reads the output of block {max(states)}, which no edit "
            "changes; raise loss.rmu_block or edit that block or one below"
        )
    if max(blocks) > max(states) and not objective.reads_head:
        raise ConfigError(
            f"method.blocks={method.blocks}: the objective reads the output of block {max(states)}, so the edit at "
            f"block {max(blocks)} would stay untrained; raise loss.rmu_block or leave that block out"
        )
