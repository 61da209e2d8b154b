"""Where the gate reads and where the edit writes, from what a forward pass shows about itself.

The published design reads and writes one position, the last token of the prompt, once per answer. Others read every
token, and write every one or all from the last prompt token on. The hooks do not know: they take whatever `Sites` a
rule gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grun.errors import DataError
from grun.method.calls import Call
from grun.method.rules import check_rule
from pyvene_custom.sites import Sites

Changes = Literal["last_prompt", "from_last_prompt", "every_token"]
"""Tokens of a row at which an edit or a gate acts: the last of the prompt, it and those after it, or any."""


@dataclass
class PositionRule:
    """Turns a call into the sites where it is read and written.

    last_prompt, last_prompt is the published rule: gate and edit at the last token of the prompt, once per answer.
    last_prompt, sticky: the edit is written there and at every token after it, by what was read there until another
    prompt ends. every_token: the gate reads every token, and the edit is weighted by the gate in force at its token.
    """

    read: str = "last_prompt"
    """Where the gate reads: last_prompt or every_token."""
    write: str = "last_prompt"
    """Where the edit is written: last_prompt, sticky (there and after it) or every_token."""
    reset: Sequence[int] = ()
    """Ids that begin a user's turn, at the last of which what is accumulated starts again."""

    @property
    def changes(self) -> Changes:
        """Which tokens of a row training can change above the first edited block, besides what follows from it."""
        if self.read == "every_token":
            return "every_token"
        return "last_prompt" if self.write == "last_prompt" else "from_last_prompt"

    @property
    def remembers(self) -> bool:
        """Whether a pass depends on what gates read in earlier ones."""
        return self.changes != "last_prompt"

    def locate(self, call: Call) -> Sites | None:
        """Sites of this pass, or None where nothing is read or written."""
        last = last_prompt_column(call)
        if not self.remembers:
            return _last_prompt_alone(call, last)
        columns = torch.arange(call.columns, device=call.device).expand(call.rows, -1)
        counts = attended(call)
        if self.read == "every_token":
            written = counts & self._written(columns, last)
            return Sites(columns, counts, columns, written, call.carry, self._resets(call), everywhere=True)
        if last is None:
            nothing = columns[:, :0]
            return Sites(nothing, nothing.bool(), columns, counts, call.carry)
        inside = ((last >= 0) & (last < call.columns)).unsqueeze(1)
        return Sites(last.unsqueeze(1), inside, columns, counts & (columns >= last.unsqueeze(1)), call.carry)

    def _written(self, columns: Tensor, last: Tensor | None) -> Tensor:
        """Where a gate that reads every token has its edit written, padding aside."""
        if self.write == "every_token" or (last is None and self.write == "sticky"):
            return torch.ones_like(columns, dtype=torch.bool)
        if last is None:
            return torch.zeros_like(columns, dtype=torch.bool)
        return columns == last.unsqueeze(1) if self.write == "last_prompt" else columns >= last.unsqueeze(1)

    def _resets(self, call: Call) -> Tensor | None:
        if not self.reset or call.ids is None:
            return None
        ids = call.ids.to(call.device)
        count = len(self.reset) - 1
        before = ids.new_full((call.rows, count), -1)
        if count and call.earlier is not None and (known := call.earlier[:, -count:]).shape[1]:
            before[:, count - known.shape[1] :] = known.to(call.device)
        joined = torch.cat((before, ids), dim=1)
        found = torch.ones(call.rows, call.columns, dtype=torch.bool, device=call.device)
        for place, token in enumerate(self.reset):
            found &= joined[:, place : place + call.columns] == token
        return found


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
    return bool(call.after_prompt) and call.labels is None


def position_rule(gate_read: str, gate_accumulate: str, edit_write: str, reset: Sequence[int] = ()) -> PositionRule:
    """Rule for these names, see `PositionRule`; ConfigError lists what exists, or what does not go together."""
    check_rule(gate_read, gate_accumulate, edit_write)
    return PositionRule(gate_read, edit_write, tuple(reset) if gate_read == "every_token" else ())


def _last_prompt_alone(call: Call, last: Tensor | None) -> Sites | None:
    if last is None:
        return None
    inside = (last >= 0) & (last < call.columns)
    if not bool(inside.any()):
        return None
    where = last.unsqueeze(1)  # [batch, 1]
    return Sites(read=where, read_mask=inside.unsqueeze(1), write=where, write_mask=inside.unsqueeze(1))


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
