"""Frozen rows on the device that trains, where they fit: a step takes its own by index, and copies nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from grun.cache.attention import Parts, parts_of
from grun.cache.shard import FrozenRow
from grun.cache.store import FrozenRows
from grun.data.encoding import EncodedRow
from grun.runtime.memory import free_memory

log = logging.getLogger(__name__)

SHARE = 0.6
"""Of the device's free memory, what rows may take; the rest is for the steps."""


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; 0 where rows had better stay in main memory: on the CPU they lie there."""
    return (free_memory(device) or 0) if device.type == "cuda" else 0


def resident(frozen: FrozenRows, rows: Sequence[EncodedRow], device: torch.device) -> FrozenRows:
    """`frozen`, or the same of `rows` on `device` where they fit."""
    free = free_bytes(device)
    if not free:
        return frozen
    found = {row: frozen[row] for row in rows}
    prompts = {row.prompt_ids: one.prompt.nbytes for row, one in found.items()}
    size = sum(one.states.nbytes + one.reference.nbytes for one in found.values()) + sum(prompts.values())
    if not found or size > SHARE * free:
        return frozen
    log.info("frozen rows are kept on %s: %.3f GB", device, size / 1e9)
    return Resident(found, device)


class Resident(dict[EncodedRow, FrozenRow]):
    """Frozen rows one after another in three tensors of a device, and views of each."""

    def __init__(self, rows: dict[EncodedRow, FrozenRow], device: torch.device) -> None:
        """Copy `rows` there; those of one prompt share its keys and values."""
        super().__init__()
        prompts: dict[tuple[int, ...], Tensor] = {row.prompt_ids: one.prompt for row, one in rows.items()}
        self.states, states_at = _joined([one.states for one in rows.values()], device)
        self.prompts, prompts_at = _joined(list(prompts.values()), device)
        self.reference, reference_at = _joined([one.reference for one in rows.values()], device)
        self.without_reference = {row for row, one in rows.items() if bool(one.reference.isnan().any())}
        """Rows whose log-probabilities under the untouched model are not in the cache."""
        number = {prompt: index for index, prompt in enumerate(prompts)}
        self._at: dict[EncodedRow, tuple[slice, slice, slice]] = {}
        for row, states, reference in zip(rows, states_at, reference_at, strict=True):
            self._at[row] = at = states, prompts_at[number[row.prompt_ids]], reference
            self[row] = FrozenRow(self.states[at[0]], self.prompts[at[1]], self.reference[at[2]])

    def of(self, rows: Sequence[EncodedRow]) -> Taking:
        """What takes `rows`, one after another."""
        return Taking(self, [self._at[row] for row in rows])


class Taking:
    """Indices of some rows of a Resident, on the CPU until `parts` are moved."""

    def __init__(self, resident: Resident, at: Sequence[tuple[slice, slice, slice]]) -> None:
        """`at`: places of the states, the prompt and the reference of each row."""
        self._resident = resident
        self._states = torch.cat([torch.arange(one.start, one.stop) for one, _, _ in at])
        self._reference = torch.cat([torch.arange(one.start, one.stop) for _, _, one in at])
        longest = max(one.stop - one.start for _, one, _ in at)
        column = torch.arange(-longest, 0)
        ends = torch.tensor([one.stop for _, one, _ in at]).unsqueeze(1)
        first = torch.tensor([one.start for _, one, _ in at]).unsqueeze(1)
        self._prompts = (ends + column).maximum(first).flatten() if longest else None
        """[rows * longest]; what stands in padding is masked."""
        self._shape = (len(at), longest)

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        return parts_of(self, "_states", "_reference", "_prompts")

    def states(self) -> Tensor:
        """States of the rows, [tokens, width]."""
        return self._resident.states.index_select(0, self._states)

    def prompts(self) -> Tensor | None:
        """Keys and values padded on the left, [rows, longest, blocks above, 2, heads, head size]; None: none."""
        kept = self._resident.prompts
        if self._prompts is None or kept.dim() < 2 or not kept.shape[1]:
            return None
        return kept.index_select(0, self._prompts).unflatten(0, self._shape)

    def reference(self) -> Tensor:
        """Log-probabilities of the answer tokens under the untouched model, [answer tokens]."""
        return self._resident.reference.index_select(0, self._reference)


def _joined(parts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[slice]]:
    """Tensors one after another on `device`, copied one by one (no second whole exists), and where each stands."""
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    at = [slice(end - len(part), end) for end, part in zip(ends, parts, strict=True)]
    whole = parts[0].new_empty(ends[-1], *parts[0].shape[1:], device=device)
    for place, part in zip(at, parts, strict=True):
        whole[place].copy_(part)
    return whole, at
