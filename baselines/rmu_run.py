"""A run of `python -m baselines.rmu`: corpora and model to a folder with the result, run.json and log.jsonl."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from baselines.rmu import RmuOptions
from baselines.rmu_task import RmuTask, Topic
from baselines.tensors import check_block, in_float32, named_tensors, numbered_tensors, write_back
from grun.config.options import ModelConfig, TrainConfig
from grun.data import templates
from grun.data.encoding import Batch, EncodedRow, collate
from grun.data.templates import TEMPLATES, Template, encode
from grun.data.texts import load_texts
from grun.loading.changed_tensors import save_changed
from grun.loading.models import context_length, load_base
from grun.method.fingerprint import fingerprint
from grun.method.host import hidden_size_of
from grun.objectives.rmu import control_vector
from grun.runtime.files import content_hash, holding, staged, target, writing
from grun.runtime.memory import enough_memory
from grun.runtime.runs import claim, finish_run, identity, open_run
from grun.training.train import CHECKPOINTS, remove_checkpoints, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

RETAIN_TOKENS = FORGET_TOKENS = 512
LONG_FORGET_TOKENS = 768
"""Longest texts, tokens."""
FIELD_CORPUS = "bio-forget-corpus"
"""The one corpus whose field `text` the published tool reads; of others it takes the raw line."""
DECIDE_NOTHING = ("output_dir", "overwrite", "device", "save_steps")
"""Options that change no result."""
OPTIMIZERS = {"legacy": "legacy_adamw", "torch": "adamw"}


@dataclasses.dataclass(frozen=True)
class Texts:
    """What one topic reads."""

    forget: list[str]
    retain: list[str]


@holding()
def run(options: RmuOptions) -> Path:
    """Unlearn, and return the folder of the result; a finished run of the same options is found, not repeated.

    Raises:
        DataError: a corpus cannot be had, or nothing is left of it.
        ConfigError, ModelError: the model, a block or the choice of tensors does not fit.
        RunError: the folder belongs to another run, or training cannot go on.
    """
    topics = load_topics(options)
    steps = number_of_steps(options, topics)
    if steps < options.max_num_batches:
        asked = options.max_num_batches
        log.info("%d steps: the shortest corpus has no more batches (--max_num_batches %d)", steps, asked)
    base, tokenizer, template = load_base(
        ModelConfig(
            path=options.model_name_or_path,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    )
    check_block(base, options.layer_id, "--layer_id")
    tensors = _chosen(base, options)
    of_base = fingerprint(base)
    folder = target(options.output_dir, "--output_dir")
    decides = {name: value for name, value in dataclasses.asdict(options).items() if name not in DECIDE_NOTHING}
    data = {
        f"{side} {name}": content_hash(getattr(texts, side))
        for side, corpora in (("forget", options.forget_corpora), ("retain", options.retain_corpora))
        for name, texts in zip(corpora, topics, strict=True)
    }
    of_run = identity(decides, base=of_base, data=data)
    state = open_run(folder, of_run, overwrite=options.overwrite)
    if state == "finished":
        log.info("%s holds this very run, finished: nothing to do (--overwrite runs it again)", folder)
        return folder
    controls = [
        control_vector(hidden_size_of(base), coefficient, options.seed, number)
        for number, coefficient in enumerate(options.steering_coeffs)
    ]
    trained = in_float32(tensors) if options.master_dtype == "fp32" else tensors
    count = sum(tensor.numel() for tensor in trained.values())
    log.info("RMU: %d steps, %s trained parameters in %s", steps, f"{count:,}", ", ".join(trained))
    smaller = [f"--batch_size {max(1, options.batch_size // 2)}"]
    with enough_memory("running the untouched model", smaller):
        task = RmuTask(
            base,
            trained,
            [
                Topic(name, *batches(options, number, texts, tokenizer, base, steps), alpha, control)
                for number, (name, texts, alpha, control) in enumerate(
                    zip(options.forget_corpora, topics, options.alpha, controls, strict=True)
                )
            ],
            block=options.layer_id,
            steps=steps,
            loss_mask=options.loss_mask,
            verbose=options.verbose,
        )
    claim(folder, of_run, overwrite=options.overwrite)
    config = TrainConfig(
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer=OPTIMIZERS[options.optimizer],
        schedule="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_steps=options.save_steps,
    )
    result = train(task, config, folder, options.seed, smaller=smaller)
    if trained is not tensors:
        write_back(base, trained)
    with writing(folder), staged(folder) as new:
        _save(new, options, base, tensors, tokenizer, template, of_base)
    finish_run(
        folder,
        {
            "command": "rmu",
            "objective": "rmu",
            "parametrization": "tensors",
            "config": dataclasses.asdict(options),
            "quirks": options.quirks,
            "seed": options.seed,
            "dtype": str(base.dtype).removeprefix("torch."),
            "tensors": list(tensors),
            "control_vectors": [content_hash(control.tolist()) for control in controls],
            "data": data,
            "base_fingerprint": of_base,
            "parameters": {"trained": count, "base": sum(parameter.numel() for parameter in base.parameters())},
            "frozen_bytes": task.frozen_bytes,
            "steps": result.steps,
            "resumed_from": result.resumed_from,
            "seconds": round(result.seconds, 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "device": str(base.device),
        },
        without=None if config.keep_all_checkpoints else CHECKPOINTS,
    )
    remove_checkpoints(folder, config)
    return folder


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
        starts = range(0, len(rows), options.batch_size)
        pieces = (rows[start : start + options.batch_size] for start in starts)
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


def _chosen(base: PreTrainedModel, options: RmuOptions) -> dict[str, nn.Parameter]:
    if options.tensors is not None:
        return named_tensors(base, options.layer_ids, options.tensors)
    return numbered_tensors(base, options.layer_ids, options.param_ids or [])


def _save(
    folder: Path,
    options: RmuOptions,
    base: PreTrainedModel,
    tensors: dict[str, nn.Parameter],
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    of_base: str,
) -> None:
    """The whole model as transformers saves it, with its tokenizer; or the changed tensors."""
    if options.save == "delta":
        changed: dict[str, torch.Tensor] = {name: tensor.detach() for name, tensor in tensors.items()}
        save_changed(folder, changed, base_name=options.model_name_or_path, base_fingerprint=of_base)
        return
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template is not None:
        templates.store(template, folder)
