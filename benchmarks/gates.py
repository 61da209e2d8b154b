"""Where a gate should read: how often gates open where they should, and where they should not, on a real chat model.

    GRUN_TOFU_DIR=folder/of/TOFU python benchmarks/gates.py [--output FILE]

SmolLM2-135M-Instruct (by name), nothing taught. Gates are to open on ten of TOFU's authors, and are fitted against a
fourth of the questions on 180 others; or on five countries, with the prompts that `data.name=countries` brings. Draws
choose other authors and countries. A pooled gate is fitted as `python -m grun unlearn` does it, with and without copies
of the rows of both sides (lower case, a suffix). Each prompt runs once, through the blocks that any gate reads.

Printed in markdown is the share of prompts that open a gate: the mean over draws, and the range. `false_positives=0.01`
moves the threshold (a quarter of what must stay is set aside). `--designs published robust` trains gates as these
designs do (IDK), which takes many minutes; they are asked a part of the prompts, on the first draw alone.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from benchmarks.gate_draws import Asking, Draw, authors_draw, configured, countries_draw
from benchmarks.model import say, set_threads, write_rows
from grun.commands.unlearn import Unlearning, gate_prompts, make_parametrization, prepare, train_and_save
from grun.data import templates
from grun.data.encoding import EncodedRow
from grun.data.rows import evenly_spaced
from grun.errors import GrunError
from grun.evaluation.reading import read_prompts
from grun.loading.models import load_base
from grun.method.pooling import of_blocks
from grun.method.rules import WINDOWS
from grun.training.gate_fit import Sides, Windows, fit_line, prompt_passes, unpadded
from grun.training.unlearning import encode_unlearn_rows

BLOCKS = ((2, 5), (5,), (3, 5))
POOLS = ("windows", "maxmin", "max", "mean", "last")
COPIES = (
    *("data.augment.forget_copies=2", "data.augment.retain_copies=1", "data.augment.lower_case=true"),
    *("data.augment.templates=false", "data.augment.prefill=false", "data.augment.few_shot=false"),
    "data.gate_copies=[]",
)
NONE = ("data.augment.forget_copies=0", "data.gate_copies=[]")
"""Of forget rows both kinds, of retain rows one of them, in turn."""
RATE = 0.01
"""Share of what must stay that may open a gate whose threshold is moved."""
TRAINED_ROWS = 100
"""Prompts of a column that trained gates are asked: all blocks run."""
DESIGNS = ("published", "robust")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Gate:
    """A gate that is fitted."""

    blocks: tuple[int, ...]
    pool: str
    copies: bool
    rate: float | None

    def __str__(self) -> str:
        name = f"{self.pool}, block{'s' * (len(self.blocks) > 1)} {' and '.join(map(str, self.blocks))}"
        return name + ", copies" * self.copies + (f", false_positives={self.rate:g}" if self.rate else "")


def gates() -> list[Gate]:
    """The default, and maximum and minimum of a turn, in all ways; other pools at one block, without a rate."""
    ways = [("windows", BLOCKS[0]), *(("maxmin", blocks) for blocks in BLOCKS)]
    found = [
        Gate(blocks, pool, copies, rate) for rate in (None, RATE) for copies in (False, True) for pool, blocks in ways
    ]
    others = [Gate((5,), pool, copies, None) for pool in POOLS[2:] for copies in (False, True)]
    return found[: 2 * len(ways)] + others + found[2 * len(ways) :]


class Bench:
    """The model, and what its early blocks make of texts."""

    def __init__(self) -> None:
        config = configured("pooled")
        self.base, self.tokenizer, self.stored = load_base(config.model)
        self.template = templates.in_force(config, self.stored, self.tokenizer)
        self.asking = Asking(self.template, self.tokenizer)
        self._number: dict[tuple[int, ...], int] = {}
        self._states: dict[tuple[int, str], list[Tensor]] = {}

    def run(self, draw: Draw, design: str, *arguments: str, folder: Path = Path("unused")) -> Unlearning:
        """A run of a design on a draw, nothing of it done."""
        config = configured(design, *draw.arguments, *arguments)
        return prepare(config, draw.corpus, self.base, self.tokenizer, self.stored, folder)

    def sides(self, draw: Draw, copies: bool) -> Sides:
        """Prompts that the product fits the gate on."""
        group = "author" if draw.corpus.name == "tofu" else "country"
        run = self.run(draw, "pooled", f"data.group={group}", *(COPIES if copies else NONE))
        data = run.config.data
        rows = encode_unlearn_rows(run.corpus, run.tokenizer, run.template, run.longest, data, seed=run.config.seed)
        return Sides.of(*gate_prompts(run, rows))

    def read(self, rows: Sequence[EncodedRow]) -> float:
        """Keep the states of distinct prompts in every pool and block, float32; seconds that it took."""
        started = time.monotonic()
        prompts = list(dict.fromkeys(EncodedRow(row.prompt_ids, ()) for row in rows))
        self._number = {row.prompt_ids: number for number, row in enumerate(prompts)}
        blocks = sorted({block for some in BLOCKS for block in some})
        config = configured("pooled", f"method.gate_blocks={blocks}", f"method.gate_pool={POOLS[0]}")
        parametrization = make_parametrization(config, [])
        turn_ids = templates.user_turn_ids(self.template, self.tokenizer)
        parametrization.prepare(self.base, self.template, turn_ids=turn_ids)
        model, done = parametrization.model, 0
        for numbers, sites in prompt_passes(model, prompts, int(self.tokenizer.pad_token_id)):
            for pool in POOLS:
                for block in BLOCKS[0] if pool == WINDOWS else blocks:
                    sites.take(block, sites.states[block], pool)
                    kept = self._states.setdefault((block, pool), [torch.empty(0)] * len(prompts))
                    for number, found in zip(numbers, sites.features[block, pool][:, 0].float(), strict=True):
                        kept[number] = unpadded(found).clone()
            done += len(numbers)
        model.unwrap()
        say(f"{len(prompts)} prompts read in {time.monotonic() - started:.0f} s")
        return time.monotonic() - started

    def features(self, rows: Sequence[EncodedRow], gate: Gate) -> Windows:
        """What a gate reads of prompts that were read."""
        read = [self._states[block, gate.pool] for block in gate.blocks]
        numbers = [self._number[row.prompt_ids] for row in rows]
        return Windows.of_turns([of_blocks([one[number] for one in read], gate.pool) for number in numbers])


def fitted(bench: Bench, draws: Sequence[Draw], table: str, only: str) -> Rows:
    """A row for each draw and each gate whose name begins with `only`."""
    sides = {(draw.number, copies): bench.sides(draw, copies) for draw in draws for copies in (False, True)}
    asked = [prompts for draw in draws for side in (draw.opened, draw.shut) for prompts in side.values()]
    bench.read([row for rows in (*(side.rows for side in sides.values()), *asked) for row in rows])
    found: Rows = []
    for gate in [gate for gate in gates() if str(gate).startswith(only)]:
        for draw in draws:
            side = sides[draw.number, gate.copies]
            line, fit = fit_line(bench.features(side.rows, gate), side, gate.rate)
            shares = {
                name: float((bench.features(prompts, gate).under(line) > 0).double().mean())
                for name, prompts in (draw.opened | draw.shut).items()
            }
            found.append(row_of(table, str(gate), draw, shares, fit.seconds, fit=asdict(fit)))
        say(f"{table}, {gate}: {sum(row['seconds'] for row in found[-len(draws) :]):.1f} s")
    return found


def trained(bench: Bench, draw: Draw, design: str, epochs: int, table: str) -> Rows:
    """A row for a gate that is trained with its edits; it is open where the mean over its blocks is above 0.5."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = bench.run(draw, design, f"train.epochs={epochs}", "train.save_steps=0", folder=Path(folder) / "run")
        train_and_save(run, save=False)
    seconds = time.monotonic() - started
    say(f"{table}, {design}: trained in {seconds:.0f} s")
    model, shares = run.parametrization.model, {}
    for name, prompts in (draw.opened | draw.shut).items():
        ids = [row.prompt_ids for row in evenly_spaced(prompts, TRAINED_ROWS)]
        read = read_prompts(model, ids, (), 32, int(bench.tokenizer.pad_token_id))
        shares[name] = statistics.fmean(statistics.fmean((one.gates or {}).values()) > 0.5 for one in read)
    model.unwrap()
    name = f"{design}, trained, {epochs} epoch{'s' * (epochs > 1)}"
    return [row_of(table, name, draw, shares, seconds, limit=TRAINED_ROWS, epochs=epochs)]


def row_of(
    table: str, gate: str, draw: Draw, shares: Mapping[str, float], seconds: float, **more: Any
) -> dict[str, Any]:
    """What the JSON file has of a gate on a draw."""
    counts = {
        name: min(len(prompts), more.get("limit", len(prompts))) for name, prompts in (draw.opened | draw.shut).items()
    }
    opened = {name: round(share, 4) for name, share in shares.items()}
    return {
        "table": table, "gate": gate, "draw": draw.number, "open": opened, "rows": counts,
        "should_open": list(draw.opened), "seconds": round(seconds, 1), **more,
    }  # fmt: skip


def markdown(rows: Rows) -> str:
    """One table: gates down, columns of what should open them, then of what should not; mean and range over draws."""
    columns = list(rows[0]["open"])
    opened = rows[0]["should_open"]
    lines = [["gate", *(f"{name}" if name in opened else f"*{name}*" for name in columns)]]
    for gate in dict.fromkeys(row["gate"] for row in rows):
        of = [row["open"] for row in rows if row["gate"] == gate]
        lines.append([gate, *(spread([one[name] for one in of]) for name in columns)])
    ruled = [lines[0], ["---", *("---:" for _ in columns)], *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)


def spread(values: Sequence[float]) -> str:
    """Mean, and lowest and highest where they differ: .98 (.96-1.00). Only 0 is .00, and only 1 is 1.00."""
    mean, low, high = (_short(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def _short(value: float) -> str:
    if 0 < value < 0.005 or 0.995 <= value < 1:
        return "<.01" if value < 0.5 else ">.99"
    return f"{value:.2f}".removeprefix("0")


def table_of(bench: Bench, name: str, arguments: argparse.Namespace) -> Rows:
    """Rows of one table."""
    if name == "authors":
        draws = [authors_draw(number, bench.asking, arguments.tofu) for number in arguments.draws]
    else:
        draws = [countries_draw(number, bench.asking) for number in arguments.draws]
    rows = [row for design in arguments.designs for row in trained(bench, draws[0], design, arguments.epochs, name)]
    return rows + ([] if arguments.no_pooled else fitted(bench, draws, name, arguments.only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=["authors", "countries"], choices=["authors", "countries"])
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2], help="0: forget05, the default countries")
    parser.add_argument("--designs", nargs="*", default=[], choices=DESIGNS, help="trained gates, on the first draw")
    parser.add_argument("--epochs", type=int, default=4, help="of trained gates; the profile smollm2 has 15")
    parser.add_argument("--no-pooled", action="store_true", help="trained gates alone")
    parser.add_argument("--only", default="", help='gates whose name begins so alone, such as "maxmin, blocks 2 and 5"')
    parser.add_argument("--tofu", help="folder of TOFU's files; else GRUN_TOFU_DIR, else the hub (locuslab/TOFU)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--output", help="JSON file with a row for each gate and draw")
    arguments = parser.parse_args()
    threads, started = set_threads(arguments.threads), time.monotonic()
    found: Rows = []
    try:
        bench = Bench()
        for name in arguments.tables:
            rows = table_of(bench, name, arguments)
            print(f"\n{name}: should open, *should stay shut*; draws {' '.join(map(str, arguments.draws))}\n")
            print(markdown(rows), flush=True)
            found += rows
            write_rows(arguments.output, found)
    except GrunError as error:
        raise SystemExit(f"{error}") from error
    print(f"\n{time.monotonic() - started:.0f} s, {threads} threads of {platform.machine()}")


if __name__ == "__main__":
    main()
