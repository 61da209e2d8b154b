"""EditedModel: a frozen base model that carries edits, whatever they are and however it is called."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from grun.data.templates import Template
from grun.errors import ConfigError, ModelError
from grun.method.gate_state import GateState, follow
from grun.method.pooled_sites import pooled_in
from grun.method.position import (
    Call,
    PositionRule,
    PromptOfCall,
    attended,
    cache_length,
    counting,
    is_decode_step,
    prompt_of_call,
)
from grun.runtime.devices import input_device, keep_unpacked
from pyvene_custom import IntervenableModel, find_blocks
from pyvene_custom.blocks import text_config
from pyvene_custom.context import Calls, PerContext
from pyvene_custom.model import Located, Pass, refuse_replicas

EDITIONS = itertools.count(1)
"""Numbers for every set of edits that is put on a model, so that what gates remember is of one set."""
PROMPT: PerContext[PromptOfCall] = PerContext("grun.prompt")
"""By model, the prompt of the `generate` call in progress."""
OFF: PerContext[bool] = PerContext("grun.off")
"""By model, whether it is within `disabled()`."""


@dataclass
class GrunOutput(ModelOutput):
    """Result of one forward pass; also by key, or by place among what is not None."""

    loss: Tensor | None = None
    """The base model's own loss; None without labels."""
    logits: Tensor = None  # type: ignore[assignment]  # ModelOutput wants a default for each
    """Next-token logits, shape [batch, length, vocabulary]."""
    gate_logits: dict[int, Tensor] = None  # type: ignore[assignment]
    """Gate logits by block, each [batch, positions read], of a stack the widest gate's; empty without gates or where
    nothing was read."""
    gates: dict[int, Tensor] = None  # type: ignore[assignment]
    """Probabilities that the edits were weighted with by block, as `gate_logits`; 0 where nothing was read."""
    base_output: Any = None
    """What the base model returned, for everything else (cache, hidden states, ...)."""


class EditedModel(nn.Module):
    """Edits on a frozen base model.

    Wrapping mutates the base: its parameters stop requiring gradients, it is put into evaluation mode, hooks sit on its
    blocks, something of ours stands before its `forward` and that of the decoder in it, and its `generate` is replaced
    by one that knows where the prompt ends. So every way of calling it is edited or refused (docs/calling.md).
    `disabled()`, `enabled` and `unwrap()` are the only ways out. Move the base to its device before wrapping; each edit
    lives on its block's device.

    What belongs to a call in progress (where it is edited, what gates read) is kept with the call, so that threads and
    asyncio tasks may call one base at once.

    The module's own parameters and state dict are those of the edits alone.
    """

    base: PreTrainedModel
    intervenable: IntervenableModel
    enabled: bool = True
    """Whether the edits act; False leaves the base as within `disabled()`, for every thread and task."""
    _model: PreTrainedModel
    _threshold: float | None = None

    def __init__(
        self,
        base: PreTrainedModel,
        edits: Mapping[int, nn.Module],
        rule: PositionRule,
        template: Template | None = None,
        pooled: Any = None,
        *,
        turns: Calls | None = None,
    ) -> None:
        """Put `edits` (by 0-based block) on `base`, at the positions of `rule`.

        `pooled`: a module that is a `pyvene_custom.model.Reader`, the gate or gates for all of them. `turns`: calls of
        a base that this one and others are on in turn, each from `put_on` on; None: it is on at once.
        """
        super().__init__()
        keep_unpacked(base)
        object.__setattr__(self, "base", base)  # not a sub-module: our parameters are the edits' alone
        object.__setattr__(self, "_model", transformers_model(base))  # the same, or what PEFT has around it
        self.template = template
        self._on = False
        self._calls = turns or Calls()
        if turns is None:
            self._take_hold()
        self._put(edits, rule, pooled)

    @classmethod
    def of(cls, base: nn.Module) -> Self | None:
        """The edits that `base` carries (a deep copy has its own); None if it carries none of this class."""
        found = transformers_model(base).__dict__.get("_grun_model")
        return found if isinstance(found, cls) else None

    # -- calling ----------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """False within `disabled()`, while not `enabled`, and after `unwrap()`."""
        return self._on and self.enabled and not OFF.get(self)

    @property
    def device(self) -> torch.device:
        """Device that inputs go to."""
        return input_device(self.base)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's loss divides by the labels of a whole step; transformers' Trainer asks."""
        stated: bool | None = getattr(self._model, "accepts_loss_kwargs", None)
        parameters = inspect.signature(self._model.forward).parameters.values()
        return any(one.kind is one.VAR_KEYWORD for one in parameters) if stated is None else stated

    @property
    def loss_type(self) -> str | None:
        """Kind of the base's loss; Trainer asks, to count labels as it does."""
        return getattr(self._model, "loss_type", None)

    @property
    def hf_device_map(self) -> Any:
        """Where the base lies if it lies on several devices; Trainer then moves no edit from its block."""
        return self._model.hf_device_map

    @property
    def gate_threshold(self) -> float | None:
        """Gate probability below which, in evaluation mode, an edit is skipped, bit for bit; of a stack in any mode."""
        return self._threshold

    @gate_threshold.setter
    def gate_threshold(self, value: float | None) -> None:
        check_threshold(value)
        self._threshold = value
        for edit in self.edit_at().values():
            edit.threshold = value

    @property
    def last_gates(self) -> dict[int, Tensor]:
        """Probabilities by block that the edits of the last edited pass were weighted with, [batch, positions read].

        The last pass of this thread or asyncio task; where it has made none, of any.
        """
        return self._gates()

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
            prompt_lengths: prompt tokens of each row without padding, counted from the first token of this pass on,
                shape [batch]; with `past_key_values`, more than this pass has: the prompt goes on in the next one.
            **kwargs: anything the base model takes.
        """
        if self._on and prompt_lengths is not None:
            kwargs["prompt_lengths"] = prompt_lengths
        with self._calls.calling():
            before = self.intervenable.here
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            logits = self.intervenable.gates_since(before)
            return GrunOutput(output.get("loss"), output.logits, logits, self.last_gates if logits else {}, output)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`base.generate`: one edit at the last prompt token handed to this call; the gates are in `last_gates`."""
        generate: Any = self.base.generate
        return generate(*args, **kwargs)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Within the block the base is the untouched base, bit for bit, for this thread or asyncio task alone."""
        before = OFF.get(self)
        OFF.set(self, True)
        try:
            yield self.base
        finally:
            OFF.set(self, before)

    def unwrap(self) -> PreTrainedModel:
        """Take everything off the base that wrapping put on it, and return it; `put_on` alone wakes this object again.

        It waits for calls in progress in other threads.
        """
        with self._calls.changing():
            self._let_go()
        return self.base

    def put_on(self) -> None:
        """Put the edits on the base again, in the place of those that it carries now, if it carries any.

        It waits for calls in progress in other threads.
        """
        before = EditedModel.of(self.base)
        if before is self:
            return
        with contextlib.nullcontext() if before is None else before._calls.changing():
            if before is not None:
                before._let_go()
            self._take_hold()
            self._attach()

    def _take_hold(self) -> None:
        """Freeze the base, and stand before its `generate`."""
        self._on = True
        self._was_trainable = [parameter for parameter in self.base.parameters() if parameter.requires_grad]
        self._was_training = [module for module in self.base.modules() if module.training]
        self.base.requires_grad_(False)
        self.base.eval()
        # In the instance's __dict__, not through nn.Module's setattr: neither is a part of the base.
        own = self._model.__dict__
        own["_grun_model"] = self
        self._own_generate = own.get("generate")
        generate: Any = self._model.generate
        own["generate"] = functools.wraps(generate)(functools.partial(self._generate, generate))
        own["init_continuous_batching"] = _refuse_batching

    def _let_go(self) -> None:
        """Undo `_take_hold`, and take the hooks away."""
        self.intervenable.detach()
        self._on = False
        own = self._model.__dict__
        if own.get("_grun_model") is self:
            for name in ("_grun_model", "generate", "init_continuous_batching"):
                del own[name]
            if self._own_generate is not None:
                own["generate"] = self._own_generate
            for parameter in self._was_trainable:
                parameter.requires_grad_(True)
            for module in self._was_training:
                module.training = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __copy__(self) -> NoReturn:
        raise ModelError("edits cannot be copied without their base; take copy.deepcopy, or save_pretrained")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.intervenable.__reduce_ex__(protocol)

    _replicate_for_data_parallel = staticmethod(refuse_replicas)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _gates(self) -> dict[int, Tensor]:
        """By block, [batch, positions read] or [batch, positions read, requests]; 0 where nothing was read."""
        mask = self.intervenable.gate_mask
        found = {}
        for block, logits in self.intervenable.openings.items():
            gates = torch.sigmoid(logits)
            if mask is not None and mask.shape == gates.shape[:2]:
                gates = gates.masked_fill(~(mask if gates.dim() == 2 else mask.unsqueeze(2)), 0)
            found[block] = gates
        return found

    def edit_at(self) -> dict[int, Any]:
        """Edits by block."""
        return {int(block): edit for block, edit in self.edits.items()}

    def _put(self, edits: Mapping[int, nn.Module], rule: PositionRule, pooled: Any = None) -> None:
        if "intervenable" in self.__dict__:
            self.intervenable.detach()
        self.edits = nn.ModuleDict({str(block): edits[block] for block in sorted(edits)})
        self.pooled = pooled
        self.rule = rule
        self._edition = next(EDITIONS)
        trainable = [parameter for parameter in self.base.parameters() if parameter.requires_grad]
        object.__setattr__(self, "intervenable", IntervenableModel(dict(edits), self._model))
        for parameter in trainable:  # frozen by it: what is frozen is up to `_take_hold`
            parameter.requires_grad_(True)
        if self._on:
            self._attach()

    def _attach(self) -> None:
        acting = functools.partial(getattr, self, "active")  # copied with this object, as a closure is not
        self.intervenable.attach(self._locate, self._remember, acting, self._calls, self.pooled)

    def _locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Located, dict[str, Any]]:
        kwargs = dict(kwargs)
        prompt_lengths = kwargs.pop("prompt_lengths", None)
        if not self.active:
            return None, kwargs
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        inputs = embeddings if ids is None else ids
        if inputs is None:
            if prompt_lengths is not None:
                raise ModelError("prompt_lengths needs input_ids or inputs_embeds of the same call")
            return "further in", kwargs
        if self.rule.keywords and ids is None:
            raise ModelError("a gate by keywords reads token ids, and this pass has embeddings alone; give input_ids")
        _refuse_unseen(inputs, kwargs)
        cache = kwargs.get("past_key_values")
        past = cache_length(cache)
        prompt = PROMPT.get(self)
        foreign = prompt is not None and not prompt.owns(inputs, ids, cache, past)
        if prompt is not None and foreign:
            prompt.disown(cache)
        state = self._state_of(cache, past, inputs) if self.rule.remembers else None
        call = Call(
            rows=inputs.shape[0],
            columns=inputs.shape[1],
            past=past,
            device=inputs.device,
            labels=kwargs.get("labels"),
            prompt_lengths=None if prompt_lengths is None else torch.as_tensor(prompt_lengths),
            prompt=None if foreign else prompt,
            ids=ids,
            state=state,
            logits_to_keep=0 if (kept := kwargs.get("logits_to_keep")) is None else kept,
            goes_on=cache is not None,
            after_prompt=past > 0 and (isinstance(cache, tuple) or getattr(cache, "prompt_ended", False)),
        )
        if self.rule.remembers or not is_decode_step(call):  # which is to launch nothing
            call.attention_mask = counting(kwargs.get("attention_mask"), call)
        sites = self.rule.locate(call)
        if sites is not None:
            sites.shape = call.rows, call.columns
            sites.about = call, prompt if foreign else None, cache
        return sites, kwargs

    def _state_of(self, cache: Any, past: int, inputs: Tensor) -> GateState:
        """What gates remember of the `past` tokens in `cache`: nothing of those cached while no edit acted."""
        state: GateState | None = getattr(cache, "gate_state", None)
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

    def _remember(self, output: Any, running: Pass) -> None:
        """Keep what gates read in a pass with the keys and values that it has made."""
        assert running.sites is not None
        call, foreign_to, given = running.sites.about
        running.sites.about = None  # sites may be kept as long as states are
        read = [sites.let_go() for sites in pooled_in(running.sites)]
        if hasattr(output, "get"):
            cache = output.get("past_key_values")
        else:  # return_dict=False
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        cache = given if cache is None else cache  # some models give none back
        if foreign_to is not None:
            foreign_to.disown(cache)
        if cache is not None and not isinstance(cache, tuple):
            lengths = call.prompt_lengths
            goes_on = lengths is not None and bool((lengths.to(call.device) > attended(call).sum(1)).all())
            cache.prompt_ended = call.after_prompt or not goes_on
        if call.state is None or cache is None:
            return
        ids = torch.full((call.rows, call.columns), -1, device=call.device)
        if call.ids is not None:
            ids = torch.where(attended(call), call.ids, ids)
        call.state.extend(ids, running.kept, read)
        follow(cache, call.state)

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        with self._calls.calling():
            now = EditedModel.of(self.base)
            if not self._on and now is not None:  # which took the place of this one while the call waited
                return now._generate(generate, *args, **kwargs)
            if not self.active:
                return generate(*args, **kwargs)
            if kwargs.get("prompt_lengths") is not None:
                raise ModelError(
                    "generate takes the end of the prompt from the prompt itself; leave prompt_lengths out"
                )
            outer, prompt = PROMPT.get(self), prompt_of_call(args, kwargs, self._model.generation_config)
            PROMPT.set(self, prompt)
            try:
                return generate(*args, **kwargs)
            finally:
                PROMPT.set(self, outer)
                if prompt is not None:
                    prompt.over = True


def _refuse_unseen(inputs: Tensor, given: Mapping[str, Any]) -> None:
    """ModelError where a call does not show where to edit.

    A row holds several sequences one after another, of which the last alone would be edited; or the model is given its
    past in a form that does not show how many tokens it holds.
    """
    positions = given.get("position_ids")
    packed = given.get("cu_seq_lens_q") is not None or given.get("cu_seqlens_q") is not None
    if isinstance(positions, Tensor) and positions.dim() == 2 and inputs.shape[1] > 1 and not packed:
        packed = given.get("attention_mask") is None and bool((positions.diff(dim=1) < 0).any())
    if packed:
        _refuse_batching()
    if name := next((name for name in ("cache_params", "state") if given.get(name) is not None), None):
        raise ModelError(
            f"this model keeps its past in {name}, which does not show how many tokens it holds, so where to edit is "
            "unknown; call it, or generate, with use_cache=False"
        )


def _refuse_batching(*_: Any, **__: Any) -> NoReturn:
    raise ModelError(
        "several sequences packed into one row (continuous batching, position_ids that start again) cannot be edited; "
        "give each a row of its own, padded and with an attention_mask, or use generate"
    )


def transformers_model(base: nn.Module) -> PreTrainedModel:
    """`base`, or the model in it where it is around one, as PEFT's and torch.compile's are; ModelError if none is."""
    found = next((module for module in base.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None or not hasattr(found, "generate"):
        raise ModelError(f"{type(base).__name__} holds no causal language model of transformers to put edits on")
    return found


def output_embeddings(base: PreTrainedModel) -> nn.Module:
    """The module that makes logits of the last hidden states; ModelError for a model that names none."""
    found: nn.Module | None = transformers_model(base).get_output_embeddings()
    if found is None:
        raise ModelError(f"{type(base).__name__} names no output embeddings, whose logits an action could change")
    return found


def hidden_size_of(base: PreTrainedModel) -> int:
    """Width of the residual stream of a model."""
    stated = getattr(text_config(base), "hidden_size", None)
    if stated is None:  # a config that names it otherwise
        embeddings: Any = base.get_input_embeddings()
        stated = embeddings.weight.shape[1]
    return int(stated)


def edit_dtype(blocks: nn.Module) -> torch.dtype:
    """Type that edits of these blocks are computed and stored in: float64 where they are, else float32."""
    return torch.promote_types(next(blocks.parameters()).dtype, torch.float32)


def check_threshold(value: float | None) -> None:
    """ConfigError for a gate threshold that is no probability."""
    if value is not None and not 0 <= value <= 1:
        raise ConfigError(f"gate_threshold {value} must be a probability between 0 and 1")


def blocks_to_edit(base: PreTrainedModel) -> nn.ModuleList:
    """Decoder blocks of `base`; ConfigError if it carries edits already, ModelError if it has no blocks to edit."""
    if EditedModel.of(base) is not None:
        raise ConfigError("this base model carries GRUN edits already; call unwrap() on its GrunModel first")
    try:
        return find_blocks(base)[1]
    except ValueError as error:
        raise ModelError(str(error)) from error


def is_quantized(base: PreTrainedModel) -> bool:
    """Whether the weights of `base` are quantized, so that they cannot be compared with others' or trained."""
    return getattr(base, "quantization_method", None) is not None
