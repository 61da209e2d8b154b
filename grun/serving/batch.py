"""Rows that one model answers together: they join and leave between steps.

Rows are padded on the left, so that the last column is every row's newest token. A joining prompt is run by itself, and
its keys and values, and what gates remember of it, are put below those of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from grun.data.encoding import collate_prompts
from grun.evaluation.generation import DROPPED
from grun.evaluation.scoring import base_of, takes_prompt_lengths
from grun.loading.models import context_length
from grun.method.gate_state import GateState, follow

ROOM = 32
"""Columns that keys and values have in reserve, so that a step writes one instead of copying all."""


class Row(Protocol):
    """What a batch knows of an answer."""

    prompt: tuple[int, ...]
    ids: list[int]
    """Tokens of the answer so far, at least one once the prompt has been run."""
    ended: bool


class Batch:
    """Rows of one model."""

    def __init__(self, model: Any, pad_id: int) -> None:
        """`model`: a transformers causal model that `needs_generate` has no reason against, or one with edits."""
        self.rows: list[Any] = []
        """As `Row`; those that have ended are taken out when there are enough of them."""
        self.model = model
        base = base_of(model)
        self._pad_id = pad_id
        self._config = base.config
        self._last = context_length(base) - 1
        self._device = base.device
        self._takes_lengths = takes_prompt_lengths(model)
        keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._more: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}
        self._cache: Any = None
        self._counts = torch.zeros(0, dtype=torch.long, device=self._device)
        """Tokens of each row that are in the cache."""

    def begin(self, rows: Sequence[Row]) -> Tensor:
        """Run the prompts of further rows, which join; logits of their first tokens, [rows, vocabulary]."""
        batch = collate_prompts([row.prompt for row in rows], self._pad_id).to(self._device)
        positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
        lengths = {"prompt_lengths": batch.prompt_lengths} if self._takes_lengths else {}
        cache: Any = DynamicCache(config=self._config)
        logits = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions,
            past_key_values=cache, **lengths, **self._more,
        ).logits[:, -1]  # fmt: skip
        going_on = self._going_on()
        parts = [(cache, torch.arange(len(rows), device=self._device))]
        counts = batch.prompt_lengths
        if len(going_on):
            parts.insert(0, (self._cache, going_on))
            counts = torch.cat((self._counts[going_on], counts))
        self.rows = [*(row for row in self.rows if not row.ended), *rows]
        self._put(parts, counts)
        return logits

    @property
    def gate_state(self) -> GateState | None:
        """What gates have read of the rows, in their order; None where nothing remembers."""
        return getattr(self._cache, "gate_state", None)

    def step(self) -> Tensor:
        """Run the newest token of every row; logits of the next ones, [rows, vocabulary]."""
        going_on = self._going_on()
        if len(self.rows) - len(going_on) >= DROPPED * len(self.rows):
            self.rows = [row for row in self.rows if not row.ended]
            self._put([(self._cache, going_on)], self._counts[going_on])
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self._device)
        at = self._counts.clamp_max(self._last).unsqueeze(1)  # a row that has ended may go on for some steps
        self._counts = self._counts + 1
        columns = self._cache.get_seq_length() + 1
        mask = torch.arange(columns, device=self._device) >= columns - self._counts.unsqueeze(1)
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=at, past_key_values=self._cache, **self._more
        ).logits[:, -1]
        return logits

    def _going_on(self) -> Tensor:
        places = [place for place, row in enumerate(self.rows) if not row.ended]
        return torch.tensor(places, dtype=torch.long, device=self._device)

    def _put(self, parts: Sequence[tuple[Any, Tensor]], counts: Tensor) -> None:
        """Go on with these rows of these caches, which hold `counts` tokens each."""
        self._counts = counts
        self._cache = _joined(parts, int(counts.max()))


def _joined(parts: Sequence[tuple[Any, Tensor]], columns: int) -> Cache:
    """A cache with the rows numbered in each part, of each its last `columns`, padded in front where it has fewer."""
    rows = sum(len(places) for _, places in parts)
    layers: list[Any] = []
    for index, like in enumerate(parts[0][0].layers):
        room = [one.new_zeros(rows, one.shape[1], columns + ROOM, one.shape[3]) for one in (like.keys, like.values)]
        start = 0
        for cache, places in parts:
            layer, end = cache.layers[index], start + len(places)
            for into, held in zip(room, (layer.keys, layer.values), strict=True):
                width = min(columns, held.shape[2])
                newest = held[:, :, held.shape[2] - width :]
                into[start:end, :, columns - width : columns] = newest[places.to(held.device)]
            start = end
        layers.append(RoomyLayer(room[0], room[1], columns))
    joined: Any = Cache(layers=layers)
    joined.prompt_ended = True
    states: list[GateState] = []
    for cache, places in parts:
        state: GateState | None = getattr(cache, "gate_state", None)
        if state is not None:
            state.fit(cache.get_seq_length())
            state.select(places)
            states.append(state)
    if states:
        follow(joined, GateState.joined(states, columns))
    return joined


class RoomyLayer(DynamicLayer):
    """Keys and values of a block with room behind them."""

    def __init__(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """Of buffers [rows, heads, any, size] whose first `columns` are filled."""
        super().__init__()
        self._room = [keys, values]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show(columns)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values of further columns behind; all that there are."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._room[0].shape[2]:
            reserve = key_states.new_zeros(*key_states.shape[:2], end - start + ROOM, key_states.shape[3])
            self._room = [torch.cat((held[:, :, :start], reserve), dim=2) for held in self._room]
        for held, new in zip(self._room, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        return self._show(end)

    def _show(self, columns: int) -> tuple[Tensor, Tensor]:
        keys, values = (held[:, :, :columns] for held in self._room)
        self.keys, self.values = keys, values
        return keys, values
