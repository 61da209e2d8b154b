"""A model larger than what a process may have: unlearned by reading its blocks from their files, and loaded whole.

    python benchmarks/streaming.py                      # 4 GiB of weights, 1.5 GiB of addresses
    python benchmarks/streaming.py --blocks 4 --width 256 --cap 0

Two processes run the same `unlearn` on a random Llama in float32: one with `cache.build=stream` under a limit of its
address space (RLIMIT_AS, which counts mapped files and libraries too), one that loads the model, without a limit.
Written are the peaks of both and how far losses and adapters lie apart. Rows are those of the generated corpus.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as files, not installed

ROWS = [f"data.demo.{group}={count}" for group, count in (("forget", 1), ("retain", 2), ("heldout", 1))]
ROWS += ["data.demo.unknown=1", "data.demo.refused=1", "data.demo.questions=2"]
"""2 forget rows and 4 retain rows."""
TRAINING = ["objective=npo", "design=published", "method.rank=4"]
TRAINING += ["train.epochs=8", "train.batch_size=2", "train.save_steps=0"]
SMALL = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
"""Environment in which libraries reserve few addresses ahead."""


def make_model(folder: Path, blocks: int, width: int) -> int:
    """Write a random Llama, its tokenizer and template, a file for each block; bytes of the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from grun.config.options import DataConfig, DemoConfig
    from grun.data.corpus import load_corpus
    from grun.data.templates import TEMPLATES, store
    from grun.data.tokenizer import train_tokenizer

    rows = load_corpus(DataConfig(demo=DemoConfig())).taught(without_forget=False)
    tokenizer = train_tokenizer([f"{row.prompt} {row.completion}" for row in rows], 1000)
    tokenizer.model_max_length = 256
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        dtype="float32", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{number}.safetensors", {})[name] = shape
    torch.manual_seed(0)
    size = 0
    for file, inside in files.items():
        made = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.5 / math.sqrt(shape[1])
            for name, shape in inside.items()
        }
        size += sum(value.nbytes for value in made.values())
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": {n: f for f, inside in files.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    store(TEMPLATES.get("tiny"), folder)
    return size


def child(report: Path, cap: int, arguments: list[str]) -> None:
    """Unlearn within `cap` bytes of addresses (0: no limit), and write what it took."""
    if cap:
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    import transformers  # noqa: F401  # what is imported is no part of the peak above it

    from benchmarks.memory import addresses, peak_of
    from grun.cli import main

    status: list[int] = []
    started = time.monotonic()
    found = peak_of(lambda: status.append(main(["unlearn", *arguments])))
    report.write_text(json.dumps({**found, "addresses": addresses(), "seconds": time.monotonic() - started}))
    sys.exit(status[0])


def run(folder: Path, model: Path, build: str, blocks: int, cap: int) -> dict[str, Any]:
    """What one of the two processes took, its losses and its adapter."""
    from safetensors.torch import load_file

    output, report = folder / build, folder / f"{build}.json"
    arguments = [
        *ROWS, *TRAINING, f"method.blocks=[{blocks - 2},{blocks - 1}]", f"model.path={model}", "model.device=cpu",
        f"output_dir={output}", f"cache.dir={folder / build}-cache", f"cache.build={build}", "overwrite=true",
        "cache.memory_budget=64MiB",
    ]  # fmt: skip
    command = [sys.executable, __file__, "--child", str(report), "--cap", str(cap / 2**30), *arguments]
    done = subprocess.run(command, env={**os.environ, **SMALL}, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"cache.build={build} failed with status {done.returncode}")
    losses = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
    weights = load_file(output / "adapter_model.safetensors")
    return {**json.loads(report.read_text()), "losses": losses, "weights": weights}


def compare(folder: Path, blocks: int, width: int, cap: float) -> dict[str, Any]:
    """Sizes in bytes, seconds and differences of the two runs."""
    size = make_model(folder / "model", blocks, width)
    streamed = run(folder, folder / "model", "stream", blocks, int(cap * 2**30))
    whole = run(folder, folder / "model", "whole", blocks, 0)
    losses = max(abs(a - b) / abs(b) for a, b in zip(streamed["losses"], whole["losses"], strict=True))
    apart = max(
        float((streamed["weights"][name] - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in whole["weights"].items()
    )
    kept = ("addresses", "peak", "peak_anonymous", "seconds")
    sides = {side: {key: of[key] for key in kept} for side, of in (("stream", streamed), ("whole", whole))}
    return {"weights": size, "cap": int(cap * 2**30), **sides, "losses_apart": losses, "adapters_apart": apart}


def main() -> None:
    """Make the model below --folder, run both, print a table; --child is for the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=98)
    parser.add_argument("--width", type=int, default=832, help="hidden size, a multiple of 64")
    parser.add_argument("--cap", type=float, default=1.5, help="GiB of addresses; 0: no limit")
    parser.add_argument("--folder", type=Path, default=Path("streaming"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args, arguments = parser.parse_known_args()
    if args.child is not None:
        child(args.child, int(args.cap * 2**30), arguments)
    found = compare(args.folder, args.blocks, args.width, args.cap)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    print(f"weights {found['weights'] / 2**30:.2f} GiB, limit of addresses {found['cap'] / 2**30:.2f} GiB")
    print("| | peak of addresses | peak resident | of it anonymous | seconds |\n|---|---:|---:|---:|---:|")
    for side in ("stream", "whole"):
        sizes = " | ".join(f"{found[side][key] / 2**20:,.0f} MiB" for key in ("addresses", "peak", "peak_anonymous"))
        print(f"| {side} | {sizes} | {found[side]['seconds']:.0f} |")
    print(f"losses apart by {found['losses_apart']:.1e}, adapters by {found['adapters_apart']:.1e} (relative)")


if __name__ == "__main__":
    main()
