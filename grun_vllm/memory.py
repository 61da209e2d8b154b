"""What gates remember of the tokens of earlier passes, by page of vLLM's key/value cache.

Of each page is kept what was known at its newest token, and of each token its state where windows are made of those.
A pass goes on after the newest token of a page, or begins with a page, and a page that sequences share is full: so
chunked prefill, preemption and sequences that come and go need nothing of their own, and prefix caching does only where
a page is filled in the pass in which another sequence begins with it (`Step.rounds`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from grun_vllm.step import Step


class PagedMemory:
    """Numbers of each page, or of each token on one, by what they are."""

    def __init__(
        self, widths: Mapping[Hashable, int], rows: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """`widths`: numbers of a row; `rows`: pages, or tokens on them (`Step.slot`)."""
        self._kept = {key: torch.zeros(rows, width, device=device, dtype=dtype) for key, width in widths.items()}

    def at(self, key: Hashable, rows: Tensor) -> Tensor:
        """What is known: rows [...] -> [..., width]."""
        return self._kept[key][rows]

    def before(self, key: Hashable, step: Step) -> Tensor:
        """What was known before a pass, [sequences, width] by page; anything where a sequence begins with it."""
        return self.at(key, step.put(step.before))

    def keep(self, key: Hashable, rows: Tensor, values: Tensor) -> None:
        """Note what is known now: rows [any], values [any, width]."""
        kept = self._kept[key]
        kept.index_copy_(0, rows, values.to(kept.dtype))


class Turns:
    """Where users' turns begin. The ids of all tokens on pages are remembered, on the host."""

    def __init__(self, resets: Sequence[tuple[int, ...]], tokens: int) -> None:
        """`resets`: token ids that begin a turn, at the last of which it begins; `tokens` on all pages."""
        self._resets = resets
        self._ids = np.full(tokens if resets else 0, -1, dtype=np.int32)

    def of(self, step: Step) -> dict[tuple[int, ...], np.ndarray]:
        """By the ids that begin them, the tokens at which turns begin, bool; remembers those of the pass."""
        if self._resets:
            ids = -1 if step.ids is None else step.ids.cpu().numpy()  # none where a model is given embeddings
            self._ids[step.slot(step.sequence, step.position)] = ids
        return {reset: self.begun(step, reset, step.sequence, step.position) for reset in self._resets}

    def begun(self, step: Step, reset: tuple[int, ...], sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Whether turns begin at these places of sequences, bool; both broadcast to [...]."""
        found = np.full(np.broadcast_shapes(sequence.shape, position.shape), bool(reset))
        for back, token in enumerate(reversed(reset)):
            at = position - back
            found &= (at >= 0) & (self._ids[step.slot(sequence, np.maximum(at, 0))] == token)
        return found
