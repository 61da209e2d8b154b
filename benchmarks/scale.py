"""Memory and time of unlearning large models by counted arithmetic: the table of docs/scale.md; nothing is run.

    python benchmarks/scale.py

Shapes are those of Llama 3.1, weights in bfloat16, rows those of TOFU forget05 with retain95 as 40 epochs draw them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, not installed

from grun.method.model import resolve_blocks

BYTES = 2
"""Of a value in bfloat16."""
PROMPT, ANSWER = 22, 46
"""Tokens of a mean row, such that the cache has the 1.32 MB a row that were measured at 8B."""
ROWS = {"published": 3563, "pooled": 200}
"""Rows that are frozen: forget and retain rows; the pooled design trains on forget rows alone."""
READS = 5
"""Times that the blocks up to the first edit are read under NPO: four to compare the engines, one to build."""
DISK, RATE = 3e9, 747e12
"""Bytes a second from files, and multiply-adds times two a second: a product of large matrices, measured on an H200."""
EDITED = {"published": None, "pooled": [-4, -3, -2, -1]}
"""Blocks by design; None: as deep as published."""


class Shape(NamedTuple):
    """What decides the size of a Llama."""

    depth: int
    width: int
    inner: int
    keys: int
    """Width of keys, and of values."""
    vocabulary: int

    @property
    def block(self) -> int:
        """Weights of a block, norms left out."""
        return 2 * self.width * (self.width + self.keys) + 3 * self.width * self.inner

    @property
    def rest(self) -> int:
        """Weights of the embeddings and the head."""
        return 2 * self.width * self.vocabulary


SHAPES = {
    "8B": Shape(32, 4096, 14336, 1024, 128256),
    "70B": Shape(80, 8192, 28672, 1024, 128256),
    "405B": Shape(126, 16384, 53248, 1024, 128256),
}


def counted(shape: Shape, design: str) -> dict[str, float]:
    """GB of weights and of the cache, and seconds of what is counted."""
    first = min(resolve_blocks(EDITED[design], shape.depth))
    above, rows = shape.depth - 1 - first, ROWS[design]
    cache = rows * BYTES * ((PROMPT - 1) * above * 2 * shape.keys + ANSWER * shape.width)
    passes = shape.block * (shape.depth * PROMPT + (first + 1) * ANSWER)
    step = 32 if design == "published" else 16
    return {
        "weights": BYTES * (shape.depth * shape.block + shape.rest) / 1e9,
        "trained": BYTES * (above * shape.block + shape.rest) / 1e9,
        "block": BYTES * shape.block / 1e9,
        "cache": cache / 1e9,
        "read": READS * BYTES * (first + 1) * shape.block / DISK,
        "build": 2 * rows * passes / RATE,
        "step": 2 * 2 * step * ANSWER * (above * shape.block + shape.rest / 2) / RATE,
    }


def main() -> None:
    """Print the table."""
    print("| model | design | weights | stay to train | a block | cache | reading | build | a step |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, shape in SHAPES.items():
        for design in ROWS:
            found = counted(shape, design)
            sizes = " | ".join(f"{found[key]:,.1f} GB" for key in ("weights", "trained", "block", "cache"))
            times = f"{found['read']:,.0f} s | {found['build']:,.1f} s | {1000 * found['step']:,.1f} ms"
            print(f"| {name} | {design} | {sizes} | {times} |")


if __name__ == "__main__":
    main()
