"""Gate terms: what trains the gate to open on forget rows and to stay shut on retain rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from grun.objectives.terms import Continuation, Outputs, TermValue, summed, term

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST = 3
"""Positions of a forget row that `bce_max` opens the gate at."""


def gate_passes(continuations: Collection[Continuation]) -> list[Continuation]:
    """Passes whose gates count: each prompt once, so the answer's where a forget row is run with another too."""
    again = ("refusal", "alternate") if "answer" in continuations else ()
    return [name for name in continuations if name not in again]


@term("bce_row", side="gate", per="row", continuations=())
def bce_row(outputs: Outputs) -> TermValue:
    """BCE on gate logits, forget rows 1, retain rows 0, mean over blocks.

    On logits, not probabilities: a gate that is wide open on a retain row still learns.

    Source: GRUN, arXiv 2502.17823.
    """

    def of_rows(name: Continuation, logits: Tensor, mask: Tensor, _: Tensor | None) -> Tensor:
        import torch

        target = torch.full_like(logits, 0.0 if name == "retain" else 1.0)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        counted = mask.to(loss.dtype)  # [batch, positions read]
        return (loss * counted).sum(dim=2).div(counted.sum(dim=1).clamp(min=1))

    return _over_passes(outputs, of_rows)


@term("bce_max", side="gate", per="row", continuations=())
def bce_max(outputs: Outputs) -> TermValue:
    """BCE on a row's highest gate logits: 3 of a forget prompt 1, maximum and token mean of a retain row 0.

    For gates that read every token, where not each token of a forget row shows what the row is about.
    Multiple-instance learning: a row is a bag of tokens, of which a few decide. With one position read (last_prompt) it
    is `bce_row` with the retain half counted twice.
    """
    return _over_highest(outputs, _open)


@term("bce_max_last", side="gate", per="row", continuations=())
def bce_max_last(outputs: Outputs) -> TermValue:
    """As bce_max, and the gate logit at a forget prompt's last token 1.

    For questions that are asked in other words: two cues open the gate, not one. With `bce_max` alone it learns the
    tokens that mark a forget prompt best, mostly a name's, and stays shut where these are written otherwise. The last
    prompt token holds what the model is about to generate, however it was asked.
    """
    return _over_highest(outputs, lambda logits, counted: _open(logits, counted) + _open(logits, _last(counted)))


def _over_highest(outputs: Outputs, opened: Callable[[Tensor, Tensor], Tensor]) -> TermValue:
    """As `_over_passes`: `_shut` on retain rows, `opened` on the prompts of forget rows; arguments as `_open`'s."""

    def of_rows(name: Continuation, logits: Tensor, mask: Tensor, in_prompt: Tensor | None) -> Tensor:
        if name == "retain":
            return _shut(logits, mask)
        return opened(logits, mask if in_prompt is None else mask & in_prompt)

    return _over_passes(outputs, of_rows)


def _over_passes(
    outputs: Outputs, of_rows: Callable[[Continuation, Tensor, Tensor, Tensor | None], Tensor]
) -> TermValue:
    """Sum over rows of the mean over blocks.

    `of_rows` gives the loss [blocks, batch] from a pass' name, gate logits [blocks, batch, positions read], which of
    these count, and which lie in the prompt (as in StepOutput).
    """
    import torch

    rows = []
    for name in gate_passes(outputs.model):
        output = outputs.model[name]
        if output.gate_logits is None or output.gate_mask is None:
            continue
        logits = torch.stack(list(output.gate_logits.values()))
        rows.append(of_rows(name, logits, output.gate_mask, output.gate_prompt).mean(dim=0))
    return summed(torch.cat(rows)) if rows else TermValue(torch.zeros(()), 0)


def _open(logits: Tensor, counted: Tensor) -> Tensor:
    """-log sigmoid of the mean of a row's highest logits; arguments and result as `_mean_of_highest`."""
    from torch.nn.functional import softplus

    return softplus(-_mean_of_highest(logits, counted, HIGHEST)) * counted.any(dim=1)


def _shut(logits: Tensor, counted: Tensor) -> Tensor:
    """-log(1 - sigmoid) of a row's highest logit, plus the mean of that over its positions; as `_mean_of_highest`."""
    from torch.nn.functional import softplus

    highest = softplus(_mean_of_highest(logits, counted, 1))
    mean = (softplus(logits) * counted).sum(dim=2) / counted.sum(dim=1).clamp(min=1)
    return highest * counted.any(dim=1) + mean


def _last(counted: Tensor) -> Tensor:
    """Only the last position of each row that counts; bool, [batch, positions read], as `counted`."""
    return counted & (counted.flip(1).cumsum(dim=1).flip(1) == 1)


def _mean_of_highest(logits: Tensor, counted: Tensor, most: int) -> Tensor:
    """Mean of the `most` highest logits among the positions that count, of all where there are fewer; 0 where none.

    From logits [blocks, batch, positions read] and `counted`, bool [batch, positions read], to [blocks, batch].
    """
    import torch

    highest = logits.masked_fill(~counted, -torch.inf).topk(min(most, logits.shape[2]), dim=2).values
    number = counted.sum(dim=1).clamp(max=most)  # [batch]
    taken = torch.arange(highest.shape[2], device=logits.device) < number.unsqueeze(1)  # [batch, most]
    return highest.masked_fill(~taken, 0.0).sum(dim=2) / number.clamp(min=1)
