"""What is served: a base with an adapter, or with the requests of a store as they are now."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.config.checks import adapter_name
from grun.data import templates
from grun.errors import ConfigError, ModelError
from grun.evaluation.generation import end_tokens, needs_generate
from grun.loading.adapters import edited
from grun.loading.models import load_base
from grun.method.adapter import STACK, AdapterConfig, find_adapter, peft_type
from grun.method.model import GrunModel
from grun.method.stack.manifest import MANIFEST_FILE
from grun.method.stack.stack import GrunStack
from grun.serving.refusal import Refused

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from grun.config.options import ServeConfig
    from grun.data.templates import Template

log = logging.getLogger(__name__)

VARIANTS = 8
"""Models with some of the requests off that are kept."""


@dataclass
class Edition:
    """The edits in force between two changes of a store. Answers that began under it are finished under it."""

    base: PreTrainedModel
    """Without edits."""
    model: GrunModel | GrunStack | None
    """On a base of its own that shares its weights with `base`; None: no request is in force."""
    configs: Mapping[str, AdapterConfig]
    """By request."""
    template: Template
    """That questions are put in."""
    _variants: dict[frozenset[str], Any] = field(default_factory=dict)

    def variant(self, edits: bool, off: Iterable[str]) -> tuple[Any, Mapping[str, AdapterConfig]]:
        """The model without the requests `off`, or without any, and the requests that are on it."""
        off = frozenset(self.configs.keys() & set(off))
        if not edits or self.model is None or len(off) == len(self.configs):
            return self.base, {}
        if not off:
            return self.model, self.configs
        if off not in self._variants:
            model = shared_copy(self.model, self.base)
            for name in off:
                model.remove(name)  # a stack's: one adapter has no part to leave out
            self._variants[off] = model
            for old in list(self._variants)[:-VARIANTS]:
                del self._variants[old]
        return self._variants[off], {name: one for name, one in self.configs.items() if name not in off}


class Served:
    """A base that is loaded once, and the edition in force."""

    def __init__(self, config: ServeConfig) -> None:
        """Load it; ConfigError, ModelError or AdapterError where something of it cannot be served."""
        if config.adapter is None:
            raise ConfigError("serve needs adapter=FOLDER, an adapter that `unlearn` made, or a store of requests")
        self.folder = find_adapter(config.adapter)
        kind = peft_type(self.folder)
        if kind not in ("GRUN", STACK):
            raise ConfigError(f"{self.folder} is of type {kind}; serve takes GRUN's adapters and stores of requests")
        self._kind, self.is_store = kind, kind == STACK
        self._config = config
        self.base, self.tokenizer, self._stored = load_base(config.model)
        if reason := needs_generate(self.base):
            raise ModelError(
                f"answers of this model cannot be computed together: {reason}; use `python -m grun generate`"
            )
        self.base.eval().requires_grad_(False)
        self.model_name = Path(str(config.model.path)).name
        self.pad_id = int(self.tokenizer.pad_token_id or 0)
        self.ends = end_tokens(self.base, self.tokenizer)
        self._loading = threading.Lock()
        self._stamp = self._stamp_now()
        self.edition = self._load()

    def refuse_other(self, model: str) -> None:
        """Refused with status 404 for the name of another model."""
        if model != self.model_name:
            raise Refused(404, f"the model here is {self.model_name!r}", "model", "model_not_found")

    def reload(self) -> bool:
        """Read the store anew where its manifest has changed since it was read; whether it had.

        GrunError where it cannot be read; the edition stays as it was, until the manifest changes again.
        """
        with self._loading:
            stamp = self._stamp_now()
            if not self.is_store or stamp == self._stamp:
                return False
            self._stamp = stamp
            self.edition = self._load()
            return True

    def _load(self) -> Edition:
        base: Any = shared_copy(self.base)
        strict, gate_threshold = self._config.strict, self._config.gate_threshold
        model = edited(base, self.folder, self._kind, strict=strict, gate_threshold=gate_threshold)
        configs = dict(model.configs) if self.is_store else {adapter_name(str(self.folder)): model.config}
        template = templates.in_force(self._config, model.template or self._stored, self.tokenizer)
        return Edition(self.base, model if configs else None, configs, template)

    def _stamp_now(self) -> tuple[int, int, int] | None:
        """Differs between a manifest and the one that replaces it; None: there is none."""
        try:
            status = (self.folder / MANIFEST_FILE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def shared_copy(model: nn.Module, *others: nn.Module) -> Any:
    """A copy whose tensors are those of `model` and of `others` themselves, so that it takes next to no memory."""
    tensors = itertools.chain.from_iterable((*one.parameters(), *one.buffers()) for one in (model, *others))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
