"""What the gates of each request said at the tokens of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grun.method.adapter import AdapterConfig
from grun.method.gate_state import GateState
from grun.method.stack.stack import GrunStack

Gates = dict[str, float]
"""By request the probability with which its edits are weighted at a token, the mean over its blocks."""


def gates_at(
    model: Any, configs: Mapping[str, AdapterConfig], counts: Sequence[int], *, prompt: bool
) -> list[list[Gates]]:
    """Gates in the last pass of this thread, for each row at each of its tokens; none where a gate was not asked.

    Args:
        model: a GrunModel, of which `configs` names one request, a GrunStack, or a model without gates.
        configs: by request.
        counts: tokens of each row in the pass, which was padded on the left.
        prompt: whether the pass ended the prompts; a gate that is asked there alone is told at their last tokens.
    """
    found: list[list[Gates]] = [[{} for _ in range(count)] for count in counts]
    if not configs:
        return found
    by_request = model.request_gates if isinstance(model, GrunStack) else dict.fromkeys(configs, model.last_gates)
    for name, by_block in by_request.items():
        everywhere = configs[name].gate_read == "every_token"
        if not by_block or not (everywhere or prompt):
            continue
        values = torch.stack([one.double().cpu() for one in by_block.values()]).mean(0).tolist()  # [rows, positions]
        for row, gates in enumerate(found):
            told = values[row][-len(gates) :] if everywhere else values[row][-1:]
            for at, value in zip(gates[-len(told) :], told, strict=True):
                at[name] = value
    return found


def reads_along(model: Any, configs: Mapping[str, AdapterConfig], memory: GateState | None, row: int) -> list[Gates]:
    """What the pooled gates would say at each token of a prompt, if it ended there; none of other gates.

    Args:
        model, configs: as in `gates_at`.
        memory: what pooled gates have read of the prompt, padding included; None: nothing.
        row: of the memory.
    """
    if not configs or memory is None or model.pooled is None:
        return []
    found: list[Gates] = [{} for _ in range(memory.turns.shape[1])]
    logits = model.pooled.along(memory, row)
    for name, values in (logits if isinstance(model, GrunStack) else dict.fromkeys(configs, logits)).items():
        for reads, value in zip(found, torch.sigmoid(values.double()).tolist(), strict=True):
            reads[name] = value
    return found
