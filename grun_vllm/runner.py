"""What is put around methods of vLLM's worker and model runner V1, in a process whose model has edits."""

from __future__ import annotations

import functools
from typing import Any

from grun.errors import ModelError
from grun_vllm.held import HELD
from grun_vllm.step import Step


def follow_runner() -> None:
    """Tell edits of each pass what its tokens are, and how many pages there are; once in a process."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, "_grun"):
        return
    GPUModelRunner._grun = True
    forward, dummy = GPUModelRunner._model_forward, GPUModelRunner._dummy_run
    initialize = GPUModelRunner.initialize_kv_cache

    @functools.wraps(forward)
    def passing(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not _is_edited(self):
            return forward(self, input_ids, *args, **kwargs)
        with HELD[-1].edits.passing(Step.of(self, input_ids)):
            return forward(self, input_ids, *args, **kwargs)

    @functools.wraps(dummy)
    def resting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_edited(self):
            return dummy(self, *args, **kwargs)
        with HELD[-1].resting():
            return dummy(self, *args, **kwargs)

    @functools.wraps(initialize)
    def opening(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, kv_cache_config, *args, **kwargs)
        if _is_edited(self):
            HELD[-1].open(pages_of(self, kv_cache_config), self.input_batch.block_table[0].block_size)

    GPUModelRunner._model_forward = passing
    GPUModelRunner._dummy_run = resting
    GPUModelRunner.initialize_kv_cache = opening


def _is_edited(of: Any) -> bool:
    """Whether a worker or a runner is that of a model with edits; there may be others in the process."""
    return bool(of.vllm_config.load_config.load_format == "grun")


def pages_of(runner: Any, kv_cache_config: Any) -> int:
    """Pages of a key/value cache as block tables number them; ModelError where there are several caches."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ModelError(f"the model has {len(groups)} groups of key/value caches; GRUN's plugin serves those with one")
    whole = groups[0].kv_cache_spec.block_size // runner.input_batch.block_table[0].block_size  # pages of a block
    return int(kv_cache_config.num_blocks * whole)


def make_room(worker: Any) -> None:
    """Let the key/value cache leave what gates remember their share of the memory that is there for both.

    `worker` is the class of vLLM's worker in this process.
    """
    if "_grun" in worker.__dict__:
        return
    worker._grun = True
    available = worker.determine_available_memory

    @functools.wraps(available)
    def shared(self: Any) -> int:
        whole: int = available(self)
        if not _is_edited(self):
            return whole
        specs = list(self.model_runner.get_kv_cache_spec().values())
        page = sum(spec.page_size_bytes for spec in specs)
        own = HELD[-1].edits.page_bytes(specs[0].block_size)
        return int(whole * (page / (page + own)))

    worker.determine_available_memory = shared
