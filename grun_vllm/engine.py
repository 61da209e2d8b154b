"""Which configurations of vLLM edits go together with, and what they change in one. Needs no vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grun.errors import ConfigError
from grun.runtime.reading import typed
from grun.version import __version__
from grun_vllm.adapters import Shape, read_in_force

VERSION = "0.32."
"""Of vLLM, whose insides the plugin knows; others are refused."""
ARCHITECTURES = ("LlamaForCausalLM",)
"""Models that were tried."""
DTYPES = ("float32", "bfloat16")
"""Types of the base that were tried."""
V2 = "VLLM_USE_V2_MODEL_RUNNER"
SALT = "GRUN_VLLM_SALT"
"""Set in the environment, for vLLM's other processes: pages are hashed with the length of the prompt."""
EXTENSION = "grun_vllm.worker.GrunWorker"
OPERATOR = "vllm::grun_edit"


@dataclass(frozen=True)
class Options:
    """`--model-loader-extra-config`."""

    adapter: str
    """Folder or hub id of an adapter, or folder of a store of requests."""
    strict: bool = False
    """Refuse adapters that were trained on other weights; otherwise a warning."""


def options_of(extra: Any) -> Options:
    """ConfigError for an option that does not exist, or is not of its type."""
    where = "--model-loader-extra-config"
    if not isinstance(extra, dict) or "adapter" not in extra:
        raise ConfigError(f'{where} must name what is to be in force: \'{{"adapter": "FOLDER_OR_STORE"}}\'')
    options: Options = typed(Options, extra, where, ConfigError)
    return options


def shape_of(model_config: Any) -> Shape:
    """Shape of a base."""
    config = model_config.hf_text_config
    return config.hidden_size, config.num_hidden_layers, config.vocab_size


def check_engine(config: Any, version: str) -> None:
    """Refuse a `VllmConfig` that edits do not go together with, and switch on what they need; before it is settled.

    `version` is that of vLLM.

    Raises:
        ConfigError: one line on what does not go together.
        AdapterError: the adapter or store cannot be put in force.
    """
    if not version.startswith(VERSION):
        raise ConfigError(f"GRUN in vLLM: the plugin is made for vLLM {VERSION}x, this is {version}; install that one")
    for problem in problems(config):
        raise ConfigError(f"GRUN in vLLM: {problem}")
    options = options_of(config.load_config.model_loader_extra_config)
    found = read_in_force(options.adapter, shape_of(config.model_config))
    os.environ[V2] = "0"
    if found.depends_on_end:
        os.environ[SALT] = "1"
    config.parallel_config.worker_extension_cls = EXTENSION
    # Part of the key of compiled code, which has hooks in it where blocks are edited.
    configs = [one.config for one in found.adapters.values()]
    read = {block for one in configs for block in (*one.blocks, *(one.gate_blocks or ()))}
    blocks = "all" if found.store is not None else sorted(read)
    config.additional_config = {**(config.additional_config or {}), "grun": [__version__, blocks]}


def settle_engine(config: Any) -> None:
    """Let compiled code and CUDA graphs be split where edits are made; after vLLM has settled the configuration."""
    from vllm.config import CUDAGraphMode

    if config.use_v2_model_runner:
        raise ConfigError(f"GRUN in vLLM: it chose model runner V2, which is not served; set {V2}=0")
    compilation = config.compilation_config
    if compilation.splitting_ops and OPERATOR not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATOR)
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        pieces = CUDAGraphMode.PIECEWISE if compilation.splitting_ops else CUDAGraphMode.NONE
        compilation.cudagraph_mode = pieces


def problems(config: Any) -> Iterator[str]:
    """What edits do not go together with, or was never tried with them, one clause each."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    architectures = list(getattr(model.hf_config, "architectures", None) or [])
    if not set(architectures) & set(ARCHITECTURES):
        yield f"the model is {', '.join(architectures) or 'unknown'}; tried, and served, are {', '.join(ARCHITECTURES)}"
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        yield f"dtype {dtype} was not tried; set --dtype to {' or '.join(DTYPES)}"
    if model.quantization is not None:
        yield f"a base quantized by {model.quantization} was not tried; serve the one that the adapter was trained on"
    if model.runner_type != "generate":
        yield f"the runner is {model.runner_type}; edits are served to generate alone (--runner generate)"
    if str(os.environ.get(V2, "0")).strip().lower() not in ("0", "false", ""):
        yield f"{V2}={os.environ[V2]}: model runner V2 is not served; unset it"
    for name in ("speculative_config", "lora_config", "kv_transfer_config", "ec_transfer_config", "watermark_config"):
        if getattr(config, name, None) is not None:
            yield f"{name} was not tried; leave what sets it out"
    for name in (
        *("pipeline_parallel_size", "data_parallel_size"),
        *("decode_context_parallel_size", "prefill_context_parallel_size"),
    ):
        if (size := getattr(parallel, name, 1)) > 1:
            yield f"{name} {size} was not tried; set it to 1"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        yield "passes in micro-batches (--enable-dbo) were not tried; leave them out"
    if parallel.worker_extension_cls not in ("", EXTENSION):
        yield f"--worker-extension-cls {parallel.worker_extension_cls} takes the place of GRUN's; leave it out"
    for of, name in ((model, "enable_prompt_embeds"), (model, "enable_sleep_mode"), (cache, "kv_offloading_size")):
        if getattr(of, name, None):
            yield f"{name} was not tried; leave it out"
    if getattr(cache, "prefix_match_unit", None) is not None:
        yield "prefix_match_unit lets prefixes end within a page, of which gates know the end alone; leave it out"
    if not isinstance(config.additional_config or {}, dict):
        yield "additional_config must be an object: it is given a key of GRUN's"
