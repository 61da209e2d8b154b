"""A model's own forward pass over packed rows: no padding, any range of its blocks, prompts that others share.

Tokens of several rows stand one after another as one row of a batch, so every linear layer computes real tokens only.
Attention alone gets to know which tokens belong together, and takes the keys and values of a row's earlier tokens, its
prefix, from outside. The decoder is transformers' own, on shallow copies of the modules that share all weights: the
base is neither changed nor hooked. What the copies do differently is decided in two places that transformers offers:
the attention function, and the list of decoder blocks.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

from grun.cache.attention import How, Pack
from grun.cache.fused import fuse
from grun.errors import ModelError
from grun.runtime.devices import device_of, input_device, launches, lies_elsewhere, loaded
from grun.training.recomputation import recompute_blocks
from pyvene_custom import find_blocks

ATTENTION = "grun_packed"
"""Name under which transformers finds our attention function."""

Edit = Callable[[Tensor], Tensor]
"""States [tokens, hidden size] of a pass -> the same, edited."""


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
    pack.starts_alone = False
    home, here = pack.device, query.device
    # Gradients of squeeze, unlike those of [0], cost nothing.
    query, key, value = (part.squeeze(0).to(home) for part in (query, key, value))
    out = pack.attend(block, query, key, value, How(scaling, sliding_window, softcap))
    return out.to(here).unsqueeze(0), None


@dataclass
class _Run:
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

    index: int
    owner: PackedModel
    device: torch.device

    def __init__(self, block: nn.Module, index: int, owner: PackedModel) -> None:
        super().__init__()
        self.block = block
        self.index, self.owner, self.device = index, owner, device_of(block)

    def __getattr__(self, name: str) -> Any:
        """What a decoder asks a block about itself, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        owner, index, run = self.owner, self.index, self.owner.current
        if run.states is not None and index == min(run.first, owner.depth - 1):
            hidden = run.states.unsqueeze(0)
        output: Any = hidden
        if run.first <= index <= run.last:
            kwargs["pack"].starts_alone = index == run.first and index in owner.narrowed
            if owner.is_spread:
                hidden, args, kwargs = send_to_device((hidden, args, kwargs), self.device)
            with loaded(self.block):
                output = self.block(hidden, *args, **kwargs)
            owner.gives_tuple = isinstance(output, tuple)
            hidden = output[0] if owner.gives_tuple else output
            if index in run.edits or index in run.captured:
                hidden = hidden.to(owner.device)
            if index in run.edits:
                hidden = run.edits[index](hidden.squeeze(0)).unsqueeze(0)
        if index in run.captured:
            run.captured[index] = hidden.squeeze(0)
        if index == owner.depth - 1:
            hidden = hidden.to(self.device)  # where the norm that follows lies
        return (hidden, *output[1:]) if isinstance(output, tuple) else (hidden,) if owner.gives_tuple else hidden


class HandOn(nn.Module):
    """Stands for the decoder, so that the model's own forward is its head alone: what is embedded is handed on."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """The embeddings as the decoder's output."""
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
        AttentionInterface.register(ATTENTION, _attend)
        path, blocks = find_blocks(base)
        owner, _, name = path.rpartition(".")
        if not owner:
            raise ModelError(f"{type(base).__name__} holds its blocks itself, without a decoder below it")
        configs: dict[int, Any] = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
        copies: dict[int, Any] = {}
        for key, config in configs.items():
            copies[key] = copy.copy(config)
            if hasattr(config, "_attn_implementation_internal"):
                copies[key]._attn_implementation_internal = ATTENTION
        self.depth = len(blocks)
        self.current = _Run(0, -1, None, {}, {})
        self.pack: Pack | None = None
        self.gives_tuple = False
        self._decoder = shared_copy(base.get_submodule(owner), copies)
        own: Any = self._decoder.get_submodule(name)
        stages = [_Stage(block, index, self) for index, block in enumerate(own)]
        self.blocks = [stage.block for stage in stages]
        self._decoder.__dict__["_modules"][name] = nn.ModuleList(stages)
        self.is_spread = len({stage.device for stage in stages}) > 1
        """Whether blocks lie on several devices; packs and their attention stay on that of the embeddings."""
        self._head = shared_copy(base, copies, {owner: HandOn()})
        self.device = input_device(base)
        if launches(self.device):
            fuse(self._decoder)
        head: Any = base.get_output_embeddings()
        self._head_device = head.weight.device if self.is_spread and head is not None else None
        self._recompute = recompute
        self.narrowed: set[int] = set()
        """Blocks whose input is constant but at the first token of each row, where a pass begins with them."""
        if recompute:
            recompute_blocks(self.blocks)
        self._text_config: Any = base.config.get_text_config()
        self._dtype = base.dtype
        self.vocabulary = int(self._text_config.vocab_size)

    def backpropagate_starts(self, first: int) -> None:
        """From now on no gradients go back to the input of block `first` but at the first token of each row.

        For a block whose input is constant elsewhere: its linear layers before attention then have nothing to do for
        the other tokens in a backward pass. Nothing changes where blocks are recomputed.
        """

        def narrow(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            pack = self.pack
            if pack is None or not pack.starts_alone or not output.requires_grad:
                return None
            starts = pack.starts.to(output.device)
            part = type(module).forward(module, args[0][:, starts])
            return output.detach().index_copy(1, starts, part)

        if self._recompute or first in self.narrowed or first >= self.depth:
            return  # a block that is run again must do the same again
        self.narrowed.add(first)
        for module in self.blocks[first].modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_hook(narrow)

    @property
    def streams(self) -> bool:
        """Whether some blocks lie in files until they are run."""
        return any(lies_elsewhere(block) for block in self.blocks)

    def stretches(self, last: int, ends: Collection[int] = ()) -> list[range]:
        """Blocks 0 ... `last` cut after each of `ends` and around each block that lies in files."""
        streamed = [block for block in range(last + 1) if lies_elsewhere(self.blocks[block])]
        cuts = {0, last + 1, *(end + 1 for end in ends), *streamed, *(block + 1 for block in streamed)}
        return [range(start, end) for start, end in pairwise(sorted(cuts)) if end <= last + 1]

    @contextlib.contextmanager
    def loaded(self, blocks: Iterable[int]) -> Iterator[None]:
        """Within the block the weights of `blocks` are there, which for those in files means reading them once."""
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(loaded(self.blocks[block]))
            yield

    def bytes_of_token(self, blocks: int) -> int:
        """Bytes of a token's state, and of its keys and values of so many blocks."""
        config = self._text_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return self._dtype.itemsize * (config.hidden_size + 2 * blocks * heads * size)

    def run(
        self,
        pack: Pack,
        given: Tensor,
        *,
        first: int = 0,
        last: int | None = None,
        edits: Mapping[int, Edit] | None = None,
        capture: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks `first` ... `last` (None: to the end) on `given`: token ids [tokens], or states [tokens, width].

        Returns the input of the head [tokens, width], which means something at the end alone, and the outputs of the
        blocks in `capture`, edits included.
        """
        kind, states = ("inputs_embeds", given) if given.is_floating_point() else ("input_ids", None)
        captured: dict[int, Tensor] = dict.fromkeys(capture, torch.empty(0))
        run = _Run(first, self.depth - 1 if last is None else last, states, edits or {}, captured)
        before, self.current, self.pack = self.current, run, pack
        try:
            output = self._decoder(
                **{kind: given.unsqueeze(0)},
                position_ids=pack.positions.unsqueeze(0),
                attention_mask=None,
                use_cache=False,
                pack=pack,
            )
        finally:
            self.current, self.pack = before, None
        return output.last_hidden_state.squeeze(0).to(self.device), captured

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head: [tokens, width] -> [tokens, vocabulary]."""
        there = hidden if self._head_device is None else hidden.to(self._head_device)
        return self._head(inputs_embeds=there.unsqueeze(0), use_cache=False).logits.squeeze(0).to(hidden.device)


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def shared_copy(
    module: nn.Module, configs: Mapping[int, Any], replaced: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    """Copy of a module tree that shares parameters and buffers, without hooks; `module` stays as it is.

    In the copy `configs`, by id of a config, and `replaced`, by dotted name of a module, stand for those.
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
