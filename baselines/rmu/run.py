"""A run of `python -m baselines.rmu`: what each topic reads, the task on the model, and what is saved."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines.published import Loaded, Prepared, chosen_tensors, run_published
from baselines.rmu.options import RmuOptions
from baselines.rmu.task import RmuTask, Topic
from baselines.tensors import in_float32, write_back
from grun.config.options import TrainConfig
from grun.data.encoding import Batch, EncodedRow, collate
from grun.data.templates import TEMPLATES, encode
from grun.data.texts import load_texts
from grun.loading.changed_tensors import save_changed
from grun.loading.models import context_length
from grun.method.host import hidden_size_of
from grun.objectives.rmu import control_vector
from grun.runtime.files import content_hash
from grun.training.task import split

log = logging.getLogger(__name__)

RETAIN_TOKENS = FORGET_TOKENS = 512
LONG_FORGET_TOKENS = 768
"""Longest texts, tokens."""
FIELD_CORPUS = "bio-forget-corpus"
"""The one corpus whose field `text` the published tool reads; of others it takes the raw line."""
OPTIMIZERS = {"legacy": "legacy_adamw", "torch": "adamw"}


@dataclasses.dataclass(frozen=True)
class Texts:
    """What one topic reads."""

    forget: list[str]
    retain: list[str]


def run(options: RmuOptions) -> Path:
    """Unlearn, and return the folder of the result; a finished run of the same options is found, not repeated.

    Raises:
        DataError: a corpus cannot be had, or nothing is left of it.
        ConfigError, ModelError: the model, a block or the choice of tensors does not fit.
        RunError: the folder belongs to another run, or training cannot go on.
    """
    topics = load_topics(options)
    if (steps := number_of_steps(options, topics)) < options.max_num_batches:
        asked = options.max_num_batches
        log.info("%d steps: the shortest corpus has no more batches (--max_num_batches %d)", steps, asked)
    data = {
        f"{side} {name}": content_hash(getattr(texts, side))
        for side, corpora in (("forget", options.forget_corpora), ("retain", options.retain_corpora))
        for name, texts in zip(corpora, topics, strict=True)
    }
    training = TrainConfig(
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer=OPTIMIZERS[options.optimizer],
        schedule="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_steps=options.save_steps,
    )
    folder, _ = run_published(
        options,
        training,
        data,
        lambda loaded: _prepare(loaded, options, topics, steps),
        seed=options.seed,
        smaller=[f"--batch_size {max(1, options.batch_size // 2)}"],
    )
    return folder


def _prepare(loaded: Loaded, options: RmuOptions, topics: list[Texts], steps: int) -> Prepared:
    base = loaded.base
    tensors = chosen_tensors(base, options)
    trained = in_float32(tensors) if options.master_dtype == "fp32" else tensors
    count = sum(tensor.numel() for tensor in trained.values())
    log.info("RMU: %d steps, %s trained parameters in %s", steps, f"{count:,}", ", ".join(trained))
    made = []
    for number, (name, texts) in enumerate(zip(options.forget_corpora, topics, strict=True)):
        control = control_vector(hidden_size_of(base), options.steering_coeffs[number], options.seed, number)
        forget, retain = batches(options, number, texts, loaded.tokenizer, base, steps)
        made.append(Topic(name, forget, retain, options.alpha[number], control))
    task = RmuTask(
        base,
        trained,
        made,
        block=options.layer_id,
        steps=steps,
        loss_mask=options.loss_mask,
        verbose=options.verbose,
    )

    def save(folder: Path, log_of_run: Path) -> None:
        """The whole model with its tokenizer, or the changed tensors."""
        if trained is not tensors:
            write_back(base, trained)
        if options.save == "delta":
            changed = {name: tensor.detach() for name, tensor in tensors.items()}
            save_changed(folder, changed, base_name=options.model_name_or_path, base_fingerprint=loaded.fingerprint)
        else:
            loaded.save(folder)

    about = {"command": "rmu", "objective": "rmu", "parametrization": "tensors", "seed": options.seed}
    about |= {"tensors": list(tensors), "frozen_bytes": task.frozen_bytes}
    return Prepared(task, save, {**about, "control_vectors": [content_hash(topic.control.tolist()) for topic in made]})


def load_topics(options: RmuOptions) -> list[Texts]:
    """Texts of each topic, longer than `min_len` characters, in the order of the corpora; DataError if none is left."""

    def texts(name: str) -> list[str]:
        mode = options.jsonl_mode
        if mode == "published":
            mode = "field" if FIELD_CORPUS in name else "raw"
        return load_texts(name, folder=options.data_dir, jsonl=mode, min_characters=options.min_len)

    read = {name: texts(name) for name in dict.fromkeys([*options.forget_corpora, *options.retain_corpora])}
    return [
        Texts(read[forget], read[retain])
        for forget, retain in zip(options.forget_corpora, options.retain_corpora, strict=True)
    ]


def number_of_steps(options: RmuOptions, topics: list[Texts]) -> int:
    """Steps over all topics: no more than the shortest corpus, read `epochs` times, has batches, as published."""
    shortest = min(len(texts) for topic in topics for texts in (topic.forget, topic.retain))
    return min(options.max_num_batches, -(-shortest * options.epochs // options.batch_size))


def batches(
    options: RmuOptions,
    number: int,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    steps: int,
) -> tuple[list[Batch], list[Batch]]:
    """Forget and retain batches that topic `number` uses, in the order of the corpora."""
    used = len(range(number, steps, len(options.forget_corpora)))
    pad_id = tokenizer.eos_token_id if options.pad_token == "eos" else tokenizer.pad_token_id

    def encoded(of_side: list[str], tokens: int) -> list[Batch]:
        limit = min(tokens, context_length(base))
        read = of_side * options.epochs
        rows = [text_row(text, tokenizer, limit) for text in read[: used * options.batch_size]]
        pieces = split(rows, options.batch_size)
        return [collate(piece, int(pad_id), side=options.padding_side) for piece in pieces]

    return encoded(texts.forget, forget_tokens(options, number)), encoded(texts.retain, RETAIN_TOKENS)


def forget_tokens(options: RmuOptions, number: int) -> int:
    """Longest forget text of topic `number`, tokens."""
    name_is_long = "cyber" in options.forget_corpora[number]
    long = number > 0 if options.length_rule == "position" else name_is_long
    return LONG_FORGET_TOKENS if long else FORGET_TOKENS


def text_row(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRow:
    """A whole text, start token in front, no end token; one token is enough, since nothing is predicted."""
    start, rest, _ = encode(TEMPLATES.get("text"), tokenizer, None, text)
    return EncodedRow(tuple([*start, *rest[:-1]][:limit]), ())
