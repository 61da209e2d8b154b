"""Unlearning as a task of the trainer: forget and retain rows, an objective, a parametrization."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from grun.config.options import DataConfig, UnlearnConfig
from grun.data import templates
from grun.data.augmentation import PromptVariation
from grun.data.corpus import Corpus
from grun.data.encoding import EncodedRow, RowsAlone, collate, encode_rows, encode_texts
from grun.data.rows import Row, are_texts
from grun.data.sampling import epoch_order, fixed_retain_index, retain_index
from grun.errors import ConfigError
from grun.method.parametrization import Engine, Parametrization
from grun.method.plain import PlainEngine
from grun.objectives.objective import Objective
from grun.objectives.terms import Continuation, Outputs
from grun.training.task import MicroBatch, StepData, Terms, cut
from grun.training.teacher import Counterfactual, Teacher

LAID_OUT = 64
"""Steps, of one epoch, that are drawn and laid out at once."""


@dataclass(frozen=True)
class UnlearnRows:
    """Encoded rows, by what they are used for."""

    answers: Sequence[EncodedRow]
    """Forget rows with their answers."""
    refusals: Sequence[EncodedRow]
    """The same prompts, each with a refusal drawn once for the run."""
    retain: Sequence[EncodedRow]
    forget_units: Sequence[str] = ()
    """What each of `answers` belongs to: its row. Empty where no gate is fitted on them."""
    retain_units: Sequence[str] = ()
    """The same of `retain`: its row, or the row's value of the field `data.group`."""
    alternates: Sequence[Sequence[EncodedRow]] = ()
    """For each of `answers` the same prompt with other answers, one or more, for objectives that read them."""
    counterfactuals: Mapping[EncodedRow, Counterfactual] = field(default_factory=dict)
    """How rows of `answers` are asked about others, for objectives with a teacher."""


class UnlearnTask:
    """Forget and retain rows, an objective and a parametrization, as a `grun.training.train.Task`."""

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
        self.objective = objective
        self.teacher = Teacher(rows.counterfactuals, PlainEngine(parametrization), pad_id=pad_id)
        """What `objective` compares with, if it has a teacher; it asks the untouched model anew."""
        self._rows = rows
        self._train = config.train
        self._seed = config.seed
        self._pad_id = pad_id
        self._fixed_pairing = fixed_pairing
        self._steps_per_epoch = -(-len(rows.answers) // config.train.batch_size)
        self._distinct: dict[Continuation, list[EncodedRow]] = {}
        self._drawn: dict[int, StepData] = {}
        self._weights = objective.weights
        self._epochs = 0  # finished before the step at hand
        self.hidden = objective.hidden(depth)
        """Blocks whose outputs the objective reads."""

    @property
    def steps(self) -> int:
        """Epochs times steps of an epoch; the last step of an epoch may be smaller."""
        return self._train.epochs * self._steps_per_epoch

    def data(self, step: int) -> StepData:
        """As many retain rows as forget rows, both drawn as a function of the seed and the step.

        With a step those of its epoch that follow are drawn, and the engine lays them out.
        """
        if step not in self._drawn:
            end = min(step - step % self._steps_per_epoch + self._steps_per_epoch, step + LAID_OUT)
            self._drawn = {number: self._draw(number) for number in range(step, end)}
            batches = [batch for one in self._drawn.values() for batch in one.micro_batches]
            self.engine.lay_out([*batches, *filter(None, map(self._compared, batches))])
        return self._drawn[step]

    def _compared(self, batch: MicroBatch) -> MicroBatch:
        """What of a micro-batch is run under the untouched model too."""
        return {name: batch[name] for name in self.objective.reference_continuations}

    def _draw(self, step: int) -> StepData:
        epoch, within = divmod(step, self._steps_per_epoch)
        order = epoch_order(len(self._rows.answers), self._seed, epoch)
        size = self._train.batch_size
        chosen = order[within * size : (within + 1) * size]
        micro_batches = [self._batches(piece, epoch, step) for piece in cut(chosen, self._train.micro_batch_size)]
        passed = epoch + (within + 1) / self._steps_per_epoch
        return StepData(micro_batches, self.objective.counts(micro_batches), passed)

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, Terms]:
        """Weighted sum of the terms' shares of this micro-batch in the whole step."""
        objective = self.objective
        hidden = self.hidden if objective.reference == "hidden" else ()
        outputs = Outputs(self.engine.run(batch, self.hidden), self.engine.reference(self._compared(batch), hidden))
        if objective.teacher:
            outputs.reference = {**outputs.reference, "answer": self.teacher(batch["answer"])}
        warmup = objective.warmup(step)
        self._epochs = step // self._steps_per_epoch
        shares = []
        parts: Terms = {}
        for side, term in objective.terms.items():
            value = term.function(outputs, objective.options[side]).total / max(1, counts[side])
            shares.append(self._weights[side] * (1.0 if side == "gate" else warmup) * value)
            parts[side] = value.detach()
        return functools.reduce(torch.add, shares), parts

    def rows(self, name: Continuation) -> list[EncodedRow]:
        """Distinct rows that the whole run reads as `name`."""
        if name not in self._distinct:
            every = range(len(self._rows.answers))
            changes = name == "alternate" or (name == "retain" and not self._fixed_pairing)
            epochs = range(self._train.epochs if changes else 1)
            found = (self._row(name, index, epoch)[1] for epoch in epochs for index in every)
            self._distinct[name] = list(dict.fromkeys(found))
        return self._distinct[name]

    def stepped(self, parts: Terms) -> None:
        """Take the weights of the next step; only those of an objective that adapts its retain weight change."""
        self._weights = self.objective.next_weights(self._weights, parts, self._epochs)

    def state(self) -> dict[str, float]:
        """The retain weight where the objective adapts it."""
        return {"retain_weight": self._weights["retain"]} if self.objective.adapts else {}

    def restore(self, state: dict[str, float]) -> None:
        """Take up the retain weight of a checkpoint."""
        if self.objective.adapts:
            self._weights = {**self._weights, "retain": state["retain_weight"]}

    @property
    def reference_rows(self) -> list[EncodedRow]:
        """Distinct rows whose log-probabilities under the untouched model the objective reads."""
        return [row for name in self.objective.reference_continuations for row in self.rows(name)]

    def longest(self, count: int) -> MicroBatch:
        """The longest rows of each kind, `count` at most, to compare engines with."""
        longest = {name: sorted(self.rows(name), key=len)[-count:] for name in self.objective.continuations}
        return {name: collate(rows, self._pad_id, seeds=range(len(rows))) for name, rows in longest.items()}

    def _batches(self, forget_rows: Sequence[int], epoch: int, step: int) -> MicroBatch:
        batches: MicroBatch = {}
        for name in self.objective.continuations:
            drawn = [self._row(name, index, epoch) for index in forget_rows]
            seeds = [crc32(f"{self._seed} {step} {name} {number}".encode()) for number, _ in drawn]
            batches[name] = RowsAlone([row for _, row in drawn], self._pad_id, seeds)
        return batches

    def _row(self, name: Continuation, forget_row: int, epoch: int) -> tuple[int, EncodedRow]:
        """Number and row that goes by `name` with a forget row."""
        if name == "answer":
            return forget_row, self._rows.answers[forget_row]
        if name == "refusal":
            return forget_row, self._rows.refusals[forget_row]
        if name == "alternate":
            several = self._rows.alternates[forget_row]
            return forget_row, several[epoch % len(several)]
        pool = len(self._rows.retain)
        if self._fixed_pairing:
            number = fixed_retain_index(forget_row, pool)
        else:
            number = retain_index(self._seed, epoch, forget_row, pool)
        return number, self._rows.retain[number]


def encode_unlearn_rows(
    corpus: Corpus,
    tokenizer: Any,
    template: templates.Template,
    max_length: int,
    data: DataConfig,
    *,
    seed: int,
    alternates: Sequence[Sequence[str]] = (),
) -> UnlearnRows:
    """Encode what unlearning uses, copies that ask in other ways after the rows themselves.

    The refusal of each forget row, where plain texts are cut, and what copies ask depend on `seed`. `alternates` are as
    many other answers to each forget row.
    """

    def encoded(name: str, rows: Sequence[Row]) -> list[EncodedRow]:
        if data.text.cut == "whole" or not are_texts(rows):
            return encode_rows(rows, tokenizer, template, max_length, data.strict)
        texts = [row.completion for row in rows for _ in range(data.text.copies)]
        cuts = [
            Random(f"{seed}/{name}/{number}").uniform(0.5, 1.0) if data.text.cut == "random" else float(data.text.cut)
            for number in range(len(texts))
        ]
        return encode_texts(texts, tokenizer, max_length, cuts)

    forget = encoded("forget", corpus.forget)

    def instead(name: str, texts: Sequence[str]) -> list[EncodedRow]:
        return encoded(name, [replace(row, completion=text) for row, text in zip(corpus.forget, texts, strict=True)])

    refusals = [] if are_texts(corpus.forget) else draw_refusals(corpus, seed)
    refused = instead("refused", refusals) if refusals else []
    vary = PromptVariation(data.augment, tokenizer, template, max_length, corpus.retain, seed)
    answered_copies, refused_copies, of = vary.copies("forget", corpus.forget, data.augment.forget_copies, refusals)
    others = []
    for texts in zip(*alternates, strict=True):
        answered, with_other, _ = vary.copies("forget", corpus.forget, data.augment.forget_copies, texts)
        others.append(dict(zip([*forget, *answered], [*instead("alternate", texts), *with_other], strict=True)))
    kept_copies, _, of_kept = vary.copies("retain", corpus.retain, data.augment.retain_copies)
    retain = encoded("retain", corpus.retain)
    return UnlearnRows(
        forget + answered_copies,
        refused + refused_copies,
        retain + kept_copies,
        _units(corpus.forget, len(forget), of, None),
        _units(corpus.retain, len(retain), of_kept, data.group),
        # A copy may be too long with an alternate; if it is with all, its own answer stands there.
        [[one[row] for one in others if row in one] or [row] for row in forget + answered_copies] if others else [],
    )


def _units(rows: Sequence[Row], encoded: int, copied: Sequence[int], group: str | None) -> list[str]:
    """What rows that were encoded, and copies of the rows numbered in `copied`, belong to; see `UnlearnRows`."""
    each = encoded // max(1, len(rows))  # a text may be cut in several ways
    units = units_of(rows, group)
    return [units[number] for number in [number for number in range(len(rows)) for _ in range(each)] + list(copied)]


def units_of(rows: Sequence[Row], group: str | None) -> list[str]:
    """What each row belongs to: itself, or its value of the field `group`; ConfigError where a row has none."""
    if group is None:
        return [repr((*row.earlier, row.prompt or row.completion)) for row in rows]
    if without := [number for number, row in enumerate(rows, start=1) if row.extra.get(group) is None]:
        known = ", ".join(sorted({name for row in rows for name in row.extra})) or "no further ones"
        raise ConfigError(f"data.group={group}: retain row {without[0]} has no such field; the rows have {known}")
    return [str(row.extra[group]) for row in rows]


def draw_refusals(corpus: Corpus, seed: int) -> list[str]:
    """One refusal for each forget row: every refusal comes once before any comes twice."""
    return [corpus.refusals[retain_index(seed, 0, index, len(corpus.refusals))] for index in range(len(corpus.forget))]
