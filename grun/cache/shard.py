"""Frozen rows as a few large tensors, and the file that holds them: whole or absent, with a checksum for every row."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
from torch import Tensor

from grun.data.encoding import EncodedRow
from grun.runtime.files import write_bytes

FORMAT_VERSION = "1"
SHARD_BYTES = 2**26
"""Size at which a shard is closed."""


@dataclass
class FrozenRow:
    """What of one row never changes while an edit is trained."""

    states: Tensor
    """Un-edited output of the first edited block at the last prompt token and what follows, [columns, hidden size]."""
    prompt: Tensor
    """Keys and values of the prompt tokens before the last, shared by rows of one prompt, [tokens, blocks above, 2,
    heads, head size]."""
    reference: Tensor
    """Log-probability of each answer token under the untouched model, nats, [answer tokens]."""


@dataclass
class Shard:
    """Some rows as a few large tensors, the unit that is built, written and read; ValueError if they do not agree."""

    rows: list[EncodedRow]
    states: Tensor
    """States of the rows one after another, [sum of columns, hidden size]."""
    prompts: Tensor
    """Distinct prompts one after another, [sum of tokens, blocks above, 2, heads, head size]."""
    reference: Tensor
    """References of the rows one after another, float32 or float64 [sum of answer tokens]."""
    columns: list[int]
    """Columns of each row."""
    prompt_of: list[int]
    """Index of each row's prompt among the distinct ones."""
    prompt_tokens: list[int]
    """Tokens of each distinct prompt."""

    def __post_init__(self) -> None:
        answers = [len(row.answer_ids) for row in self.rows]
        self._states_at = _slices(self.columns)
        self._prompts_at = _slices(self.prompt_tokens)
        self._reference_at = _slices(answers)
        if not len(self.rows) == len(self.columns) == len(self.prompt_of):
            raise ValueError("a shard needs as many columns and prompt_of as rows")
        if any(not 0 <= prompt < len(self.prompt_tokens) for prompt in self.prompt_of):
            raise ValueError("a row of a shard names a prompt that is not there")
        for name, lengths in (("states", self.columns), ("prompts", self.prompt_tokens), ("reference", answers)):
            shape = tuple(getattr(self, name).shape)
            if min(lengths, default=0) < 0 or shape[:1] != (sum(lengths),):
                raise ValueError(f"{name} of a shard have shape {shape}, their lengths add up to {sum(lengths)}")

    @classmethod
    def without_prompts(cls, rows: list[EncodedRow], states: Tensor, reference: Tensor, columns: list[int]) -> Shard:
        """Rows of which nothing is kept of prompts alone."""
        return cls(rows, states, states.new_zeros(0), reference, columns, [0] * len(rows), [0])

    def row(self, index: int) -> FrozenRow:
        """Views of one row's part."""
        return FrozenRow(
            self.states[self._states_at[index]],
            self.prompts[self._prompts_at[self.prompt_of[index]]],
            self.reference[self._reference_at[index]],
        )

    def select(self, indices: Sequence[int]) -> Shard:
        """A copy of some rows and of the prompts that they need."""
        prompts = list(dict.fromkeys(self.prompt_of[index] for index in indices))
        place = {prompt: new for new, prompt in enumerate(prompts)}
        return Shard(
            rows=[self.rows[index] for index in indices],
            states=_copy(self.states, [self._states_at[index] for index in indices]),
            prompts=_copy(self.prompts, [self._prompts_at[prompt] for prompt in prompts]),
            reference=_copy(self.reference, [self._reference_at[index] for index in indices]),
            columns=[self.columns[index] for index in indices],
            prompt_of=[place[self.prompt_of[index]] for index in indices],
            prompt_tokens=[self.prompt_tokens[prompt] for prompt in prompts],
        )

    def bytes_of(self, indices: Iterable[int]) -> int:
        """Bytes of some rows and of the prompts that they need."""
        rows = {index: self.row(index) for index in indices}
        prompts = {self.prompt_of[index]: row.prompt.nbytes for index, row in rows.items()}
        return sum(row.states.nbytes + row.reference.nbytes for row in rows.values()) + sum(prompts.values())

    def prompt_checksum(self, prompt: int) -> int:
        """CRC-32 of a distinct prompt's type, shape and bytes."""
        return _crc(self.prompts[self._prompts_at[prompt]])

    def row_checksum(self, index: int, of_prompt: int) -> int:
        """CRC-32 of a row's token ids, states and reference, and of its prompt's checksum."""
        row, parts = self.rows[index], self.row(index)
        total = zlib.crc32(repr((of_prompt, len(row.prompt_ids))).encode())
        total = zlib.crc32(array("q", row.prompt_ids + row.answer_ids), total)
        return _crc(parts.reference, _crc(parts.states, total))


def grouped(pieces: Iterable[Shard]) -> Iterator[Shard]:
    """Neighbors joined to shards of about `SHARD_BYTES`."""
    waiting: list[Shard] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(one.states.nbytes + one.prompts.nbytes for one in waiting) >= SHARD_BYTES:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(shards: Sequence[Shard]) -> Shard:
    """Several shards as one; a prompt that stands in two stays there twice."""
    before = accumulate((len(shard.prompt_tokens) for shard in shards), initial=0)
    return Shard(
        rows=list(chain.from_iterable(shard.rows for shard in shards)),
        states=torch.cat([shard.states for shard in shards]),
        prompts=torch.cat([shard.prompts for shard in shards]),
        reference=torch.cat([shard.reference for shard in shards]),
        columns=list(chain.from_iterable(shard.columns for shard in shards)),
        prompt_of=[start + index for start, shard in zip(before, shards, strict=False) for index in shard.prompt_of],
        prompt_tokens=list(chain.from_iterable(shard.prompt_tokens for shard in shards)),
    )


def _slices(lengths: Iterable[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0))]


def _copy(tensor: Tensor, slices: Sequence[slice]) -> Tensor:
    return torch.cat([tensor[one] for one in slices]) if slices else tensor[:0].clone()


def _crc(tensor: Tensor, start: int = 0) -> int:
    total = zlib.crc32(repr((str(tensor.dtype), tuple(tensor.shape))).encode(), start)
    return zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, total)


class DamagedShard(ValueError):
    """A file holds no usable shard, or is one of another cache."""


@dataclass
class StoredShard:
    """A shard as its file holds it; the large tensors are mapped, and read when they are used."""

    shard: Shard
    row_checksums: list[int]
    prompt_checksums: list[int]

    def intact(self, indices: Iterable[int]) -> list[int]:
        """Those of `indices` whose bytes are what was written."""
        chosen, shard = list(indices), self.shard
        whole = {
            prompt
            for prompt in {shard.prompt_of[index] for index in chosen}
            if shard.prompt_checksum(prompt) == self.prompt_checksums[prompt]
        }
        return [
            index
            for index in chosen
            if (prompt := shard.prompt_of[index]) in whole
            and shard.row_checksum(index, self.prompt_checksums[prompt]) == self.row_checksums[index]
        ]


def write_shard(path: Path, shard: Shard, identity_hash: str) -> None:
    """Write a shard's file, whole or not at all."""
    from safetensors.torch import save

    prompts = [shard.prompt_checksum(prompt) for prompt in range(len(shard.prompt_tokens))]
    numbers = {
        "columns": shard.columns,
        "prompt_of": shard.prompt_of,
        "prompt_tokens": shard.prompt_tokens,
        "prompt_lengths": [len(row.prompt_ids) for row in shard.rows],
        "answer_lengths": [len(row.answer_ids) for row in shard.rows],
        "ids": [token for row in shard.rows for token in row.prompt_ids + row.answer_ids],
        "row_checksums": [shard.row_checksum(i, prompts[shard.prompt_of[i]]) for i in range(len(shard.rows))],
        "prompt_checksums": prompts,
    }
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
    for name in ("states", "prompts", "reference"):
        tensors[name] = getattr(shard, name).detach().cpu().contiguous()
    # To bytes first: `save_file` of safetensors 0.8 has a temporary name and permissions of its own.
    write_bytes(path, save(tensors, metadata=_metadata(identity_hash)))


def _metadata(identity_hash: str) -> dict[str, str]:
    return {"identity": f"{FORMAT_VERSION}:{identity_hash}"}  # one key: safetensors writes several in any order


def read_shard(path: Path, identity_hash: str) -> StoredShard:
    """Map a shard's file; its checksums are not compared yet.

    Raises:
        DamagedShard: it cannot be used.
        OSError: it cannot be opened now.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if file.metadata() != _metadata(identity_hash):
                raise DamagedShard("it is of another format or identity")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        states, prompts, reference = (tensors.pop(name) for name in ("states", "prompts", "reference"))
        numbers: dict[str, list[int]] = {name: tensor.tolist() for name, tensor in tensors.items()}
        lengths = zip(numbers.pop("prompt_lengths"), numbers.pop("answer_lengths"), strict=True)
        each = _slices(length for pair in lengths for length in pair)
        ids = numbers.pop("ids")
        rows = [EncodedRow(tuple(ids[one]), tuple(ids[two])) for one, two in zip(each[::2], each[1::2], strict=True)]
        checksums = numbers.pop("row_checksums"), numbers.pop("prompt_checksums")
        shard = Shard(rows, states, prompts, reference, **numbers)
        if (len(rows), len(shard.prompt_tokens)) != tuple(map(len, checksums)):
            raise DamagedShard("it needs one checksum for each row and prompt")
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise DamagedShard(str(error)) from error
    return StoredShard(shard, *checksums)
