"""Where the gate reads and where the edit writes, from what a forward pass tells about itself.

The published design reads and writes one position, the last token of the prompt, once per answer. The hooks and the
engines do not know that: they take whatever `Sites` a rule gives, and a rule may give every token and carry state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grun.errors import ConfigError, DataError
from pyvene_custom.sites import Sites


@dataclass
class PromptOfCall:
    """The prompt handed to one `generate` call, in columns of the whole sequence (earlier turns included)."""

    last_column: Tensor
    """Column of each row's last prompt token, int64, shape [prompts]."""
    columns: int
    """Columns of the prompt, so that a decode step is told from it without looking at a tensor."""


@dataclass
class Call:
    """What one forward pass of the base model tells about itself."""

    rows: int
    """Batch size."""
    columns: int
    """Tokens in this pass, padding included."""
    past: int
    """Tokens already in the cache."""
    device: torch.device
    """Device of the inputs."""
    attention_mask: Tensor | None
    """1 for tokens that count, shape [batch, past + columns], or None if there is no such mask."""
    labels: Tensor | None
    """-100 outside the answer, shape [batch, columns]."""
    prompt_lengths: Tensor | None
    """Prompt tokens of each row, padding not included, shape [batch]."""
    prompt: PromptOfCall | None
    """Set while `generate` runs."""


class PositionRule(Protocol):
    """Turns a call into the sites where it is read and written."""

    def locate(self, call: Call) -> Sites | None:
        """Sites of this pass, or None where nothing is read or written."""
        ...


class LastPrompt:
    """The published rule: gate and edit at the last token of the prompt, once per answer.

    The position is taken, in this order, from: `prompt_lengths`; the token before the first label; the last attended
    token; the last column. In `generate` it is the last token of the prompt handed to that call, also when a cache
    of earlier turns comes with it. A bare pass with a filled cache and neither lengths nor labels is a decode step,
    which is not edited.
    """

    def locate(self, call: Call) -> Sites | None:
        """See the class."""
        if call.prompt_lengths is None and _is_decode_step(call):
            return None
        columns = torch.arange(call.columns, device=call.device)
        if call.attention_mask is None:
            attended = torch.ones(call.rows, call.columns, dtype=torch.bool, device=call.device)
        else:
            attended = call.attention_mask[:, -call.columns :] != 0  # [batch, columns]
        if call.prompt_lengths is not None:
            last = _column_of_nth_attended(call.prompt_lengths.to(call.device), attended)
        elif call.prompt is not None:
            last = call.prompt.last_column.to(call.device)
            last = last.repeat_interleave(call.rows // len(last)) - call.past  # beams and samples repeat each prompt
        elif call.labels is not None and bool((call.labels != -100).any()):
            has_label = call.labels != -100
            first = torch.where(has_label, columns, call.columns).amin(dim=1) - 1
            last = torch.where(has_label.any(dim=1), first, _last_attended(attended))
        elif call.past > 0:
            return None
        else:
            last = _last_attended(attended)
        inside = (last >= 0) & (last < call.columns)
        if not bool(inside.any()):
            return None
        where = last.unsqueeze(1)  # [batch, 1]
        return Sites(read=where, read_mask=inside.unsqueeze(1), write=where, write_mask=inside.unsqueeze(1))


def _is_decode_step(call: Call) -> bool:
    """Whether this pass lies behind the prompt; told without looking at a tensor, so that it launches nothing."""
    if call.prompt is not None:
        return call.past >= call.prompt.columns
    return call.past > 0 and call.labels is None


def position_rule(gate_read: str, gate_accumulate: str, edit_write: str) -> PositionRule:
    """Rule for these names; ConfigError lists what exists."""
    if (gate_read, gate_accumulate, edit_write) != ("last_prompt", "none", "last_prompt"):
        raise ConfigError(
            f"position rule gate_read={gate_read} gate_accumulate={gate_accumulate} edit_write={edit_write} does not "
            "exist; known: gate_read=last_prompt gate_accumulate=none edit_write=last_prompt"
        )
    return LastPrompt()


def _column_of_nth_attended(counts: Tensor, attended: Tensor) -> Tensor:
    if counts.shape != attended.shape[:1]:
        raise DataError(f"prompt_lengths has shape {list(counts.shape)}; give one length for each of the batch's rows")
    running = attended.long().cumsum(dim=1)
    if bool(((counts < 1) | (counts > running[:, -1])).any()):
        raise DataError(
            f"prompt_lengths {counts.tolist()} must lie between 1 and the attended tokens of each row, "
            f"{running[:, -1].tolist()}; they count prompt tokens without padding"
        )
    return ((running == counts.unsqueeze(1)) & attended).long().argmax(dim=1)


def _last_attended(attended: Tensor) -> Tensor:
    columns = torch.arange(attended.shape[1], device=attended.device)
    return torch.where(attended, columns, -1).amax(dim=1)
