"""Shards of rows whose frozen parts are random and known, and what builds and looks at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from grun.cache.shard import FrozenRow, Shard
from grun.cache.store import PrefixStore, Share
from grun.data.encoding import EncodedRow

PROMPTS = [(1, 2, 3), (4,), (5, 6, 7, 8)]
ROWS = [EncodedRow(PROMPTS[number % 3], tuple(range(10, 11 + number))) for number in range(6)]
WIDTH, HEADS, HEAD_SIZE = 16, 2, 4

Sizes = tuple[int, torch.dtype]
"""Blocks above, and the type of states and prompts."""
USUAL: Sizes = (2, torch.float32)


def expected(row: EncodedRow, sizes: Sizes = USUAL) -> FrozenRow:
    """Random parts, the same for the same row; a prompt's the same for the same prompt."""
    above, dtype = sizes
    of_prompt = torch.Generator().manual_seed(sum(row.prompt_ids))
    of_row = torch.Generator().manual_seed(1000 * sum(row.prompt_ids) + sum(row.answer_ids))
    shape = (len(row.prompt_ids) - 1, above, 2, HEADS, HEAD_SIZE)
    return FrozenRow(
        torch.randn(1 + len(row.answer_ids), WIDTH, generator=of_row).to(dtype),
        torch.randn(shape, generator=of_prompt).to(dtype),
        torch.randn(len(row.answer_ids), generator=of_row),
    )


def parts_of(row: FrozenRow) -> dict[str, Tensor]:
    return {"states": row.states, "prompt": row.prompt, "reference": row.reference}


def shard_of(rows: Sequence[EncodedRow], sizes: Sizes = USUAL) -> Shard:
    parts = [expected(row, sizes) for row in rows]
    first = {row.prompt_ids: part.prompt for row, part in zip(rows, parts, strict=True)}
    return Shard(
        rows=list(rows),
        states=torch.cat([part.states for part in parts]),
        prompts=torch.cat(list(first.values())),
        reference=torch.cat([part.reference for part in parts]),
        columns=[len(part.states) for part in parts],
        prompt_of=[list(first).index(row.prompt_ids) for row in rows],
        prompt_tokens=[len(prompt) for prompt in first.values()],
    )


class Builder:
    """Builds shards of a few rows, and remembers what it was asked for."""

    def __init__(self, per_shard: int = 2, sizes: Sizes = USUAL) -> None:
        self.asked: list[list[EncodedRow]] = []
        self.per_shard, self.sizes = per_shard, sizes

    def __call__(self, rows: list[EncodedRow], share: Share = list) -> Iterator[Shard]:
        self.asked.append(rows)
        for piece in share([rows[start : start + self.per_shard] for start in range(0, len(rows), self.per_shard)]):
            yield shard_of(piece, self.sizes)


def assert_right(store: PrefixStore, rows: Sequence[EncodedRow] = ROWS, sizes: Sizes = USUAL) -> None:
    for row in rows:
        wanted = parts_of(expected(row, sizes))
        for name, found in parts_of(store[row]).items():
            assert found.dtype == wanted[name].dtype and torch.equal(found, wanted[name]), name
            assert found.is_contiguous()


def shards_in(store: PrefixStore) -> list[Path]:
    assert store.folder is not None
    return sorted(store.folder.glob("*.safetensors"))


def flip(file: Path, position: int, bit: int = 0x10) -> None:
    """Change a bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= bit
    file.write_bytes(data)


def position_of(tensor: Tensor, file: Path) -> int:
    """Offset of a tensor's first byte in a file."""
    place = file.read_bytes().find(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert place > 0
    return place
