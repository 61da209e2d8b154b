"""Weights that are cut among processes (FSDP's `fully_shard`, DeepSpeed's ZeRO-3): whole ones, for files.

How weights are cut is accelerate's business, by the files in `grun/config/accelerate/`. What is written under FSDP is
whole, so that a run goes on with another number of processes, or without sharding.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from grun.errors import ConfigError
from grun.runtime import processes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def asked_for() -> bool:
    """Whether the launcher asked for weights that are cut among processes."""
    return any(
        os.environ.get(name, "").lower() == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )


def check_possible(*, looks: bool, needs_reference: bool) -> None:
    """ConfigError where the weights are to be cut and something would need all of them in one process."""
    if asked_for() and looks:
        raise ConfigError(
            "train.monitor_epochs looks at the whole model, and its weights are cut among processes; set 0"
        )
    if asked_for() and needs_reference:
        raise ConfigError(
            "the objective reads the untouched model in every step, and weights are cut among processes; take "
            "method.parametrization=lora, which needs no cutting, or another objective"
        )


def whole_state(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """All parameters and buffers of a model after `fully_shard`, on the CPU of the first process; elsewhere none.

    With `optimizer` its state instead, by name of the parameter.
    """
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = (
        of.get_model_state_dict(model, options=options)
        if optimizer is None
        else of.get_optimizer_state_dict(model, optimizer, options=options)
    )
    return found if processes.is_first() else {}


def take_state(model: nn.Module, state: dict[str, Any], optimizer: Optimizer | None = None) -> None:
    """Put what `whole_state` gave, which the first process brings, into a model that is cut, or its optimizer."""
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=optimizer is not None)
    if optimizer is None:
        of.set_model_state_dict(model, state, options=options)  # tied ones have one name, so not strict
    else:
        of.set_optimizer_state_dict(model, optimizer, state, options=options)


def put_back(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Make the parameters of `module` whole again in the first process, where `state` holds them; tied ones stay tied.

    In the other processes nothing is changed, and the module is of no further use there.
    """
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)) if state else ():
        owner, _, leaf = name.rpartition(".")
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(state[name], requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), leaf, made[id(parameter)])
