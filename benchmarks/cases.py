"""What training.py measures: two sides of one case in turns, in whole runs, in memory, in growth."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_of
from benchmarks.model import (
    Text,
    load_text,
    random_llama,
    say,
    set_threads,
    small_llama_config,
    unlearn_config,
)
from benchmarks.sides import Side, Use
from grun.config.options import UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.training.train import train
from grun.training.unlearning import UnlearnRows

FIRST = {"62": 0.625, "78": 0.78, "last": 1.0}
"""First edited block as a share of the depth."""
VOCABULARY = 4096
MEMORY_SIDES = ("plain", "cached", "mapped")
COMMAND = Path(__file__).with_name("training.py")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Two sides that are measured against each other, and what is asked of them."""

    objective: str
    first: str
    pool: str
    """Retain rows that are drawn from: a number, or all."""
    what: tuple[str, ...]


class Bench:
    """The model, the text and the options of one process."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build what all cases share."""
        self.args = args
        self.threads = set_threads(args.threads)
        self.text: Text = load_text(VOCABULARY)
        self.vocabulary = len(self.text.tokenizer)
        self.base = random_llama(small_llama_config(self.vocabulary, args.blocks), args.seed)

    def config(self, case: Case, depth: int | None = None, **options: Any) -> UnlearnConfig:
        """Of one case; a cache that serves the steps of one epoch alone, where no run is asked for."""
        given = {
            "objective": case.objective,
            "method.blocks": edited_blocks(case.first, depth or self.args.blocks),
            "data.retain_pool": "null" if case.pool == "all" else case.pool,
            "train.epochs": self.args.epochs if "run40" in case.what else 1,
            "seed": self.args.seed,
            **options,
        }
        return unlearn_config(*(f"{key}={value}" for key, value in given.items()))

    @contextlib.contextmanager
    def cached_config(self, config: UnlearnConfig, *, disk: bool) -> Iterator[UnlearnConfig]:
        """`config` with the cache in memory, or in a temporary folder whose files are mapped."""
        if not disk:
            yield config
            return
        with tempfile.TemporaryDirectory() as folder:
            cache = dataclasses.replace(config.cache, dir=folder, memory_budget="0")
            yield dataclasses.replace(config, cache=cache)

    def side(self, config: UnlearnConfig, rows: UnlearnRows, base: Any = None, *, plain: bool = False) -> Side:
        """A side that starts with the plain engine."""
        return Side(base or self.base, self.text, rows, config, published=plain and self.args.orthogonal)


def edited_blocks(first: str, depth: int) -> list[int]:
    """Edited blocks, 0-based: 10, 12, 15 of 16 for 62; 12, 13, 15 for 78; 15 for last."""
    last = depth - 1
    start = min(int(depth * FIRST[first]), last)
    middle = {"62": int(depth * FIRST["78"]), "78": start + 1, "last": last}[first]
    return sorted({start, min(middle, last), last})


def measure(bench: Bench, case: Case) -> Rows:
    """Rows of one case."""
    args, config = bench.args, bench.config(case)
    rows = bench.text.rows(config)
    plain = bench.side(config, rows, plain=True)
    with bench.cached_config(config, disk=args.disk) as on_disk:
        cached = bench.side(on_disk, rows)
        use = cached.use_cache()
        whole_epoch = case.what != ("step",)
        steps = range(plain.steps_per_epoch if whole_epoch else args.steps)
        times = take_turns(plain, cached, steps, repeats=1 if whole_epoch else 2)
        full = full_run(cached) if "run40" in case.what and args.full else None
    shared = {
        "first_block": case.first, "objective": case.objective, "retain_pool": case.pool,
        "blocks": config.method.blocks, "threads": bench.threads, "orthogonal": args.orthogonal,
    }  # fmt: skip
    counted = plain.multiply_adds(bench.base, steps)
    ceiling = counted.plain / counted.cached
    found: Rows = []
    if "step" in case.what:
        note = f"medians of {len(times.plain)} and {len(times.cached)} steps"
        found.append(
            result("step", statistics.median(times.plain), statistics.median(times.cached), ceiling, note, **shared)
        )
    epoch = sum(times.plain), sum(times.cached)
    if "epoch" in case.what:
        found.append(result("epoch", *epoch, ceiling, f"{len(steps)} steps of each side, taken in turn", **shared))
    if "run40" in case.what:
        epochs = config.train.epochs
        of_run = plain.multiply_adds(bench.base, range(plain.task.steps))
        training = epochs * epoch[1] if full is None else full
        measured = f"build + {epochs} x epoch" if full is None else f"build + {epochs} epochs run"
        note = f"{describe(use)}; cached: {measured}; plain: {epochs} x epoch; retain pool {case.pool}"
        more = {"measured": measured, "plain_measured": f"{epochs} x epoch", "cache": use.describe(), "epochs": epochs}
        ceiling = of_run.plain / (of_run.cached + of_run.build)
        found.append(
            result("run40", epochs * epoch[0], use.seconds + training, ceiling, note, **shared, **more)
        )  # fmt: skip
    return found


@dataclass
class Times:
    """Seconds of steps, in the order they were taken."""

    plain: list[float]
    cached: list[float]


def take_turns(plain: Side, cached: Side, steps: range, *, repeats: int) -> Times:
    """Run the same steps on both sides, one after the other; the cached one `repeats` times. One step warms both."""
    plain.step(steps[0])
    cached.step(steps[0])
    times = Times([], [])
    for number in steps:
        times.cached.append(cached.step(number))
        times.plain.append(plain.step(number))
        times.cached.extend(cached.step(number) for _ in range(repeats - 1))
    return times


def full_run(side: Side) -> float:
    """Seconds of all epochs by the trainer of `unlearn`, checkpoints and log included."""
    with tempfile.TemporaryDirectory() as folder:
        return train(side.task, side.config.train, Path(folder), side.config.seed).seconds


def result(name: str, plain: float, cached: float, ceiling: float | None, note: str, **more: Any) -> dict[str, Any]:
    """One row of the list that --json writes; the table shows a part of it."""
    return {
        "name": name, **more, "plain_s": round(plain, 4), "cached_s": round(cached, 4),
        "ratio": round(plain / cached, 3), "ceiling": None if ceiling is None else round(ceiling, 3), "note": note,
    }  # fmt: skip


def describe(use: Use) -> str:
    """What filling the cache cost."""
    cache = use.describe()
    return (
        f"build {cache['build_seconds']:.1f} s ({cache['rows']} rows, {cache['rows_per_second']:.1f}/s, "
        f"{cache['bytes_per_row'] / 1e6:.2f} MB each), with checks {cache['seconds']:.1f} s"
    )


def measure_against(bench: Bench, case: Case) -> Rows:
    """A step of other parametrizations, GD on the same data, against the cached one."""
    config = bench.config(case)
    rows = bench.text.rows(config)
    cached = bench.side(config, rows)
    cached.use_cache()
    found: Rows = []
    for name in bench.args.against:
        say(f"against {name}")
        options = {"method.parametrization": name, "train.lr": 1e-5}
        other = bench.side(bench.config(case, **options), rows)
        times = take_turns(other, cached, range(bench.args.steps), repeats=2)
        plain, own = statistics.median(times.plain), statistics.median(times.cached)
        note = f"plain s: a step of {name}, all passes through the whole model"
        found.append(
            result("against", plain, own, None, note, first_block=case.first, objective=case.objective, against=name)
        )  # fmt: skip
    return found


def measure_growth(bench: Bench, case: Case) -> Rows:
    """Step times against rows in a batch, length of answers, and depth."""
    found: Rows = []
    depths = [bench.args.blocks * halves // 2 for halves in (1, 2, 3)]
    plans: list[tuple[str, dict[str, Any], float, int]] = [
        *((f"batch of {size} rows", {"train.batch_size": size}, 1.0, bench.args.blocks) for size in (8, 16, 32)),
        *((f"answers x {factor:g}", {}, factor, bench.args.blocks) for factor in (0.5, 1.0, 2.0)),
        *((f"{depth} blocks", {}, 1.0, depth) for depth in depths),
    ]
    for what, options, factor, depth in plans:
        say(f"growth: {what}")
        config = bench.config(case, depth, **options)
        base = bench.base
        if depth != bench.args.blocks:
            base = random_llama(small_llama_config(bench.vocabulary, depth), bench.args.seed)
        rows = scaled(bench.text.rows(config), factor)
        plain, cached = (bench.side(config, rows, base, plain=is_plain) for is_plain in (True, False))
        use = cached.use_cache()
        steps = range(bench.args.steps)
        times = take_turns(plain, cached, steps, repeats=2)
        counted = plain.multiply_adds(base, steps)
        step, own = statistics.median(times.plain), statistics.median(times.cached)
        more: dict[str, Any] = {"first_block": case.first, "objective": case.objective, "what": what}
        note = f"step, {what}; cache {use.describe()['bytes_per_row'] / 1e6:.2f} MB a row"
        ceiling = counted.plain / counted.cached
        found.append(result("growth", step, own, ceiling, note, cache=use.describe(), **more))
    return found


def scaled(rows: UnlearnRows, factor: float) -> UnlearnRows:
    """Rows whose answers are cut or repeated to `factor` times their tokens; made up, but for time they will do."""

    def of(row: EncodedRow) -> EncodedRow:
        count = max(1, round(len(row.answer_ids) * factor))
        return EncodedRow(row.prompt_ids, (row.answer_ids * -(-count // len(row.answer_ids)))[:count])

    if factor == 1:
        return rows
    return UnlearnRows(*([of(row) for row in part] for part in (rows.answers, rows.refusals, rows.retain)))


def measure_memory(args: argparse.Namespace, case: Case) -> Rows:
    """Peak memory of each side in a process of its own."""
    peaks: dict[str, dict[str, float]] = {}
    for side in MEMORY_SIDES:
        say(f"memory: {side}, {case.objective}, first block {case.first}")
        command = [
            sys.executable, COMMAND, "--memory-side", side, "--objectives", case.objective, "--first", case.first,
            "--retain-pool", case.pool, "--epochs", args.epochs, "--blocks", args.blocks, "--steps", args.steps,
            "--seed", args.seed, "--threads", args.threads,
            *(["--orthogonal"] if args.orthogonal else []),
        ]  # fmt: skip
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
        peaks[side] = json.loads(done.stdout.splitlines()[-1])
    found: Rows = []
    for side in MEMORY_SIDES[1:]:
        above = {name: peaks[name]["peak_anonymous"] - peaks[name]["loaded"] for name in ("plain", side)}
        found.append(
            {
                "name": "memory", "first_block": case.first, "objective": case.objective, "cache": side,
                "ratio": round(above["plain"] / above[side], 3), "plain": peaks["plain"], "cached": peaks[side],
                "share": round(above[side] / above["plain"], 3),
                "share_with_model": round(peaks[side]["peak_anonymous"] / peaks["plain"]["peak_anonymous"], 3),
            }
        )  # fmt: skip
    return found


def measure_side_memory(bench: Bench, case: Case, side: str) -> dict[str, float]:
    """What the process of `measure_memory` does: the cache of a whole run, if any, and some steps."""
    config = bench.config(case)
    rows = bench.text.rows(config)

    # What the first step of any model loads and allocates belongs to neither side.
    small = random_llama(small_llama_config(bench.vocabulary, 1), bench.args.seed)
    bench.side(bench.config(case, 1, **{"train.batch_size": 1}), rows, small).step(0)
    del small
    with bench.cached_config(config, disk=side == "mapped") as on_disk:
        made = bench.side(on_disk, rows, plain=side == "plain")
        build = peak_of(made.use_cache if side != "plain" else lambda: None)
        steps = peak_of(lambda: [made.step(number) for number in range(bench.args.steps)])
    return {
        "loaded": build["loaded"],
        "peak_build": build["peak_anonymous"],
        "peak_steps": steps["peak_anonymous"],
        "peak_anonymous": max(build["peak_anonymous"], steps["peak_anonymous"]),
        "peak": max(build["peak"], steps["peak"]),
    }
