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
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from benchmarks.cases import (
    FIRST,
    MEMORY_SIDES,
    Bench,
    Case,
    Rows,
    edited_blocks,
    measure,
    measure_against,
    measure_growth,
    measure_memory,
    measure_side_memory,
)
from benchmarks.model import (
    matmul_rate,
    print_table,
    say,
    write_rows,
)
from grun.errors import GrunError
from grun.method.parametrization import PARAMETRIZATIONS

OBJECTIVES = ("gd", "idk", "npo")
WHAT = ("step", "epoch", "run40")
EFFICIENCY = 0.7
"""Share of the rate of one large product that a step reaches, for estimates of time alone."""
COLUMNS = ("name", "first block", "objective", "plain s", "cached s", "ratio", "ceiling", "note")


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
