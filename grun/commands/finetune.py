"""`python -m grun finetune`: plain fine-tuning of all weights on the corpus."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grun.cache.packed import PackedModel
from grun.cache.unpadded import token_logprobs, unpadded
from grun.commands.results import finish_training
from grun.config.options import FinetuneConfig
from grun.config.values import to_dict
from grun.data import templates
from grun.data.augmentation import PromptVariation
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import Batch, EncodedRow, collate, encode_rows
from grun.data.rows import Row, hash_rows
from grun.data.sampling import epoch_order
from grun.errors import DataError
from grun.loading.checks import check
from grun.loading.models import context_length, load_base, place
from grun.loading.stored import TINY
from grun.loading.tiny import build_tiny
from grun.method.fingerprint import fingerprint
from grun.method.plain import run_plain
from grun.method.precision import Masters
from grun.runtime import processes
from grun.runtime.files import content_hash, holding, staged, target, writing
from grun.runtime.runs import claim, identity, is_finished
from grun.training.recomputation import recompute_blocks
from grun.training.task import MicroBatch, Stateless, StepData, Terms, cut
from grun.training.train import train
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)


DATA_SETTINGS = (*templates.OPTIONS, "max_length", "subset")
"""Data options that decide the training, apart from the rows themselves."""
TEACHING_SETTINGS = ("teach", "suffixes", "templates", "few_shot")
"""Those of data.augment."""


class FinetuneTask(Stateless):
    """Cross-entropy of the answers, and weakly of the questions, as a `grun.training.train.Task`.

    The weights are trained as float32 masters, see `grun.method.precision`.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        config: FinetuneConfig,
        pad_id: int,
        vary: Callable[[int, int], EncodedRow] | None = None,
    ) -> None:
        """`config` gives epochs, batch size, micro-batch size, precision, question weight and seed.

        `vary` gives the row that is trained on for a row of an epoch, by its place in `rows`; None: the row itself.
        """
        self.module = model
        self.masters = Masters(model, config.train.precision)
        self.packed: PackedModel | None = None
        """Runs rows without padding; None: the model itself runs them, padded."""
        self._rows = rows
        self._vary = vary or (lambda row, epoch: rows[row])
        self._train = config.train
        self._seed = config.seed
        self._pad_id = pad_id
        self._steps_per_epoch = -(-len(rows) // config.train.batch_size)

    @property
    def steps(self) -> int:
        """Epochs times steps of an epoch."""
        return self._train.epochs * self._steps_per_epoch

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.module.device
        return device

    def data(self, step: int) -> StepData:
        """Rows of the step, sorted by length so that micro-batches have little padding."""
        epoch, within = divmod(step, self._steps_per_epoch)
        size = self._train.batch_size
        chosen = epoch_order(len(self._rows), self._seed, epoch)[within * size : (within + 1) * size]
        rows = sorted((self._vary(index, epoch) for index in chosen), key=len)
        micro_batches: list[MicroBatch] = []
        for piece in cut(rows, self._train.micro_batch_size):
            batch = {"answer": collate(piece, self._pad_id)}
            if self._train.question_weight:
                batch["question"] = _question_labels(batch["answer"])
            micro_batches.append(batch)
        names = micro_batches[0].keys()
        counts = {name: sum(int((batch[name].labels != -100).sum()) for batch in micro_batches) for name in names}
        return StepData(micro_batches, counts, epoch + (within + 1) / self._steps_per_epoch)

    def loss(self, batch: MicroBatch, counts: dict[str, int], step: int) -> tuple[Tensor, Terms]:
        """Token means over the whole step."""
        answer = batch["answer"]
        weights = self._weights(answer)
        if "question" not in batch:
            value = -(weights * self._logprobs(answer)).sum() / max(1, counts["answer"])
            return value, {"answer": value.detach()}
        question = batch["question"]
        everything = Batch(
            answer.input_ids,
            answer.attention_mask,
            torch.where(question.labels != -100, question.labels, answer.labels),
            answer.prompt_lengths,
            answer.encoded,
        )
        logprobs = self._logprobs(everything)  # one pass for both
        in_answer = answer.labels != -100
        of_answer = -(weights * logprobs).masked_fill(~in_answer, 0).sum() / max(1, counts["answer"])
        of_question = -logprobs.masked_fill(in_answer, 0).sum() / max(1, counts["question"])
        total = of_answer + self._train.question_weight * of_question
        return total, {"answer": of_answer.detach(), "question": of_question.detach()}

    def _weights(self, batch: Batch) -> Tensor:
        """Weight of each answer token in the loss, 1 elsewhere: [batch, length]."""
        in_answer = batch.labels != -100
        first = in_answer & (in_answer.cumsum(dim=1) == 1)
        return torch.where(first, self._train.first_token_weight, 1.0)

    def _logprobs(self, batch: Batch) -> Tensor:
        """Log-probability of each labeled token, at least float32, 0 elsewhere: [batch, length]."""
        with self.masters.forward():
            if self.packed is not None:
                return token_logprobs(self.packed, batch)
            return run_plain(self.module, batch).token_logprobs


@processes.connected()
@holding()
def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, and return the folder of the model; one that was made of the same before is found by content hash."""
    check(config)
    with processes.first_goes_first():  # the others find what it downloads
        corpus = load_corpus(config.data)
    run_identity = _identity(config, corpus)
    name = f"{config.label()}-{config.data.subset}-{content_hash(run_identity)[:12]}"
    folder = target(config.output_dir or Path("models") / name)
    if processes.of_first(lambda: is_finished(folder, run_identity, overwrite=config.overwrite)):
        return folder
    with processes.agreed():
        model, tokenizer, template = _start(config, corpus)
        rows, vary = _rows(config, corpus, model, tokenizer, template)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info("teaching %d rows to a model of %s parameters", len(rows), f"{parameters:,}")
    processes.of_first(lambda: claim(folder, run_identity, overwrite=config.overwrite))
    task = FinetuneTask(model, rows, config, int(tokenizer.pad_token_id), vary)
    recompute = config.train.gradient_checkpointing
    if config.train.engine != "plain":
        pad_id, forward = int(tokenizer.pad_token_id), task.masters.forward()
        task.packed = unpadded(model, rows, pad_id, forward, recompute=recompute)
    if recompute:
        recompute_blocks(find_blocks(model)[1])
    result = train(task, config.train, folder, config.seed)
    model.eval()
    of_result = processes.of_first(lambda: _write(folder, model, tokenizer, template, task.masters))
    about = {
        "command": "finetune",
        "data": corpus.hashes(),
        "rows": len(rows),
        "fingerprint": of_result,
        "parameters": {"trained": parameters},
        "engine": "plain" if task.packed is None else "packed",
        "device": str(model.device),
    }
    finish_training(folder, config, template, result, about)
    return folder


def _identity(config: FinetuneConfig, corpus: Corpus) -> dict[str, Any]:
    """What decides the weights: of the options of data only those that change the training."""
    settings = to_dict(config)
    augment = settings["data"]["augment"]
    settings["data"] = {name: settings["data"][name] for name in DATA_SETTINGS}
    if augment["teach"]:
        settings["data"]["augment"] = {name: augment[name] for name in TEACHING_SETTINGS}
    settings.pop("profile")
    taught = _taught(config, corpus)
    found = identity(settings, taught=hash_rows(taught), vocabulary=content_hash(_texts(corpus, config.data.template)))
    for decides_nothing in ("device", "quantization"):  # quantized weights are never fine-tuned
        found["config"]["model"].pop(decides_nothing)
    return found


def _taught(config: FinetuneConfig, corpus: Corpus) -> list[Row]:
    """The rows of the subset that is taught."""
    if config.data.subset == "forget":
        return corpus.forget
    return corpus.taught(without_forget=config.data.subset == "without_forget")


def _rows(
    config: FinetuneConfig, corpus: Corpus, model: Any, tokenizer: Any, template: templates.Template
) -> tuple[list[EncodedRow], Callable[[int, int], EncodedRow] | None]:
    """Rows in tokens, and with `data.augment.teach` how each is asked in each epoch."""
    taught = _taught(config, corpus)
    if not taught:
        raise DataError("there are no rows to train on; name data.retain, or leave data.subset=without_forget out")
    limit = min(config.data.max_length or 2**30, context_length(model))
    rows = encode_rows(taught, tokenizer, template, limit, config.data.strict)
    if not config.data.augment.teach:
        return rows, None
    variation = PromptVariation(config.data.augment, tokenizer, template, limit, taught, config.seed)
    return rows, functools.partial(variation.taught, taught, rows)


def _write(folder: Path, model: Any, tokenizer: Any, template: templates.Template, masters: Masters) -> str:
    """Write the model in the type it came in; its fingerprint."""
    with writing(folder), masters.as_stored():
        of_result = fingerprint(model)
        with staged(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            templates.store(template, new)
    return of_result


def _start(config: FinetuneConfig, corpus: Corpus) -> tuple[Any, Any, templates.Template]:
    if config.model.path == TINY:
        model, tokenizer = build_tiny(config.model.tiny, _texts(corpus, config.data.template), config.seed)
        if config.model.dtype != "auto":
            model.to(getattr(torch, config.model.dtype))
        model = place(model, config.model.device)
        stored = None
    else:
        model, tokenizer, stored = load_base(config.model)
    return model, tokenizer, templates.in_force(config, stored, tokenizer)


def _texts(corpus: Corpus, template: str) -> list[str]:
    """Texts a tokenizer is trained on: the same for every subset, so that models can be compared token by token.

    Answers begin as the template, where it is named, lets them.
    """
    prefix = templates.TEMPLATES.get(template).answer_prefix if template in templates.TEMPLATES else ""
    rows = corpus.taught(without_forget=False)
    return [text for row in rows for text in (row.prompt, prefix + row.completion) if text] + corpus.refusals


def _question_labels(batch: Batch) -> Batch:
    labels = torch.where((batch.labels == -100) & (batch.attention_mask != 0), batch.input_ids, -100)
    labels[:, 0] = -100  # nothing precedes the first token
    return Batch(batch.input_ids, batch.attention_mask, labels, batch.prompt_lengths, batch.encoded)
