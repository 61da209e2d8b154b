"""Training: the cached engine against the published procedure, on a random 16-block Llama and TOFU forget05's text.

    GRUN_TOFU_DIR=folder/of/TOFU python benchmarks/training.py [--json FILE]

The plain side is the hooked whole model on padded rows: two forward passes a step (GD, IDK) or three (NPO, whose
reference is computed again in every step), the head at every position. The cached side is what `python -m grun
unlearn` runs. Both take turns, step by step on the same data, in one process. `ceiling` is the ratio of their counted
multiply-adds in linear layers and the head, with the plain side's padding and none on the cached side; attention's own
products, the loss and the optimizer are not counted, so a ratio can lie above it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from benchmarks.memory import peak_of
from benchmarks.model import (
    Text,
    load_text,
    matmul_rate,
    print_table,
    random_llama,
    say,
    set_threads,
    small_llama_config,
    unlearn_config,
    write_rows,
)
from benchmarks.sides import Side, Use
from grun.config import UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.errors import GrunError
from grun.parametrization import PARAMETRIZATIONS
from grun.training import train
from grun.unlearn import UnlearnRows

OBJECTIVES = ("gd", "idk", "npo")
FIRST = {"62": 0.625, "78": 0.78, "last": 1.0}
"""First edited block as a share of the depth."""
WHAT = ("step", "epoch", "run40")
VOCABULARY = 4096
EFFICIENCY = 0.7
"""Share of the rate of one large product that a step reaches, for estimates of time alone."""
MEMORY_SIDES = ("plain", "cached", "mapped")
COLUMNS = ("name", "first block", "objective", "plain s", "cached s", "ratio", "ceiling", "note")

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
            sys.executable, __file__, "--memory-side", side, "--objectives", case.objective, "--first", case.first,
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


def cases(args: argparse.Namespace) -> list[Case]:
    """What is measured: exactly what --what names; without it, what fits into 25 minutes."""
    if args.what is None and (args.memory or args.growth or args.against):
        return []
    found = []
    for first in args.first or FIRST:
        for objective in args.objectives or OBJECTIVES:
            what = args.what
            if what is None:
                what = WHAT if first == "62" else WHAT[:2] if (first, objective) == ("last", "gd") else WHAT[:1]
            found.append(Case(objective, first, args.retain_pool[0], tuple(what)))
            if "run40" in what:
                found.extend(Case(objective, first, pool, ("run40",)) for pool in args.retain_pool[1:])
    return found


def estimate(bench: Bench, case: Case, rate: float) -> float:
    """Seconds that `measure` will take, from counted operations."""
    config = bench.config(case)
    side = bench.side(config, bench.text.rows(config))
    whole_epoch = case.what != ("step",)
    count = side.steps_per_epoch if whole_epoch else bench.args.steps
    counted = side.multiply_adds(bench.base, range(count))
    turns = 1 if whole_epoch else 2
    steps = counted.plain * (1 + 1 / count) + counted.cached * (turns + 1 / count)
    more = config.train.epochs * counted.cached if bench.args.full and "run40" in case.what else 0
    return (steps + counted.build + more) / rate / EFFICIENCY


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, print the table and write the rows."""
    args = parse(arguments)
    extra = Case((args.objectives or OBJECTIVES)[0], (args.first or list(FIRST))[0], args.retain_pool[0], ("step",))
    of_run = dataclasses.replace(extra, what=("run40",))
    if args.memory_side:
        print(json.dumps(measure_side_memory(Bench(args), of_run, args.memory_side)))
        return
    planned = cases(args)
    found: Rows = []
    memory: Rows = measure_memory(args, of_run) if args.memory and not args.dry_run else []
    if planned or args.growth or args.against:
        bench = Bench(args)
        announce(bench, planned)
        if args.dry_run:
            return
        jobs: list[Callable[[], Rows]] = [lambda case=case: measure(bench, case) for case in planned]  # type: ignore[misc]
        if args.growth:
            jobs.append(lambda: measure_growth(bench, extra))
        if args.against:
            jobs.append(lambda: measure_against(bench, extra))
        for number, job in enumerate(jobs, start=1):
            rows = job()
            for row in rows:
                say(
                    f"[{number}/{len(jobs)}] {row['name']} {row['first_block']} {row['objective']}: plain "
                    f"{row['plain_s']:.2f} s, cached {row['cached_s']:.2f} s, ratio {row['ratio']:.2f}; {row['note']}"
                )
            found += rows
    if found:
        print_found(found, args)
    if memory:
        print_memory(memory)
    write_rows(args.json, found + memory)


def announce(bench: Bench, planned: Sequence[Case]) -> None:
    """Say what runs, and about how long it takes."""
    rate = matmul_rate()
    for case in planned:
        say(
            f"to do: {', '.join(case.what)}; {case.objective}, blocks {edited_blocks(case.first, bench.args.blocks)}, "
            f"retain pool {case.pool}: about {estimate(bench, case, rate):.0f} s"
        )
    total = sum(estimate(bench, case, rate) for case in planned)
    more = [name for name in ("growth", "against") if getattr(bench.args, name)]
    say(
        f"{len(planned)} cases, about {total / 60:.1f} minutes at {bench.threads} threads"
        + (f"; then {' and '.join(more)}, without an estimate" if more else "")
    )


def print_found(found: Rows, args: argparse.Namespace) -> None:
    """The table of all times."""
    form = " with torch's orthogonal parametrization" if args.orthogonal else ""
    where = "mapped files" if args.disk else "memory"
    title = (
        f"Training, Llama of {args.blocks} blocks, hidden 512, float32, TOFU forget05, batch 16: the published "
        f"procedure{form} (plain) against the cache in {where}; ceiling: ratio of counted multiply-adds"
    )
    lines = []
    for row in found:
        ceiling = "-" if row["ceiling"] is None else f"{row['ceiling']:.2f}"
        lines.append(
            [
                row["name"], row["first_block"], row["objective"], f"{row['plain_s']:.2f}", f"{row['cached_s']:.3f}",
                f"{row['ratio']:.2f}", ceiling, row["note"],
            ]
        )  # fmt: skip
    print_table(title, COLUMNS, lines)


def print_memory(found: Rows) -> None:
    """The table of peak memory."""
    sides = {"plain": found[0]["plain"], **{row["cache"]: row["cached"] for row in found}}
    keys = ("loaded", "peak_build", "peak_steps", "peak_anonymous", "peak")
    shares = {row["cache"]: f"{row['share']:.2f}" for row in found}
    lines = [
        [
            name, *(f"{value / 2**20:.0f}" for value in (peak[key] for key in keys)),
            f"{(peak['peak_anonymous'] - peak['loaded']) / 2**20:.0f}", shares.get(name, "1.00"),
        ]
        for name, peak in sides.items()
    ]  # fmt: skip
    what = f"{found[0]['objective']}, first block {found[0]['first_block']}"
    columns = (
        "side",
        "loaded MiB",
        "peak of build",
        "peak of steps",
        "peak of both",
        "with mapped files",
        "peak above loaded",
        "share of plain",
    )
    print_table(f"Peak memory of a process, mapped files left out, {what}", columns, lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--objectives", type=names_of(OBJECTIVES), help="gd,idk,npo (all)")
    add("--first", type=names_of(tuple(FIRST)), help="first edited block: 62,78,last (all), %% of the depth")
    add("--what", type=names_of(WHAT), help="step,epoch,run40, for every combination; default: step for all nine, "
        "epoch at 62 and for gd at last, run40 at 62")  # fmt: skip
    add("--retain-pool", type=pools, help="400, all, or 400,all: retain rows of run40 (400; with --full both)")
    add("--epochs", type=int, default=40, help="epochs of run40 (40)")
    add("--full", action="store_true", help="really run the cached side's epochs of run40, for both pools")
    add("--steps", type=int, default=3, help="plain steps where no epoch is measured (3; the cached side takes twice)")
    add("--orthogonal", action="store_true", help="plain side: torch's orthogonal parametrization, as published")
    add("--disk", action="store_true", help="cached side: read the cache from mapped files in a temporary folder")
    add("--memory", action="store_true", help="peak memory of each side, each in a process of its own")
    add("--growth", action="store_true", help="step times against rows in a batch, length of answers, depth")
    add("--against", type=lambda text: text.split(","), default=[], metavar="NAMES",
        help="other parametrizations by name, such as full,lora; those that do not exist are passed over")  # fmt: skip
    add("--threads", type=int, default=1, help="threads (default 1; 0: physical cores)")
    add("--blocks", type=int, default=16, help="depth of the model (16)")
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="say what would run and about how long, then stop")
    add("--json", metavar="FILE", help="write the rows as a list")
    add("--memory-side", choices=MEMORY_SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.retain_pool = args.retain_pool or (["400", "all"] if args.full else ["400"])
    for name in [name for name in args.against if name not in PARAMETRIZATIONS]:
        say(f"against {name}: no such parametrization, passed over")
        args.against.remove(name)
    return args


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list of `known` names."""

    def parsed(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return parsed


def pools(text: str) -> list[str]:
    """Parser of a comma-separated list of numbers of rows and `all`."""
    found = text.split(",")
    if any(pool != "all" and not pool.isdecimal() for pool in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of rows, all, or several")
    return found


if __name__ == "__main__":
    try:
        main()
    except GrunError as error:
        raise SystemExit(str(error)) from error
