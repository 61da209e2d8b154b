"""`python -m grun unlearn`: train a parametrization so that a taught model forgets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from grun import processes, sharding
from grun.checks import check, quirks_in_force
from grun.config import DataConfig, MethodConfig, UnlearnConfig
from grun.data import templates
from grun.data.augmentation import PromptVariation
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import EncodedRow, collate, encode_rows, encode_texts
from grun.data.rows import Row
from grun.data.sampling import epoch_order, fixed_retain_index, retain_index
from grun.data.turns import user_turn_ids
from grun.devices import input_device
from grun.engine import use_cached
from grun.errors import ConfigError, RunError
from grun.files import holding, staged, target, writing
from grun.loading import adapter_hash, context_length, load_base
from grun.method.adapter import CONFIG_FILE, STACK_FILE, WEIGHTS_FILE
from grun.method.fingerprint import fingerprint
from grun.method.gate_pretraining import pretrain_gates
from grun.method.model import resolve_blocks
from grun.method.plain import PlainEngine
from grun.method.store import Use
from grun.micro_batches import MicroBatch, cut
from grun.objectives.presets import Objective, build_objective
from grun.objectives.terms import Continuation, Outputs, number_of
from grun.parametrization import PARAMETRIZATIONS, Engine, Parametrization, is_gated
from grun.profiles import in_force, to_dict
from grun.recomputation import recompute_blocks
from grun.reference import use_reference
from grun.runs import claim, finish_run, identity, open_run
from grun.step_log import Look
from grun.task import StepData
from grun.training import CHECKPOINTS, remove_checkpoints, train
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnlearnRows:
    """Encoded rows, by what they are used for."""

    answers: Sequence[EncodedRow]
    """Forget rows with their answers."""
    refusals: Sequence[EncodedRow]
    """The same prompts, each with a refusal drawn once for the run."""
    retain: Sequence[EncodedRow]


class UnlearnTask:
    """Forget and retain rows, an objective and a parametrization, as a `grun.training.Task`."""

    def __init__(
        self,
        parametrization: Parametrization,
        objective: Objective,
        rows: UnlearnRows,
        config: UnlearnConfig,
        *,
        pad_id: int,
        device: torch.device,
        fixed_pairing: bool = False,
        engine: Engine | None = None,
        depth: int = 0,
    ) -> None:
        """`config` gives epochs, batch size, micro-batch size and seed; the engine is plain where none is given.

        `depth` is the number of the model's blocks, for objectives that read the states of all of them.
        """
        self.module = parametrization.module
        self.device = device
        self.parametrization = parametrization
        self.engine: Engine = engine or PlainEngine(parametrization)
        self._objective = objective
        self._rows = rows
        self._train = config.train
        self._seed = config.seed
        self._pad_id = pad_id
        self._fixed_pairing = fixed_pairing
        self._steps_per_epoch = -(-len(rows.answers) // config.train.batch_size)
        self._distinct: dict[Continuation, list[EncodedRow]] = {}
        self._weights = objective.weights
        self._epochs = 0  # finished before the step at hand
        self.continuations = objective.continuations
        self.reads_head = objective.reads_head
        self.hidden = objective.hidden(depth)
        """Blocks whose outputs the objective reads."""

    @property
    def steps(self) -> int:
        """Epochs times steps of an epoch; the last step of an epoch may be smaller."""
        return self._train.epochs * self._steps_per_epoch

    def data(self, step: int) -> StepData:
        """As many retain rows as forget rows, both drawn as a function of the seed and the step."""
        epoch, within = divmod(step, self._steps_per_epoch)
        order = epoch_order(len(self._rows.answers), self._seed, epoch)
        size = self._train.batch_size
        chosen = order[within * size : (within + 1) * size]
        micro_batches: list[MicroBatch] = [
            self._batches(piece, epoch, step) for piece in cut(chosen, self._train.micro_batch_size)
        ]
        return StepData(micro_batches, self.counts(micro_batches), epoch + (within + 1) / self._steps_per_epoch)

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the terms' shares of this micro-batch in the whole step."""
        objective = self._objective
        compared = {name: batch[name] for name in objective.reference_continuations}
        outputs = Outputs(
            self.engine.run(batch, self.hidden),
            self.engine.reference(compared, self.hidden if objective.reference == "hidden" else ()),
        )
        warmup = objective.warmup(step)
        self._epochs = step // self._steps_per_epoch
        total = torch.zeros((), device=self.device)
        parts: dict[str, float] = {}
        for side, term in objective.terms.items():
            value = term.function(outputs, objective.options[side]).total / max(1, counts[side])
            total = total + self._weights[side] * (1.0 if side == "gate" else warmup) * value
            parts[side] = float(value.detach())
        return total, parts

    def rows(self, name: Continuation) -> list[EncodedRow]:
        """Distinct rows that the whole run reads as `name`."""
        if name not in self._distinct:
            every = range(len(self._rows.answers))
            epochs = range(self._train.epochs if name == "retain" and not self._fixed_pairing else 1)
            found = (self._row(name, index, epoch)[1] for epoch in epochs for index in every)
            self._distinct[name] = list(dict.fromkeys(found))
        return self._distinct[name]

    def stepped(self, parts: dict[str, float]) -> None:
        """Take the weights of the next step; only those of an objective that adapts its retain weight change."""
        self._weights = self._objective.next_weights(self._weights, parts, self._epochs)

    def state(self) -> dict[str, float]:
        """The retain weight where the objective adapts it."""
        return {"retain_weight": self._weights["retain"]} if self._objective.adapts else {}

    def restore(self, state: dict[str, float]) -> None:
        """Take up the retain weight of a checkpoint."""
        if self._objective.adapts:
            self._weights = {**self._weights, "retain": state["retain_weight"]}

    @property
    def reference_rows(self) -> list[EncodedRow]:
        """Distinct rows whose log-probabilities under the untouched model the objective reads."""
        return [row for name in self._objective.reference_continuations for row in self.rows(name)]

    def longest(self, count: int) -> MicroBatch:
        """The longest rows of each kind, `count` at most, to compare engines with."""
        longest = {name: sorted(self.rows(name), key=len)[-count:] for name in self._objective.continuations}
        return {name: collate(rows, self._pad_id, seeds=range(len(rows))) for name, rows in longest.items()}

    def counts(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """Denominators of the terms."""
        return {
            side: sum(
                number_of(term.per, batch[name]) for batch in micro_batches for name in self._objective.counted(side)
            )
            for side, term in self._objective.terms.items()
        }

    def _batches(self, forget_rows: Sequence[int], epoch: int, step: int) -> MicroBatch:
        batches = {}
        for name in self._objective.continuations:
            drawn = [self._row(name, index, epoch) for index in forget_rows]
            seeds = [crc32(f"{self._seed} {step} {name} {number}".encode()) for number, _ in drawn]
            batches[name] = collate([row for _, row in drawn], self._pad_id, seeds=seeds)
        return batches

    def _row(self, name: Continuation, forget_row: int, epoch: int) -> tuple[int, EncodedRow]:
        """Number and row that goes by `name` beside a forget row."""
        if name == "answer":
            return forget_row, self._rows.answers[forget_row]
        if name == "refusal":
            return forget_row, self._rows.refusals[forget_row]
        pool = len(self._rows.retain)
        if self._fixed_pairing:
            number = fixed_retain_index(forget_row, pool)
        else:
            number = retain_index(self._seed, epoch, forget_row, pool)
        return number, self._rows.retain[number]


@processes.connected()
@holding()
def unlearn(config: UnlearnConfig) -> Path:
    """Run `config` and return the folder of the result; a finished run of the same config is found, not repeated."""
    check(config)
    quirks = quirks_in_force(config)
    objective = build_objective(config.objective, config.loss, gated=is_gated(config.method), quirks=quirks)
    parametrization = make_parametrization(config, quirks)  # first: its package may be missing
    with processes.first_goes_first():  # the others find what it downloads
        corpus = load_corpus(config.data)
        _check_rows(corpus, objective)
    folder = target(config.output_dir or f"results/{config.label()}/{config.objective}")
    with processes.agreed():
        base, tokenizer, stored = load_base(config.model)
        template = templates.in_force(config, stored, tokenizer)
    depth = len(find_blocks(base)[1])
    if config.method.blocks is None and config.method.parametrization in ("grun", "reft"):
        sources = config.sources and {**config.sources, "method.blocks": "default"}
        config = replace(config, method=replace(config.method, blocks=resolve_blocks(None, depth)), sources=sources)
    hashes = corpus.hashes()
    run_identity = identity(
        to_dict(config), base=fingerprint(base), data=hashes, template=template.to_dict(), quirks=quirks
    )
    if config.method.beside is not None:
        run_identity["beside"] = adapter_hash(Path(config.method.beside).expanduser())
    state = processes.of_first(lambda: open_run(folder, run_identity, overwrite=config.overwrite))
    if state == "finished":
        log.info("%s holds this very run, finished: nothing to do (overwrite=true runs it again)", folder)
        return folder

    limit = min(config.data.max_length or 2**30, context_length(base))
    with processes.agreed():
        rows = encode_unlearn_rows(corpus, tokenizer, template, limit, config.data, seed=config.seed)
        check_blocks(objective, config.method, depth, later_edits="rmu_hidden_state_index" in quirks)
        in_base = sum(parameter.numel() for parameter in base.parameters())
        torch.manual_seed(config.seed)
        parametrization.prepare(base, template, turn_ids=user_turn_ids(template, tokenizer))
    if config.train.gradient_checkpointing:
        recompute_blocks(find_blocks(base)[1])
    trained = sum(parameter.numel() for _, parameter in parametrization.trainable_parameters())
    log.info(
        "unlearning with %s/%s: %d forget and %d retain rows, %s trained parameters (%.4f %% of the model's)",
        config.method.parametrization, config.objective, len(rows.answers), len(rows.retain), f"{trained:,}",
        100 * trained / in_base,
    )  # fmt: skip
    task = UnlearnTask(
        parametrization,
        objective,
        rows,
        config,
        pad_id=int(tokenizer.pad_token_id),
        device=input_device(base),
        fixed_pairing="retain_fixed_pairing" in quirks,
        depth=depth,
    )
    processes.of_first(lambda: claim(folder, run_identity, overwrite=config.overwrite))
    use, noted = None, _noted(folder, config, hashes)
    if config.train.engine == "cached":
        with processes.agreed():
            use = use_cached(task, config, noted)
    if config.train.gate_pretraining:
        if use is None:
            raise RunError(
                "train.gate_pretraining needs the cached engine, which does not fit this model; leave it out"
            )
        pretrain_gates(use.engine, task.rows("answer"), task.rows("retain"), config.train.gate_pretraining)
    if use is None:
        with processes.agreed():
            pad_id = int(tokenizer.pad_token_id)
            kept = use_reference(task, base, objective.reference, config, pad_id=pad_id, use=noted)
    else:
        kept = use.completed
    reads_base = config.method.parametrization == "full" and kept is None and objective.reference != "none"
    sharding.check_possible(looks=bool(config.train.monitor_epochs), needs_reference=reads_base)
    look = None
    if config.train.monitor_epochs:
        from grun.monitor import Monitor

        monitor = Monitor(
            parametrization.model, tokenizer, template, corpus, rows=config.train.monitor_rows, max_length=limit
        )
        look = Look(monitor.look, config.train.monitor_epochs * task.steps // config.train.epochs)
    result = train(task, config.train, folder, config.seed, look, smaller=_smaller(config))
    with processes.agreed(), writing(folder):
        if processes.is_first():
            with staged(folder) as new:
                parametrization.save(new)
                if not (new / CONFIG_FILE).exists():  # a whole model needs its tokenizer beside it
                    tokenizer.save_pretrained(new)
    finish_run(
        folder,
        {
            "command": "unlearn",
            "profile": config.profile,
            "objective": config.objective,
            "terms": {side: objective.weights[side] for side in objective.terms},
            "parametrization": config.method.parametrization,
            "config": to_dict(config),
            "template": template.to_dict(),
            "in_force": in_force(config, template),
            "quirks": quirks,
            "data": hashes,
            "base_fingerprint": run_identity["base"],
            "parameters": {"trained": trained, "base": in_base},
            "saved_bytes": saved_bytes(folder),
            "engine": task.engine.name,
            "cache": None if kept is None else dataclasses.asdict(kept),
            "steps": result.steps,
            "resumed_from": result.resumed_from,
            "seconds": round(result.seconds + (kept.seconds if kept else 0.0), 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "device": str(base.device),
        },
        without=None if config.train.keep_all_checkpoints else CHECKPOINTS,
    )
    remove_checkpoints(folder, config.train)
    return folder


def _noted(folder: Path, config: UnlearnConfig, hashes: dict[str, str]) -> Use:
    """What a cache notes of this run: a store of requests trains each in its folder `training/ID`."""
    folder = folder.resolve()
    store = folder.parent.parent
    of_store = folder.parent.name == "training" and (store / STACK_FILE).is_file()
    request, stored_in = (folder.name, str(store)) if of_store else (None, None)
    return Use(str(folder), config.model.path, hashes, request, stored_in)


def _smaller(config: UnlearnConfig) -> list[str]:
    """What beside the options of training takes less memory."""
    if config.method.parametrization == "full":
        return ["method.parametrization=lora"]
    return ["model.quantization=4bit"] if config.model.quantization is None else []


def make_parametrization(config: UnlearnConfig, quirks: Sequence[str]) -> Parametrization:
    """New parametrization for `config`; `quirks` are those in force."""
    return PARAMETRIZATIONS.get(config.method.parametrization).make(config, quirks)


def saved_bytes(folder: Path) -> int:
    """Bytes of the weights of a result, an adapter's or a whole model's."""
    found = [*folder.glob(WEIGHTS_FILE), *folder.glob("model*.safetensors")]
    return sum(path.stat().st_size for path in found)


def encode_unlearn_rows(
    corpus: Corpus, tokenizer: Any, template: templates.Template, max_length: int, data: DataConfig, *, seed: int
) -> UnlearnRows:
    """Encode what unlearning uses, copies that ask in other ways behind the rows themselves.

    The refusal of each forget row, where plain texts are cut, and what copies ask depend on `seed`.
    """

    def encoded(name: str, rows: Sequence[Row]) -> list[EncodedRow]:
        if data.text.cut == "whole" or not _are_texts(rows):
            return encode_rows(rows, tokenizer, template, max_length, data.strict)
        texts = [row.completion for row in rows for _ in range(data.text.copies)]
        cuts = [
            Random(f"{seed}/{name}/{number}").uniform(0.5, 1.0) if data.text.cut == "random" else float(data.text.cut)
            for number in range(len(texts))
        ]
        return encode_texts(texts, tokenizer, max_length, cuts)

    forget = encoded("forget", corpus.forget)
    refused: list[EncodedRow] = []
    refusals: list[str] = []
    if not _are_texts(corpus.forget):
        refusals = draw_refusals(corpus, seed)
        refused = encoded(
            "refused", [replace(row, completion=text) for row, text in zip(corpus.forget, refusals, strict=True)]
        )
    vary = PromptVariation(data.augment, tokenizer, template, max_length, corpus.retain, seed)
    answered_copies, refused_copies = vary.copies("forget", corpus.forget, data.augment.forget_copies, refusals)
    kept_copies, _ = vary.copies("retain", corpus.retain, data.augment.retain_copies)
    return UnlearnRows(
        forget + answered_copies, refused + refused_copies, encoded("retain", corpus.retain) + kept_copies
    )


def _are_texts(rows: Sequence[Row]) -> bool:
    """Whether rows are plain texts, which ask nothing."""
    return bool(rows) and all(row.prompt is None for row in rows)


def draw_refusals(corpus: Corpus, seed: int) -> list[str]:
    """One refusal for each forget row: every refusal comes once before any comes twice."""
    return [corpus.refusals[retain_index(seed, 0, index, len(corpus.refusals))] for index in range(len(corpus.forget))]


def _check_rows(corpus: Corpus, objective: Objective) -> None:
    if not corpus.retain and "retain" in objective.continuations:
        raise ConfigError("the retain set is empty, but the objective has a retain or gate term; name data.retain")
    if _are_texts(corpus.forget) and "refusal" in objective.continuations:
        raise ConfigError(
            "the objective answers forget questions with refusals, but the forget set is plain texts; choose another "
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
    if method.parametrization not in ("grun", "reft") or later_edits:
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
