"""`--load-format grun`: a model as vLLM loads it, with edits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.import_utils import resolve_obj_by_qualname

from grun.errors import AdapterError, ModelError
from grun.method.adapter import check_base
from grun.method.fingerprint import fingerprint_of, sample
from grun_vllm.adapters import InForce, read_in_force
from grun_vllm.edits import Edits
from grun_vllm.engine import options_of, shape_of
from grun_vllm.held import HELD, Held, hook, register_operator
from grun_vllm.runner import follow_runner, make_room

logger = init_logger("vllm.grun")


class GrunModelLoader(DefaultModelLoader):
    """vLLM's own loader; then hooks on decoder blocks. One model of a process is loaded so."""

    def __init__(self, load_config: Any) -> None:
        """`load_config.model_loader_extra_config`: see `grun_vllm.engine.Options`."""
        self.options = options_of(load_config.model_loader_extra_config)
        self._samples: dict[str, bytes] = {}
        super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={}))

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, of which a fingerprint is taken as they pass: vLLM fuses them."""
        for name, tensor in super().get_all_weights(model_config, model):
            self._samples[name] = sample(name, tensor)
            yield name, tensor

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model with edits."""
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        found = read_in_force(self.options.adapter, shape_of(model_config))
        self._check_base(found, model_config)
        edits = Edits(found, vllm_config.device_config.device, model_config.dtype)
        HELD[:] = [Held(edits, self.options.adapter, shape_of(model_config))]
        register_operator()
        blocks = blocks_of(model, model_config.hf_text_config.num_hidden_layers)
        # Of a store, to which requests are added while it is served, all of them.
        for block in sorted(edits.blocks) if found.store is None else range(len(blocks)):
            blocks[block].register_forward_hook(hook(block))
        act_on_logits(model, HELD[0])
        follow_runner()
        make_room(resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls))
        logger.info("GRUN: in force from %s: %s", found.folder, ", ".join(found.adapters) or "nothing")
        return model

    def _check_base(self, found: InForce, model_config: Any) -> None:
        """AdapterError, or a line in the log, where an adapter was trained on other weights."""
        config = model_config.hf_text_config
        if getattr(config, "tie_word_embeddings", False):
            self._samples.pop("lm_head.weight", None)
        names = [name for name in self._samples if not name.endswith("rotary_emb.inv_freq")]  # no parameter
        of_base = fingerprint_of({name: self._samples[name] for name in names})
        for name, one in found.adapters.items():
            trained_on, base = one.config.base_fingerprint, one.config.base_model_name_or_path
            try:
                check_base(trained_on, base, of_base, strict=True)
            except AdapterError as error:
                if self.options.strict:
                    raise
                logger.warning("GRUN: request %s: %s", name, str(error).removesuffix("; strict=true refuses it"))


def blocks_of(model: nn.Module, depth: int) -> list[nn.Module]:
    """Decoder blocks in their order; ModelError if they cannot be told."""
    found = {}
    for name, module in model.named_modules():
        if match := re.fullmatch(r"(?:.*\.)?layers\.(\d+)", name):
            found[int(match[1])] = module
    if sorted(found) != list(range(depth)):
        raise ModelError(f"{type(model).__name__}: {len(found)} decoder blocks found, of {depth}; it cannot be edited")
    return [found[block] for block in range(depth)]


def act_on_logits(model: Any, held: Held) -> None:
    """Let an action on logits, if there is one, change those that tokens are sampled from."""
    compute: Callable[..., Tensor | None] = model.compute_logits

    def changed(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute(*args, **kwargs)
        return None if logits is None else held.edits.acted(logits)

    model.compute_logits = changed
