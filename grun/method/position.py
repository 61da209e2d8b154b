"""Where the gate reads and where the edit writes, from what a forward pass shows about itself.

The published design reads and writes one position, the last token of the prompt, once per answer. Others read every
token, and write every one or all from the last prompt token on. The hooks do not know: they take whatever `Sites` a
rule gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.functional import pad

from grun.errors import DataError, ModelError
from grun.method.gate_state import GateState
from grun.method.pooled_sites import PLACES, PooledSites
from grun.method.rules import PROMPT
from pyvene_custom.sites import Sites

Changes = Literal["last_prompt", "from_last_prompt", "every_token"]
"""Tokens of a row at which an edit or a gate acts: the last of the prompt, it and those after it, or any."""
ANY = -2
"""Stands for any token, and is the id of none."""
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
    state: GateState | None = None
    """What gates remember of earlier passes; None: nothing."""
    logits_to_keep: int | Tensor = 0
    """Columns that logits are made of; see `PooledSites`."""
    goes_on: bool = False
    """Whether there is a cache to hold this pass, so that a prompt may end in a later one."""
    after_prompt: bool = False
    """Whether a prompt has ended in the cache, which may hold virtual tokens alone, as PEFT's."""

    @property
    def carry(self) -> dict[str, Tensor]:
        """What gates remember, by intervention: `GateState.last`."""
        return {} if self.state is None else self.state.last()


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
                self.columns += in_front
                self.last_column = self.last_column + in_front
                self.ids = None
                self.mask = None if self.mask is None else pad(self.mask, (in_front, 0), value=1)
        return True

    def disown(self, cache: Any) -> None:
        """Count no pass with `cache` as this call's."""
        if cache is not None and not isinstance(cache, tuple):
            self._foreign.add(cache)


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
        last = _last_attended(mask != 0)
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


def counting(mask: Any, call: Call) -> Tensor | None:
    """1 for tokens that count, of the whole sequence or of this pass alone: [batch, past + columns or columns].

    A mask of [batch, 1, queries, keys], bool or added to scores, shows whether each token may look at itself. Of a dict
    of masks by kind of layer that of full attention is read. None: all tokens count. Where `generate` hands on another
    form of the prompt's own mask, that one counts.

    ModelError: `mask`, which the model is given, cannot be read.
    """
    rows, columns, past, prompt = call.rows, call.columns, call.past, call.prompt
    if prompt is not None and prompt.mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        own = prompt.mask.repeat_interleave(rows // len(prompt.mask), dim=0)[:, : past + columns]
        return pad(own, (0, past + columns - own.shape[1]), value=1)
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


@dataclass
class PositionRule:
    """Turns a call into the sites where it is read and written.

    last_prompt, last_prompt is the published rule: gate and edit at the last token of the prompt, once per answer.
    last_prompt, sticky: the edit is written there and at every token after it, by what was read there until another
    prompt ends. last_prompt, prompt: at every token of this pass from the turn's first one up to there. every_token:
    the gate reads every token, and the edit is weighted by the gate in force at its token.
    """

    read: str = "last_prompt"
    """Where the gate reads: last_prompt or every_token."""
    write: str = "last_prompt"
    """Where the edit is written: last_prompt, sticky (there and after it), prompt (there and before it) or
    every_token."""
    reset: tuple[int, ...] = ()
    """Ids that begin a user's turn, at the last of which what is accumulated or pooled starts again; none otherwise."""
    pooled: bool = False
    """Whether one gate for all edits reads states pooled over the tokens so far; `read` is where it is asked."""
    counts: bool = False
    """With `pooled` and sticky: whether tokens are counted from the last one of the prompt on."""
    keywords: tuple[tuple[int, ...], ...] = ()
    """With `pooled`: sequences of ids at whose ends a gate by keywords opens; empty: it reads states."""

    def __post_init__(self) -> None:
        if not self.pooled and self.read != "every_token":
            self.reset = ()

    @property
    def changes(self) -> Changes:
        """Which tokens of a row training can change above the first edited block, besides what follows from it."""
        if self.read == "every_token" or self.write == PROMPT:
            return "every_token"
        return "last_prompt" if self.write == "last_prompt" and not self.pooled else "from_last_prompt"

    @property
    def remembers(self) -> bool:
        """Whether a pass depends on what gates read in earlier ones."""
        return self.changes != "last_prompt"

    def locate(self, call: Call) -> Sites | None:
        """Sites of this pass, or None where nothing is read or written."""
        if (last := last_prompt_column(call)) is not None:
            last = last.unsqueeze(1)
        if not self.remembers:
            if last is None or not bool((inside := _inside(call, last)).any()):
                return None
            return Sites(last, inside, last, inside)
        columns = torch.arange(call.columns, device=call.device).expand(call.rows, -1)
        counts = attended(call)
        if last is None or self.write == "every_token":
            written = counts & (self.write in ("sticky", "every_token"))
        elif self.write == PROMPT:
            written = counts & (columns <= last)
        else:
            written = counts & (columns >= last if self.write == "sticky" else columns == last)
        resets = _ended(call, (self.reset,)) if self.reset and call.ids is not None else None
        if self.read == "every_token":
            sites = Sites(columns, counts, columns, written, call.carry, resets, everywhere=True)
        elif last is None:
            nothing = columns[:, :0]
            sites = Sites(nothing, nothing.bool(), columns, written, call.carry, whole=True)
        elif self.write == PROMPT:
            inside, turn = _inside(call, last), _turns(counts, resets)
            asked = turn.gather(1, last.clamp(0, call.columns - 1))
            if call.past and bool((inside & (asked == 0)).any()):
                raise ModelError(
                    "noise is written on a whole turn, and the cache holds the beginning of this one; hand a user's "
                    "turn over in one pass (without prefill_chunk_size)"
                )
            sites = Sites(last, inside, columns, written & inside & (turn == asked), call.carry, whole=True)
        else:
            first = int(last.clamp(0, call.columns - 1).min())  # nothing is written before it
            sites = Sites(last, _inside(call, last), columns[:, first:], written[:, first:], call.carry)
        if not self.pooled:
            return sites
        found = PooledSites(**vars(sites), turns=_turns(counts, resets), memory=call.state)
        if self.keywords and call.ids is not None:
            found.spelled = _ended(call, self.keywords).unsqueeze(2)
        if self.counts:
            found.places, found.answered = _places(call, last, written), written
            found.logits_to_keep = call.logits_to_keep
        return found


def _inside(call: Call, last: Tensor) -> Tensor:
    """Which rows' last prompt tokens, columns [rows, 1], this pass has: as `last`."""
    return (last >= 0) & (last < call.columns)


def _turns(counts: Tensor, resets: Tensor | None) -> Tensor:
    """Number of each column's turn in this pass, -1 for what does not count: int64 [rows, columns]."""
    number = torch.zeros_like(counts, dtype=torch.long) if resets is None else resets.long().cumsum(dim=1)
    return torch.where(counts, number, -1)


def _ended(call: Call, sequences: tuple[tuple[int, ...], ...]) -> Tensor:
    """Columns at which one of `sequences` of ids ends, of this pass and those before it: bool [rows, columns]."""
    assert call.ids is not None
    ids = call.ids.to(call.device).masked_fill(~attended(call), -1)  # what is masked is part of none
    wanted = _from_behind(sequences, call.device)  # [longest, sequences]
    count = len(wanted) - 1
    before = ids.new_full((call.rows, count), -1)
    if count and call.state is not None and (known := call.state.ids[:, -count:]).shape[1]:
        before[:, count - known.shape[1] :] = known.to(call.device)
    joined = torch.cat((before, ids), dim=1).unsqueeze(2)
    found = joined[:, count:] == wanted[0]  # [rows, columns, sequences]
    for place in range(1, count + 1):
        found &= (joined[:, count - place : -place] == wanted[place]) | (wanted[place] == ANY)
    return found.any(dim=2)


@lru_cache(maxsize=64)
def _from_behind(sequences: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Ids of sequences from their ends to their beginnings, `ANY` before these: int64 [longest, sequences]."""
    longest = max(map(len, sequences))
    return torch.tensor([[*one[::-1], *[ANY] * (longest - len(one))] for one in sequences], device=device).T


def last_prompt_column(call: Call) -> Tensor | None:
    """Column of each row's last prompt token, within this pass, shape [batch]; None for a pass after the prompt.

    It lies outside 0..columns - 1 where the token is in an earlier pass or a later one. It is taken, in this order,
    from: `prompt_lengths`; in `generate`, the prompt handed to that call, also when a cache of earlier turns comes with
    it; the token before the first label, in rows of which that is not the first attended token; the last attended
    token; the last column. A bare pass after a prompt in the cache, with neither lengths nor labels, is a decode step.
    """
    if is_decode_step(call):
        return None
    if call.prompt_lengths is not None:
        return _column_of_nth_attended(call.prompt_lengths.to(call.device), attended(call), call.goes_on)
    if call.prompt is not None:
        last = call.prompt.last_column.to(call.device)
        return last.repeat_interleave(call.rows // len(last)) - call.past  # beams and samples repeat each prompt
    last = torch.full((call.rows,), -1, device=call.device) if call.after_prompt else _last_attended(attended(call))
    if call.labels is None or not bool((has_label := call.labels.to(call.device) != -100).any()):
        return None if call.after_prompt else last
    first = torch.where(has_label, torch.arange(call.columns, device=call.device), call.columns).amin(dim=1)
    # The label of a row's first token marks no prompt: its whole text is labeled. After a prompt in the cache it does.
    start = -1 if call.after_prompt else attended(call).long().argmax(dim=1)
    return torch.where(has_label.any(dim=1) & (first > start), first - 1, last)


def attended(call: Call) -> Tensor:
    """Which tokens of this pass count, bool, shape [batch, columns]."""
    if call.attention_mask is None:
        return torch.ones(call.rows, call.columns, dtype=torch.bool, device=call.device)
    return call.attention_mask[:, -call.columns :].to(call.device) != 0


def is_decode_step(call: Call) -> bool:
    """Whether this pass comes after the prompt; decided without looking at a tensor, so that it launches nothing."""
    if call.prompt_lengths is not None:
        return False
    if call.prompt is not None:
        return call.past >= call.prompt.columns
    return call.after_prompt and call.labels is None


def _places(call: Call, last: Tensor | None, written: Tensor) -> Tensor:
    """See `PooledSites.places`; `written` are the columns that are counted, those from the last prompt token on."""
    before = call.carry.get(PLACES)
    start = torch.full((call.rows, 1), -1, device=call.device) if before is None else before.clamp(min=-1).long()
    if last is not None:
        start = torch.where(_inside(call, last), -1, start.to(call.device))
    return start.to(call.device) + written.long().cumsum(dim=1)


def _column_of_nth_attended(counts: Tensor, attended: Tensor, goes_on: bool) -> Tensor:
    if counts.shape != attended.shape[:1]:
        raise DataError(f"prompt_lengths has shape {list(counts.shape)}; give one length for each of the batch's rows")
    running = attended.long().cumsum(dim=1)
    beyond = counts > running[:, -1]
    if bool(((counts < 1) | (beyond if not goes_on else False)).any()):
        raise DataError(
            f"prompt_lengths {counts.tolist()} must lie between 1 and the attended tokens of each row, "
            f"{running[:, -1].tolist()}; they count prompt tokens without padding (with past_key_values alone may they "
            "be more than a pass has: the prompt goes on in the next one)"
        )
    column = ((running == counts.unsqueeze(1)) & attended).long().argmax(dim=1)
    return torch.where(beyond, attended.shape[1], column)


def _last_attended(attended: Tensor) -> Tensor:
    columns = torch.arange(attended.shape[1], device=attended.device)
    return torch.where(attended, columns, -1).amax(dim=1)
