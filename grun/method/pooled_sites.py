"""Where a pooled gate is asked in a forward pass, and what it reads there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grun.errors import ModelError
from grun.method.actions import Act
from grun.method.gate_state import GateState, Read
from grun.method.pooling import of_blocks, pooled_at, windows_at
from grun.method.rules import WINDOWS
from pyvene_custom import Sites

PLACES = "places"
"""What `PooledSites.places` go by among what a cache keeps of gates."""


@dataclass
class PooledSites(Sites):
    """Sites of a pass in which one gate for all edits reads pooled states; columns read are where it is asked."""

    turns: Tensor = field(default_factory=lambda: torch.empty(0))
    """See `pooled_at`; [batch, columns]."""
    memory: GateState | None = None
    """States of earlier passes."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """By block, what this pass reads, until it is over."""
    summaries: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """By block and pool, summaries at the last column, where every token is asked."""
    features: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """By block and pool, features where gates are asked, [batch, positions read, feature size]."""

    spelled: Tensor | None = None
    """Of a gate by keywords, at which columns one ends, bool [batch, columns, 1]: what it reads in place of states."""
    places: Tensor | None = None
    """Tokens between each column and the last one of the prompt before it, 0 there and -1 where none has ended, int64
    [batch, columns]; None: nobody asks."""
    answered: Tensor | None = None
    """With `places`: which columns lie from the last token of the prompt on, bool [batch, columns]."""
    logits_to_keep: int | Tensor = 0
    """Columns that logits are made of, as transformers has it: so many last ones, 0: all, or those named."""
    given: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of several gates, by what tells them apart, their logits there and those in force."""

    def take(self, block: int, hidden: Tensor, pool: str) -> None:
        """Pool what a block gives, [batch, columns, hidden size], once for all gates that pool it so.

        What is spelled takes its place as a state of one number, 1 or 0, which its root mean square leaves as it is.
        """
        hidden = hidden if self.spelled is None else self.spelled.to(hidden)
        self.states[block] = hidden
        if not self.read.shape[1] or (block, pool) in self.features:
            return
        asked = None if self.everywhere else self.read.to(hidden.device)
        memory, turns = self.memory, self.turns
        if pool == WINDOWS:
            assert asked is not None
            if memory is not None and block in memory.states:
                asked = torch.where(asked < 0, asked, asked + memory.columns)
                hidden, turns = torch.cat((memory.whole(block).to(hidden), hidden), dim=1), memory.with_turns(turns)
            self.features[block, pool] = windows_at(hidden, turns.to(hidden.device), asked)
            return
        before = None if memory is None else memory.summary(block, pool)
        features, summary = pooled_at(hidden, turns.to(hidden.device), before, asked, pool)
        self.features[block, pool] = features
        if asked is None:
            self.summaries[block, pool] = summary

    def acted(self, logits: Tensor, opening: Tensor, threshold: float, act: Act) -> Tensor | None:
        """Logits after an action in open rows, from the token after the prompt on; None where there are none of those.

        Args:
            logits: as the model's output embeddings give them, [rows, columns or the last ones of them, vocabulary].
            opening: gate logit in force, [rows, 1].
            threshold: probability from which on a gate is open.
            act: the action.

        Raises:
            ModelError: the logits are of columns that cannot be told.
        """
        assert self.places is not None and self.answered is not None
        is_open = torch.sigmoid(opening) >= threshold
        open_places = self.places.masked_fill(~(self.answered & is_open), -1).to(logits.device)
        kept = self.logits_to_keep
        if isinstance(kept, Tensor):
            open_places = open_places[:, kept.to(logits.device)]
        elif kept:
            open_places = open_places[:, -kept:]
        if logits.shape[:2] != open_places.shape:
            raise ModelError(
                f"logits of shape {list(logits.shape)} in a pass of {list(self.places.shape)} rows and tokens: which "
                "of them they belong to is unknown, so a refusal cannot take their place"
            )
        chosen = open_places >= 0
        if not bool(chosen.any()):
            return None
        changed = logits.clone()
        changed[chosen] = act(logits[chosen], open_places[chosen]).to(logits.dtype)
        return changed

    def joined(self, blocks: Sequence[int], pool: str) -> Tensor:
        """Features of several blocks; see `of_blocks`."""
        return of_blocks([self.features[block, pool] for block in blocks], pool)

    def let_go(self) -> Read:
        """What memory takes of a pass that is over; of it nothing stays here that leads to its states."""
        read = self.turns, self.states, self.summaries
        self.memory, self.states, self.summaries = None, {}, {}
        if any(features.requires_grad for features in self.features.values()):
            self.features, self.given = {}, {}
        return read


def pooled_in(sites: Sites | None) -> list[PooledSites]:
    """Of sites, or of those of several rules (`StackSites`), the ones of pooled gates."""
    several = getattr(sites, "by_position", None)
    return [one for one in (several.values() if several is not None else [sites]) if isinstance(one, PooledSites)]
