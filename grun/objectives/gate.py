"""Gate terms: what teaches the gate to open on forget rows and to stay shut on retain rows."""

from __future__ import annotations

from collections.abc import Collection

from grun.objectives.terms import Continuation, Options, Outputs, TermValue, summed, term


def gate_passes(continuations: Collection[Continuation]) -> list[Continuation]:
    """Passes whose gates count: each prompt once, so the answer's where a forget row is run with a refusal too."""
    return [name for name in continuations if name != "refusal" or "answer" not in continuations]


@term(
    "bce_row",
    "BCE on gate logits, forget rows 1, retain rows 0, mean over blocks",
    side="gate",
    per="row",
    continuations=(),
)
def _bce_row(outputs: Outputs, _: Options) -> TermValue:
    """On logits, not probabilities: a gate that is wide open on a retain row still learns."""
    import torch

    rows = []
    for name in gate_passes(outputs.model):
        output = outputs.model[name]
        if output.gate_logits is None or output.gate_mask is None:
            continue
        logits = torch.stack(list(output.gate_logits.values()))  # [blocks, batch, positions read]
        target = torch.full_like(logits, 0.0 if name == "retain" else 1.0)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        counted = output.gate_mask.to(loss.dtype)  # [batch, positions read]
        rows.append((loss * counted).sum(dim=2).div(counted.sum(dim=1).clamp(min=1)).mean(dim=0))
    return summed(torch.cat(rows)) if rows else TermValue(torch.zeros(()), 0)
