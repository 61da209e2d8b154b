"""A model's own forward pass over packed rows: no padding, any range of its blocks, prompts that others share.

Tokens of several rows stand one after another as one row of a batch, so every linear layer computes real tokens only.
Attention alone gets to know which tokens belong together, and takes the keys and values of a row's earlier tokens, its
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
from itertools import groupby
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

Edit = Callable[[Tensor], Tensor]
"""States [tokens, hidden size] of a pass -> the same, edited."""
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block."""


class Layout:
    """Rows that stand one after another, [tokens, ...], and the same rows padded on the right, [rows, longest, ...]."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        """`lengths`: tokens of each row, each >= 1, on the CPU."""
        column = torch.arange(int(lengths.max()))
        inside = column < lengths.unsqueeze(1)
        starts = lengths.cumsum(0) - lengths
        self.inside = inside.to(device)
        """Which padded places are tokens, bool [rows, longest]."""
        self._is_even = bool(inside.all())
        self._token = torch.where(inside, starts.unsqueeze(1) + column, 0).flatten().to(device)  # 0 in padding
        self._place = inside.flatten().nonzero().squeeze(1).to(device)

    def padded(self, packed: Tensor) -> Tensor:
        """What stands in padding is arbitrary."""
        found: Tensor = packed if self._is_even else _Gather.apply(packed, self._token, self._place, False)
        return found.unflatten(0, self.inside.shape)

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse of `padded`."""
        flat = padded.flatten(0, 1)
        return flat if self._is_even else _Gather.apply(flat, self._place, self._token, True)


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


class Pack:
    """Rows of one packed pass, and attention within each of them.

    Neighbors of one length are attended together, on a GPU all rows; put rows in order of length where that costs
    nothing.
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
        prefix: Mapping[int, KeysValues],
        device: torch.device,
        record: dict[int, KeysValues] | None = None,
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
        self._count, before = torch.tensor(lengths), torch.tensor(prefix_lengths)
        starts = self._count.cumsum(0) - self._count
        self.starts, self.lengths = starts.to(device), self._count.to(device)
        within = torch.arange(int(self._count.sum())) - starts.repeat_interleave(self._count)
        self.positions = (within + before.repeat_interleave(self._count)).to(device)
        groups = _groups(lengths, together=device.type != "cpu")
        self._groups = [_Group(rows, self._count[rows], before[rows], device) for rows in groups]

    @functools.cached_property
    def layout(self) -> Layout:
        """Of all rows."""
        return Layout(self._count, self.device)

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attention of each row to its prefix and to itself: query [heads, tokens, size] -> [tokens, heads, size]."""
        if self.record is not None:
            self.record[block] = (key, value)
        sizes = [group.tokens for group in self._groups]
        pieces = zip(*(part.transpose(0, 1).split(sizes) for part in (query, key, value)), strict=True)
        prefix = self._prefix.get(block)
        parts = [
            group.attend(of_query, of_key, of_value, prefix, scale, window, softcap)
            for group, (of_query, of_key, of_value) in zip(self._groups, pieces, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _groups(lengths: Sequence[int], together: bool) -> Iterator[slice]:
    """Rows that are attended together: padding costs little on a GPU, where more launches cost much."""
    start = 0
    for _, run in groupby(lengths, key=lambda length: together or length):
        end = start + len(list(run))
        yield slice(start, end)
        start = end


class _Group:
    """Consecutive rows of a pack that are attended together."""

    def __init__(self, rows: slice, count: Tensor, before: Tensor, device: torch.device) -> None:
        self.tokens = int(count.sum())
        self._rows, self._before = rows, int(before.max())
        self._layout = Layout(count, device)
        column = torch.arange(int(count.max()))
        other = torch.arange(-self._before, len(column))
        self._back = (column.unsqueeze(1) - other).to(device)  # [longest, before + longest]: how far back a key lies
        self._seen = ((self._back >= 0) & (other >= -before.view(-1, 1, 1)).to(device)).unsqueeze(1)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: KeysValues | None, scale: float | None,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """From and to [tokens, heads, size]; `prefix` of the whole pack."""
        query, key, value = (self._layout.padded(part).transpose(1, 2) for part in (query, key, value))
        if prefix is not None and self._before:
            key, value = (
                torch.cat((earlier[self._rows, :, -self._before :], part), dim=2)
                for earlier, part in zip(prefix, (key, value), strict=True)
            )
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
        return self._layout.packed(out.transpose(1, 2))

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a key is seen, -inf elsewhere, [rows, 1, longest, before + longest]."""
        if (window, dtype) not in self._masks:
            seen = self._seen if window is None else self._seen & (self._back < window)
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._masks[window, dtype] = zeros.masked_fill(~seen, -torch.inf)
        return self._masks[window, dtype]


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
    last: int
    """First and last block that is run."""
    states: Tensor | None
    """Input of the first one, [tokens, hidden size]; None: the embeddings."""
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


class HandOn(nn.Module):
    """Stands for the decoder, so that the model's own forward is its head alone: what is embedded is handed on."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """The embeddings as the decoder's output."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class PackedModel:
    """Passes over packed rows through the blocks of `base`, whose weights it shares.

    Nothing of `base` is changed; hooks and edits on it do not act here. Weights that are moved or changed in place
    are seen, modules that are replaced are not.
    """

    def __init__(self, base: PreTrainedModel, *, recompute: bool = False) -> None:
        """ModelError where the model's structure does not allow it; the caller tries whether it computes the same.

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
        self._decoder = shared_copy(base.get_submodule(owner), copies)
        own: Any = self._decoder.get_submodule(name)
        stages = [_Stage(block, index, self) for index, block in enumerate(own)]
        self.blocks = [stage.block for stage in stages]
        self._decoder.__dict__["_modules"][name] = nn.ModuleList(stages)
        self._head = shared_copy(base, copies, {owner: HandOn()})
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

    def states(self, pack: Pack, tokens: Tensor, *, last: int, capture: Collection[int] = ()) -> dict[int, Tensor]:
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


def shared_copy(
    module: nn.Module, configs: Mapping[int, Any], replaced: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """Copy of a module tree that shares parameters and buffers, without hooks.

    Args:
        module: stays as it is.
        configs: by id of a config, what stands for it in the copy.
        replaced: by dotted name, what stands for a module in the copy.
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
        children[name] = (
            replaced[name] if name in replaced else None if child is None else shared_copy(child, configs, below)
        )
    state["_modules"] = children
    return new
