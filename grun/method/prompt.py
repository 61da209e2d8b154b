"""The prompt of one `generate` call: where it ends, and which forward passes belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from grun.errors import ModelError


@dataclass(eq=False)
class PromptOfCall:
    """The prompt handed to one `generate` call, in columns of the whole sequence (earlier turns included)."""

    last_column: Tensor
    """Column of each row's last prompt token, int64, shape [prompts]."""
    columns: int
    """Columns of the prompt, so that a decode step is told from it without looking at a tensor."""
    mask: Tensor | None = None
    """1 for tokens that count, shape [prompts, columns]; None: all do."""
    ids: Tensor | None = None
    """Its tokens, shape [prompts, columns]; None where they are not all known."""
    past: int = 0
    """Columns that were in the cache before."""
    over: bool = False
    """Whether the call has returned: what a callback left running is none of it."""
    _begun: bool = False
    _foreign: WeakSet[Any] = field(default_factory=WeakSet)
    """Caches of passes that are none of this call's."""

    def owns(self, inputs: Tensor, ids: Tensor | None, cache: Any, past: int) -> bool:
        """Whether a pass belongs to this call, or is another one's that is made within it (by a logits processor, say).

        Virtual tokens that come before the prompt from its first pass on, as PEFT puts them, are counted here.
        """
        if self.over or len(inputs) % len(self.last_column) or (cache is not None and cache in self._foreign):
            return False
        repeats = len(inputs) // len(self.last_column)
        if past == 0 and ids is not None and self.ids is not None:
            count = min(ids.shape[1], self.ids.shape[1])
            own = self.ids[:, :count].to(ids.device).repeat_interleave(repeats, dim=0)
            if not torch.equal(ids[:, :count], own):
                return False
        if not self._begun:
            self._begun = True
            in_front = past - self.past
            if ids is None and self.ids is not None:
                in_front = max(in_front, past + inputs.shape[1] - self.columns)
            if in_front > 0:
                self._put_in_front(in_front)
        return True

    def disown(self, cache: Any) -> None:
        """Count no pass with `cache` as this call's."""
        if cache is not None and not isinstance(cache, tuple):
            self._foreign.add(cache)

    def counting(self, rows: int, columns: int) -> Tensor | None:
        """1 for the tokens that count of the first `columns`, generated ones included, as `mask`: [rows, columns]."""
        if self.mask is None:
            return None
        mask = self.mask.repeat_interleave(rows // len(self.mask), dim=0)[:, :columns]
        return torch.nn.functional.pad(mask, (0, columns - mask.shape[1]), value=1)

    def _put_in_front(self, count: int) -> None:
        self.columns += count
        self.last_column = self.last_column + count
        self.ids = None
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (count, 0), value=1)


def prompt_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], config: Any = None) -> PromptOfCall | None:
    """Where the prompt handed to `generate(*args, **kwargs)` ends; None where the call brings no prompt.

    `config` is the model's generation config, ModelError for a mask that cannot be read.
    """
    named = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")] + list(args[:1])
    inputs = next((value for value in named if value is not None), None)
    if inputs is None:
        return None
    past = cache_length(kwargs.get("past_key_values"))
    mask = kwargs.get("attention_mask")
    if mask is None and past == 0:
        mask = _told_from_padding(inputs, kwargs, kwargs.get("generation_config") or config)
    length = inputs.shape[1]
    # Without a mask the ids are the whole conversation, unless they are shorter than what the cache already holds.
    total = mask.shape[1] if mask is not None else length if length > past else past + length
    ids = inputs if inputs.dim() == 2 and length == total else None
    if mask is None:
        last = torch.full((inputs.shape[0],), total - 1, device=inputs.device)
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask != 0, columns, -1).amax(dim=1)
    else:
        raise ModelError("generate needs an attention_mask of [batch, tokens], 1 for tokens that count")
    return PromptOfCall(last, total, mask, ids, past)


def _told_from_padding(inputs: Tensor, kwargs: Mapping[str, Any], config: Any) -> Tensor | None:
    """The mask that transformers makes of padding in a prompt without one, by the same rule."""
    pad, end = (kwargs.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or inputs.dim() != 2 or pad in (end if isinstance(end, list | tuple) else [end]):
        return None
    counts = inputs != int(pad)
    return None if bool(counts.all()) else counts.long()


def cache_length(cache: Any) -> int:
    """Tokens held by a key/value cache, padding included; 0 for None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])
