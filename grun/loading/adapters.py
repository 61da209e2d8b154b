"""Models to ask: a base with whatever adapter is named on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grun.config.options import ModelConfig
from grun.data import templates
from grun.data.templates import Template
from grun.errors import AdapterError, ConfigError
from grun.loading.changed_tensors import KIND as CHANGED
from grun.loading.changed_tensors import put_changed
from grun.loading.hashing import adapter_hash
from grun.loading.models import load_base
from grun.method import guardrail
from grun.method.adapter import STACK, WEIGHTS_FILE, check_finite, find_adapter, peft_type
from grun.method.fingerprint import fingerprint
from grun.runtime.reading import in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Loaded:
    """A model to ask, and what belongs to it."""

    model: Any
    """A transformers model, or a GrunModel or GrunStack around one."""
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    """Stored with the adapter, else with the weights; None where neither has one."""
    identity: dict[str, str | None]
    """Fingerprint of the base, type and quantization of its weights, hash of the adapter; None: there is none."""
    guarded: bool = False
    """Whether a guardrail stands around the model, which acts in conversations alone."""

    @property
    def pad_id(self) -> int:
        """Id that fills up short rows; it is masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def refuse_guarded(self, what: str) -> None:
        """ConfigError for `what` where there is a guardrail."""
        if self.guarded:
            raise ConfigError(
                f"{what} asks in words of its own, where a guardrail does not act: its numbers would be the base's; "
                "leave the adapter out"
            )


def load_model(config: ModelConfig, adapter: str | None, *, strict: bool, gate_threshold: float | None) -> Loaded:
    """A base model with an adapter on it, or none.

    An adapter is one of GRUN's, a store of requests, changed tensors, a guardrail, or what PEFT knows (LoRA, unmerged).

    Raises:
        ConfigError, ModelError: see `load_base`.
        AdapterError: the adapter is missing, damaged, or does not fit the base.
    """
    folder = None if adapter is None else find_adapter(adapter)
    kind = "" if folder is None else peft_type(folder)  # before minutes of loading
    base, tokenizer, template = load_base(config)
    identity: dict[str, str | None] = {
        "base": fingerprint(base),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": config.quantization,
        "adapter": None if folder is None else adapter_hash(folder),
    }
    if folder is None:
        return Loaded(base, tokenizer, template, identity)
    if kind in ("GRUN", STACK):
        model = edited(base, folder, kind, strict=strict, gate_threshold=gate_threshold)
        return Loaded(model, tokenizer, model.template or template, identity)
    if gate_threshold is not None:
        raise ConfigError(f"gate_threshold needs a GRUN adapter; {adapter} is of type {kind}, which has no gates")
    if kind == guardrail.KIND:
        found = guardrail.Guardrail.read(folder)
        found.put_on(base, strict=strict)
        return Loaded(base, tokenizer, found.template, identity, guarded=True)
    if kind == CHANGED:
        put_changed(base, folder, strict=strict)
    else:
        base = _put_on(base, folder)
    return Loaded(base, tokenizer, templates.load(folder) or template, identity)


def edited(base: PreTrainedModel, folder: Path, kind: str, *, strict: bool, gate_threshold: float | None) -> Any:
    """A GRUN adapter or a store of requests on `base`, with `gate_threshold` in place of its own, if one is given."""
    from grun.method.model import GrunModel
    from grun.method.stack.stack import GrunStack

    model = (GrunStack.from_folder if kind == STACK else GrunModel.from_pretrained)(base, folder, strict=strict)
    if gate_threshold is not None:
        model.gate_threshold = gate_threshold
    return model


def _put_on(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` with the layers of a PEFT adapter inside; it stays a transformers model, so everything works on it.

    AdapterError if not everything that the adapter does is then in the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        config = PeftConfig.from_pretrained(str(folder))
        outside = _acts_outside(config)
        wrapped = None if outside else PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # PEFT and torch raise many kinds for a file that is damaged
        raise AdapterError(f"the adapter {folder} does not go on this base model: {in_one_line(error)}") from error
    if wrapped is not None:
        inner = cast("PreTrainedModel", wrapped.get_base_model())
        if {id(parameter) for parameter in wrapped.parameters()} != {id(parameter) for parameter in inner.parameters()}:
            outside = "keeps weights of its own outside the model"
    if wrapped is None or outside:
        kind = str(config.peft_type).rpartition(".")[2]
        raise AdapterError(
            f"the adapter {folder} is of PEFT's type {kind} and {outside}, which is not supported; take one that acts "
            "inside the model's layers, such as LoRA"
        )
    own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # else the hub is asked for the base's name
    check_finite(own, folder)
    if (path := folder / WEIGHTS_FILE).exists():
        with safe_open(str(path), "pt") as file:
            stored = set(file.keys())
        if astray := sorted(stored - own.keys() - wrapped.state_dict().keys() | own.keys() - stored):
            raise AdapterError(
                f"the adapter {folder} does not go on this base model: {len(astray)} tensors belong to one of the two "
                f"alone, first {astray[0]!r}; name the model that it was trained on"
            )
    wrapped.eval()
    return inner


def _acts_outside(config: Any) -> str | None:
    """What PEFT does around the model for an adapter, which the model alone would not do; None if nothing."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if config.is_prompt_learning:
        return "puts tokens of its own before every prompt"
    if getattr(config, "alora_invocation_tokens", None) is not None:
        return "waits for invocation tokens (alora_invocation_tokens)"
    if hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "generate"):
        return "needs more than tokens, or a second pass, for an answer"
    return None
