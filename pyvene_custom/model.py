"""pyvene's IntervenableModel, patched by subclassing so that gated interventions work on any current decoder."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, Literal, NoReturn, Protocol, Self, runtime_checkable

import torch
from pyvene import IntervenableModel as StockModel
from pyvene.models.modeling_utils import HandlerList
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from torch.utils.weak import WeakTensorKeyDictionary

from grun.errors import ModelError
from pyvene_custom.blocks import find_blocks
from pyvene_custom.context import Calls, PerContext
from pyvene_custom.sites import GatedOutput, Sites, gather, put_back, read_and_written, scatter

Located = Sites | None | Literal["further in"]
"""Where a pass is edited, None: nowhere; or that only a module further in knows, which is given the tokens."""
Locate = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Located, dict[str, Any]]]
"""Says where the forward pass with these arguments is edited, and which keyword arguments the model should get."""


@dataclass(eq=False)
class Pass:
    """One forward pass, and what gates read in it."""

    sites: Sites | None
    """Where it is edited; None: nowhere."""
    level: int = 0
    """Of the entry that it has come to."""
    outer: Pass | None = None
    """The pass in progress when this one began, or came to this entry."""
    gates: dict[int, Tensor] = field(default_factory=dict)
    """Gate logits by block, each [batch, positions read]; empty without gates."""
    openings: dict[int, Tensor] = field(default_factory=dict)
    """The same accumulated over positions, as the edits were weighted."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """By intervention key, what passes after this one need of each position read."""
    again: bool = False
    """Whether blocks run again in a backward pass."""
    decided: dict[Any, Any] = field(default_factory=dict)
    """What an intervention has found out of a `Reader`'s opening that is the same for others of this pass."""


class Reader(Protocol):
    """Reads outputs of blocks, un-edited ones, and says from them how all edits after it are weighted."""

    blocks: Sequence[int]
    """Blocks that are read, 0-based, none above an edited one."""

    def read(self, block: int, hidden: Tensor, running: Pass) -> None:
        """Take what is needed of the output of a block, [batch, length, width], before it is edited.

        Of a block that runs again for the backward pass (`Pass.again`) too, in a pass of its own with the same sites:
        it must then do what can have a gradient once more, and keep nothing.
        """

    def opening(self, running: Pass, device: torch.device) -> Any:
        """What interventions are given to be weighted by; asked after all blocks were read."""


@runtime_checkable
class Resting(Protocol):
    """An intervention that may have nothing to do in a pass, and report nothing, by what a `Reader` gives."""

    def rests(self, opening: Any, known: dict[Any, Any]) -> bool:
        """Whether it does not; `known` is `Pass.decided`."""


_SEVERAL = object()
"""In the place of sites: those of several passes."""


@dataclass(eq=False)
class Entry:
    """What stands in for the `forward` of a module: of the model, or of one inside it that holds the edited blocks."""

    owner: IntervenableModel
    module: nn.Module
    level: int
    """0 for the model, 1 for the module inside it, and so on."""
    forward: Callable[..., Any]
    """The module's own."""
    names: list[str]
    """Of arguments that may be given by place."""
    on_instance: Any
    """What the instance had for `forward`, over its class; None: nothing."""
    entrance: Callable[..., Any]
    """What it has now, to be bound to the module."""


RUNNING: PerContext[Pass] = PerContext("pyvene_custom.running")
"""By model, the pass in progress."""
LAST: PerContext[Pass] = PerContext("pyvene_custom.last")
"""By model, the last edited pass."""
IDLE: PerContext[bool] = PerContext("pyvene_custom.idle")
"""By model, whether hooks leave everything as it is."""


class IntervenableModel(StockModel):
    """Interventions at the output of decoder blocks.

    Mutates `model`: its parameters stop requiring gradients (as under stock pyvene) and, between `attach` and
    `detach`, hooks sit on it. Stock `forward(base, unit_locations=...)` and `generate` work as documented by pyvene;
    the gates of the last call are in `gates`.
    """

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
        self.blocks = blocks
        self._path = path
        self.block_of_key = dict(zip(self.sorted_keys, order, strict=True))
        self._reader: Reader | None = None
        self._handlers: list[Any] = []
        self._attached: list[Any] = []
        self._entries: list[Entry] = []
        self._latest: Pass | None = None
        self._given: Any = WeakTensorKeyDictionary()
        """By states that a block was given, the sites of that pass; nothing in a pass's sites leads to its states."""

    # -- what the last pass read ------------------------------------------------------------------------------------

    @property
    def last(self) -> Pass | None:
        """The last edited pass of this context (thread, asyncio task); where it has made none, of any."""
        return self.here or self._latest

    @property
    def running(self) -> Pass | None:
        """The pass in progress in this context; None: there is none."""
        return RUNNING.get(self)

    @property
    def here(self) -> Pass | None:
        """The last edited pass of this context, if it has made one."""
        return LAST.get(self)

    def gates_since(self, before: Pass | None) -> dict[int, Tensor]:
        """Gate logits of the last edited pass of this context; none if that is still `before`."""
        return {} if self.here is None or self.here is before else dict(self.here.gates)

    @property
    def gates(self) -> dict[int, Tensor]:
        """Gate logits of the last edited pass by block, each [batch, positions read]; empty without gates."""
        return {} if self.last is None else self.last.gates

    @property
    def openings(self) -> dict[int, Tensor]:
        """The same accumulated over positions, as the edits were weighted."""
        return {} if self.last is None else self.last.openings

    @property
    def gate_mask(self) -> Tensor | None:
        """Which of these positions count, bool, [batch, positions read]; None after a stock call, where all do."""
        return None if self.last is None or self.last.sites is None else self.last.sites.read_mask

    def _begun(self, running: Pass) -> None:
        LAST.set(self, running)
        self._latest = running

    # -- hooks that stay on the model ------------------------------------------------------------------------------

    def attach(
        self,
        locate: Locate,
        finished: Callable[[Any, Pass], None] = lambda output, running: None,
        acting: Callable[[], bool] = lambda: True,
        calls: Calls | None = None,
        reader: Reader | None = None,
    ) -> None:
        """Edit every call of the model at the sites that `locate` gives, until `detach`.

        A call is one of the model, or of a module inside it that holds the edited blocks, each also by its `forward`.
        `finished` is called with the output of each edited pass, and the pass. While `acting` gives False, nothing is
        edited and blocks may be called by themselves. Each call is one of `calls`, which `detach` does not wait for.
        With a `reader` interventions are given its `opening` too.
        """
        self.detach()
        self._reader = reader
        self._calls = calls or Calls()
        self._locate, self._finished, self._acting = locate, finished, acting
        for level, module in enumerate(_entrances(self.model, self._path)):
            self._enter_through(module, level)
        self.model.__dict__["_replicate_for_data_parallel"] = refuse_replicas
        keys: dict[int, str | None] = dict.fromkeys(reader.blocks if reader else ())
        keys |= {self.block_of_key[key]: key for key in self.sorted_keys}
        for index, key in keys.items():
            # prepend: transformers records hidden states by a hook of its own, and should record the edited ones.
            hook = functools.partial(self._edit_block, index, key)  # copied with the model, as a closure is not
            self._attached.append(self.blocks[index].register_forward_hook(hook, prepend=True))

    def detach(self) -> None:
        """Take away everything that `attach` put on the model, and nothing else."""
        for handle in self._attached:
            handle.remove()
        for entry in self._entries:
            state = entry.module.__dict__
            if getattr(state.get("forward"), "__func__", None) is not entry.entrance:
                continue  # something else was put before it since then, and goes on through it
            del state["forward"], state["_entries"][entry.entrance]
            if not state["_entries"]:
                del state["_entries"]
            if entry.on_instance is not None:
                state["forward"] = entry.on_instance
        if self._entries:
            self.model.__dict__.pop("_replicate_for_data_parallel", None)
        self._attached, self._entries = [], []

    def _enter_through(self, module: nn.Module, level: int) -> None:
        """Let each call of `module`, by its `forward` too, come to `_enter` first.

        In the instance's __dict__, as accelerate does: a bound method, which is copied with the module.
        """
        state = module.__dict__
        entrance = _entrance(type(module).forward)
        parameters = list(inspect.signature(entrance).parameters.values())[1:]
        names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        entry = Entry(self, module, level, module.forward, names, state.get("forward"), entrance)
        state.setdefault("_entries", {})[entrance] = entry
        state["forward"] = MethodType(entrance, module)
        self._entries.append(entry)

    @skip
    def _enter(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module; a pass begins here, unless the call comes out of one of a module further out."""
        with self._calls.calling():
            if entry.module.__dict__.get("_entries", {}).get(entry.entrance) is not entry:  # taken away meanwhile
                return entry.module.forward(*args, **kwargs)
            running, args, kwargs = self._begin(entry, args, kwargs)
            if running is None:
                return entry.forward(*args, **kwargs)
            output = None
            try:
                output = entry.forward(*args, **kwargs)
            finally:
                self._end(running, output)
            return output

    @torch.compiler.disable
    def _begin(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass that a call belongs to, None where none begins, and the arguments for the module."""
        if not self._entries:
            return None, args, kwargs
        outer = RUNNING.get(self)
        if outer is not None and outer.level < entry.level:
            running = replace(outer, level=entry.level, outer=outer)
            RUNNING.set(self, running)
            return running, args, kwargs
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise ModelError(
                "a model that carries edits cannot be traced or exported: where they act would be that of the example; "
                "use torch.compile, or unwrap() and export the base"
            )
        named = dict(zip(entry.names, args, strict=False))
        if not named.keys() & kwargs.keys():  # otherwise the module raises
            args, kwargs = args[len(named) :], named | kwargs
        located, kwargs = self._locate(args, kwargs)
        if IDLE.get(self):
            located = None
        if located == "further in":
            return None, args, kwargs
        running = Pass(located, entry.level, outer)
        RUNNING.set(self, running)
        if located is not None:
            self._begun(running)
        return running, args, kwargs

    @torch.compiler.disable
    def _end(self, running: Pass, output: Any) -> None:
        RUNNING.set(self, running.outer)
        began_here = running.outer is None or running.outer.sites is not running.sites
        if running.sites is not None and began_here and output is not None:  # None where the pass failed
            self._finished(output, running)

    @torch.compiler.disable
    def _edit_block(self, index: int, key: str | None, block: nn.Module, args: Any, output: Any) -> Any:
        running = self._known_of(args, RUNNING.get(self))
        if running is None and self._acting() and not IDLE.get(self):
            raise ModelError(
                "a block that carries edits was called outside a call of its model, so where to edit is unknown; call "
                "the model, its decoder or generate, or the block within disabled(); checkpoint blocks with "
                "use_reentrant=False"
            )
        if running is None or running.sites is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        shape = running.sites.shape
        if shape is not None and tuple(hidden.shape[:-1]) != shape:
            raise ModelError(
                f"a block was given states of shape {list(hidden.shape)} in a pass of {list(shape)} rows and tokens: "
                "where to edit is unknown; models that insert or leave out tokens on the way cannot carry edits"
            )
        if self._reader is not None and index in self._reader.blocks:
            self._reader.read(index, hidden, running)
        if key is None:
            return None
        edited = self._edit(key, hidden, running)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _known_of(self, args: tuple[Any, ...], running: Pass | None) -> Pass | None:
        """The pass `running`, noted with the states that a block is given; without one, that in which they were.

        So a block that the backward pass computes again, hooks and all, is edited where it was, in another thread and
        after other passes too. None where the same states were given in passes that differ.
        """
        if not args or not isinstance(args[0], Tensor):
            return running
        if running is None:
            sites = self._given.get(args[0], _SEVERAL)
            return None if sites is _SEVERAL else Pass(sites, again=True)
        same = self._given.get(args[0], running.sites) is running.sites
        self._given[args[0]] = running.sites if same else _SEVERAL
        return running

    def _edit(self, key: str, hidden: Tensor, running: Pass) -> Tensor:
        """`hidden` edited where its block computes; gates go where the sites are, so that all are in one place."""
        assert running.sites is not None
        intervention = self.interventions[key]
        shared = {} if self._reader is None else {"opening": self._reader.opening(running, hidden.device)}
        if shared and isinstance(intervention, Resting) and intervention.rests(shared["opening"], running.decided):
            return hidden
        sites, home = running.sites.to(hidden.device), running.sites.read.device
        read, written = read_and_written(hidden, sites)
        carry = sites.carry.get(key)
        result = intervention(written, None, None, read=read, sites=sites, carry=carry, **shared)
        if result.gate is not None:
            opening = result.gate if result.opening is None else result.opening
            running.gates[self.block_of_key[key]] = result.gate.to(home)
            running.openings[self.block_of_key[key]] = opening.to(home)
        kept = result.opening if result.carry is None else result.carry
        if kept is not None and kept.numel():
            running.kept[key] = kept.detach().to(home)
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
        idle = IDLE.get(self)
        IDLE.set(self, True)
        try:
            result = call(*args, **kwargs)
            gates = [output.gate for output in self.full_intervention_outputs if isinstance(output, GatedOutput)]
            blocks = [self.block_of_key[key] for key in self.sorted_keys]
            found = {block: gate for block, gate in zip(blocks, gates, strict=False) if gate is not None}
            self._begun(Pass(None, gates=found, openings=dict(found)))
            return result
        finally:
            self.full_intervention_outputs.clear()
            IDLE.set(self, idle)

    def train(self, mode: bool = True) -> IntervenableModel:
        """Set the mode of the model and of the interventions; stock sets the model's alone."""
        nn.Module.train(self, mode)
        return self

    def eval(self) -> IntervenableModel:
        """`train(False)`."""
        return self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """With its model, of which the copy is edited by the copy; without what the last pass read."""
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(
            copy.deepcopy({**self.__dict__, "_latest": None, "_given": WeakTensorKeyDictionary()}, memo)
        )
        return new

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ModelError(
            "a model that carries edits cannot be pickled or given to torch.save; save the edits with "
            "GrunModel.save_pretrained, and the base after unwrap()"
        )


def _entrances(model: nn.Module, path: str) -> list[nn.Module]:
    """From `model` in to what holds the blocks at `path`, the modules that can be called."""
    names = path.split(".")[:-1]
    modules = [model, *(model.get_submodule(".".join(names[: count + 1])) for count in range(len(names)))]
    return [one for one in modules if type(one).forward is not nn.Module.forward]


def _entrance(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function in the place of `forward` of a class, with its signature, that goes through the module's entry."""

    @skip
    def entrance(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entry: Entry | None = module.__dict__.get("_entries", {}).get(entrance)
        if entry is None:  # taken away by another thread
            return module.forward(*args, **kwargs)
        return entry.owner._enter(entry, args, kwargs)

    functools.update_wrapper(entrance, forward)
    entrance.__dict__.pop("__wrapped__")  # or accelerate looks through it
    entrance.__dict__["__signature__"] = inspect.signature(forward)
    return entrance


def refuse_replicas() -> NoReturn:
    """In the place of what torch.nn.DataParallel copies a module with, whose copies would not be edited."""
    raise ModelError(
        "torch.nn.DataParallel cannot run a model that carries edits; use DistributedDataParallel, or device_map"
    )
