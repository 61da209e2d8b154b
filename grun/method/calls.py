"""What a forward pass, and the `generate` call it may belong to, show about their prompts: what edits go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from grun.errors import ModelError

SHUT = -1000.0
"""What is added to a score that is masked is below this, whoever made the mask."""


@dataclass
class Call:
    """What one forward pass of the base model shows about itself."""

    rows: int
    """Batch size."""
    columns: int
    """Tokens in this pass, padding included."""
    past: int
    """Tokens already in the cache."""
    device: torch.device
    """Device of the inputs."""
    attention_mask: Tensor | None = None
    """1 for tokens that count, shape [batch, past + columns] or those of this pass alone; None: all do."""
    labels: Tensor | None = None
    """-100 outside the answer, shape [batch, columns]."""
    prompt_lengths: Tensor | None = None
    """Prompt tokens of each row from the first of this pass on, padding not included, shape [batch]."""
    prompt: PromptOfCall | None = None
    """Set while `generate` runs."""
    ids: Tensor | None = None
    """Tokens of this pass, shape [batch, columns]; None where the model is given embeddings."""
    earlier: Tensor | None = None
    """Tokens of earlier passes that are known, -1 for padding, shape [batch, any]."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """What gates remember of earlier passes, by intervention."""
    goes_on: bool = False
    """Whether there is a cache to hold this pass, so that a prompt may end in a later one."""
    after_prompt: bool | None = None
    """Whether a prompt has ended in the cache; None: wherever it holds any. False for virtual tokens, as PEFT's."""

    def __post_init__(self) -> None:
        if self.after_prompt is None:
            self.after_prompt = self.past > 0


@dataclass(eq=False)
class PromptOfCall:
    """The prompt handed to one `generate` call, in columns of the whole sequence (earlier turns included)."""

    last_column: Tensor
    """Column of each row's last prompt token, int64, shape [prompts]."""
    columns: int
    """Columns of the prompt, by which a decode step is known without looking at a tensor."""
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
        """Whether a pass belongs to this call, or is one made within it, as by a logits processor.

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
        mask = _mask_of_padding(inputs, kwargs, kwargs.get("generation_config") or config)
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


def _mask_of_padding(inputs: Tensor, kwargs: Mapping[str, Any], config: Any) -> Tensor | None:
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


def counting(mask: Any, rows: int, columns: int, past: int) -> Tensor | None:
    """1 for tokens that count, of the whole sequence or of this pass alone: [batch, past + columns or columns].

    A mask of [batch, 1, queries, keys], bool or added to scores, shows whether each token may look at itself. Of a dict
    of masks by kind of layer that of full attention is read. None: all tokens count.

    Args:
        mask: what the model is given.
        rows: batch size.
        columns: tokens of this pass.
        past: tokens in the cache.

    Raises:
        ModelError: it cannot be read.
    """
    if isinstance(mask, Mapping):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == rows and mask.shape[1] >= columns:
        start = past if mask.shape[1] >= past + columns else mask.shape[1] - columns
        return mask[:, : start + columns]
    readable = isinstance(mask, Tensor) and mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())
    if not readable or mask.shape[2] != columns or mask.shape[3] < columns or len(mask) not in (1, rows):
        given = f"{list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ModelError(
            f"the attention mask is {given}, for {rows} rows of {columns} tokens after {past}; edits need one that is "
            "1 for tokens that count, [batch, tokens], or [batch, 1, queries, keys] of bool or added to scores"
        )
    keys = mask.shape[3]
    own = torch.arange(columns, device=mask.device) + (past if keys >= past + columns else keys - columns)
    at_itself = mask[:, 0].gather(2, own.expand(len(mask), -1).unsqueeze(2)).squeeze(2)  # [batch or 1, columns]
    seen = at_itself if mask.dtype == torch.bool else at_itself > SHUT
    return seen.long().expand(rows, -1) if len(mask) == 1 else seen.long()
