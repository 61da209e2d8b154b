"""What a step of RMU costs, against a plain implementation that goes about it as the published tool does.

    python benchmarks/rmu.py [--threads 1] [--pairs 5] [--hidden 256] [--length 128] [--json FILE]

A Llama of 32 blocks with random weights; the loss reads block 7, blocks 5, 6 and 7 change. The plain side holds two
models, runs both whole, head included, and lets every parameter of the updated one take gradients. Both sides take the
same steps (forget and retain batch, loss, backward, optimizer) in turns, and must give the same losses. Our side runs
the untouched model before training: that time is added to its steps, one retain batch a step; two topics that share
their retain corpus, as published, pay half of it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from baselines.rmu.task import RmuTask, Topic
from baselines.tensors import named_tensors
from benchmarks.model import print_table, random_llama, say, set_threads, write_rows
from grun.data.encoding import Batch, EncodedRow, collate
from grun.objectives.rmu import control_vector
from grun.training.optimizers import LegacyAdamW

DEPTH, BLOCK, CHANGED = 32, 7, [5, 6, 7]
ALPHA, STEERING, LR = 1200.0, 6.5, 5e-5


class Plain:
    """Two models, whole passes, gradients for every parameter; only the chosen tensors are stepped and zeroed."""

    def __init__(self, base: Any, topic: Topic) -> None:
        self.updated, self.frozen, self._topic = copy.deepcopy(base), copy.deepcopy(base), topic
        chosen = list(named_tensors(self.updated, CHANGED, ["mlp.down_proj"]).values())
        self.updated.requires_grad_(True)
        self.frozen.requires_grad_(True)
        self._optimizer = LegacyAdamW(chosen, lr=LR)

    def step(self, number: int) -> float:
        topic = self._topic
        forget, retain = topic.forget[number], topic.retain[number]
        forget_loss = (self._hidden(self.updated, forget) - topic.control).square().mean()
        updated = self._hidden(self.updated, retain)
        with torch.no_grad():
            frozen = self._hidden(self.frozen, retain)
        loss = forget_loss + topic.alpha * (updated - frozen).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def held(self) -> int:
        """Bytes of parameters and gradients."""
        return held([*self.updated.parameters(), *self.frozen.parameters()])

    @staticmethod
    def _hidden(model: Any, batch: Batch) -> Tensor:
        seen: list[Tensor] = []
        hook = model.model.layers[BLOCK].register_forward_hook(lambda _, __, output: seen.append(output))
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hook.remove()
        return seen[0]


class Ours:
    """`RmuTask` and the loop around it, without log and checkpoints (about a millisecond a step)."""

    def __init__(self, base: Any, topic: Topic, steps: int) -> None:
        self._base = base
        started = time.perf_counter()
        tensors = named_tensors(base, CHANGED, ["mlp.down_proj"])
        self.task = RmuTask(base, tensors, [topic], block=BLOCK, steps=steps, loss_mask="all")
        self.untouched = (time.perf_counter() - started) / steps
        """Seconds of the untouched model's pass, for each step."""
        self._optimizer = LegacyAdamW(self.task.module.parameters(), lr=LR)

    def step(self, number: int) -> float:
        data = self.task.data(number)
        loss, _ = self.task.loss(data.micro_batches[0], data.counts, number)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def held(self) -> int:
        """Bytes of parameters and gradients."""
        return held(self._base.parameters())


def held(parameters: Iterable[Tensor]) -> int:
    return sum(one.nbytes + (0 if one.grad is None else one.grad.nbytes) for one in parameters)


def batches(count: int, rows: int, length: int, vocabulary: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, rows, length), generator=generator).tolist()
    return [collate([EncodedRow(tuple(row), ()) for row in batch], 0) for batch in ids]


def timed(side: Plain | Ours, number: int) -> tuple[float, float]:
    """Seconds and loss of a step."""
    started = time.perf_counter()
    loss = side.step(number)
    return time.perf_counter() - started, loss


def main() -> None:
    from transformers import LlamaConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="0: torch's default")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048, help="of Mistral's share of the hidden size")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    threads = set_threads(arguments.threads)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=DEPTH,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256),
        max_position_embeddings=arguments.length,
    )
    base = random_llama(config, seed=0)
    steps = arguments.pairs + 1
    shape = steps, arguments.rows, arguments.length, arguments.vocabulary
    topic = Topic(
        "random", batches(*shape, 1), batches(*shape, 2), ALPHA, control_vector(arguments.hidden, STEERING, 0)
    )
    plain, ours = Plain(base, topic), Ours(base, topic, steps)
    pairs = []
    for number in range(steps):  # the first is slower, and not counted
        turns: list[Plain | Ours] = [plain, ours][:: 1 if number % 2 else -1]
        spent = {type(side): timed(side, number) for side in turns}
        (plain_s, expected), (ours_s, found) = spent[Plain], spent[Ours]
        if abs(found - expected) > 1e-3 * abs(expected):  # float32, through updates of their own
            raise SystemExit(f"step {number + 1}: our loss is {found}, the plain one {expected}")
        say(f"step {number + 1}: plain {plain_s:.2f} s, ours {ours_s:.2f} s, loss {expected:.5f}")
        pairs.append((plain_s, ours_s))
    pairs = pairs[1:]
    ratio = statistics.median(one / (other + ours.untouched) for one, other in pairs)
    row = {
        "name": "rmu step",
        "plain_s": round(statistics.median(one for one, _ in pairs), 4),
        "ours_s": round(statistics.median(other for _, other in pairs), 4),
        "untouched_s": round(ours.untouched, 4),
        "ratio": round(ratio, 2),
        "step_ratio": round(statistics.median(one / other for one, other in pairs), 2),
        "plain_bytes": plain.held(),
        "ours_bytes": ours.held(),
        "frozen_bytes_a_step": ours.task.frozen_bytes // steps,
        "model_bytes": sum(parameter.nbytes for parameter in base.parameters()),
    }
    title = f"{DEPTH} blocks of {arguments.hidden}, {arguments.rows} x {arguments.length} tokens, {threads} threads"
    models = {name: f"{row[name] / row['model_bytes']:.2f}" for name in ("plain_bytes", "ours_bytes")}
    print_table(
        title,
        ["", "step s", "untouched s", "parameters and gradients, models"],
        [
            ["plain", f"{row['plain_s']:.3f}", "within", models["plain_bytes"]],
            ["ours", f"{row['ours_s']:.3f}", f"{row['untouched_s']:.3f}", models["ours_bytes"]],
        ],
    )
    print(
        f"\nratio {row['ratio']} (median of {arguments.pairs} pairs; the step alone {row['step_ratio']}); kept of the "
        f"untouched model, on the CPU: {row['frozen_bytes_a_step'] / 1e6:.2f} MB a step"
    )
    write_rows(arguments.json, [row])


if __name__ == "__main__":
    main()
