"""GrunModel: a frozen base model that carries gated edits."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, nn

from grun.data.templates import Template
from grun.devices import device_of, input_device
from grun.errors import ConfigError, ModelError
from grun.method.adapter import CONFIG_FILE, AdapterConfig, check_fits, find_adapter, read_weights, write_adapter
from grun.method.edit import LoReftEdit
from grun.method.fingerprint import fingerprint
from grun.method.gate import GATES, set_bias
from grun.method.gate_state import GateState, follow, state_of
from grun.method.intervention import GatedIntervention
from grun.method.position import Call, PositionRule, PromptOfCall, attended, position_rule
from pyvene_custom import IntervenableModel, Sites, find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class GrunOutput:
    """Result of one forward pass."""

    logits: Tensor
    """Next-token logits, shape [batch, length, vocabulary]."""
    loss: Tensor | None
    """The base model's own loss; None without labels."""
    gate_logits: dict[int, Tensor]
    """Gate logits by block, each [batch, positions read]; empty without gates or where nothing was read."""
    gates: dict[int, Tensor]
    """Probabilities that the edits were weighted with by block, as `gate_logits`; 0 where nothing was read."""
    base_output: Any
    """What the base model returned, for everything else (cache, hidden states, ...)."""


class GrunModel(nn.Module):
    """Gated edits on a frozen base model.

    Wrapping mutates the base: its parameters stop requiring gradients, it is put into evaluation mode, hooks sit on
    it, and its `generate` is replaced by one that knows where the prompt ends. So every way of calling the base is
    edited: `base(...)`, `base.generate`, `pipeline`. `disabled()` and `unwrap()` are the only ways out. Move the
    base to its device before wrapping; each edit lives on its block's device.

    The module's own parameters and state dict are those of the edits alone.
    """

    base: PreTrainedModel

    def __init__(self, base: PreTrainedModel, config: AdapterConfig, template: Template | None = None) -> None:
        """Use `wrap` or `from_pretrained`."""
        super().__init__()
        object.__setattr__(self, "base", base)  # not a sub-module: our parameters are the edits' alone
        self.config = config
        self.template = template
        path, blocks = find_blocks(base)
        dtype = torch.float64 if next(base.parameters()).dtype == torch.float64 else torch.float32
        self.edits = nn.ModuleDict()
        for index in config.blocks:
            self.edits[str(index)] = _intervention(config).to(device=device_of(blocks[index]), dtype=dtype)
        self.rule: PositionRule = position_rule(
            config.gate_read, config.gate_accumulate, config.edit_write, config.reset_ids
        )
        self._pass: tuple[Call, GateState] | None = None
        self._prompt: PromptOfCall | None = None
        self._argument_names = list(inspect.signature(base.forward).parameters)
        self.active = True
        """False within `disabled()` and after `unwrap()`."""
        self._was_trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self._was_training = [module for module in base.modules() if module.training]
        interventions: dict[int, nn.Module] = {int(name): edit for name, edit in self.edits.items()}
        object.__setattr__(self, "intervenable", IntervenableModel(interventions, base))
        base.requires_grad_(False)
        base.eval()
        # In the instance's __dict__, not through nn.Module's setattr: neither is a part of the base.
        base.__dict__["_grun_model"] = self
        self._own_generate = base.__dict__.get("generate")
        generate: Any = base.generate
        base.__dict__["generate"] = functools.wraps(generate)(functools.partial(self._generate, generate))
        self.intervenable.attach(self._locate, self._remember)

    intervenable: IntervenableModel

    # -- making, saving, loading ------------------------------------------------------------------------------------

    @classmethod
    def wrap(
        cls,
        base: PreTrainedModel,
        *,
        blocks: Sequence[int],
        rank: int = 4,
        gate: str = "linear",
        gate_bias: float | None = None,
        dropout: float = 0.0,
        dropout_on_hidden: bool = False,
        activation: str | None = None,
        gate_read: str = "last_prompt",
        gate_accumulate: str = "none",
        edit_write: str = "last_prompt",
        reset_ids: Sequence[int] = (),
        template: Template | None = None,
    ) -> GrunModel:
        """Put new, randomly initialized edits on `base`.

        Args:
            base: any transformers causal language model with a stack of decoder blocks.
            blocks: edited blocks, 0-based; negative counts from the last.
            rank: rank of the edit.
            gate: name in `grun.method.gate.GATES`.
            gate_bias: initial logit bias of the gate; None: torch's default initialization.
            dropout: probability of dropping entries of the change in training.
            dropout_on_hidden: drop entries of the whole edited state instead (published quirk).
            activation: name in transformers' ACT2FN applied to Wh + b; None: identity.
            gate_read: positions the gate reads: last_prompt or every_token.
            gate_accumulate: how gate values combine over positions: none or running_max.
            edit_write: positions the edit is written to: last_prompt, sticky or every_token.
            reset_ids: token ids that begin a user's turn, where a running maximum begins anew.
            template: prompt template to store with the adapter.

        Raises:
            ConfigError: an option is out of range, or the base is wrapped already.
        """
        _refuse_wrapped(base)
        depth = len(find_blocks(base)[1])
        hidden_size = hidden_size_of(base)
        if not 1 <= rank <= hidden_size:
            raise ConfigError(f"rank {rank} must lie between 1 and the hidden size {hidden_size}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout {dropout} must lie in [0, 1)")
        config = AdapterConfig(
            blocks=resolve_blocks(blocks, depth),
            rank=rank,
            gate=gate,
            gate_bias=gate_bias,
            dropout=dropout,
            dropout_on_hidden=dropout_on_hidden,
            activation=activation,
            gate_read=gate_read,
            gate_accumulate=gate_accumulate,
            edit_write=edit_write,
            reset_ids=list(reset_ids),
            hidden_size=hidden_size,
            depth=depth,
            base_model_name_or_path=getattr(base.config, "_name_or_path", "") or None,
            base_revision=getattr(base.config, "_commit_hash", None),
            base_fingerprint=fingerprint(base),
        )
        return cls(base, config, template)

    @classmethod
    def from_pretrained(
        cls, base_model: PreTrainedModel, folder_or_hub_id: str | Path, *, strict: bool = False
    ) -> GrunModel:
        """Put a saved adapter on `base_model`, in evaluation mode (no dropout; `gate_threshold` acts).

        Args:
            base_model: the model the adapter was trained on.
            folder_or_hub_id: folder of the adapter, or a hub id (found in the local hub cache when offline).
            strict: refuse a base whose weights differ from those of training; otherwise a warning.

        Raises:
            AdapterError: the adapter is missing, damaged, or made for a model of another shape.
        """
        _refuse_wrapped(base_model)
        folder = find_adapter(folder_or_hub_id)
        config, template = AdapterConfig.read(folder)
        check_fits(config, hidden_size_of(base_model), len(find_blocks(base_model)[1]), folder)
        quantized = getattr(base_model, "quantization_method", None) is not None
        config.check_fingerprint(fingerprint(base_model), strict=strict, quantized=quantized)
        weights = read_weights(folder)
        model = cls(base_model, config, template)
        try:
            model.load_weights(weights, folder)
        except BaseException:
            model.unwrap()
            raise
        return model.eval()

    def load_weights(self, weights: dict[str, Tensor], source: str | Path) -> None:
        """Copy `weights` (names as in `state_dict`) into the edits; AdapterError names what does not fit."""
        from grun.errors import AdapterError

        own = self.state_dict()
        wrong = sorted(set(own) ^ set(weights)) or sorted(k for k in own if own[k].shape != weights[k].shape)
        if wrong:
            raise AdapterError(f"{source}: weights do not match {CONFIG_FILE}, first at {wrong[0]!r}; save it again")
        self.load_state_dict(weights)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and a model card; each file is whole or absent."""
        write_adapter(Path(folder), self.config, self.state_dict(), self.template)

    # -- calling ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device that inputs go to."""
        return input_device(self.base)

    @property
    def gate_threshold(self) -> float | None:
        """Gate probability below which, in evaluation mode, the edit is skipped, bit for bit."""
        return self._edits()[0].threshold

    @gate_threshold.setter
    def gate_threshold(self, value: float | None) -> None:
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"gate_threshold {value} must be a probability between 0 and 1")
        for edit in self._edits():
            edit.threshold = value

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
    def drawing(self, seeds: Sequence[int] | None) -> Iterator[None]:
        """Within the block dropout and a gate's noise are a function of `seeds` and of the block.

        One number for each row of a pass; None: they are drawn from torch's generator.
        """
        for block, edit in self.edit_at().items():
            edit.draw_from(None if seeds is None else [crc32(f"{seed} {block}".encode()) for seed in seeds])
        try:
            yield
        finally:
            for edit in self._edits():
                edit.draw_from(None)

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

    def edit_at(self) -> dict[int, GatedIntervention]:
        """Edits by block."""
        return {int(block): edit for block, edit in self.edits.items() if isinstance(edit, GatedIntervention)}

    def _edits(self) -> list[GatedIntervention]:
        return list(self.edit_at().values())

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
            return GateState(inputs.shape[0], past, inputs.device)
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


def resolve_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """Blocks as sorted 0-based indices of a model with `depth` blocks; ConfigError if outside or named twice."""
    outside = [block for block in blocks if not -depth <= block < depth]
    if outside or not blocks:
        raise ConfigError(
            f"blocks {list(blocks)}: name at least one of the model's {depth} blocks, 0..{depth - 1} or -{depth}..-1"
        )
    resolved = sorted(block % depth for block in blocks)
    twice = sorted({block for block in resolved if resolved.count(block) > 1})
    if twice:
        raise ConfigError(f"blocks {list(blocks)}: block {twice[0]} is named twice; name each block once")
    return resolved


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


def _intervention(config: AdapterConfig) -> GatedIntervention:
    from transformers.activations import ACT2FN

    if config.activation is not None and config.activation not in ACT2FN:
        raise ConfigError(f"unknown activation {config.activation!r}; known: {', '.join(sorted(ACT2FN))}")
    activation = None if config.activation is None else ACT2FN[config.activation]
    gate = GATES.get(config.gate)(config.hidden_size)
    if gate is not None and config.gate_bias is not None:
        set_bias(gate, config.gate_bias)
    edit = LoReftEdit(config.hidden_size, config.rank, activation)
    return GatedIntervention(
        edit,
        gate,
        dropout=config.dropout,
        dropout_on_hidden=config.dropout_on_hidden,
        accumulate=config.gate_accumulate,
    )


def hidden_size_of(base: PreTrainedModel) -> int:
    """Width of the residual stream of a model."""
    stated = getattr(base.config.get_text_config(), "hidden_size", None)
    if stated is None:  # a config that names it otherwise
        embeddings: Any = base.get_input_embeddings()
        stated = embeddings.weight.shape[1]
    return int(stated)


def _refuse_wrapped(base: PreTrainedModel) -> None:
    if base.__dict__.get("_grun_model") is not None:
        raise ConfigError("this base model carries GRUN edits already; call unwrap() on its GrunModel first")
