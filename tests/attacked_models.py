"""What attacks with the weights may change of a model, so that tests see whether all of it is put back."""

from __future__ import annotations

from typing import Any

import peft
import torch
from tiny import ragged_rows
from torch import Tensor

from grun.data.encoding import collate
from grun.evaluation.scoring import base_of, forward
from grun.method.model import GrunModel

ROWS = ragged_rows(6, 2)


def with_lora(base: Any) -> Any:
    """`base` with a LoRA that changes something, as PEFT wraps it."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return wrapped.eval()


def state(model: Any) -> dict[str, Tensor]:
    """Copies of all tensors of base and edits, in their order."""
    edits = model.state_dict() if isinstance(model, GrunModel) else {}
    return {name: value.clone() for name, value in {**base_of(model).state_dict(), **edits}.items()}


def changed(before: dict[str, Tensor], model: Any) -> set[str]:
    """Names of the tensors that differ from `before` or are gone."""
    now = state(model)
    return {name for name, value in before.items() if name not in now or not torch.equal(now[name], value)}


def everything_else(model: Any) -> list[Any]:
    """Names and order of tensors, gradients, flags, modes and logits."""
    both = [base_of(model), model]
    flags = [(p.requires_grad, p.grad, id(p)) for one in both for p in one.parameters()]
    modules = [(type(module), module.training) for one in both for module in one.modules()]
    return [[*state(model)], flags, modules, logits(model).tolist()]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of some rows."""
    batch = collate(ROWS, 0)
    found: Tensor = forward(model, batch.input_ids, batch.attention_mask, batch.prompt_lengths).logits
    return found
