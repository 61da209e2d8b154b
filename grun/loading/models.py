"""Base models and tokenizers: from a hub id, a folder, or made on the spot."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grun.config.options import ModelConfig, TinyConfig
from grun.data import templates
from grun.data.templates import Template
from grun.errors import AdapterError, ConfigError, ModelError
from grun.loading.hashing import adapter_hash
from grun.loading.stored import TINY
from grun.runtime import processes
from grun.runtime.devices import keep_unpacked
from grun.runtime.reading import in_one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MOST_TINY = 1_000_000_000
"""Parameters up to which a model is built on the spot."""
WEIGHTS = ("*.safetensors", "*.bin")


@dataclass
class Loaded:
    """A model to ask, and what belongs to it."""

    model: Any
    """A transformers model, or a GrunModel or GrunStack around one."""
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    """Stored with the adapter, else beside the weights; None where neither has one."""
    identity: dict[str, str | None]
    """Fingerprint of the base, type and quantization of its weights, hash of the adapter; None: there is none."""


def load_model(config: ModelConfig, adapter: str | None, *, strict: bool, gate_threshold: float | None) -> Loaded:
    """A base model with an adapter on it, or none.

    An adapter is one of GRUN's, a store of requests, changed tensors, or what PEFT knows (LoRA, unmerged).

    Raises:
        ConfigError, ModelError: see `load_base`.
        AdapterError: the adapter is missing, damaged, or does not fit the base.
    """
    from grun.loading.changed_tensors import KIND as CHANGED
    from grun.loading.changed_tensors import put_changed
    from grun.method.adapter import STACK, find_adapter, peft_type
    from grun.method.fingerprint import fingerprint

    folder = None if adapter is None else find_adapter(adapter)
    kind = "" if folder is None else peft_type(folder)  # before minutes of loading
    base, tokenizer, template = load_base(config)
    identity: dict[str, str | None] = {
        "base": fingerprint(base),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": config.quantization,
        "adapter": None,
    }
    if folder is None:
        return Loaded(base, tokenizer, template, identity)
    if kind == STACK:
        from grun.method.stack.stack import GrunStack

        stack = GrunStack.from_folder(base, folder, strict=strict)
        if gate_threshold is not None:
            stack.gate_threshold = gate_threshold
        identity["adapter"] = adapter_hash(folder)
        return Loaded(stack, tokenizer, stack.template or template, identity)
    if kind != "GRUN":
        if gate_threshold is not None:
            raise ConfigError(f"gate_threshold needs a GRUN adapter; {adapter} is of type {kind}, which has no gates")
        identity["adapter"] = adapter_hash(folder)
        if kind == CHANGED:
            put_changed(base, folder, strict=strict)
        else:
            base = _put_on(base, folder)
        return Loaded(base, tokenizer, templates.load(folder) or template, identity)
    from grun.method.model import GrunModel

    model = GrunModel.from_pretrained(base, folder, strict=strict)
    model.gate_threshold = gate_threshold
    identity["adapter"] = adapter_hash(folder)
    return Loaded(model, tokenizer, model.template or template, identity)


def _put_on(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` with the layers of a PEFT adapter inside; it stays a transformers model, so everything works on it.

    AdapterError if not everything that the adapter does is then in the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from grun.method.adapter import WEIGHTS_FILE, check_finite

    try:
        config = PeftConfig.from_pretrained(str(folder))
        outside = _acts_outside(config)
        wrapped = None if outside else PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # PEFT and torch raise many kinds for a file that is damaged
        raise AdapterError(f"the adapter {folder} does not go on this base model: {in_one_line(error)}") from error
    if wrapped is not None:
        inner = cast("PreTrainedModel", wrapped.get_base_model())
        if {id(parameter) for parameter in wrapped.parameters()} != {id(parameter) for parameter in inner.parameters()}:
            outside = "keeps weights of its own beside the model"
    if wrapped is None or outside:
        kind = str(config.peft_type).rpartition(".")[2]
        raise AdapterError(
            f"the adapter {folder} is of PEFT's type {kind} and {outside}, which is not supported; take one that acts "
            "inside the model's layers, such as LoRA"
        )
    own = get_peft_model_state_dict(wrapped)
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


def load_base(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Template | None]:
    """Model in evaluation mode on its device, tokenizer with a pad token, and the template stored beside the weights.

    Raises:
        ConfigError: no model is named, or an option is unknown.
        ModelError: the model or its tokenizer cannot be loaded or used.
    """
    from transformers import AutoTokenizer

    source, gguf = _source(config)
    if any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        gguf = {}  # beside a GGUF file it is the original
    with _named_errors(config, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, **gguf
        )
        tokenizer("a")  # a setting of another type shows here
    ensure_pad_token(tokenizer)
    model = load_weights(config)
    _check_vocabulary(model, tokenizer, config)
    return model, tokenizer, stored_template(config)


def load_weights(config: ModelConfig) -> PreTrainedModel:
    """Model in evaluation mode on its device; where it lies there need be no tokenizer. Errors as of `load_base`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    source, gguf = _source(config)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    more: dict[str, Any] = {"attn_implementation": config.attention} if config.attention else {}
    if config.quantization is not None:
        more["quantization_config"] = _quantization(config)
        more["device_map"] = {"": pick_device(config.device)}
    if config.device_map is not None:
        more["device_map"] = config.device_map
    if gguf and hasattr(transformers, "GgufConfig"):  # older versions always unpack
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _named_errors(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **gguf,
            **more,
        )
    model: PreTrainedModel = loaded[0]
    if random := sorted(loaded[1]["missing_keys"]):
        raise ModelError(
            f"the weights of {config.path!r} are not those of its config.json: {len(random)} tensors, such as "
            f"{random[0][:120]}, are missing and would be random; copy the whole model"
        )
    if gguf:
        model.config.name_or_path = config.path  # the file, not its folder
    if config.quantization is not None:
        keep_unpacked(model)
        _try_kernels(model, config)
    if "device_map" not in more:
        return place(model, config.device).eval()
    outside = {str(device) for device in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if outside and torch.cuda.is_available() and config.device_map is not None:
        raise ModelError(
            "model.device_map=auto: the GPUs do not hold all blocks; give more of them, or model.quantization=4bit"
        )
    return model.eval()


def _try_kernels(model: PreTrainedModel, config: ModelConfig) -> None:
    """ModelError where this machine's kernels refuse the model's quantized layers, before any work is done on it."""
    import torch

    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.quantization={config.quantization}: the kernels on this machine refuse the layers of "
            f"{config.path!r} ({text}); leave model.quantization out or take another kind"
        ) from error


def stored_template(config: ModelConfig) -> Template | None:
    """Template that lies beside the weights, in a folder or on the hub."""
    from transformers.utils import cached_file

    path = Path(config.path or "").expanduser()
    path = path.parent if path.is_file() else path
    if config.path and not path.is_dir():
        quietly = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
        found = cached_file(config.path, templates.FILE_NAME, revision=config.revision, **quietly)
        path = Path(found).parent if found is not None else path
    return templates.load(path) if config.path and path.is_dir() else None


def _source(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """Folder or hub id to load from, and for a GGUF file `gguf_file`, its name there."""
    if config.path is None or config.path == TINY:
        raise ConfigError(
            "model.path names no taught model; give a hub id, or a folder such as the one `python -m grun finetune` "
            "prints"
        )
    path = Path(config.path).expanduser()
    gguf = [path] if path.suffix == ".gguf" else []
    if path.is_dir() and not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return _gguf_source(config, gguf)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(
            f"model.path={config.path}: no such folder; if an adapter named it, set model.path to where its base is now"
        )
    if path.is_dir():
        _check_folder(path)
    return str(path) if path.is_dir() else config.path, {}


def _gguf_source(config: ModelConfig, files: Sequence[Path]) -> tuple[str, dict[str, str]]:
    """Folder, or OWNER/NAME of the hub, and name of a GGUF file, whose weights are unpacked."""
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"model.path={config.path} holds several GGUF files ({names}); give one of them")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF needs the package gguf, which is not installed: pip install 'grun-unlearning[gguf]'")
    if config.quantization is not None:
        raise ConfigError(
            f"model.quantization={config.quantization} is not for GGUF, whose weights are unpacked; leave it out"
        )
    (file,) = files
    if not file.is_file() and (file.is_absolute() or len(file.parts) != 3):
        raise ModelError(f"model.path={config.path}: no such file")
    return str(file.parent), {"gguf_file": file.name}


@contextlib.contextmanager
def _named_errors(config: ModelConfig, part: str = "") -> Iterator[None]:
    """What transformers raises while it loads a model, or a `part` of it, becomes one line that names it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"model {config.path!r} cannot be loaded: a .bin of it is damaged, or a pickle of more than tensors, which "
            "may run code; save it again as safetensors"
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the tokenizers' Rust
            raise
        raise ModelError(f"{part}model {config.path!r} cannot be loaded: {in_one_line(error)}") from error


def _check_folder(folder: Path) -> None:
    """ModelError for a folder that lacks what makes a model, before transformers guesses at what it might be."""
    if any(folder.glob("*.gguf")):
        return
    if not (folder / "config.json").is_file():
        hint = "; it is an adapter: give it as adapter" if (folder / "adapter_config.json").is_file() else ""
        raise ModelError(f"model.path={folder} is no model: config.json is missing{hint}")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ModelError(f"model.path={folder} holds no weights ({', '.join(WEIGHTS)}); copy the whole model")


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """ModelError where the tokenizer has ids that the model has no embedding of."""
    embeddings: Any = model.get_input_embeddings()
    rows, largest = len(embeddings.weight), max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {config.path!r} has tokens up to id {largest}, the model {rows} embeddings: tokens were "
            "added to the tokenizer alone; save the model after model.resize_token_embeddings(len(tokenizer))"
        )


def _quantization(config: ModelConfig) -> Any:
    """Settings for bitsandbytes: int8, or 4 bits computed in the type that model.dtype names."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantization needs bitsandbytes, which is not installed: pip install 'grun-unlearning[quantization]'"
        )
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    kind = "fp4" if config.quantization == "fp4" else "nf4"
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the end-of-text token pad where there is no pad token; padding is always masked, so any token will do."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a pad nor an end-of-text token; set one and save it again")
    tokenizer.pad_token = tokenizer.eos_token
    log.info("the tokenizer has no pad token; %s is used, masked", tokenizer.eos_token)


def pick_device(name: str) -> torch.device:
    """Device for `auto`, `cpu`, `cuda` or `mps`; ConfigError if it is not there. Each process has a GPU of its own."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", processes.local_rank())
    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not known.get(name, False):
        available = ", ".join(device for device, there in known.items() if there)
        raise ConfigError(f"model.device={name} is not available here; available: auto, {available}")
    return torch.device(name)


def place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """`model` on the device that the option names."""
    torch_module: torch.nn.Module = model
    torch_module.to(pick_device(device))
    return model


def build_tiny(config: TinyConfig, texts: list[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama with random weights, a function of `seed`, and a byte-level BPE tokenizer trained on `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grun.data.tokenizer import train_tokenizer

    if config.hidden_size % config.heads:
        raise ConfigError(
            f"model.tiny.hidden_size={config.hidden_size} must be a multiple of model.tiny.heads={config.heads}"
        )
    if config.hidden_size // config.heads % 2:
        raise ConfigError(
            f"model.tiny.hidden_size={config.hidden_size} must give each of model.tiny.heads={config.heads} an even "
            "width: positions turn pairs of values"
        )
    width, inner = config.hidden_size, config.intermediate_size
    size = width * config.vocabulary + config.blocks * (4 * width**2 + 3 * width * inner)
    if size > MOST_TINY:
        raise ConfigError(f"model.tiny would have {size:,} parameters, more than {MOST_TINY:,}; make it smaller")
    tokenizer = train_tokenizer(texts, config.vocabulary)
    tokenizer.model_max_length = config.context
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.blocks,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=config.context,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return model, tokenizer


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence the model takes, tokens."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**30)
