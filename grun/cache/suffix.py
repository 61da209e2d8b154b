"""The part of a forward pass that an edit can change, run from what `grun.cache.prefix` keeps of each row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grun.cache.ahead import Gathered
from grun.cache.attention import Layout, Pack, Parts, parts_of
from grun.cache.packed import Edit, PackedModel
from grun.cache.shard import FrozenRow
from grun.data.encoding import EncodedRow
from grun.errors import ModelError
from grun.method.intervention import GatedIntervention, GatedOutput
from grun.method.pooled_sites import PooledSites
from grun.method.position import Call, PositionRule
from grun.runtime.devices import launches
from pyvene_custom import Sites
from pyvene_custom.sites import put_back, read_and_written

SLICE = 2**24
"""Logits that exist at once (64 MiB in float32)."""
SLICE_THERE = 2**27
"""The same on a GPU (512 MiB), where each slice costs launches."""


@dataclass
class SuffixStates:
    """One pass over the columns of some rows that can change, packed one after another."""

    gates: dict[int, Tensor]
    """Gate logits by block, each [rows, positions read]."""
    pack: Pack
    """Layout of `final` and `hidden`: of each row the last prompt token, then the answer (its last token left out); of
    whole rows all tokens."""
    final: Tensor
    """Input of the head, [tokens, hidden size]."""
    hidden: dict[int, Tensor]
    """Outputs of the blocks that were asked for, edits included, [tokens, hidden size]."""


class SuffixRunner:
    """Runs the blocks above the first edited one on the columns that vary."""

    def __init__(self, packed: PackedModel, first_block: int) -> None:
        """`first_block` is the one that rows were frozen at; edits sit there or above."""
        self._packed = packed
        self._first = first_block

    def states(
        self,
        frozen: Sequence[FrozenRow],
        edits: Mapping[int, GatedIntervention],
        hidden: Collection[int] = (),
        locate: Callable[[Pack], Sites | Written] | None = None,
        pooled: Mapping[int, Tensor] | None = None,
    ) -> SuffixStates:
        """Run rows with `edits` (by block), up to the head.

        Without `locate` they are read and written at the first column of each row; else at its sites, whose columns
        are those of `Pack.layout`. `pooled` has the logits of a gate for all edits, [rows, 1], if there is one, by the
        block that it goes by.
        """
        device = self._packed.device
        states, prompts = gathered(frozen)
        prefix = {} if prompts is None else self.prefix_of(prompts.to(device, non_blocking=True))
        pack = Pack([len(row.states) for row in frozen], [len(row.prompt) for row in frozen], prefix, device)
        return self.run(pack, states.to(device, non_blocking=True), edits, hidden, locate, pooled)

    def run(
        self,
        pack: Pack,
        states: Tensor,
        edits: Mapping[int, GatedIntervention],
        hidden: Collection[int] = (),
        locate: Callable[[Pack], Sites | Written] | None = None,
        pooled: Mapping[int, Tensor] | None = None,
    ) -> SuffixStates:
        """`states` of rows that are laid out: `states` [tokens, width] of a pack with its prefix."""
        if below := [block for block in hidden if block < self._first]:
            raise ModelError(f"block {below[0]} lies below the first edited one, {self._first}: its output is not kept")
        gates: dict[int, Tensor] = dict(pooled or {})
        opening = next(iter(gates.values()), None)
        sites = None if locate is None or not edits else locate(pack)
        acting = {block: _at_home(edit, pack.device) for block, edit in edits.items()}
        edit_at = {block: _edit_at(edit, sites, pack, gates, block, opening) for block, edit in acting.items()}
        if self._first in edit_at:
            states = edit_at.pop(self._first)(states)
        above = [block for block in hidden if block > self._first]
        final, captured = self._packed.run(pack, states, first=self._first + 1, edits=edit_at, capture=above)
        if self._first in hidden:
            captured[self._first] = states
        return SuffixStates(dict(sorted(gates.items())), pack, final, captured)

    def logprobs(self, asked: Asked, states: SuffixStates, reference: Callable[[], Tensor]) -> Tensor:
        """Log-probability of every answer token, one row after another, in at least float32.

        Where only the first token's can change, the others are as the untouched model has them, by `reference`.
        """
        final = states.final
        if asked.first is not None:
            final = final.index_select(0, states.pack.starts)
            changed = token_logprobs(self._packed, final, asked.targets[asked.first])
            return reference().index_copy(0, asked.first, changed)
        if asked.column is not None:
            final = final.index_select(0, asked.column)
        return token_logprobs(self._packed, final, asked.targets)

    def prefix_of(self, prompts: Tensor) -> dict[int, Tensor]:
        """Prompts [rows, longest, blocks above, 2, heads, head size] as the prefix of a pack."""
        pairs = prompts.permute(2, 3, 0, 4, 1, 5).unbind(0)  # by block [2, rows, heads, longest, head size]
        return {self._first + 1 + number: pair for number, pair in enumerate(pairs)}


def gathered(frozen: Sequence[FrozenRow], pinned: bool = False) -> Gathered:
    """Rows where they lie, one after another; `pinned`: in memory that is copied to a GPU behind the host's back."""
    parts, prompts = [row.states for row in frozen], [row.prompt for row in frozen]
    longest = max(map(len, prompts))
    states = torch.cat(parts)
    if pinned:
        states = states.pin_memory()
    if not longest or not prompts[0].shape[1]:
        return states, None
    shape, like = (len(prompts), longest, *prompts[0].shape[1:]), prompts[0]
    padded = torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=pinned)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: longest - len(prompt)] = 0
        row[longest - len(prompt) :] = prompt
    return states, padded


class Asked:
    """Where the answer tokens of rows are predicted, on the CPU until `parts` are moved."""

    def __init__(self, rows: Sequence[EncodedRow], columns: Sequence[int], *, whole_rows: bool) -> None:
        """`columns`: of each row, those that are run."""
        counts = torch.tensor([len(row.answer_ids) for row in rows])
        self.targets = torch.tensor([token for row in rows for token in row.answer_ids])
        """The answer tokens, [answer tokens]."""
        self.first: Tensor | None = None
        """Of each row's answer the first token's place among all, [rows], where no other can change."""
        self.column: Tensor | None = None
        """Token of the pack that predicts each, [answer tokens]; None: the first predicts the first, and so on."""
        starts = counts.cumsum(0) - counts  # of each row's answer
        if any(of < len(row.answer_ids) for of, row in zip(columns, rows, strict=True)):
            self.first = starts
            return
        run = torch.tensor(columns)
        begins = run.cumsum(0) - run - starts
        if whole_rows:
            begins += torch.tensor([len(row.prompt_ids) - 1 for row in rows])
        if len(self.targets) != int(run.sum()):
            self.column = begins.repeat_interleave(counts) + torch.arange(len(self.targets))

    @property
    def parts(self) -> Parts:
        """What lies on the device."""
        return parts_of(self, "targets", "first", "column")


@dataclass
class Written:
    """Edits by one gate for all of them, written at every token that is run."""

    row: Tensor
    """Row of each token, [tokens]."""


def sites_of_rows(rule: PositionRule, inside: Tensor, prompt_lengths: Tensor, ids: Tensor | None = None) -> Sites:
    """Where a rule reads and writes rows that are run without a key/value cache, padded on the right.

    Args:
        rule: of the edits.
        inside: which places are tokens, bool [rows, longest], see `Layout`.
        prompt_lengths: tokens of each row up to the last of its prompt, at least 1: [rows].
        ids: the tokens, [rows, longest], by which turns are known; None: there is one turn.
    """
    rows, columns = inside.shape
    sites = rule.locate(Call(rows, columns, 0, inside.device, inside, prompt_lengths=prompt_lengths, ids=ids))
    assert sites is not None  # the prompt's end is in every row
    return sites


def sites_of_prompts(
    rule: PositionRule, prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Layout, PooledSites]:
    """The layout of distinct prompts, and where a gate for all edits is asked in them: at the last token of each."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    layout = Layout(lengths, device)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    sites = sites_of_rows(rule, layout.inside, lengths, layout.padded(tokens))
    assert isinstance(sites, PooledSites)
    return layout, sites


def token_logprobs(packed: PackedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` [tokens] after `hidden` [tokens, hidden size], in at least float32: [tokens].

    Logits exist for a slice of the tokens at a time, also in training: what a backward pass needs of them, the
    derivative of each token's log-probability, is a vector of the hidden size and is computed at once.
    """
    values: Tensor = _TokenLogprobs.apply(hidden, targets, packed)
    return values


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, packed: PackedModel) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        values, derivatives = [], []
        most = SLICE_THERE if launches(hidden.device) else SLICE
        size = most // int(packed.vocabulary) or 1
        for states, tokens in zip(hidden.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(wants_gradient):
                leaf = states.detach().requires_grad_(wants_gradient)
                logits = packed.logits(leaf)  # [slice, vocabulary]
            wide = torch.promote_types(logits.dtype, torch.float32)
            logprobs = torch.log_softmax(logits.detach(), dim=1, dtype=wide)
            chosen = logprobs.gather(1, tokens.unsqueeze(1))
            values.append(chosen.squeeze(1))
            if wants_gradient:
                slope = logprobs.exp_().neg_()  # d log p / d logits = one-hot - softmax
                slope.scatter_add_(1, tokens.unsqueeze(1), torch.ones_like(chosen))
                derivatives.append(torch.autograd.grad(logits, leaf, slope.to(logits.dtype))[0])
        if wants_gradient:
            ctx.save_for_backward(torch.cat(derivatives))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (derivatives,) = ctx.saved_tensors
        scale = gradients[0].unsqueeze(1)
        return (derivatives * scale).to(derivatives.dtype), None, None


def _at_home(edit: GatedIntervention, home: torch.device) -> Callable[..., GatedOutput]:
    """`edit`, which lies where its block does, from and to the device of the pack."""
    own = next(edit.parameters(), None)  # beside other requests there is none here
    if own is None or own.device == home:
        return edit
    where = own.device

    def call(written: Tensor, **shared: Tensor | Sites | None) -> GatedOutput:
        there = {name: value.to(where) for name, value in shared.items() if value is not None}
        result: GatedOutput = edit(written.to(where), **there)
        for name in ("output", "gate"):
            value = getattr(result, name)
            setattr(result, name, None if value is None else value.to(home))
        return result

    return call


def _edit_at(
    edit: Callable[..., GatedOutput],
    sites: Sites | Written | None,
    pack: Pack,
    gates: dict[int, Tensor],
    block: int,
    opening: Tensor | None,
) -> Edit:
    """`edit` at `sites`, or without them at the first token of every row; gate logits go to `gates`.

    `opening` is the logit of a gate for all edits, [rows, 1].
    """
    shared = {} if opening is None else {"opening": opening}

    def apply(states: Tensor) -> Tensor:
        if sites is None:
            here = states.index_select(0, pack.starts).unsqueeze(1)  # [rows, 1, width]
            result = edit(here, read=here)
        elif isinstance(sites, Written):
            assert opening is not None
            result = edit(states.unsqueeze(1), opening=opening[sites.row])
        else:
            padded = pack.layout.padded(states)
            read, written = read_and_written(padded, sites)
            result = edit(written, read=read, sites=sites, **shared)
        if result.gate is not None:
            gates[block] = result.gate
        if result.output is None:
            return states
        if sites is None:
            return states.index_copy(0, pack.starts, result.output.squeeze(1))
        if isinstance(sites, Written):
            everywhere: Tensor = result.output.squeeze(1)
            return everywhere
        return pack.layout.packed(put_back(padded, sites, result.output))

    return apply
