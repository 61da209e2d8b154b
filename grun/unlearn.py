"""`python -m grun unlearn`: train a parametrization so that a taught model forgets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grun.checks import check, quirks_in_force
from grun.config import UnlearnConfig
from grun.data import templates
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import EncodedRow, collate, encode_rows
from grun.data.rows import Row
from grun.data.sampling import epoch_order, fixed_retain_index, retain_index
from grun.errors import ConfigError
from grun.files import writing
from grun.loading import context_length, load_base
from grun.method.adapter import CONFIG_FILE
from grun.method.fingerprint import fingerprint
from grun.objectives.presets import Objective, build_objective
from grun.objectives.terms import Continuation, Outputs, Term
from grun.parametrization import PARAMETRIZATIONS, Parametrization, StepOutput
from grun.profiles import to_dict
from grun.recomputation import recompute_blocks
from grun.runs import claim, finish_run, identity, open_run
from grun.training import Look, MicroBatch, StepData, remove_checkpoints, split, train

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
    ) -> None:
        """`config` gives epochs, batch size, micro-batch size and seed."""
        self.module = parametrization.module
        self.device = device
        self._parametrization = parametrization
        self._objective = objective
        self._rows = rows
        self._train = config.train
        self._seed = config.seed
        self._pad_id = pad_id
        self._fixed_pairing = fixed_pairing
        self._steps_per_epoch = -(-len(rows.answers) // config.train.batch_size)

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
            {name: collate(self._encoded(name, piece, epoch), self._pad_id) for name in self._objective.continuations}
            for piece in split(chosen, self._train.micro_batch_size)
        ]
        counts = {
            side: sum(self._count(term, batch) for batch in micro_batches)
            for side, term in self._objective.terms.items()
        }
        return StepData(micro_batches, counts, epoch + (within + 1) / self._steps_per_epoch)

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the terms' shares of this micro-batch in the whole step."""
        objective = self._objective
        outputs = Outputs(
            {name: self._run(batch, name) for name in objective.continuations},
            self._reference(batch, objective.reference_continuations),
        )
        warmup = objective.warmup(step)
        total = torch.zeros((), device=self.device)
        parts: dict[str, float] = {}
        for side, term in objective.terms.items():
            value = term.function(outputs, objective.options).total / max(1, counts[side])
            total = total + objective.weights[side] * (1.0 if side == "gate" else warmup) * value
            parts[side] = float(value.detach())
        return total, parts

    def _run(self, batch: MicroBatch, name: Continuation) -> StepOutput:
        return self._parametrization.run(batch[name], self._objective.hidden)

    def _reference(self, batch: MicroBatch, names: Sequence[Continuation]) -> dict[Continuation, StepOutput]:
        if not names:
            return {}
        with self._parametrization.reference():
            return {name: self._run(batch, name) for name in names}

    def _encoded(self, name: Continuation, forget_rows: Sequence[int], epoch: int) -> list[EncodedRow]:
        if name == "answer":
            return [self._rows.answers[index] for index in forget_rows]
        if name == "refusal":
            return [self._rows.refusals[index] for index in forget_rows]
        pool = len(self._rows.retain)
        if self._fixed_pairing:
            return [self._rows.retain[fixed_retain_index(index, pool)] for index in forget_rows]
        return [self._rows.retain[retain_index(self._seed, epoch, index, pool)] for index in forget_rows]

    def _count(self, term: Term, batch: MicroBatch) -> int:
        names = self._objective.continuations if term.side == "gate" else term.continuations
        if term.per == "row":
            return sum(batch[name].rows for name in names) if term.side == "gate" else batch[names[0]].rows
        return sum(int((batch[name].labels != -100).sum()) for name in names)


def unlearn(config: UnlearnConfig) -> Path:
    """Run `config` and return the folder of the result; a finished run of the same config is found, not repeated."""
    check(config)
    quirks = quirks_in_force(config)
    gated = config.method.parametrization == "grun" and config.method.gate != "none"
    objective = build_objective(config.objective, config.loss, gated=gated)
    parametrization = make_parametrization(config, quirks)  # first: its package may be missing
    corpus = load_corpus(config.data)
    _check_rows(corpus, objective)
    folder = Path(config.output_dir or f"results/{Path(config.profile).stem}/{config.objective}").expanduser()
    base, tokenizer, stored = load_base(config.model)
    template = templates.resolve(config.data.template, stored, tokenizer, config.data.system_prompt, config.data.date)
    hashes = corpus.hashes()
    run_identity = identity(
        to_dict(config), base=fingerprint(base), data=hashes, template=template.to_dict(), quirks=quirks
    )
    state = open_run(folder, run_identity, overwrite=config.overwrite)
    if state == "finished":
        log.info("%s holds this very run, finished: nothing to do (overwrite=true runs it again)", folder)
        return folder

    limit = min(config.data.max_length or 2**30, context_length(base))
    rows = encode_unlearn_rows(corpus, tokenizer, template, limit, strict=config.data.strict, seed=config.seed)
    torch.manual_seed(config.seed)
    parametrization.prepare(base, template)
    if config.train.gradient_checkpointing:
        recompute_blocks(base)
    trained = sum(parameter.numel() for _, parameter in parametrization.trainable_parameters())
    in_base = sum(parameter.numel() for parameter in base.parameters())
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
        device=base.device,
        fixed_pairing="retain_fixed_pairing" in quirks,
    )
    if state == "new":
        claim(folder, run_identity)
    look = None
    if config.train.monitor_epochs:
        from grun.monitor import Monitor

        monitor = Monitor(
            parametrization.model, tokenizer, template, corpus, rows=config.train.monitor_rows, max_length=limit
        )
        look = Look(monitor.look, config.train.monitor_epochs * task.steps // config.train.epochs)
    result = train(task, config.train, folder, config.seed, look)
    with writing(folder):
        parametrization.save(folder)
        if not (folder / CONFIG_FILE).exists():  # a whole model needs its tokenizer beside it
            tokenizer.save_pretrained(folder)
    finish_run(
        folder,
        {
            "command": "unlearn",
            "profile": config.profile,
            "objective": config.objective,
            "terms": {side: objective.weights[side] for side in objective.terms},
            "parametrization": config.method.parametrization,
            "config": to_dict(config),
            "quirks": quirks,
            "data": hashes,
            "base_fingerprint": run_identity["base"],
            "parameters": {"trained": trained, "base": in_base},
            "steps": result.steps,
            "resumed_from": result.resumed_from,
            "seconds": round(result.seconds, 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "device": str(base.device),
        },
    )
    remove_checkpoints(folder, config.train)
    return folder


def make_parametrization(config: UnlearnConfig, quirks: Sequence[str]) -> Parametrization:
    """New parametrization for `config`."""
    kind: Any = PARAMETRIZATIONS.get(config.method.parametrization)
    options: dict[str, Any] = {}
    if "dropout_on_hidden" in quirks and config.method.parametrization in ("grun", "reft"):
        options["dropout_on_hidden"] = True
    if config.method.parametrization == "full":
        options["precision"] = config.train.precision
    made: Parametrization = kind(config.method, **options)
    return made


def encode_unlearn_rows(
    corpus: Corpus, tokenizer: Any, template: templates.Template, max_length: int, *, strict: bool, seed: int
) -> UnlearnRows:
    """Encode what unlearning uses; the refusal of each forget row is drawn once, as a function of `seed`."""

    def encoded(rows: Sequence[Row]) -> list[EncodedRow]:
        return encode_rows(rows, tokenizer, template, max_length, strict)

    refusals = draw_refusals(corpus, seed)
    refused = [replace(row, completion=text) for row, text in zip(corpus.forget, refusals, strict=True)]
    return UnlearnRows(encoded(corpus.forget), encoded(refused), encoded(corpus.retain))


def draw_refusals(corpus: Corpus, seed: int) -> list[str]:
    """One refusal for each forget row: every refusal comes once before any comes twice."""
    return [corpus.refusals[retain_index(seed, 0, index, len(corpus.refusals))] for index in range(len(corpus.forget))]


def _check_rows(corpus: Corpus, objective: Objective) -> None:
    if not corpus.retain and {"retain", "gate"} & set(objective.terms):
        raise ConfigError("the retain set is empty, but the objective has a retain or gate term; name data.retain")
