"""What gates remember of the tokens of earlier passes, by page of vLLM's key/value cache.

Of each page is kept what was known at its newest token. A pass goes on after the newest token of a page, or begins with
a page, and a page that sequences share is full: so chunked prefill, prefix caching, preemption and sequences that come
and go need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from grun_vllm.step import Step


class PagedMemory:
    """Numbers of each page, by what they are."""

    def __init__(self, widths: Mapping[Hashable, int], pages: int, device: torch.device) -> None:
        """`widths`: numbers of a page."""
        self._kept = {key: torch.zeros(pages, width, device=device) for key, width in widths.items()}

    def before(self, key: Hashable, step: Step) -> Tensor:
        """What was known before a pass, [sequences, width]; anything where a sequence begins with it."""
        return self._kept[key][step.put(step.before)]

    def keep(self, key: Hashable, pages: Tensor, values: Tensor) -> None:
        """Note what is known now: pages [any], values [any, width]."""
        self._kept[key].index_copy_(0, pages, values)


def bytes_of_page(widths: Mapping[Hashable, int]) -> int:
    """Memory that a page takes."""
    return 4 * sum(widths.values())


class Turns:
    """Where users' turns begin. Of each page the last tokens are remembered, on the host."""

    def __init__(self, resets: Sequence[tuple[int, ...]], pages: int) -> None:
        """`resets`: token ids that begin a turn, at the last of which it begins."""
        self._resets = resets
        self._count = max((len(reset) for reset in resets), default=1) - 1
        self._tails = np.full((pages, self._count), -1, dtype=np.int64)

    def begun(self, step: Step) -> dict[tuple[int, ...], np.ndarray]:
        """By the ids that begin them, the tokens at which turns begin, bool; none where a model is given embeddings."""
        if not self._resets or step.ids is None:
            return {}
        ids = step.ids.cpu().numpy().astype(np.int64)
        back = [ids, *(self._back(step, ids, count) for count in range(1, self._count + 1))]
        found = {}
        for reset in self._resets:
            found[reset] = np.logical_and.reduce([back[n] == token for n, token in enumerate(reversed(reset))])
        if self._count:
            kept = np.flatnonzero(step.kept)
            self._tails[step.page_of(kept)] = np.stack([one[kept] for one in reversed(back[:-1])], axis=1)
        return found

    def _back(self, step: Step, ids: np.ndarray, count: int) -> np.ndarray:
        """Token so many places before each, -1 where there is none."""
        found = np.roll(ids, count)
        local = np.arange(step.tokens) - step.starts[step.sequence]
        outside = np.flatnonzero(local < count)
        sequence = step.sequence[outside]
        earlier = self._tails[step.before[sequence], self._count - (count - local[outside])]
        found[outside] = np.where(step.goes_on[sequence], earlier, -1)
        return found
