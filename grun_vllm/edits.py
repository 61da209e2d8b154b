"""All edits of a model, on the states of tokens of many sequences side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grun.errors import ModelError
from grun.method.actions import ACTIONS, EDIT
from grun.method.pooling import features, joined, of_blocks, parts, windows_at
from grun.method.rules import POOLS, WINDOWS
from grun.method.stack.combination import edit_weights
from grun.method.stack.gates import starting
from grun.method.stack.group import Acting, GateGroup, Group, Grouped, Kind, enough, grouped
from grun_vllm.adapters import InForce
from grun_vllm.memory import PagedMemory, Turns
from grun_vllm.runs import Join, Runs, accumulated, gone_on, runs_of
from grun_vllm.step import WIDER, Step, Where

PoolKey = tuple[int, str]
"""Block and name of a pool."""
TOGETHER = 2**13
"""Tokens, or one prompt of more, whose windows are made at once."""


def where_written(kind: Kind) -> Where:
    """Tokens at which edits of a kind are written."""
    return {"last_prompt": "ends", "sticky": "answers"}.get(kind.edit_write, "all")  # type: ignore[return-value]


def asked_once(kind: Kind) -> bool:
    """Whether a gate is asked at the end of the prompt alone."""
    return kind.gate_read == "last_prompt"


@dataclass
class Passing:
    """What gates have read in the pass in progress."""

    step: Step
    begins: Mapping[tuple[int, ...], np.ndarray]
    """Where turns begin, by the ids that begin them."""
    runs: dict[Hashable, Runs | None] = field(default_factory=dict)
    summaries: dict[PoolKey, Tensor] = field(default_factory=dict)
    """Of each stretch, [stretches, any]."""
    given: dict[Kind, Tensor] = field(default_factory=dict)
    """Of gates for all edits, logits in force: [sequences, requests] where they are asked once, else [tokens,
    requests]."""

    def runs_over(self, reset: tuple[int, ...], *, every: bool) -> Runs | None:
        """Runs of tokens: of all, or of those of prompts alone, which a gate that is asked once reads."""
        key = (reset, every)
        if key not in self.runs:
            counted = np.ones(self.step.tokens, dtype=bool) if every else ~self.step.answers | self.step.ends
            self.runs[key] = runs_of(self.step, counted, self.begins.get(reset), every=every)
        return self.runs[key]


class Edits:
    """Gates and edits of the requests in force, and what gates remember.

    For each pass `passing`, and within it `apply` behind each block in their order.
    """

    def __init__(self, found: InForce, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Of what is in force, to compute in float32 on `device`; `open` gives it room to remember.

        `dtype`: that of the model's states, in which those are remembered that windows are made of.
        """
        self.found = found
        self.device = device
        self.dtype = dtype
        self._hidden_size = next((one.config.hidden_size for one in found.adapters.values()), 0)
        like = torch.empty(0, dtype=torch.float32, device=device)
        self._act = None
        of_kind = Grouped()
        configs = {name: one.config for name, one in found.adapters.items()}
        if any(config.action != EDIT for config in configs.values()):
            (name, adapter), *_ = found.adapters.items()  # the only one
            config = adapter.config
            self._act = ACTIONS.get(config.action)(config.answer_ids)
            self._least = 0.5 if config.gate_threshold is None else config.gate_threshold
            of_kind.gates[Kind.of(config)] = {name: starting(adapter.weights, "pooled.")}
        else:
            of_kind = grouped({name: (one.config, one.weights) for name, one in found.adapters.items()}, {})
        self._gates: dict[Kind, GateGroup] = {}
        for kind, members in sorted(of_kind.gates.items()):
            self._gates[kind] = GateGroup(kind, self._hidden_size)
            self._gates[kind].append(list(members), list(members.values()), like)
        self._edits: dict[int, list[Group]] = {}
        for (block, kind), members in sorted(of_kind.edits.items()):
            group = Group(kind, self._hidden_size)
            group.append(list(members), list(members.values()), like)
            if kind in self._gates:
                group.places = self._gates[kind].places(group.names)
            self._edits.setdefault(block, []).append(group)
        self._pools: dict[PoolKey, tuple[bool, tuple[int, ...]]] = {}
        """Whether it is asked at every token, and the ids at which it starts again."""
        for kind in self._gates:
            for of in ((block, kind.gate_pool) for block in kind.gate_blocks):
                every = not asked_once(kind) or (of in self._pools and self._pools[of][0])
                self._pools[of] = every, kind.reset_ids
        self._resets = sorted({tuple(one.reset_ids) for one in configs.values() if one.reset_ids})
        self._states_of: dict[Hashable, int] = {of: self._hidden_size for of, pool in self._pools if pool == WINDOWS}
        self.open(0, 0)
        self._passing: Passing | None = None
        self._sampled: Passing | None = None

    # -- what it remembers --------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> set[int]:
        """Blocks behind which something is read or written."""
        return {*self._edits, *(block for block, _ in self._pools)}

    def page_bytes(self, page_size: int) -> int:
        """Memory that gates take for each page of so many tokens of the key/value cache."""
        of_token = self.dtype.itemsize * sum(self._states_of.values())
        return 4 * sum(self._widths().values()) + page_size * of_token

    def _widths(self) -> dict[Hashable, int]:
        widths: dict[Hashable, int] = {}
        for block, groups in self._edits.items():
            for group in groups:
                if group.gates is not None and _remembers(group.kind):
                    widths[block, group.kind] = len(group.names)
        for kind, gates in self._gates.items():
            if _remembers(kind):
                widths[kind] = len(gates.names)
        for block, pool in self._pools:
            if pool not in ("last", WINDOWS):  # of the token itself, and of all tokens
                widths[block, pool] = POOLS[pool] * self._hidden_size + (pool == "mean")
        return widths

    def open(self, pages: int, page_size: int) -> None:
        """Make room for what is remembered of so many pages of so many tokens."""
        tokens = pages * page_size
        self._memory = PagedMemory(self._widths(), pages, self.device)
        self._states = PagedMemory(self._states_of, tokens, self.device, self.dtype)
        self._turns = Turns(self._resets, tokens)

    # -- a pass -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def passing(self, step: Step) -> Iterator[None]:
        """Within the block the model is run on what `step` says."""
        self._passing = self._sampled = Passing(step, self._turns.of(step))
        try:
            yield
        finally:
            self._passing = None

    def apply(self, hidden: Tensor, residual: Tensor | None, block: int) -> None:
        """Edit hidden + residual, [tokens and padding, hidden size] each, in place, behind a block.

        Where a token is edited hidden holds the sum afterwards, and residual 0; elsewhere both stay bit for bit.
        """
        pools = [pool for of, pool in self._pools if of == block]
        if not pools and block not in self._edits:
            return
        if self._passing is None:
            raise ModelError(
                "a pass of the model did not say what its tokens are, so nothing can be edited: GRUN's plugin needs "
                "vLLM's model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)"
            )
        passing = self._passing
        count = passing.step.tokens
        hidden, residual = hidden[:count], None if residual is None else residual[:count]
        states = (hidden if residual is None else hidden + residual).to(torch.float32)
        for pool in pools:
            self._pool(passing, block, pool, states)
        for kind, gates in self._gates.items():
            if block == kind.gate_blocks[-1]:
                passing.given[kind] = self._asked(passing, kind, gates)
        if block in self._edits:
            self._edit(passing, block, states, hidden, residual)

    def acted(self, logits: Tensor) -> Tensor:
        """Logits that are to be sampled from after the pass, [sequences, vocabulary], as an action leaves them.

        Those of a pass come first; whatever else is asked for after it (of prompt tokens) stays as it is.
        """
        passing, self._sampled = self._sampled, None
        if self._act is None or passing is None:
            return logits
        step = passing.step
        if len(logits) != step.sequences:
            raise ModelError(f"{len(logits)} rows of logits for {step.sequences} sequences: which are whose is unknown")
        (opening,) = passing.given.values()
        places = step.position[step.starts[1:] - 1] - step.prompt + 1
        is_open = torch.sigmoid(opening[:, 0]) >= self._least
        chosen = (step.put(places >= 0) & is_open).to(logits.device)
        if not bool(chosen.any()):
            return logits
        changed = logits.clone()
        changed[chosen] = self._act(logits[chosen], step.put(places).to(logits.device)[chosen]).to(logits.dtype)
        return changed

    # -- gates --------------------------------------------------------------------------------------------------------

    def _pool(self, passing: Passing, block: int, pool: str, states: Tensor) -> None:
        """Summarize what a block gives, [tokens, hidden size], and what came before."""
        step = passing.step
        if pool == WINDOWS:
            of_prompts = np.flatnonzero(~step.answers | step.ends)
            slots = step.slot(step.sequence[of_prompts], step.position[of_prompts])
            if len(of_prompts):
                self._states.keep(block, step.put(slots), states[step.put(of_prompts)])
            return
        every, reset = self._pools[block, pool]
        runs = passing.runs_over(reset, every=every)
        if runs is None:
            return
        if pool == "last":
            passing.summaries[block, pool] = parts(states[step.put(runs.last)], pool)
            return
        everything = len(runs.tokens) == step.tokens
        each = parts(states if everything else states[step.put(runs.tokens)], pool)
        summary = each if runs.single else _summarized(each, step.put(runs.stretch), len(runs.last), pool)
        passing.summaries[block, pool] = self._accumulated(
            (block, pool), summary, step, runs, partial(joined, pool=pool)
        )

    def _accumulated(self, key: Hashable, values: Tensor, step: Step, runs: Runs, join: Join) -> Tensor:
        """Of each stretch what is known up to its end, earlier passes included, [stretches, width]; it is kept."""
        values = found = accumulated(values, step, runs, join)
        before = self._memory.before(key, step)
        kept = np.flatnonzero(step.kept[runs.last])
        for number in range(step.rounds):
            if number:
                before = torch.where(
                    step.put(step.past % step.page_size == 0).unsqueeze(1), self._memory.before(key, step), before
                )
            found = gone_on(values, before, step, runs, join)
            self._memory.keep(key, step.put(step.page_of(runs.last[kept])), found[step.put(kept)])
        return found

    def _asked(self, passing: Passing, kind: Kind, gates: GateGroup) -> Tensor:
        """Logits in force of gates for all edits, as in `Passing.given`."""
        step = passing.step

        def read(block: int) -> Tensor:
            runs = passing.runs_over(kind.reset_ids, every=self._pools[block, kind.gate_pool][0])
            summary = passing.summaries[block, kind.gate_pool]
            assert runs is not None  # a token is asked
            if asked_once(kind):
                summary = summary[step.put(np.flatnonzero(step.ends[runs.last]))]
            return features(summary, kind.gate_pool)

        def ask() -> Tensor:
            read_by = of_blocks([read(block) for block in kind.gate_blocks], kind.gate_pool)
            return gates.gates(read_by.unsqueeze(0)).squeeze(0)

        if kind.gate_pool == WINDOWS:
            return self._once(step, kind, kind, len(gates.names), lambda: self._on_windows(step, kind, gates))
        if asked_once(kind):
            return self._once(step, kind, kind, len(gates.names), ask)
        return ask()

    def _on_windows(self, step: Step, kind: Kind, gates: GateGroup) -> Tensor:
        """Logits at the prompts that end here, [prompts, gates], of the states of all of their tokens.

        Those of lengths alike are computed together, padded behind to the longest one.
        """
        ended = step.sequence[step.ends]
        lengths = step.prompt[ended]
        order = np.argsort(lengths)
        alike, several = np.frexp(lengths[order])[1], lengths[order].cumsum() // TOGETHER
        logits = torch.empty(len(ended), len(gates.names), device=self.device)
        for places in np.split(order, np.flatnonzero(np.diff(alike) | np.diff(several)) + 1):
            sequence, length = ended[places][:, None], lengths[places][:, None]
            position = np.minimum(np.arange(length.max()), length - 1)
            turns = self._turns.begun(step, kind.reset_ids, sequence, position).cumsum(axis=1)
            turns[np.arange(length.max()) >= length] = -1
            slots, of, last = (step.put(each) for each in (step.slot(sequence, position), turns, length - 1))
            read = [windows_at(self._states.at(block, slots), of, last) for block in kind.gate_blocks]
            logits[step.put(places)] = gates.gates(of_blocks(read, WINDOWS)).squeeze(1)
        return logits

    def _once(self, step: Step, kind: Kind, key: Hashable, gates: int, ask: Callable[[], Tensor]) -> Tensor:
        """Logits in force of gates that are asked at the end of a prompt, and hold from there on: [sequences, gates].

        `ask` gives those of the prompts that end here; those of others ended in earlier passes, or are yet to end.
        """
        in_force = torch.full((step.sequences, gates), -torch.inf, device=self.device)
        asked = ask() if step.ends.any() else None
        for _ in range(step.rounds):
            if _remembers(kind) and step.goes_on.any():
                in_force = self._memory.before(key, step)
                begun = step.past >= step.prompt
                if not begun.all():
                    in_force = in_force.masked_fill(~step.put(begun).unsqueeze(1), -torch.inf)
            if asked is not None:
                in_force[step.put(step.sequence[step.ends])] = asked
            if _remembers(kind):
                kept = np.flatnonzero(step.kept & step.answers)
                self._memory.keep(key, step.put(step.page_of(kept)), in_force[step.put(step.sequence[kept])])
        return in_force

    def _own(self, passing: Passing, block: int, group: Group, states: Tensor) -> Tensor:
        """Logits in force of gates that read the block's own states; as in `Passing.given`."""
        step, kind, gates = passing.step, group.kind, group.gates
        assert gates is not None
        key = (block, kind)
        if asked_once(kind):
            ends = step.index("ends")
            return self._once(step, kind, key, len(group.names), lambda: gates(states[ends].unsqueeze(0)).squeeze(0))
        logits: Tensor = gates(states.unsqueeze(0)).squeeze(0)
        if kind.gate_accumulate == "none":
            return logits
        runs = passing.runs_over(kind.reset_ids, every=True)
        assert runs is not None  # a pass has tokens
        return self._accumulated(key, logits, step, runs, torch.maximum)

    # -- edits --------------------------------------------------------------------------------------------------------

    def _edit(self, passing: Passing, block: int, states: Tensor, hidden: Tensor, residual: Tensor | None) -> None:
        step, groups = passing.step, self._edits[block]
        opened = []
        for group in groups:
            if group.gates is not None:
                opened.append(self._own(passing, block, group, states))
                continue
            given = passing.given[group.kind]
            opened.append(given if group.places is None else given[:, group.places])
        where = max((where_written(group.kind) for group in groups), key=WIDER.index)
        if not step.mask(where).any():
            return
        rows: Any = slice(None) if where == "all" else step.index(where)
        counts = [len(group.names) for group in groups]
        of_rows = step.sequences_of[rows]
        logits, masks = [], []
        for group, values, count in zip(groups, opened, counts, strict=True):
            logits.append(values[of_rows if asked_once(group.kind) else rows])
            masks.append(step.within(where_written(group.kind), where).unsqueeze(1).expand(-1, count))
        in_force, mask = torch.cat(logits, dim=1), torch.cat(masks, dim=1)
        if (is_open := enough(groups, in_force, self.found.threshold)) is not None:
            mask = mask & is_open
            if not bool(mask.any()):
                return
        flat = states[rows]
        weights = edit_weights(in_force, mask, self.found.rule).split(counts, dim=1)
        change = torch.zeros_like(flat)
        for group, part in zip(groups, weights, strict=True):
            if (acting := Acting.of(part)) is not None:
                group.add_change(change, flat, acting)
        acts = mask.any(dim=1, keepdim=True)
        hidden[rows] = torch.where(acts, (flat + change).to(hidden.dtype), hidden[rows])
        if residual is not None:
            residual[rows] = residual[rows].masked_fill(acts, 0)


def _remembers(kind: Kind) -> bool:
    """Whether logits in force are needed by later passes."""
    if asked_once(kind):
        return kind.edit_write == "sticky"
    return kind.gate_accumulate != "none"


def _summarized(each: Tensor, stretch: Tensor, count: int, pool: str) -> Tensor:
    """Summaries of stretches of those of tokens: [tokens, any] -> [stretches, any]."""
    if pool == "mean":
        return each.new_zeros(count, each.shape[1]).index_add_(0, stretch, each)
    index = stretch.unsqueeze(1).expand_as(each)
    return each.new_full((count, each.shape[1]), -torch.inf).scatter_reduce_(0, index, each, "amax")
