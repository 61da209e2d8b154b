"""How the edits of several requests that act on one state are put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RULES = {
    "sum": "every edit, weighted with its own gate",
    "max_gate": "the edit of the gate that is most open, weighted with it",
    "softmax_gate": "every edit, weighted with its gate and with its share in the softmax of the gates' logits",
    "grun_paper": "the sum times 0.6 n + 0.6 for n requests, as published; one request alone is edited 1.2 times",
}
"""Names of the rules, and what each does."""


def edit_weights(opening: Tensor, written: Tensor, rule: str) -> Tensor:
    """Weight of each request's edit at each position, 0 where it is not written.

    With one request every rule but `grun_paper` gives the gate's probability.

    Args:
        opening: gates' logits in force, -inf where shut, [..., requests].
        written: which requests write at which positions, bool, of a shape that broadcasts to that of `opening`.
        rule: a name in `RULES`. Source of grun_paper: the code published with GRUN, arXiv 2502.17823.
    """
    import torch

    shut = opening.masked_fill(~written, -torch.inf)
    gates = torch.sigmoid(shut)
    if rule == "grun_paper":
        return (0.6 * opening.shape[-1] + 0.6) * gates
    if rule == "max_gate":
        widest = torch.nn.functional.one_hot(shut.argmax(dim=-1), opening.shape[-1])
        return gates * widest
    if rule == "softmax_gate":
        lowest = torch.finfo(shut.dtype).min  # not -inf: where every gate is shut the softmax of those is undefined
        return gates * torch.softmax(shut.clamp(min=lowest), dim=-1)
    return gates
