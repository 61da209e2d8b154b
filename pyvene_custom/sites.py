"""Where a forward pass is read and written, and what a gated intervention gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from pyvene.models.interventions import (
    DistributedRepresentationIntervention,
    InterventionOutput,
    SourcelessIntervention,
    TrainableIntervention,
)
from torch import Tensor


@dataclass
class Sites:
    """Columns of one forward pass that interventions read and write, by row.

    Columns count within the tokens of this pass, padding included, 0-based. Entries whose mask is False are ignored.
    """

    read: Tensor
    """Columns read, int64, shape [batch, positions read]."""
    read_mask: Tensor
    """Which of them count, bool, shape [batch, positions read]."""
    write: Tensor
    """Columns written, int64, shape [batch, positions written]; may be the same object as `read`."""
    write_mask: Tensor
    """Which of them are written, bool, shape [batch, positions written]."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """State that interventions keep from one pass to the next, by intervention key; its owner decides how long."""
    reset: Tensor | None = None
    """Positions read at which that state starts again, bool, shape [batch, positions read]; None: none."""
    everywhere: bool = False
    """Whether `read` and `write` are all columns in their order, so that states are taken as they stand."""
    whole: bool = False
    """Whether `write` is all columns in their order, whatever `read` is."""
    shape: tuple[int, int] | None = None
    """Rows and tokens of the pass, which a block must be given to be edited; None: any."""
    about: Any = None
    """Whatever their owner wants to know when the pass is over."""

    def to(self, device: torch.device) -> Sites:
        """Same columns on `device`; the carried state stays shared."""
        if self.read.device == device:
            return self
        write = self.write.to(device)
        read = write if self.read is self.write else self.read.to(device)
        reset = None if self.reset is None else self.reset.to(device)
        masks = self.read_mask.to(device), self.write_mask.to(device)
        return Sites(read, masks[0], write, masks[1], self.carry, reset, self.everywhere, self.whole)


class Intervention(SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
    """Base of an intervention that is trained and needs no source activations.

    What it holds is float32 or wider: `half()`, `to(torch.bfloat16)` and the like move it, and leave its type.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrow = result.is_floating_point() and result.dtype.itemsize < 4
            return tensor.to(result.device) if narrow and result.dtype != tensor.dtype else result

        applied: Self = super()._apply(wide, recurse)
        return applied

    def widen(self, states: Tensor) -> torch.dtype:
        """Type to compute in, at least float32 and that of `states`; what is held becomes as wide, however it came."""
        tensors = (
            one for module in self.modules() for one in (*module._parameters.values(), *module._buffers.values())
        )
        held = {one.dtype for one in tensors if one is not None and one.is_floating_point()}
        least = torch.promote_types(states.dtype, torch.float32)
        widest = max((least, *held), key=lambda dtype: dtype.itemsize)
        if any(dtype != widest for dtype in held):
            self.to(widest)
        return widest


@dataclass
class GatedOutput(InterventionOutput):
    """pyvene's intervention output with the gate."""

    gate: Any = None
    """Gate logits, shape [batch, positions read]; None for an intervention without a gate."""
    opening: Any = None
    """Logits by which the edit was weighted, accumulated over positions, as `gate`; None: the gate logits."""
    carry: Any = None
    """What passes after this one need, at each position read or one for all; None: the opening; empty: nothing."""


def read_and_written(hidden: Tensor, sites: Sites) -> tuple[Tensor, Tensor]:
    """States [batch, positions, width] that `sites` read and write, one object where these are the same positions."""
    if sites.everywhere:
        return hidden, hidden
    written = hidden if sites.whole else gather(hidden, sites.write)
    if sites.read is sites.write:
        return written, written
    return gather(hidden, sites.read) if sites.read.shape[1] else hidden[:, :0], written


def put_back(hidden: Tensor, sites: Sites, states: Tensor) -> Tensor:
    """`hidden` with `states` [batch, positions written, width] where `sites` write."""
    if not (sites.everywhere or sites.whole):
        return scatter(hidden, sites.write, sites.write_mask, states)
    if bool(sites.write_mask.all()):
        return states.to(hidden.dtype)
    return torch.where(sites.write_mask.unsqueeze(-1), states.to(hidden.dtype), hidden)


def gather(hidden: Tensor, columns: Tensor) -> Tensor:
    """States at `columns`: hidden [batch, length, width], columns [batch, positions] -> [batch, positions, width]."""
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
    return hidden[rows, columns.clamp(0, hidden.shape[1] - 1)]


def scatter(hidden: Tensor, columns: Tensor, mask: Tensor, states: Tensor) -> Tensor:
    """Copy of `hidden` with `states` [batch, positions, width] at `columns` where `mask` is True."""
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1).expand_as(columns)
    if bool(mask.all()):
        return hidden.index_put((rows, columns), states.to(hidden.dtype))
    return hidden.index_put((rows[mask], columns[mask]), states[mask].to(hidden.dtype))
