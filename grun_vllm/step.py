"""What the tokens of one pass are: whose, where in their sequences, on which pages of the key/value cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

Where = Literal["ends", "answers", "all"]
"""Tokens of a pass, each set within the next one: last ones of prompts, those and what comes after them, all."""
WIDER: tuple[Where, ...] = ("ends", "answers", "all")


@dataclass
class Step:
    """Tokens of one pass, those of one sequence side by side, in its order. Arrays are on the host."""

    starts: np.ndarray
    """First token of each sequence in the pass, and the number of all tokens: [sequences + 1]."""
    past: np.ndarray
    """Tokens of each sequence before this pass."""
    prompt: np.ndarray
    """Tokens of each sequence's prompt."""
    table: np.ndarray
    """Pages of each sequence, [sequences, most pages of one]."""
    page_size: int
    """Tokens on a page."""
    device: torch.device
    """Where states are."""
    ids: Tensor | None = None
    """Tokens, [tokens]; None where the model is given embeddings."""
    _within: dict[tuple[Where, Where], Tensor] = field(default_factory=dict)
    _indices: dict[Where, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, runner: Any, ids: Tensor | None) -> Self:
        """From vLLM's model runner in the midst of `execute_model`, and the tokens that it gives to the model."""
        batch = runner.input_batch
        count = batch.num_reqs
        starts = runner.query_start_loc.np[: count + 1].astype(np.int64)
        pages = batch.block_table[0]
        return cls(
            starts=starts,
            past=batch.num_computed_tokens_cpu[:count].astype(np.int64),
            prompt=batch.num_prompt_tokens[:count].astype(np.int64),
            table=pages.block_table.np[:count],
            page_size=pages.block_size,
            device=runner.device,
            ids=None if ids is None else ids[: starts[-1]],
        )

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.starts[-1])

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.past)

    @cached_property
    def sequence(self) -> np.ndarray:
        """Which sequence each token belongs to."""
        return np.repeat(np.arange(self.sequences), np.diff(self.starts))

    @cached_property
    def position(self) -> np.ndarray:
        """Place of each token in its sequence."""
        return np.arange(self.tokens) - self.starts[self.sequence] + self.past[self.sequence]

    @cached_property
    def ends(self) -> np.ndarray:
        """Whether a token is the last of its prompt."""
        return self.position == self.prompt[self.sequence] - 1

    @cached_property
    def answers(self) -> np.ndarray:
        """Whether a token is the last of its prompt, or comes after it."""
        return self.position >= self.prompt[self.sequence] - 1

    @cached_property
    def goes_on(self) -> np.ndarray:
        """Whether a sequence has tokens before this pass."""
        return self.past > 0

    @cached_property
    def before(self) -> np.ndarray:
        """Page of the token before a sequence's first one here; any page where there is none."""
        return self.page(np.arange(self.sequences), np.maximum(self.past - 1, 0))

    @cached_property
    def kept(self) -> np.ndarray:
        """Whether a token is the newest one on its page when the pass is over: what gates know there is kept."""
        last = np.zeros(self.tokens, dtype=bool)
        last[self.starts[1:] - 1] = True
        return last | (self.position % self.page_size == self.page_size - 1)

    @cached_property
    def rounds(self) -> int:
        """1, and how many sequences in a row begin with a page that the next one fills in this very pass.

        vLLM's prefix caching shares pages from when they are handed out on.
        """
        full = np.flatnonzero(self.position % self.page_size == self.page_size - 1)
        filled = dict(zip(self.page_of(full).tolist(), self.sequence[full].tolist(), strict=True))
        begins = np.flatnonzero(self.goes_on & (self.past % self.page_size == 0)).tolist()
        source = {one: filled[page] for one in begins if (page := int(self.before[one])) in filled}
        most, rows = 1, list(source)
        while rows:
            most, rows = most + 1, [source[row] for row in rows if source[row] in source]
        return most

    def page(self, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Pages of tokens, by sequence and place in it."""
        return self.table[sequence, position // self.page_size].astype(np.int64)

    def slot(self, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Places of tokens on all pages one after another, by sequence and place in it."""
        return self.page(sequence, position) * self.page_size + position % self.page_size

    def page_of(self, tokens: np.ndarray) -> np.ndarray:
        """Pages of tokens of this pass."""
        return self.page(self.sequence[tokens], self.position[tokens])

    def put(self, values: np.ndarray) -> Tensor:
        """An array where states are."""
        return torch.from_numpy(values).to(self.device)

    def mask(self, where: Where) -> np.ndarray:
        """Which tokens, bool."""
        return np.ones(self.tokens, dtype=bool) if where == "all" else getattr(self, where)

    def index(self, where: Where) -> Tensor:
        """Which tokens, by number, where states are."""
        if where not in self._indices:
            self._indices[where] = self.put(np.flatnonzero(self.mask(where)))
        return self._indices[where]

    def within(self, where: Where, wider: Where) -> Tensor:
        """Of the tokens `wider`, which are `where`: bool, where states are."""
        if (where, wider) not in self._within:
            self._within[where, wider] = self.put(self.mask(where)[self.mask(wider)])
        return self._within[where, wider]

    @cached_property
    def sequences_of(self) -> Tensor:
        """`sequence`, where states are."""
        return self.put(self.sequence)
