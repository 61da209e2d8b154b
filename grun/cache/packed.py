"""A model's own forward pass over packed rows: no padding, any range of its blocks, prompts that others share.

Tokens of several rows stand one after another as one row of a batch, so every linear layer computes real tokens only;
attention alone is told which tokens belong together, and takes the keys and values of a row's earlier tokens, its
prefix, from outside. The decoder is transformers' own, on shallow copies of the modules that share all weights: the
base is neither changed nor hooked. What the copies do differently is decided in two places that transformers offers:
the attention function, and the list of decoder blocks.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from grun.errors import ModelError
from grun.training.recomputation import recompute_blocks
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "grun_packed"
"""Name under which transformers finds our attention function."""

SIMILAR = 1.0
"""Rows that stand side by side are attended together on a CPU if the shortest is at least this share of the longest.

At 1 only rows of one length are, which need no padding; lower values were slower or no faster.
"""

Edit = Callable[[Tensor], Tensor]
"""States [tokens, hidden size] of a pass -> the same, edited."""


class Pack:
    """Rows of one packed pass, and attention within each of them.

    Rows of similar length that stand side by side are attended together, padded to one length; put rows in order of
    length where that costs nothing.
    """

    positions: Tensor
    """Position of each token in its row, int64 [tokens]."""
    starts: Tensor
    """Index of each row's first token in the pack, int64 [rows]."""
    lengths: Tensor
    """Tokens of each row, int64 [rows]."""
    before_attention: bool
    """Whether the first block that is run has not come to its attention yet."""

    def __init__(
        self,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int],
        prefix: Mapping[int, tuple[Tensor, Tensor]],
        device: torch.device,
        record: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Lay out rows one after another.

        Args:
            lengths: tokens of each row in this pass, each >= 1.
            prefix_lengths: earlier tokens of each row, whose keys and values come from outside.
            prefix: by block, keys and values [rows, heads, longest prefix, head size], padded on the left.
            device: of all tensors.
            record: where given, this pass's own keys and values are put here by block, [heads, tokens, head size].
        """
        self.device = device
        self.record = record
        self.before_attention = False
        self._prefix = prefix
        count, before = torch.tensor(lengths), torch.tensor(prefix_lengths)
        starts = count.cumsum(0) - count
        self.starts, self.lengths = starts.to(device), count.to(device)
        within = torch.arange(int(count.sum())) - starts.repeat_interleave(count)
        self.positions = (within + before.repeat_interleave(count)).to(device)
        # Padding costs little on a GPU, more launches cost much.
        similar = SIMILAR if device.type == "cpu" else 0.0
        self._groups = [_Group(rows, count, before, starts, device) for rows in _side_by_side(lengths, similar)]

    def padded(self, states: Tensor) -> Tensor:
        """States [tokens, width] as [rows, longest, width], padded on the right."""
        found: Tensor = _Gather.apply(states, *self._layout, False)
        return found.unflatten(0, (len(self.lengths), -1))

    def unpadded(self, states: Tensor) -> Tensor:
        """The inverse of `padded`."""
        pad, unpad = self._layout
        found: Tensor = _Gather.apply(states.flatten(0, 1), unpad, pad, True)
        return found

    @functools.cached_property
    def inside(self) -> Tensor:
        """Which columns of `padded` are tokens, bool [rows, longest]."""
        return torch.arange(int(self.lengths.max()), device=self.device) < self.lengths.unsqueeze(1)

    @functools.cached_property
    def _layout(self) -> tuple[Tensor, Tensor]:
        """Of each padded place the token that stands there (the first one in padding), and of each token its place."""
        column = torch.arange(self.inside.shape[1], device=self.device)
        pad = torch.where(self.inside, self.starts.unsqueeze(1) + column, 0).flatten()
        return pad, self.inside.flatten().nonzero().squeeze(1)

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attention of each row to its prefix and to itself: query [heads, tokens, size] -> [tokens, heads, size]."""
        if self.record is not None:
            self.record[block] = (key, value)
        parts = []
        sizes = [group.tokens for group in self._groups]
        pieces = zip(*(part.transpose(0, 1).split(sizes) for part in (query, key, value)), strict=True)
        for group, (of_query, of_key, of_value) in zip(self._groups, pieces, strict=True):
            before = None
            if block in self._prefix:
                before_key, before_value = (part[group.rows, :, -group.before :] for part in self._prefix[block])
                before = (before_key, before_value) if group.before else None
            parts.append(group.attend(of_query, of_key, of_value, before, scale, window, softcap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Group:
    """Consecutive rows of a pack that are attended together."""

    def __init__(self, rows: slice, count: Tensor, before: Tensor, starts: Tensor, device: torch.device) -> None:
        count, before, starts = count[rows], before[rows], starts[rows]
        longest = int(count.max())
        column = torch.arange(longest)
        inside = column < count.unsqueeze(1)  # [rows, longest]
        first = int(starts[0])
        self.rows = rows
        self.before = int(before.max())
        self.tokens = int(count.sum())
        self._pad = torch.where(inside, starts.unsqueeze(1) - first + column, 0).flatten().to(device)
        self._unpad = inside.flatten().nonzero().squeeze(1).to(device)
        self._shape = (len(count), longest)
        self._even = bool(inside.all())
        other = torch.arange(-self.before, longest)
        self._back = (column.unsqueeze(1) - other).to(device)  # [longest, before + longest]: how far back a key lies
        self._seen = ((self._back >= 0) & (other >= -before.view(-1, 1, 1)).to(device)).unsqueeze(1)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None, scale: float | None,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """From and to [tokens, heads, size]."""
        query, key, value = (self._padded(part) for part in (query, key, value))
        if prefix is not None:
            key, value = torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mask = self._mask(window, query.dtype)
        if softcap is None:
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        else:
            scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
            scores = torch.tanh(scores / softcap) * softcap + mask
            wide = torch.promote_types(scores.dtype, torch.float32)
            out = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value
        out = out.transpose(1, 2).flatten(0, 1)
        return out if self._even else _Gather.apply(out, self._unpad, self._pad, True)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a key is seen, -inf elsewhere, [rows, 1, longest, before + longest]."""
        if (window, dtype) not in self._masks:
            seen = self._seen if window is None else self._seen & (self._back < window)
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._masks[window, dtype] = zeros.masked_fill(~seen, -torch.inf)
        return self._masks[window, dtype]

    def _padded(self, packed: Tensor) -> Tensor:
        """[tokens, heads, size] -> [rows, heads, longest, size]; what stands in padding is seen by padding alone."""
        padded: Tensor = packed if self._even else _Gather.apply(packed, self._pad, self._unpad, False)
        return padded.unflatten(0, self._shape).transpose(1, 2)


class _Gather(torch.autograd.Function):
    """Between the packed and the padded layout, whose gradients need no sum: nothing comes from a padded place."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, back: Tensor, unpads: bool) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.unpads, ctx.length = unpads, len(source)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        index, back = ctx.saved_tensors
        if not ctx.unpads:  # padded -> packed: the padded places have no gradient
            return gradients[0].index_select(0, back), None, None, None
        gradient = gradients[0].new_zeros(ctx.length, *gradients[0].shape[1:])
        return gradient.index_copy_(0, index, gradients[0]), None, None, None


def _side_by_side(lengths: Sequence[int], similar: float) -> Iterator[slice]:
    """Runs of neighbors whose shortest is at least `similar` times their longest."""
    start, shortest, longest = 0, lengths[0], lengths[0]
    for index, length in enumerate(lengths):
        shortest, longest = min(shortest, length), max(longest, length)
        if shortest < similar * longest:
            yield slice(start, index)
            start, shortest, longest = index, length, length
    yield slice(start, len(lengths))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    pack: Pack,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, size] -> [1, tokens, heads, size]."""
    block: Any = module.layer_idx
    pack.before_attention = False
    out = pack.attend(block, query[0], key[0], value[0], scaling, sliding_window, softcap)
    return out.unsqueeze(0), None


@dataclass
class _Run:
    """What one pass through the decoder does."""

    first: int
    """First block that is run."""
    last: int
    """Last block that is run."""
    states: Tensor | None
    """Input of the first block that is run, [tokens, hidden size]; None: the embeddings."""
    edits: Mapping[int, Edit]
    """Applied to the output of a block."""
    captured: dict[int, Tensor]
    """Outputs, edits included, of the blocks that are keys here: [tokens, hidden size]."""


class _Stage(nn.Module):
    """Stands for one block in the decoder's list: runs it, or hands the states on."""

    def __init__(self, block: nn.Module, index: int, owner: PackedModel) -> None:
        super().__init__()
        self.block = block
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "owner", owner)

    def __getattr__(self, name: str) -> Any:
        """What a decoder asks a block about itself, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self.owner
        index: Any = self.index
        run: _Run = owner.run
        if run.states is not None and index == min(run.first, owner.depth - 1):
            hidden = run.states.unsqueeze(0)
        output: Any = hidden
        if run.first <= index <= run.last:
            kwargs["pack"].before_attention = index == run.first
            output = self.block(hidden, *args, **kwargs)
            owner.gives_tuple = isinstance(output, tuple)
            hidden = output[0] if owner.gives_tuple else output
            if index in run.edits:
                hidden = run.edits[index](hidden[0]).unsqueeze(0)
        if index in run.captured:
            run.captured[index] = hidden[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else (hidden,) if owner.gives_tuple else hidden


class _HandOn(nn.Module):
    """Stands for the decoder, so that the model's own forward is its head alone."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class PackedModel:
    """Passes over packed rows through the blocks of `base`, whose weights it shares.

    Nothing of `base` is changed; hooks and edits on it do not act here. Weights that are moved or changed in place
    are seen, modules that are replaced are not.
    """

    def __init__(self, base: PreTrainedModel, *, recompute: bool = False) -> None:
        """ModelError where the model's structure does not allow it; whether it computes the same is for others to try.

        With `recompute` blocks keep their input alone for the backward pass (gradient checkpointing).
        """
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        path, blocks = find_blocks(base)
        owner, _, name = path.rpartition(".")
        if not owner:
            raise ModelError(f"{type(base).__name__} holds its blocks itself, without a decoder below it")
        if len(set(getattr(base, "hf_device_map", {"": 0}).values())) > 1:
            raise ModelError("the model lies on several devices")
        configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
        copies: dict[int, Any] = {}
        for key, config in configs.items():
            copies[key] = copy.copy(config)
            if hasattr(config, "_attn_implementation_internal"):
                copies[key]._attn_implementation_internal = ATTENTION
        self.depth = len(blocks)
        self.run = _Run(0, -1, None, {}, {})
        self.pack: Pack | None = None
        self.gives_tuple = False
        self._decoder = _copy(base.get_submodule(owner), copies)
        own: Any = self._decoder.get_submodule(name)
        stages = [_Stage(block, index, self) for index, block in enumerate(own)]
        self.blocks = [stage.block for stage in stages]
        self._decoder.__dict__["_modules"][name] = nn.ModuleList(stages)
        self._head = _copy(base, copies, {owner: _HandOn()})
        self._recompute = recompute
        self._narrowed: set[int] = set()
        if recompute:
            recompute_blocks(self.blocks)
        self.device = base.device
        self.vocabulary = int(base.config.get_text_config().vocab_size)

    def backpropagate_starts(self, first: int) -> None:
        """From now on no gradients go back to the input of block `first` but at the first token of each row.

        For a block whose input is constant elsewhere: its linear layers before attention then have nothing to do for
        the other tokens in a backward pass. Nothing changes where blocks are recomputed.
        """
        from transformers.pytorch_utils import Conv1D

        def narrow(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            pack = self.pack
            if pack is None or not pack.before_attention or not output.requires_grad:
                return None
            part = type(module).forward(module, args[0][:, pack.starts])
            return output.detach().index_copy(1, pack.starts, part)

        if self._recompute or first in self._narrowed or first >= self.depth:
            return  # a block that is run again must do the same again
        self._narrowed.add(first)
        for module in self.blocks[first].modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_hook(narrow)

    def states(
        self,
        pack: Pack,
        tokens: Tensor,
        *,
        last: int,
        capture: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Embed `tokens` [tokens] and run blocks 0 ... last; outputs of the blocks in `capture`, [tokens, width]."""
        captured: dict[int, Tensor] = dict.fromkeys(capture, torch.empty(0))
        self._call(_Run(0, last, None, {}, captured), pack, input_ids=tokens.unsqueeze(0))
        return captured

    def finish(
        self,
        pack: Pack,
        states: Tensor,
        *,
        first: int,
        edits: Mapping[int, Edit] | None = None,
        capture: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks `first` ... to the end on `states` [tokens, width].

        Returns the input of the head [tokens, width], and the outputs of the blocks in `capture`, edits included.
        """
        captured: dict[int, Tensor] = dict.fromkeys(capture, torch.empty(0))
        run = _Run(first, self.depth - 1, states, edits or {}, captured)
        return self._call(run, pack, inputs_embeds=states.unsqueeze(0)), captured

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head: [tokens, width] -> [tokens, vocabulary]."""
        return self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]

    def _call(self, run: _Run, pack: Pack, **inputs: Any) -> Tensor:
        before, self.run, self.pack = self.run, run, pack
        try:
            output = self._decoder(
                **inputs, position_ids=pack.positions.unsqueeze(0), attention_mask=None, use_cache=False, pack=pack
            )
        finally:
            self.run, self.pack = before, None
        return output.last_hidden_state[0]


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def _copy(module: nn.Module, configs: Mapping[int, Any], replaced: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """Copy of a module tree that shares parameters and buffers, without hooks, with other configs.

    `replaced` gives other modules for some dotted names.
    """
    replaced = replaced or {}
    new = copy.copy(module)
    state = new.__dict__
    for name in _HOOKS:
        state[name] = OrderedDict()
    for name in ("forward", "generate", "_grun_model", "_entries", "_replicate_for_data_parallel"):  # put by wrapping
        state.pop(name, None)
    if id(state.get("config")) in configs:
        state["config"] = configs[id(state["config"])]
    children = {}
    for name, child in module._modules.items():
        below = {key.removeprefix(f"{name}."): value for key, value in replaced.items() if key.startswith(f"{name}.")}
        children[name] = replaced[name] if name in replaced else None if child is None else _copy(child, configs, below)
    state["_modules"] = children
    return new
