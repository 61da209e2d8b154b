"""What a training step of the cached engine tells a GPU, counted without one: kernels, waits, bytes copied.

    GRUN_TOFU_DIR=folder/of/TOFU python benchmarks/counts.py [--objective gd] [--steps 20] [--json FILE]

A Llama of the structure of Llama-3.1-8B (32 blocks, 32 heads on 8, vocabulary 128,256, bfloat16), but hidden size 256:
width changes no count. The text is TOFU's forget05 and retain95, batch 16. The steps are the trainer's own, from data
to optimizer, on a device that only counts (`benchmarks/pretended.py`). An operator counts as one kernel, though on a
real GPU some (QR, index_put that accumulates) launch several.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

import torch

from benchmarks import pretended
from benchmarks.model import Text, load_text, print_table, random_llama, say, unlearn_config, write_rows
from benchmarks.sides import Side
from grun.cache import resident
from grun.config.options import UnlearnConfig
from grun.errors import GrunError
from grun.training.step_log import Look
from grun.training.train import train

VOCABULARY = 8192
"""Of the tokenizer."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print the table and write the row."""
    args = parse(arguments)
    row = measure(args)
    title = f"A step of GRUN-{args.objective.upper()} at the structure of Llama-3.1-8B"
    lines = [
        ["kernels", f"{row['launches']:.0f}", f"{row['least_launches']} to {row['most_launches']}"],
        ["waits for a value", f"{row['waits']:.1f}", f"none in {row['steps_without_waits']} of {args.steps} steps"],
        ["bytes copied to the device", f"{row['bytes']:,.0f}", f"at most {row['most_bytes']:,}"],
        ["rows", f"{row['rows']:.1f}", ""],
    ]
    print_table(title, ("what", "a step", "note"), lines)
    for name, count in row["by_name"].items():
        say(f"{count:8.1f} {name}")
    write_rows(args.json, [row])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Counts of a step, the mean of all but the first."""
    config = options(args)
    text = load_text(VOCABULARY)
    base = random_llama(llama_config(text), args.seed, torch.bfloat16)
    side = Side(base, text, text.rows(config), config)
    pretended.move(side.model)
    pretended.move(side.task.module)
    side.task.device = pretended.device()
    seen: list[pretended.Counts] = []
    with pretended.on_it() as counts, all_free(), tempfile.TemporaryDirectory() as folder:
        use = side.use_cache()
        say(f"cache of {use.completed.rows} rows in {use.seconds:.1f} s")
        look = Look(lambda: seen.append(counts.copy()) or {}, 1)  # type: ignore[func-returns-value]
        train(Cut(side.task, args.steps + 1), config.train, Path(folder), config.seed, look)
    steps = [after.since(before) for before, after in zip(seen, seen[1:], strict=False)]
    rows = [len(batch.encoded) for n in range(1, args.steps + 1) for part in side.task.data(n).micro_batches
            for batch in part.values()]  # fmt: skip
    names = sum((step.by_name for step in steps), Counter[str]())
    launches = [step.launches for step in steps]
    return {
        "objective": args.objective, "steps": len(steps), "rows": sum(rows) / len(steps),
        "launches": statistics.fmean(launches), "least_launches": min(launches), "most_launches": max(launches),
        "waits": statistics.fmean(step.waits for step in steps),
        "steps_without_waits": sum(not step.waits for step in steps),
        "bytes": statistics.fmean(step.bytes for step in steps), "most_bytes": max(step.bytes for step in steps),
        "by_name": {name: count / len(steps) for name, count in names.most_common()},
    }  # fmt: skip


@contextlib.contextmanager
def all_free() -> Iterator[None]:
    """Within the block the device has room for the cache."""
    with mock.patch.object(resident, "free_bytes", lambda device: 2**40):
        yield


class Cut:
    """The first steps of a task."""

    def __init__(self, task: Any, steps: int) -> None:
        """`task` itself stays as it is."""
        self._task, self.steps = task, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def options(args: argparse.Namespace) -> UnlearnConfig:
    """The published settings; rows that the steps do not meet are left out of the cache by one epoch."""
    return unlearn_config(
        f"objective={args.objective}", "method.blocks=[20,25,31]", f"train.epochs={-(-(args.steps + 1) // 13)}",
        "train.save_steps=0", "train.monitor_epochs=0", f"seed={args.seed}",
    )  # fmt: skip


def llama_config(text: Text) -> Any:
    """Llama-3.1-8B's structure."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, pad_token_id=text.pad_id,
    )  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--objective", choices=("gd", "idk", "npo"), default="gd")
    add("--steps", type=int, default=20, help="steps counted, after a first one (20)")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="write the row as a list of one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except GrunError as error:
        raise SystemExit(str(error)) from error
