"""A run of `python -m baselines.llm360`: corpora and model to a folder with the result, run.json and the logs."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines.llm360.options import FIXED_SEED, METHODS, Llm360Options
from baselines.llm360.task import PairedTask
from baselines.lora import Lora, linear_layers
from baselines.published import Loaded, Prepared, chosen_tensors, run_published
from baselines.rmu.task import RmuTask, Topic
from grun.config.checks import check_train
from grun.config.options import LoraConfig, LossConfig, MethodConfig, TrainConfig
from grun.data.encoding import IGNORED, Batch, collate, encode_texts
from grun.data.texts import load_texts
from grun.errors import ConfigError, DataError
from grun.loading.models import context_length
from grun.method.host import hidden_size_of
from grun.method.plain import run_plain
from grun.objectives.objective import build_objective
from grun.objectives.rmu import control_vector
from grun.runtime.devices import input_device
from grun.runtime.files import content_hash, write_json
from grun.runtime.reading import read_json_lines
from grun.runtime.records import Step
from grun.training.task import split
from pyvene_custom import find_blocks

log = logging.getLogger(__name__)

LORA_RANK, LORA_ALPHA = 32, 16.0
LORA_TARGET = "c_attn"
"""Layer that the published tool puts LoRA on."""
LOG_FILE = "log.json"
"""The published tool's log: three lists with a number for each update."""


def run(options: Llm360Options) -> Path:
    """Unlearn, and return the folder of the result; a finished run of the same options is found, not repeated.

    Raises:
        DataError: a corpus cannot be had, or has too few texts.
        ConfigError, ModelError: the model, a block or the choice of tensors does not fit.
        RunError: the folder belongs to another run, or training cannot go on.
    """
    training = TrainConfig(
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer="schedule_free",
        schedule="constant",
        warmup=float(options.warmup_steps),
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_steps=options.save_steps,
    )
    check_train(training)
    texts = {topic: texts_of(topic, options) for topic in (options.forget_topic, options.retain_topic)}
    folder, is_new = run_published(
        options,
        training,
        {topic: content_hash(found) for topic, found in texts.items()},
        lambda loaded: _prepare(loaded, options, texts),
        seed=options.random_seed,
        smaller=[f"--batch_size {max(1, options.batch_size // 2)}", "--use_lora True", "a smaller --max_len"],
        averaged=options.final_weights == "averaged",
    )
    if is_new and options.use_wandb:
        _send(_steps(folder), folder, options.wandb_project)
    return folder


def _steps(folder: Path) -> list[dict[str, float]]:
    return [line for _, line in read_json_lines(folder / "log.jsonl", Step)]


def _prepare(loaded: Loaded, options: Llm360Options, texts: dict[str, list[str]]) -> Prepared:
    base = loaded.base
    forget, retain = (
        batches_of(texts[topic], loaded.tokenizer, base, options)
        for topic in (options.forget_topic, options.retain_topic)
    )
    torch.manual_seed(options.random_seed)
    lora = _lora(base, options) if options.use_lora else None
    task = make_task(base, lora, forget, retain, options)
    trained = sum(parameter.numel() for parameter in task.module.parameters())
    log.info("%s: %d updates, %s trained parameters", options.unlearn_method, task.steps, f"{trained:,}")
    if left := options.max_unlearn_steps % options.gradient_accumulation_steps:
        log.info("the last %d of %d micro-batches make no update and are dropped", left, options.max_unlearn_steps)

    def save(folder: Path, log_of_run: Path) -> None:
        if lora is None:
            loaded.save(folder)
        else:
            lora.save(folder)
            loaded.save_tokenizer(folder)
        write_json(folder / LOG_FILE, published_log(_steps(log_of_run)))

    kind = "tensors" if options.unlearn_method == "rmu" else "lora" if lora is not None else "full"
    about = {"command": "llm360", "objective": METHODS[options.unlearn_method], "parametrization": kind}
    return Prepared(task, save, about)


def texts_of(topic: str, options: Llm360Options) -> list[str]:
    """The texts that a run uses of a corpus, in the published order, blanks around them removed.

    The corpus is put in the order that `datasets.Dataset.shuffle(seed=42)` gives, whatever the seed of the run.

    Raises:
        DataError: the corpus cannot be had, or has too few texts that are long enough.
    """
    import numpy as np

    every = load_texts(topic, folder=options.data_dir, min_characters=-1)
    order = np.random.default_rng(FIXED_SEED).permutation(len(every))
    long = [every[at] for at in order if len(every[at]) > options.min_len]
    kept = [text.strip() for text in long if text.strip() and len(text.strip()) >= options.min_len]
    kept *= options.epochs
    needed = options.updates * options.gradient_accumulation_steps * options.batch_size
    if len(kept) < needed:
        found = len(kept) // options.epochs
        raise DataError(
            f"{topic} has {found} texts of more than {options.min_len} characters, and {needed} are needed; lower "
            "--max_unlearn_steps, --batch_size or --min_len, raise --epochs, or give a larger corpus"
        )
    return kept[:needed]


def batches_of(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel, options: Llm360Options
) -> list[Batch]:
    """Texts as batches in which every token but the first of each is predicted, padding never.

    With positions=all they are padded on the left, with the end token, to the longest text that is allowed.
    """
    limit = min(options.max_len, context_length(base))
    rows = encode_texts(texts, tokenizer, limit)
    everywhere = options.positions == "all"
    pad_id = int(tokenizer.eos_token_id if everywhere else tokenizer.pad_token_id)
    pieces = split(rows, options.batch_size)
    if not everywhere:
        return [collate(piece, pad_id) for piece in pieces]
    return [_padded(collate(piece, pad_id, side="left"), limit, pad_id) for piece in pieces]


def make_task(
    base: PreTrainedModel, lora: Lora | None, forget: list[Batch], retain: list[Batch], options: Llm360Options
) -> PairedTask | RmuTask:
    """What is trained, and the loss. All weights are, but for rmu and where there is a LoRA."""
    if options.unlearn_method == "rmu":
        return _rmu_task(base, forget, retain, options)
    name, everywhere = METHODS[options.unlearn_method], options.positions == "all"
    quirks = [f"{name}_all_positions"] if everywhere and name != "min_posterior" else []
    seed = options.vector_seed if name == "random_mapping" else None
    if lora is None:
        base.requires_grad_(True)
    return PairedTask(
        base if lora is None else lora.module,
        (lambda batch, hidden: run_plain(base, batch, hidden)) if lora is None else lora.run,
        build_objective(name, LossConfig(control_seed=seed), gated=False, quirks=quirks),
        forget,
        retain,
        device=input_device(base),
        depth=len(find_blocks(base)[1]),
        accumulation=options.gradient_accumulation_steps,
        published=options.accumulation == "published",
    )


def published_log(steps: list[dict[str, float]]) -> dict[str, list[float]]:
    """The lists of the published tool's log, of the lines of log.jsonl."""
    forget, retain = ([step[side] for step in steps] for side in ("forget", "retain"))
    return {"total": [a + b for a, b in zip(forget, retain, strict=True)], "retain": retain, "forget": forget}


def _lora(base: PreTrainedModel, options: Llm360Options) -> Lora:
    """LoRA on `base`, on the layers that are named, else on c_attn, else on all linear layers of attention."""
    targets = options.lora_targets or []
    if not targets:
        layers = list(linear_layers(base))
        attention = [name for name in layers if "attn" in name.lower() or "attention" in name.lower()]
        targets = [LORA_TARGET] if any(name.endswith(f".{LORA_TARGET}") for name in layers) else attention
        if not targets:
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise ConfigError(f"--use_lora: no layer of attention is found by name; name some of {ends} in "
                              "--lora_targets")  # fmt: skip
    made = Lora(MethodConfig(lora=LoraConfig(rank=LORA_RANK, alpha=LORA_ALPHA, dropout=0.0, targets=targets)))
    made.prepare(base, None)
    return made


def _rmu_task(base: PreTrainedModel, forget: list[Batch], retain: list[Batch], options: Llm360Options) -> RmuTask:
    tensors = chosen_tensors(base, options)
    control = control_vector(hidden_size_of(base), options.steering_coeff, options.vector_seed)
    return RmuTask(
        base,
        tensors,
        [Topic(options.forget_topic, forget, retain, options.alpha, control)],
        block=options.layer_id,
        steps=options.updates,
        loss_mask=options.positions,
        accumulation=options.gradient_accumulation_steps,
    )


def _padded(batch: Batch, length: int, pad_id: int) -> Batch:
    """The batch with padding on its left, `length` columns wide."""
    left = (length - batch.input_ids.shape[1], 0)
    return dataclasses.replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, left, value=pad_id),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, left),
        labels=torch.nn.functional.pad(batch.labels, left, value=IGNORED),
    )


def _send(steps: list[dict[str, float]], folder: Path, project: str) -> None:
    if importlib.util.find_spec("wandb") is None:
        log.info("wandb is not installed, so nothing was sent; the log is %s (--use_wandb False)", folder / "log.jsonl")
        return
    import wandb

    try:
        sent = wandb.init(project=project, name=folder.name)
        for step in steps:
            sent.log({name: value for name, value in step.items() if name != "step"}, step=int(step["step"]))
        sent.finish()
    except Exception as error:  # whatever the service raises; the result is saved
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("wandb did not take the log (%s); it is %s", reason, folder / "log.jsonl")
