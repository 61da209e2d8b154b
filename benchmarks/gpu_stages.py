"""Stages of `benchmarks/gpu.py` beside the published run: the pooled design, fine-tuning, evaluation and attacks."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as files, not installed

import torch

from benchmarks.model import CONTEXT, Text, random_llama, say, synchronize, unlearn_config
from grun.cache.unpadded import unpadded
from grun.commands.finetune import FinetuneTask
from grun.commands.unlearn import prepare, train_and_save
from grun.data import templates
from grun.data.corpus import load_corpus
from grun.data.encoding import encode_rows
from grun.loading.resolve import resolve

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
"""Shape of SmolLM2-135M."""
WARM_UP = 3
"""Steps before those that are timed."""
NEW_TOKENS = 24
"""Longest answer, as in the profile smollm2."""
ALL_ATTACKS = "prompt,decoding,context,read_out,weights"


def pooled(args: argparse.Namespace, config: LlamaConfig, text: Text) -> dict[str, Any]:
    """A whole run of the pooled design: identity of the weights, gate, cache, training."""
    base = random_llama(config, args.seed, getattr(torch, args.dtype), args.device)
    with tempfile.TemporaryDirectory() as folder:
        return _unlearn(args, base, text, Path(folder), save=False)


def _unlearn(
    args: argparse.Namespace, base: PreTrainedModel, text: Text, folder: Path, *, save: bool, epochs: int | None = None
) -> dict[str, Any]:
    """Run the pooled design on `base` into `folder`, in memory alone unless `save`."""
    options = unlearn_config(
        *(
            "design=pooled",
            "loss.retain_weight=null",
            f"objective={args.objective}",
            "cache.memory_budget=64GiB",
            f"seed={args.seed}",
        ),
        *(f"train.epochs={epochs or args.epochs}", "train.save_steps=0"),
    )
    corpus = load_corpus(options.data)
    synchronize(args.device)
    started = time.perf_counter()
    run = prepare(options, corpus, base, text.tokenizer, text.template, folder / "adapter")
    prepared = time.perf_counter() - started
    train_and_save(run, save=save)
    synchronize(args.device)
    seconds = time.perf_counter() - started
    assert run.gate is not None
    say(f"pooled design: {seconds:.1f} s, the gate {run.gate.seconds:.1f} s")
    return {
        "seconds": seconds, "identity_seconds": prepared, "gate_seconds": run.gate.seconds,
        "epochs": options.train.epochs, "forget_rows": len(corpus.forget), "retain_rows": len(corpus.retain),
    }  # fmt: skip


def finetune(args: argparse.Namespace, config: LlamaConfig, text: Text) -> dict[str, Any]:
    """Seconds of a step of all weights on rows one after another, and on padded ones, in turns of one process."""
    options = resolve(
        "finetune",
        [
            *("profile=grun_tofu", "train.micro_batch_size=null", "train.gradient_checkpointing=false"),
            *(f"train.batch_size={args.batch}", f"seed={args.seed}"),
        ],
    )
    corpus = load_corpus(options.data)
    rows = encode_rows(corpus.taught(without_forget=False), text.tokenizer, text.template, CONTEXT, strict=False)
    base = random_llama(config, args.seed, getattr(torch, args.dtype), args.device)
    task = FinetuneTask(base, rows, options, text.pad_id)
    packed = unpadded(base, rows, text.pad_id, task.masters.forward(), recompute=False)
    if packed is None:
        raise SystemExit("rows without padding were refused (see the warning above): there is nothing to measure")
    optimizer = torch.optim.AdamW(base.parameters(), lr=options.train.lr, fused=True)
    base.train()

    def step(number: int) -> float:
        synchronize(args.device)
        started = time.perf_counter()
        data = task.data(number % task.steps)
        for batch in data.micro_batches:
            on_device = {name: part.to(args.device) for name, part in batch.items()}
            task.loss(on_device, data.counts, number)[0].backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(args.device)
        return time.perf_counter() - started

    taken: dict[str, list[float]] = {"packed": [], "padded": []}
    for number in range(WARM_UP + args.steps):
        for name, engine in (("packed", packed), ("padded", None)):
            task.packed = engine
            taken[name].append(step(number))
    seconds = {name: statistics.median(times[WARM_UP:]) for name, times in taken.items()}
    batches = [task.data(number % task.steps).micro_batches for number in range(WARM_UP, WARM_UP + args.steps)]
    real = sum(len(row) for parts in batches for part in parts for row in part["answer"].encoded)
    padded = sum(part["answer"].input_ids.numel() for parts in batches for part in parts)
    return {
        "steps_per_second": 1 / seconds["packed"], "padded_steps_per_second": 1 / seconds["padded"],
        "tokens_per_second": real / args.steps / seconds["packed"], "ratio": seconds["padded"] / seconds["packed"],
        "padding_share": 1 - real / padded, "batch": args.batch, "steps": args.steps, "rows": len(rows),
    }  # fmt: skip


def evaluation(args: argparse.Namespace, config: LlamaConfig, text: Text) -> dict[str, Any]:
    """The table of answers of a pooled adapter."""
    from grun.evaluation.evaluate import evaluate

    with tempfile.TemporaryDirectory() as name:
        arguments = _taught(args, config, text, Path(name))
        started = time.perf_counter()
        result = evaluate(resolve("evaluate", [*arguments, f"data.limit={args.rows}"]), Path(name) / "out")
        seconds = time.perf_counter() - started
    counts = {name: found["rows"] for name, found in result["counts"].items()}
    return {"seconds": seconds, "rows": counts, **{f"{part}_seconds": s for part, s in result["seconds"].items()}}


def attacks(args: argparse.Namespace, config: LlamaConfig, text: Text) -> dict[str, Any]:
    """All attacks on a pooled adapter."""
    from grun.evaluation.suites.base import evaluate_suite
    from grun.runtime.records import ATTACKS_FILE

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        arguments = [*_taught(args, config, text, Path(name)), "suite=attacks", f"attacks=[{ALL_ATTACKS}]"]
        started = time.perf_counter()
        found = evaluate_suite(resolve("evaluate", [*arguments, f"attack_rows={args.rows}"]), out)[str(out)]
        seconds = time.perf_counter() - started
        lines = len((out / ATTACKS_FILE).read_text(encoding="utf-8").splitlines())
    return {
        "seconds": seconds, "load_seconds": found["seconds"]["load"], "measure_seconds": found["seconds"]["measure"],
        "attacks": len(found["attacks"]), "left_out": found["left_out"], "asked": lines, "rows": args.rows,
    }  # fmt: skip


def _taught(args: argparse.Namespace, config: LlamaConfig, text: Text, folder: Path) -> list[str]:
    """Write a random model and a pooled adapter of it; the options that name them."""
    base = random_llama(config, args.seed, getattr(torch, args.dtype), args.device)
    base.save_pretrained(folder / "model")
    text.tokenizer.save_pretrained(folder / "model")
    templates.store(text.template, folder / "model")
    _unlearn(args, base, text, folder, save=True, epochs=1)
    return [
        *(f"model.path={folder / 'model'}", f"adapter={folder / 'adapter'}", f"model.device={args.device}"),
        *("data.name=tofu", "data.forget=forget05", f"batch_size={args.generated}", f"max_new_tokens={NEW_TOKENS}"),
    ]
