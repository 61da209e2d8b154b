"""Base models and tokenizers, from a name of ours, a hub id, a folder or a GGUF file."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.options import ModelConfig, UnlearnConfig
from grun.data import templates
from grun.data.templates import Template
from grun.errors import ConfigError, GrunError, ModelError
from grun.loading.fetching import located
from grun.loading.named import MODELS, refuse_revision
from grun.loading.quantized import bitsandbytes_settings, gguf_source, try_kernels, unpacking
from grun.loading.stored import TINY
from grun.loading.streaming import file_of, files_to_stream, load_streamed
from grun.runtime.devices import keep_unpacked, pick_device
from grun.runtime.reading import in_one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin")


def load_base(
    config: ModelConfig, for_run: UnlearnConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Template | None]:
    """Model in evaluation mode on its device, tokenizer with a pad token, and the template stored with the weights.

    With `for_run`, what the model is to be unlearned by, its blocks may stay in their files (`cache.build`).

    Raises:
        ConfigError: no model is named, or an option is unknown.
        ModelError: the model or its tokenizer cannot be loaded or used.
    """
    from transformers import AutoTokenizer

    source, gguf = _source(config)
    if any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        gguf = {}  # the original, which lies in the folder of the GGUF file
    with _named_errors(config, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, **gguf
        )
        tokenizer("a")  # a setting of another type shows here
    ensure_pad_token(tokenizer)
    model = _streamed(for_run) if for_run is not None else None
    model = load_weights(config) if model is None else model
    _check_vocabulary(model, tokenizer, config)
    return model, tokenizer, stored_template(config)


def _streamed(config: UnlearnConfig) -> PreTrainedModel | None:
    """The model of a run with its blocks in their files; None where it is to be loaded whole."""
    source, gguf = _source(config.model)
    with _named_errors(config.model):
        files = files_to_stream(config, source, bool(gguf))
        return load_streamed(config.model, source, files) if files else None


def load_weights(config: ModelConfig) -> PreTrainedModel:
    """Model in evaluation mode on its device; its folder needs no tokenizer. Raises what `load_base` does."""
    import torch
    from transformers import AutoModelForCausalLM

    source, gguf = _source(config)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    more: dict[str, Any] = {"attn_implementation": config.attention} if config.attention else {}
    if config.quantization is not None:
        more["quantization_config"] = bitsandbytes_settings(config)
        more["device_map"] = {"": pick_device(config.device)}
    if config.device_map is not None:
        more["device_map"] = config.device_map
    if gguf:
        more |= unpacking()
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
    if gguf or config.path in MODELS:
        model.name_or_path = model.config.name_or_path = str(config.path)  # the file or name, not its folder
    if config.quantization is not None:
        keep_unpacked(model)
        try_kernels(model, config)
    if "device_map" not in more:
        return place(model, config.device).eval()
    outside = {str(device) for device in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if outside and torch.cuda.is_available() and config.device_map is not None:
        raise ModelError(
            "model.device_map=auto: the GPUs do not hold all blocks; give more of them, or model.quantization=4bit"
        )
    return model.eval()


def stored_template(config: ModelConfig) -> Template | None:
    """Template stored with the weights, in a folder or on the hub."""
    path = Path(located(config.path or "")).expanduser()
    path = path.parent if path.is_file() else path
    if config.path and not path.is_dir():
        found = file_of(config.path, templates.FILE_NAME, config.revision)
        path = Path(found).parent if found is not None else path
    return templates.load(path) if config.path and path.is_dir() else None


def _source(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """Folder or hub id to load from, and for a GGUF file `gguf_file`, its name there."""
    if config.path is None or config.path == TINY:
        raise ConfigError(
            "model.path names no taught model; give a hub id, or a folder such as the one `python -m grun finetune` "
            "prints"
        )
    refuse_revision(config)
    path = Path(located(config.path)).expanduser()
    gguf = [path] if path.suffix == ".gguf" else []
    if path.is_dir() and not (path / "config.json").is_file():
        gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return gguf_source(config, gguf)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(
            f"model.path={config.path}: no such folder; if an adapter named it, set model.path to where its base is now"
        )
    if path.is_dir():
        _check_folder(path)
    return str(path) if path.is_dir() else config.path, {}


@contextlib.contextmanager
def _named_errors(config: ModelConfig, part: str = "") -> Iterator[None]:
    """What transformers raises while it loads a model, or a `part` of it, becomes one line that names it."""
    try:
        yield
    except GrunError:
        raise
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


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the end-of-text token pad where there is no pad token; padding is always masked, so any token will do."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a pad nor an end-of-text token; set one and save it again")
    tokenizer.pad_token = tokenizer.eos_token
    log.info("the tokenizer has no pad token; %s is used, masked", tokenizer.eos_token)


def place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """`model` on the device that the option names."""
    torch_module: torch.nn.Module = model
    torch_module.to(pick_device(device))
    return model


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence the model takes, tokens."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**30)
