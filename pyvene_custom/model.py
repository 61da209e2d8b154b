"""pyvene's IntervenableModel, patched by subclassing so that gated interventions work on any current decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyvene import IntervenableModel as StockModel
from pyvene.models.modeling_utils import HandlerList
from torch import Tensor, nn

from pyvene_custom.blocks import find_blocks
from pyvene_custom.sites import GatedOutput, Sites, gather, put_back, read_and_written, scatter

Locate = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Sites | None, dict[str, Any]]]
"""Says where the forward pass with these arguments is edited, and which keyword arguments the model should get."""


class IntervenableModel(StockModel):
    """Interventions at the output of decoder blocks.

    Mutates `model`: its parameters stop requiring gradients (as under stock pyvene) and, between `attach` and
    `detach`, hooks sit on it. Stock `forward(base, unit_locations=...)` and `generate` work as documented by pyvene;
    the gates of the last call are in `gates`.
    """

    gates: dict[int, Tensor]
    """Gate logits of the last edited pass by block, each [batch, positions read]; empty without gates."""
    openings: dict[int, Tensor]
    """The same accumulated over positions, as the edits were weighted."""
    gate_mask: Tensor | None
    """Which of these positions count, bool, [batch, positions read]; None after a stock call, where all do."""

    def __init__(self, interventions: dict[int, nn.Module], model: nn.Module, **kwargs: Any) -> None:
        """Put `interventions` (by 0-based block index, each used once) on `model`."""
        path, blocks = find_blocks(model)
        outside = [index for index in interventions if not 0 <= index < len(blocks)]
        if outside:
            raise ValueError(f"blocks {outside} do not exist: {type(model).__name__} has blocks 0..{len(blocks) - 1}")
        order = sorted(interventions)
        representations = [
            {"layer": index, "component": f"{path}[{index}].output", "intervention": interventions[index]}
            for index in order
        ]
        super().__init__(representations, model, **kwargs)
        self.gates, self.openings = {}, {}
        self.gate_mask = None
        self.blocks = blocks
        self.block_of_key = dict(zip(self.sorted_keys, order, strict=True))
        self._handlers: list[Any] = []
        self._attached: list[Any] = []
        self._sites: Sites | None = None
        self._idle = False

    # -- hooks that stay on the model ------------------------------------------------------------------------------

    def attach(self, locate: Locate, finished: Callable[[Any], None] = lambda output: None) -> None:
        """Edit every call of the model itself at the sites that `locate` gives, until `detach`.

        `finished` is called with the output of each edited pass.
        """
        self.detach()

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._sites, kwargs = (None, kwargs) if self._idle else locate(args, kwargs)
            if self._sites is not None:
                self.gates, self.openings, self.gate_mask = {}, {}, self._sites.read_mask
            return args, kwargs

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            edited, self._sites = self._sites is not None, None
            if edited and output is not None:  # None where the pass failed
                finished(output)

        self._attached = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, always_call=True),
        ]
        for key in self.sorted_keys:
            # prepend: transformers records hidden states by a hook of its own, and should record the edited ones.
            block = self.blocks[self.block_of_key[key]]
            self._attached.append(block.register_forward_hook(self._edit_hook(key), prepend=True))

    def detach(self) -> None:
        """Take away every hook that `attach` put on the model, and no other."""
        for handle in self._attached:
            handle.remove()
        self._attached = []
        self._sites = None

    def _edit_hook(self, key: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if self._sites is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            edited = self._edit(key, hidden, self._sites.to(hidden.device), self._sites.read.device)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    def _edit(self, key: str, hidden: Tensor, sites: Sites, home: torch.device) -> Tensor:
        """`hidden` edited where its block computes; gates go to `home`, so that all of them are in one place."""
        read, written = read_and_written(hidden, sites)
        result = self.interventions[key](written, None, None, read=read, sites=sites, carry=sites.carry.get(key))
        if result.gate is not None:
            opening = result.gate if result.opening is None else result.opening
            self.gates[self.block_of_key[key]] = result.gate.to(home)
            self.openings[self.block_of_key[key]] = opening.to(home)
        if result.carry is not None:
            sites.carry[key] = result.carry
        if result.output is None:  # nothing to write anywhere
            return hidden
        return put_back(hidden, sites, result.output)

    # -- overrides of stock methods, each explained in README.md ----------------------------------------------------

    def _remove_forward_hooks(self) -> None:
        """Remove the hooks of this call alone; stock removes every forward hook of every sub-module."""
        for handler in self._handlers:
            handler.remove()
        self._handlers = []

    def _intervention_setter(self, *args: Any, **kwargs: Any) -> HandlerList:
        handlers = super()._intervention_setter(*args, **kwargs)
        self._handlers.append(handlers)
        return handlers

    def _intervention_getter(self, *args: Any, **kwargs: Any) -> HandlerList:
        handlers = super()._intervention_getter(*args, **kwargs)
        self._handlers.append(handlers)
        return handlers

    def _gather_intervention_output(self, output: Any, key: str, unit_locations: Any) -> Tensor:
        if unit_locations is None or self.representations[key].unit != "pos":
            return super()._gather_intervention_output(output, key, unit_locations)
        hidden = output[0] if isinstance(output, tuple) else output
        return gather(hidden, torch.as_tensor(unit_locations, device=hidden.device))

    def _scatter_intervention_output(self, output: Any, states: Tensor, key: str, unit_locations: Any) -> Tensor:
        if unit_locations is None or self.representations[key].unit != "pos":
            return super()._scatter_intervention_output(output, states, key, unit_locations)
        hidden = output[0] if isinstance(output, tuple) else output
        columns = torch.as_tensor(unit_locations, device=hidden.device)
        edited = scatter(hidden, columns, torch.ones_like(columns, dtype=torch.bool), states)
        hidden.copy_(edited)  # stock edits the block's output in place
        return hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """pyvene's forward; hooks of `attach` are idle meanwhile."""
        return self._stock_call(super().forward, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """pyvene's generate; nothing of the call is left behind."""
        self.full_intervention_outputs.clear()
        return self._stock_call(super().generate, args, kwargs)

    def _stock_call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        idle, self._idle = self._idle, True
        self.gates, self.openings, self.gate_mask = {}, {}, None
        try:
            result = call(*args, **kwargs)
            gates = [output.gate for output in self.full_intervention_outputs if isinstance(output, GatedOutput)]
            blocks = [self.block_of_key[key] for key in self.sorted_keys]
            self.gates = {block: gate for block, gate in zip(blocks, gates, strict=False) if gate is not None}
            self.openings = dict(self.gates)
            return result
        finally:
            self.full_intervention_outputs.clear()
            self._idle = idle

    def train(self, mode: bool = True) -> IntervenableModel:
        """Set the mode of the model and of the interventions; stock sets the model's alone."""
        nn.Module.train(self, mode)
        return self

    def eval(self) -> IntervenableModel:
        """`train(False)`."""
        return self.train(False)
