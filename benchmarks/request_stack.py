"""What many requests on one base cost: GrunStack against the bare model, for more and more requests.

    python benchmarks/request_stack.py                                     # published design: 1 to 1,000 requests
    python benchmarks/request_stack.py --design every_token                # robust design, linear gates
    python benchmarks/request_stack.py --design pooled                     # one gate each, on pooled states
    python benchmarks/request_stack.py --design pooled --adapter           # one adapter (GrunModel), not a stack
    python benchmarks/request_stack.py --design every_token --gate noisy_mlp_3 --counts 1,10,100
    python benchmarks/request_stack.py --counts 10000 --rank 1             # gates, with next to no edit
    python benchmarks/request_stack.py --store                             # adding, removing, loading from a folder

Both models have the same random weights and get the same tokens, in turns: one prompt pass each, then decode steps one
after the other. Times are CPU seconds of this process, which runs one thread, so that what other commands take of the
core does not count. Gates are random directions; their biases are set so that in the whole batch one row opens one
gate. Each count is measured with a threshold of 0.5 and without.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generation import BLOCKS, DESIGNS, model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from grun.data.encoding import EncodedRow
from grun.data.rows import Row
from grun.method.adapter import AdapterConfig
from grun.method.gate import make_gate, set_bias
from grun.method.model import GrunModel
from grun.method.stack.stack import GrunStack
from grun.requests.store import RequestStore
from grun.training.gate_fit import padded, prompt_features
from pyvene_custom import find_blocks

HIDDEN, ROWS = 512, 16
EDITED = {"last_prompt": (10, 12, 15), "every_token": (13, 15), "pooled": (12, 13, 14, 15)}
THRESHOLDS = {"0.5": 0.5, "none": None}
WHAT = ("prefill", "decode")
Member = tuple[AdapterConfig, dict[str, Tensor]]


def states_of(base: PreTrainedModel, ids: Tensor, blocks: Sequence[int], last: bool) -> dict[int, Tensor]:
    """States behind `blocks`, [batch, positions read, hidden size]."""
    found: dict[int, Tensor] = {}
    _, modules = find_blocks(base)

    def hook(block: int) -> Callable[..., None]:
        def keep(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found[block] = hidden[:, -1:] if last else hidden

        return keep

    handles = [modules[block].register_forward_hook(hook(block)) for block in blocks]
    base(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


class Requests:
    """Requests with random gates and edits."""

    def __init__(self, design: str, gate: str, rank: int, base: PreTrainedModel, ids: Tensor) -> None:
        options: dict[str, Any] = {**DESIGNS[design], "blocks": list(EDITED[design])}
        self.config = AdapterConfig(rank=rank, gate=gate, hidden_size=HIDDEN, depth=BLOCKS, **options)
        self._states: dict[str, Tensor] = {}
        """By gate what it reads, [batch, positions read, any]."""
        if self.config.gate_blocks is None:
            found = states_of(base, ids, EDITED[design], last=design == "last_prompt")
            self._states = {f"edits.{block}.gate": states for block, states in found.items()}
        else:
            rows = [EncodedRow(tuple(row), ()) for row in ids.tolist()]
            features = prompt_features(wrapped := GrunModel(base, self.config), rows, 0)
            wrapped.unwrap()
            self._states = {"pooled.gate": padded(features).float()}
        self._random = torch.Generator().manual_seed(0)

    def make(self, opens: bool) -> Member:
        """One whose gates open for a single row of the batch, or for none."""
        weights: dict[str, Tensor] = {}
        for block in self.config.blocks:
            start = f"edits.{block}.edit"
            rank = self.config.rank
            weights[f"{start}.rotation"] = self._normal(HIDDEN, rank)
            weights[f"{start}.source.weight"] = self._normal(rank, HIDDEN) / HIDDEN**0.5
            weights[f"{start}.source.bias"] = torch.zeros(rank)
        for start, states in self._states.items():
            size = states.shape[2] if self.config.gate_blocks is None else self.config.gate_size
            gate = make_gate(self.config.gate, size, self.config.gate_pool)
            if gate is None:
                raise SystemExit("choose a gate")
            gate.eval()
            for parameter in gate.parameters():
                parameter.data = self._normal(*parameter.shape) / parameter.shape[-1] ** 0.5
            set_bias(gate, 0.0)
            logits = gate(states).squeeze(2)
            first, second = logits.amax(dim=1).topk(2).values.tolist()
            set_bias(gate, -(first + second) / 2 if opens else -first - float(logits.std()))
            weights |= {f"{start}.{name}": value for name, value in gate.state_dict().items()}
        return self.config, weights

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)


class OwnCode:
    """CPU seconds between hooks around those of the edits and gates, within the passes of their base."""

    def __init__(self, base: PreTrainedModel, blocks: Sequence[int]) -> None:
        self.spent = 0.0
        _, modules = find_blocks(base)
        # Hooks that are prepended now run before the stack's own, appended ones behind them.
        self._handles = [
            base.register_forward_pre_hook(self._start, prepend=True),
            base.register_forward_pre_hook(self._stop),
            base.register_forward_hook(self._start, prepend=True),
            base.register_forward_hook(self._stop),
        ]
        for block in blocks:
            self._handles.append(modules[block].register_forward_hook(self._start, prepend=True))
            self._handles.append(modules[block].register_forward_hook(self._stop))

    def _start(self, *_: Any) -> None:
        self.spent -= time.process_time()

    def _stop(self, *_: Any) -> None:
        self.spent += time.process_time()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Turns:
    """One prompt pass and some decode steps of the bare model and of the stack, in turns."""

    def __init__(self, bare: PreTrainedModel, stack: GrunStack | GrunModel, ids: Tensor, steps: int) -> None:
        self.sides = {"bare": bare, "stack": stack.base}
        self.ids = ids
        self.steps = steps
        self._stack = stack

    def measure(self, pairs: int) -> dict[str, dict[str, list[float]]]:
        """Of `pairs` turns: for prompt passes and decode steps the ratio of the two models' times (`ratio`) and the
        stack's own code as a share of all the rest of its pass (`own`)."""
        found: dict[str, dict[str, list[float]]] = {what: {"ratio": [], "own": []} for what in WHAT}
        read = [] if self._stack.pooled is None else self._stack.pooled.blocks
        self._own = OwnCode(self.sides["stack"], [*self._stack.edit_at(), *read])
        for number in range(-1, pairs):
            order = list(self.sides)[:: 1 if number % 2 == 0 else -1]
            for what, spent in zip(WHAT, self._turn(order), strict=True):
                if number >= 0:  # the first turn is slower
                    own = statistics.median(spent["own"])
                    whole = statistics.median(spent["stack"])
                    found[what]["ratio"].append(whole / statistics.median(spent["bare"]))
                    found[what]["own"].append(own / (whole - own))
        self._own.remove()
        return found

    def _turn(self, order: Sequence[str]) -> list[dict[str, list[float]]]:
        caches = {side: DynamicCache() for side in order}
        inputs = [[self.ids], self.ids.split(1, dim=1)[: self.steps]]
        found = []
        for passes in inputs:
            spent: dict[str, list[float]] = {"bare": [], "stack": [], "own": []}
            for step, ids in enumerate(passes):
                self._own.spent = 0.0
                for side in order if step % 2 == 0 else order[::-1]:
                    spent[side].append(self._seconds(side, ids, caches[side]))
                spent["own"].append(self._own.spent)
            found.append(spent)
        return found

    def _seconds(self, side: str, ids: Tensor, cache: DynamicCache) -> float:
        started = time.process_time()
        self.sides[side](input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.process_time() - started


def seconds(done: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    started = clock()
    done()
    return clock() - started


def percent(values: Sequence[float]) -> str:
    """Median, and the range of the middle half."""
    low, middle, high = (100 * value for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{middle:6.2f} % ({low:.1f} to {high:.1f})"


def costs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return overheads, memory, and time to add and remove, by count."""
    bare, base = model(HIDDEN), model(HIDDEN)
    ids = torch.randint(1, 4096, (ROWS, arguments.prompt), generator=torch.Generator().manual_seed(0))
    requests = Requests(arguments.design, arguments.gate, arguments.rank, bare, ids)
    stack = GrunStack(base).eval()
    turns = Turns(bare, stack, ids, arguments.steps)
    rows: list[dict[str, Any]] = []
    for count in arguments.counts:
        new = {f"request {number}": requests.make(number == 0) for number in range(len(stack.names), count)}
        built = seconds(functools.partial(stack.add_weights, new))
        one = {"one more": requests.make(False)}
        added, removed = [], []
        for _ in range(5):
            added.append(seconds(functools.partial(stack.add_weights, one)))
            removed.append(seconds(functools.partial(stack.remove, "one more")))
        add, remove = statistics.median(added), statistics.median(removed)
        mib = sum(values.nbytes for values in stack.buffers()) / 2**20
        print(f"\n{count} requests: {mib:.1f} MiB; {len(new)} added at once in {built:.2f} s, "
              f"one more in {add:.3f} s, one removed in {remove:.3f} s")  # fmt: skip
        del new
        rows += measured(turns, stack, arguments.pairs, {"count": count, "mib": mib, "add_s": add, "remove_s": remove})
    print_slopes(rows)
    return rows


def measured(turns: Turns, stack: GrunStack | GrunModel, pairs: int, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Print and return overheads with and without a threshold."""
    rows = []
    for name, threshold in THRESHOLDS.items():
        stack.gate_threshold = threshold
        for what, found in turns.measure(pairs).items():
            ratios = [value - 1 for value in found["ratio"]]
            print(
                f"  threshold {name:4}  {what:7}  own code {percent(found['own']):27} pairs {percent(ratios)}",
                flush=True,
            )
            rows.append(
                {"what": what, "threshold": name, **about, "own": statistics.median(found["own"]),
                 "overhead": statistics.median(ratios), "every": found}
            )  # fmt: skip
    return rows


def one_adapter(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return overheads of one adapter that no stack holds, open on a single row and on none."""
    bare, base = model(HIDDEN), model(HIDDEN)
    ids = torch.randint(1, 4096, (ROWS, arguments.prompt), generator=torch.Generator().manual_seed(0))
    requests = Requests(arguments.design, arguments.gate, arguments.rank, bare, ids)
    rows = []
    for opens in (True, False):
        config, weights = requests.make(opens)
        adapter = GrunModel(base, config).eval()
        adapter.load_state_dict(weights)
        print(f"\none adapter, open on {'one row' if opens else 'no row'}")
        rows += measured(Turns(bare, adapter, ids, arguments.steps), adapter, arguments.pairs, {"opens": opens})
        adapter.unwrap()
    return rows


def print_slopes(rows: Sequence[dict[str, Any]]) -> None:
    """Own code as a straight line over the number of requests, by least squares."""
    for name in THRESHOLDS:
        for what in WHAT:
            chosen = [row for row in rows if (row["threshold"], row["what"]) == (name, what)]
            if len(chosen) > 1:
                values = [100 * row["own"] for row in chosen]
                slope, start = map(float, np.polyfit([row["count"] for row in chosen], values, 1))
                print(f"threshold {name:4}  {what:7}  own code = {start:.2f} % + {slope:.4f} % per request")


def stores(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return what a store of requests on disk takes: seconds of the clock, bytes."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        adapter, folder = Path(temporary) / "adapter", Path(temporary) / "store"
        made = GrunModel.wrap(model(HIDDEN), blocks=EDITED["last_prompt"], rank=arguments.rank, gate="linear")
        made.save_pretrained(adapter)
        base = made.unwrap()
        store = RequestStore.create(folder)
        forget = [Row(f"question {number}", "answer") for number in range(20)]

        def add(number: int) -> None:
            store.add(f"request-{number}", adapter, forget_rows=forget, config={"seed": number})

        for count in arguments.counts:
            with store.writing():  # the manifest is read once for all of them
                for number in range(len(store.manifest.requests), count):
                    add(number)
            loaded = seconds(lambda: GrunStack.from_folder(base, folder).unwrap(), time.perf_counter)
            added, removed = [], []
            for _ in range(3):
                added.append(seconds(functools.partial(add, count), time.perf_counter))
                removed.append(seconds(functools.partial(store.remove, f"request-{count}"), time.perf_counter))
            row = {"count": count, "add_s": statistics.median(added), "remove_s": statistics.median(removed),
                   "load_s": loaded, "mib": sum(file.stat().st_size for file in folder.rglob("*")) / 2**20}  # fmt: skip
            print(f"{count:6} requests: one more in {row['add_s']:.3f} s, one removed in {row['remove_s']:.3f} s, "
                  f"all loaded in {loaded:.2f} s, {row['mib']:.1f} MiB", flush=True)  # fmt: skip
            rows.append(row)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", choices=sorted(DESIGNS), default="last_prompt")
    parser.add_argument("--gate", default="linear")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--counts", default="1,10,100,1000", help="ascending, with commas between")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a turn")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--adapter", action="store_true", help="one adapter in place of a stack")
    parser.add_argument("--store", action="store_true", help="measure a store on disk instead")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.counts = [int(count) for count in arguments.counts.split(",")]
    torch.set_num_threads(1)
    rows = (stores if arguments.store else one_adapter if arguments.adapter else costs)(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
