"""EditedModel: a frozen base model that carries edits, whatever they are and however it is called."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grun.data.templates import Template
from grun.devices import input_device, keep_unpacked
from grun.errors import ConfigError, ModelError
from grun.method.gate_state import GateState, follow, state_of
from grun.method.position import Call, PositionRule, PromptOfCall, attended
from pyvene_custom import IntervenableModel, Sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EDITIONS = itertools.count(1)
"""Numbers for every set of edits that is put on a model, so that what gates remember is told apart."""


@dataclass
class GrunOutput:
    """Result of one forward pass."""

    logits: Tensor
    """Next-token logits, shape [batch, length, vocabulary]."""
    loss: Tensor | None
    """The base model's own loss; None without labels."""
    gate_logits: dict[int, Tensor]
    """Gate logits by block, each [batch, positions read], of a stack the widest gate's; empty without gates or where
    nothing was read."""
    gates: dict[int, Tensor]
    """Probabilities that the edits were weighted with by block, as `gate_logits`; 0 where nothing was read."""
    base_output: Any
    """What the base model returned, for everything else (cache, hidden states, ...)."""


class EditedModel(nn.Module):
    """Edits on a frozen base model.

    Wrapping mutates the base: its parameters stop requiring gradients, it is put into evaluation mode, hooks sit on
    it, and its `generate` is replaced by one that knows where the prompt ends. So every way of calling the base is
    edited: `base(...)`, `base.generate`, `pipeline`. `disabled()` and `unwrap()` are the only ways out. Move the
    base to its device before wrapping; each edit lives on its block's device.

    The module's own parameters and state dict are those of the edits alone.
    """

    base: PreTrainedModel
    intervenable: IntervenableModel

    def __init__(
        self,
        base: PreTrainedModel,
        edits: Mapping[int, nn.Module],
        rule: PositionRule,
        template: Template | None = None,
    ) -> None:
        """Put `edits` (by 0-based block) on `base`, at the positions of `rule`."""
        super().__init__()
        keep_unpacked(base)
        object.__setattr__(self, "base", base)  # not a sub-module: our parameters are the edits' alone
        self.template = template
        self._pass: tuple[Call, GateState] | None = None
        self._prompt: PromptOfCall | None = None
        self._argument_names = list(inspect.signature(base.forward).parameters)
        self.active = True
        """False within `disabled()` and after `unwrap()`."""
        self._was_trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self._was_training = [module for module in base.modules() if module.training]
        base.requires_grad_(False)
        base.eval()
        # In the instance's __dict__, not through nn.Module's setattr: neither is a part of the base.
        base.__dict__["_grun_model"] = self
        self._own_generate = base.__dict__.get("generate")
        generate: Any = base.generate
        base.__dict__["generate"] = functools.wraps(generate)(functools.partial(self._generate, generate))
        self._put(edits, rule)

    # -- calling ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device that inputs go to."""
        return input_device(self.base)

    @property
    def last_gates(self) -> dict[int, Tensor]:
        """Probabilities by block that the edits of the last edited pass were weighted with, [batch, positions read]."""
        mask = self.intervenable.gate_mask
        openings = {block: torch.sigmoid(logits) for block, logits in self.intervenable.openings.items()}
        if mask is None:
            return openings
        return {
            block: gate.masked_fill(~mask, 0) if mask.shape == gate.shape else gate for block, gate in openings.items()
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> GrunOutput:
        """Run the base with the edits.

        Args:
            input_ids: tokens, int64, shape [batch, length].
            attention_mask: 1 for tokens that count, shape [batch, length].
            labels: -100 outside the answer, shape [batch, length]; gives the loss, and the position if
                `prompt_lengths` is not given.
            prompt_lengths: prompt tokens of each row without padding, counted within this pass, shape [batch].
            **kwargs: anything the base model takes.
        """
        if self.active and prompt_lengths is not None:
            kwargs["prompt_lengths"] = prompt_lengths
        self.intervenable.gates.clear()
        output = self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        logits = dict(self.intervenable.gates)
        return GrunOutput(output.logits, output.get("loss"), logits, self.last_gates if logits else {}, output)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`base.generate`: one edit at the last prompt token handed to this call; the gates are in `last_gates`."""
        generate: Any = self.base.generate
        return generate(*args, **kwargs)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Within the block the base is the untouched base, bit for bit."""
        active, self.active = self.active, False
        self.intervenable.detach()
        try:
            yield self.base
        finally:
            if active and self.base.__dict__.get("_grun_model") is self:  # not unwrapped in the meantime
                self.active = True
                self.intervenable.attach(self._locate, self._remember)

    def unwrap(self) -> PreTrainedModel:
        """Take everything off the base that wrapping put on it, and return it; this object is dead afterwards."""
        self.intervenable.detach()
        self.active = False
        if self.base.__dict__.get("_grun_model") is self:
            del self.base.__dict__["_grun_model"]
            del self.base.__dict__["generate"]
            if self._own_generate is not None:
                self.base.__dict__["generate"] = self._own_generate
            for parameter in self._was_trainable:
                parameter.requires_grad_(True)
            for module in self._was_training:
                module.training = True
        return self.base

    # -- inside -----------------------------------------------------------------------------------------------------

    def edit_at(self) -> Mapping[int, Any]:
        """Edits by block."""
        return {int(block): edit for block, edit in self.edits.items()}

    def _put(self, edits: Mapping[int, nn.Module], rule: PositionRule) -> None:
        """Carry `edits` from now on, instead of any before."""
        if "intervenable" in self.__dict__:
            self.intervenable.detach()
        self.edits = nn.ModuleDict({str(block): edits[block] for block in sorted(edits)})
        self.rule = rule
        self._edition = next(EDITIONS)
        object.__setattr__(self, "intervenable", IntervenableModel(dict(edits), self.base))
        if self.active:
            self.intervenable.attach(self._locate, self._remember)

    def _locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sites | None, dict[str, Any]]:
        kwargs = dict(kwargs)
        prompt_lengths = kwargs.pop("prompt_lengths", None)
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given.get("inputs_embeds")
        if inputs is None:
            return None, kwargs
        mask = given.get("attention_mask")
        cache = given.get("past_key_values")
        past = cache_length(cache)
        ids = given.get("input_ids")
        state = self._state_of(cache, past, inputs) if self.rule.remembers else None
        call = Call(
            rows=inputs.shape[0],
            columns=inputs.shape[1],
            past=past,
            device=inputs.device,
            attention_mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            labels=given.get("labels"),
            prompt_lengths=None if prompt_lengths is None else torch.as_tensor(prompt_lengths),
            prompt=self._prompt,
            ids=ids,
            earlier=None if state is None else state.ids,
            carry={} if state is None else state.last(),
        )
        self._pass = None if state is None else (call, state)
        return self.rule.locate(call), kwargs

    def _state_of(self, cache: Any, past: int, inputs: Tensor) -> GateState:
        """What gates remember of the `past` tokens in `cache`: nothing of those cached while no edit acted."""
        state = state_of(cache)
        if state is None or past == 0:
            return GateState(inputs.shape[0], past, inputs.device, self._edition)
        if state.edition != self._edition:
            raise ModelError("this cache was filled under other edits, whose gates it remembers; take an empty cache")
        if state.rows != inputs.shape[0]:
            raise ModelError(
                f"the gates remember {state.rows} sequences of this cache, the pass has {inputs.shape[0]}; change the "
                "rows of a cache by its own methods (reorder_cache, batch_repeat_interleave, batch_select_indices)"
            )
        state.fit(past)
        return state

    def _remember(self, output: Any) -> None:
        """Keep what gates read in this pass beside the keys and values that it has made."""
        cache = output.get("past_key_values") if hasattr(output, "get") else None
        if self._pass is None or cache is None:
            return
        (call, state), self._pass = self._pass, None
        ids = torch.full((call.rows, call.columns), -1, device=call.device)
        if call.ids is not None:
            ids = torch.where(attended(call), call.ids, ids)
        openings, block_of_key = self.intervenable.openings, self.intervenable.block_of_key
        state.extend(ids, {key: openings[block] for key, block in block_of_key.items() if block in openings})
        follow(cache, state)

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        outer, self._prompt = self._prompt, prompt_of_call(args, kwargs)
        self.intervenable.gates.clear()
        try:
            return generate(*args, **kwargs)
        finally:
            self._prompt = outer


def cache_length(cache: Any) -> int:
    """Tokens held by a key/value cache, padding included; 0 for None."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])


def prompt_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PromptOfCall | None:
    """Where the prompt handed to `generate(*args, **kwargs)` ends; None where the call brings no prompt."""
    given = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")] + list(args[:1])
    inputs = next((value for value in given if value is not None), None)
    if inputs is None:
        return None
    past = cache_length(kwargs.get("past_key_values"))
    length = inputs.shape[1]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        columns = torch.arange(mask.shape[1], device=mask.device)
        return PromptOfCall(torch.where(mask != 0, columns, -1).amax(dim=1), mask.shape[1])
    # Without a mask the ids are the whole conversation, unless they are shorter than what the cache already holds.
    total = length if length > past else past + length
    return PromptOfCall(torch.full((inputs.shape[0],), total - 1, device=inputs.device), total)


def hidden_size_of(base: PreTrainedModel) -> int:
    """Width of the residual stream of a model."""
    stated = getattr(base.config.get_text_config(), "hidden_size", None)
    if stated is None:  # a config that names it otherwise
        embeddings: Any = base.get_input_embeddings()
        stated = embeddings.weight.shape[1]
    return int(stated)


def refuse_wrapped(base: PreTrainedModel) -> None:
    """ConfigError if `base` carries edits already."""
    if base.__dict__.get("_grun_model") is not None:
        raise ConfigError("this base model carries GRUN edits already; call unwrap() on its GrunModel first")
