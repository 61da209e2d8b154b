"""A whole forget05 run at the shape of Llama-3.1-8B on one GPU: random weights in bfloat16, TOFU's real text.

    GRUN_TOFU_DIR=folder/of/TOFU python benchmarks/gpu.py [--json FILE]
    GRUN_TOFU_DIR=folder/of/TOFU python benchmarks/gpu.py --device cpu --shape tiny --epochs 1     # the code path alone

The run is that of `python -m grun unlearn`: cache, then the trainer. Token ids are those of a tokenizer of 8,192 words
trained on TOFU, since the model's own is not at hand: lengths are near Llama's, the head has its 128,256 rows. The
plain engine (whole padded rows through the hooked model) is timed for a few steps and scaled to the run. The floor is
the time that the counted multiply-adds of linear layers and head take at the rate of a large product on this device.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

import torch

from benchmarks import gpu_stages
from benchmarks.gpu_stages import SMOLLM2
from benchmarks.model import (
    Text,
    load_text,
    matmul_rate,
    print_table,
    random_llama,
    say,
    synchronize,
    unlearn_config,
    write_rows,
)
from benchmarks.sides import Side
from grun.config.options import UnlearnConfig
from grun.config.values import describe
from grun.errors import GrunError
from grun.training.train import train

if TYPE_CHECKING:
    from transformers import LlamaConfig

VOCABULARY = 8192
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    },
}  # fmt: skip
BLOCKS = {"8b": [20, 25, 31], "tiny": [5, 6, 7]}
RATE_SIZE = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the product that the device's rate is measured with."""


@dataclass(frozen=True)
class Stage:
    """One measurement."""

    limit: int
    """Seconds after which its process is ended; of all together less than five minutes."""
    run: Callable[[argparse.Namespace, LlamaConfig, Text], dict[str, Any]]
    """Its figures, from the options, the shape and the text."""
    small: bool = True
    """Of SmolLM2's shape; else of the shape that `--shape` names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages, each in a process of its own, and print and write what comes."""
    args = parse(arguments)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is there; --device cpu --shape tiny runs the same code")
    if args.stage is not None:
        write_rows(args.json, [run_stage(args)])
        return
    unknown = [name for name in args.stages.split(",") if name not in STAGES]
    if unknown:
        raise SystemExit(f"--stages: there is no stage {unknown[0]}; there are {', '.join(STAGES)}")
    given, rows = list(sys.argv[1:] if arguments is None else arguments), []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.stages.split(","):
            rows.append(in_process(name, given, args.limit or STAGES[name].limit, Path(folder) / f"{name}.json"))
            print_table(f"{name}: {rows[-1].get('device', args.device)}", ("what", "value", "note"), lines(rows[-1]))
            write_rows(args.json, rows)
    if any("failed" in row for row in rows):
        raise SystemExit("a stage failed")


def in_process(name: str, given: Sequence[str], limit: float, file: Path) -> dict[str, Any]:
    """Figures of a stage that was run by itself; of one that fails, or is not done in time, why."""
    started = time.perf_counter()
    command = [sys.executable, __file__, *given, "--stage", name, "--json", str(file)]
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return {"stage": name, "failed": f"not done within {limit:g} s"}
    if code or not file.is_file():
        return {"stage": name, "failed": f"ended with status {code}; its own lines say why"}
    (row,) = json.loads(file.read_text(encoding="utf-8"))
    return {**row, "process_seconds": round(time.perf_counter() - started, 3)}


def run_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one stage, with the device's name and its peak memory."""
    stage, device = STAGES[args.stage], torch.device(args.device)
    text = load_text(VOCABULARY)
    shape = "smollm2" if stage.small and args.shape != "tiny" else args.shape
    reset_peak(device)
    row = stage.run(args, llama_config(shape, text), text)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"stage": args.stage, "device": name, "torch": torch.__version__, "shape": shape, "dtype": args.dtype}
    return {**about, "peak_gib": peak(device), **row}


def lines(row: dict[str, Any]) -> list[list[str]]:
    """Lines of a stage's table."""
    if row["stage"] == "published" and "failed" not in row:
        return table(row)
    known = ("stage", "device")
    return [
        [name, f"{value:.3f}" if isinstance(value, float) else str(value), ""]
        for name, value in row.items()
        if name not in known
    ]


def published(args: argparse.Namespace, shape: LlamaConfig, text: Text) -> dict[str, Any]:
    """The run with the cached engine, then some steps with the plain one."""
    device = torch.device(args.device)
    dtype: torch.dtype = getattr(torch, args.dtype)
    config = options(args)
    rows = text.rows(config)
    say(f"model of shape {args.shape}, random, on {device}")
    base = random_llama(shape, args.seed, dtype, device)
    rate = matmul_rate(device, dtype, RATE_SIZE.get(device.type, 1024))
    model_bytes = sum(parameter.nbytes for parameter in base.parameters())

    side = Side(base, text, rows, config)
    counted = side.multiply_adds(base, range(side.task.steps))
    floor = {"run": 2 * (counted.cached + counted.build), "plain": 2 * counted.plain}
    say(f"floor of the run {floor['run'] / rate / 2:.1f} s, of the plain one {floor['plain'] / rate / 2:.1f} s")
    reset_peak(device)
    use = side.use_cache()
    peaks = [peak(device)]
    say(f"cache of {use.completed.rows} rows in {use.seconds:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        trained = train(side.task, config.train, Path(folder), config.seed)  # resets the peak itself
    synchronize(device)
    peaks.append(peak(device))
    say(f"{trained.steps} steps in {trained.seconds:.1f} s")

    reset_peak(device)
    plain = Side(base, text, rows, config)
    plain.step(0)
    taken = [plain.step(number % plain.task.steps) for number in range(1, 1 + args.plain_steps)]
    total, plain_total = use.seconds + trained.seconds, statistics.fmean(taken) * trained.steps
    of_rows, computed = tokens(side)
    return {
        "objective": args.objective, "epochs": args.epochs, "retain_pool": args.retain_pool,
        "offload": args.offload, "seconds": round(total, 3),
        "cache": use.describe(), "training_seconds": round(trained.seconds, 3), "steps": trained.steps,
        "steps_per_second": trained.steps / trained.seconds, "row_tokens_per_second": of_rows / trained.seconds,
        "computed_tokens_per_second": computed / trained.seconds, "mean_row_tokens": of_rows / row_count(side),
        "peak_gib": max(peaks), "peak_build_gib": peaks[0], "peak_training_gib": peaks[1],
        "model_gib": model_bytes / 2**30, "flop": floor, "matmul_flop_per_second": 2 * rate,
        "floor_seconds": floor["run"] / rate / 2, "plain_floor_seconds": floor["plain"] / rate / 2,
        "plain_steps": len(taken), "plain_step_seconds": statistics.fmean(taken), "plain_seconds": plain_total,
        "plain_peak_gib": peak(device), "ratio": plain_total / total,
        "ceiling": counted.plain / (counted.cached + counted.build),
    }  # fmt: skip


def options(args: argparse.Namespace) -> UnlearnConfig:
    """The published settings with the options of this command; the cache is held in memory."""
    pool = "null" if args.retain_pool == "all" else args.retain_pool
    return unlearn_config(
        f"objective={args.objective}",
        f"method.blocks={BLOCKS[args.shape]}",
        f"data.retain_pool={pool}",
        f"train.epochs={args.epochs}",
        "cache.memory_budget=64GiB",
        f"seed={args.seed}",
        *([f"{offload_option()}=true"] if args.offload else []),
    )


def offload_option() -> str:
    """Name of the option that moves what training does not need off the device."""
    for key, _, _ in describe(UnlearnConfig):
        if key.rpartition(".")[2] == "offload":
            return key
    raise SystemExit("--offload: this version of grun has no such option")


def llama_config(shape: str, text: Text) -> LlamaConfig:
    """Llama-3.1's own settings, in the size of `shape`, or SmolLM2's shape."""
    from transformers import LlamaConfig

    sizes = SMOLLM2 if shape == "smollm2" else {**SHAPES[shape], "tie_word_embeddings": False}
    return LlamaConfig(
        **sizes,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=text.tokenizer.bos_token_id,
        eos_token_id=text.tokenizer.eos_token_id,
        pad_token_id=text.pad_id,
    )


def tokens(side: Side) -> tuple[int, int]:
    """Tokens of all rows that the run's steps read, and those of them that the cached engine runs."""
    whole = computed = 0
    for number in range(side.task.steps):
        for batches in side.task.data(number).micro_batches:
            rows = [row for batch in batches.values() for row in batch.encoded]
            whole += sum(map(len, rows))
            computed += sum(len(row.answer_ids) for row in rows)
    return whole, computed


def row_count(side: Side) -> int:
    """Rows that the run's steps read, with repetition."""
    steps = range(side.task.steps)
    return sum(batch.rows for n in steps for part in side.task.data(n).micro_batches for batch in part.values())


def table(row: dict[str, Any]) -> list[list[str]]:
    """Lines of the published run's table."""
    cache = row["cache"]
    build = f"{cache['rows']} rows, {cache['rows_per_second']:.0f}/s, {cache['bytes_per_row'] / 1e6:.2f} MB each"
    checks = cache["seconds"] - cache["build_seconds"]
    peaks = f"model {row['model_gib']:.2f}, build {row['peak_build_gib']:.2f}, training {row['peak_training_gib']:.2f}"
    found = [
        ["whole run", f"{row['seconds']:.1f}", "s", f"floor {row['floor_seconds']:.1f} s"],
        ["cache build", f"{cache['build_seconds']:.1f}", "s", build],
        ["checks before", f"{checks:.1f}", "s", "comparison with the plain engine, identity of the weights"],
        ["training", f"{row['training_seconds']:.1f}", "s", f"{row['steps']} steps, trainer and checkpoints included"],
        ["steps", f"{row['steps_per_second']:.2f}", "/s", ""],
        ["tokens of rows", f"{row['row_tokens_per_second']:.0f}", "/s", f"{row['mean_row_tokens']:.1f} in a mean row"],
        ["tokens computed", f"{row['computed_tokens_per_second']:.0f}", "/s", "last prompt token and answer"],
        ["peak memory", f"{row['peak_gib']:.2f}", "GiB", peaks],
        ["plain step", f"{row['plain_step_seconds']:.2f}", "s", f"mean of {row['plain_steps']}"],
        ["plain run", f"{row['plain_seconds']:.1f}", "s", f"scaled; floor {row['plain_floor_seconds']:.1f} s"],
        ["plain peak memory", f"{row['plain_peak_gib']:.2f}", "GiB", ""],
        ["plain / cached", f"{row['ratio']:.2f}", "", f"ceiling {row['ceiling']:.2f}"],
        ["matmul rate", f"{row['matmul_flop_per_second'] / 1e12:.2f}", "TFLOP/s", f"{row['dtype']}, measured here"],
    ]  # fmt: skip
    return [[name, f"{value} {unit}", note] for name, value, unit, note in found]


def reset_peak(device: torch.device) -> None:
    """Start the count of peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float:
    """Peak memory of the device in GiB; nan where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan


STAGES = {
    "published": Stage(120, published, small=False),
    "pooled": Stage(60, gpu_stages.pooled, small=False),
    "finetune": Stage(40, gpu_stages.finetune),
    "evaluation": Stage(30, gpu_stages.evaluation),
    "attacks": Stage(45, gpu_stages.attacks),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:N or cpu (cuda)")
    add("--shape", choices=tuple(SHAPES), default="8b")
    add("--objective", choices=("gd", "idk", "npo"), default="gd")
    add("--epochs", type=int, default=40)
    add("--retain-pool", default="all", help="rows of retain95 that are drawn from: a number, or all (all)")
    add("--plain-steps", type=int, default=5, help="steps of the plain engine that are timed (5)")
    add("--offload", action="store_true", help="move what training does not need off the device")
    add("--batch", type=int, default=32, help="finetune: rows of a step (32)")
    add("--steps", type=int, default=30, help="finetune: steps that are timed (30)")
    add("--rows", type=int, default=40, help="evaluation, attacks: rows of each set (40)")
    add("--generated", type=int, default=512, help="evaluation, attacks: answers that are written at once (512)")
    add("--seed", type=int, default=0)
    add("--stages", default=",".join(STAGES), help=f"stages that are run ({','.join(STAGES)})")
    add("--stage", choices=tuple(STAGES), help="run this stage alone, in this process, without a limit")
    add("--limit", type=float, help="seconds that each stage may take; unset: its own limit")
    add("--json", metavar="FILE", help="write the rows of all stages as a list")
    add("--dtype", choices=("bfloat16", "float32"), help="type of the weights (bfloat16; on a CPU float32)")
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


if __name__ == "__main__":
    try:
        main()
    except GrunError as error:
        raise SystemExit(str(error)) from error
