"""GrunTuner: what PEFT asks of a method, done by `GrunModel`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Self, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from grun.errors import ConfigError
from grun.method.adapter import check_finite
from grun.method.host import blocks_to_edit, transformers_model
from grun.method.model import GrunModel
from grun.method.validation import check_tensors
from grun.peft.config import GrunPeftConfig
from pyvene_custom.context import Calls

MERGING = (
    "GRUN adapters cannot be merged: their edits hang on a gate that reads hidden states, and no weights are equal to "
    "that; unload() gives the bare base"
)


class GrunLayer(nn.Module, BaseTunerLayer):
    """The adapters of one base by name, at most one of which is on it; the layer of which PEFT tells the state."""

    adapter_layer_names = ("grun_adapters",)

    def __init__(self) -> None:
        super().__init__()
        self.grun_adapters = nn.ModuleDict()
        self.calls = Calls()
        """Of the model, for which switching adapters waits."""
        self._active_adapter: list[str] = []

    def adapter(self, name: str) -> GrunModel:
        """The adapter of that name; ConfigError: there is none."""
        if name not in self.grun_adapters:
            raise ConfigError(f"there is no adapter {name!r}; there are: {', '.join(self.grun_adapters) or 'none'}")
        return cast(GrunModel, self.grun_adapters[name])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Put one adapter on the base in the place of another; all parameters but its own are frozen.

        It waits for calls in progress in other threads, and later calls of the PEFT model for it. ConfigError: there
        is none of that name, or several are named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ConfigError(
                f"adapters {names}: PEFT's way has one GRUN adapter active at a time; for several requests at once put "
                "their folders on the bare base with grun.GrunStack"
            )
        for name in names:
            self.adapter(name).put_on()
        if not names:
            self.leave_base()
        super().set_adapter(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let adapters act, or nothing; what is trained stays as it is."""
        self._disable_adapters = not enabled
        for name in self.grun_adapters:
            self.adapter(name).enabled = enabled

    def leave_base(self) -> None:
        """Leave the base bare."""
        for name in self.active_adapters:
            self.adapter(name).unwrap()


class GrunTuner(BaseTuner):
    """GRUN adapters on a base model, one of them active.

    The base carries the active adapter's edits as it does with `GrunModel`, which `GrunModel.of(model)` gives (its
    gates, its threshold); no module of it is replaced. It stays in evaluation mode.
    """

    prefix = "grun_"
    tuner_layer_cls = GrunLayer
    target_module_mapping: dict[str, list[str]] = {}
    uses_shared_state = True  # so PEFT refuses to put adapters on without a PeftModel

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configs by adapter name; ConfigError where another method, put around this one, sets its own."""
        return self._configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        if other := [config for config in configs.values() if not isinstance(config, GrunPeftConfig)]:
            raise ConfigError(
                f"a {type(other[0]).__name__} on a model with GRUN adapters: PEFT keeps one method on a model; load "
                "the base anew, and train and merge the other method's adapter before GRUN's"
            )
        self._configs = configs

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Before the first adapter: ConfigError for a model that carries others."""
        if any(isinstance(module, BaseTunerLayer | PeftModel) for module in model.modules()):
            raise ConfigError(
                "this model has an adapter of PEFT's already; GRUN goes on the bare model (another GRUN adapter: "
                "add_adapter or load_adapter; another method: merge_and_unload() it, or grun.GrunModel.wrap(model))"
            )
        blocks_to_edit(transformers_model(model))
        self.grun_layer = GrunLayer()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Make an adapter of the config of that name; the first one becomes active.

        ConfigError, AdapterError: see `GrunPeftConfig.on`; or no module can have the name.
        """
        if "." in adapter_name or hasattr(self.grun_layer.grun_adapters, adapter_name):
            raise ConfigError(f"adapter name {adapter_name!r} cannot be a module's; take another, without a point")
        if low_cpu_mem_usage or nn.ParameterList([torch.empty(1)])[0].is_meta:
            raise ConfigError("low_cpu_mem_usage: a GRUN adapter is small and made at once; leave it out")
        base = cast(PreTrainedModel, model)
        config = cast(GrunPeftConfig, self.peft_config[adapter_name]).on(base)
        adapter = GrunModel(base, config, config.template, turns=self.grun_layer.calls)
        self.peft_config[adapter_name] = config
        adapter.enabled = not self.grun_layer.disable_adapters
        adapters = self.grun_layer.grun_adapters
        adapters[adapter_name] = adapter.train(self.training).requires_grad_(False)
        if len(adapters) == 1:
            self.set_adapter(adapter_name, config.inference_mode)

    def _create_and_replace(self, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError("GRUN replaces no module of its base; make adapters by get_peft_model or add_adapter")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """See `GrunLayer.set_adapter`."""
        self.grun_layer.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train the parameters of these adapters, or freeze them."""
        self.grun_layer.set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.grun_layer.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; of an active one the place is taken by the first that is left.

        ConfigError: there is none of that name, or it is the last.
        """
        self.grun_layer.adapter(adapter_name)
        left = [name for name in self.peft_config if name != adapter_name]
        if not left:
            raise ConfigError(f"{adapter_name!r} is the only adapter; unload() gives the bare base")
        if adapter_name in self.active_adapters:
            warnings.warn(f"adapter {adapter_name!r} was active; {left[0]!r} is now", stacklevel=3)
            self.set_adapter(left[0])
        del self.peft_config[adapter_name], self.grun_layer.grun_adapters[adapter_name]

    def unload(self) -> nn.Module:
        """The base, with nothing of PEFT and GRUN on it; the adapters are gone."""
        self.grun_layer.leave_base()
        self.grun_layer.grun_adapters.clear()
        self.active_adapter, self.grun_layer._active_adapter = [], []
        del self.model.peft_config
        return cast(nn.Module, self.model)

    def train(self, mode: bool = True) -> Self:
        """Dropout and noise of edits and gates; the frozen base stays in evaluation mode, as it is served."""
        super().train(mode)
        self.model.eval()
        return self

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **given: Any) -> Iterator[None]:
        """PEFT's place for what a call asks of adapters, around every call that is not within `disable_adapter()`."""
        if given.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names: all rows of a GRUN model have one adapter; call set_adapter, and leave it out"
            )
        with self.grun_layer.calls.calling():
            yield

    # -- refused ----------------------------------------------------------------------------------------------------

    def merge_and_unload(self, *_: Any, **__: Any) -> NoReturn:
        """ConfigError: no weights are equal to gated edits."""
        raise ConfigError(MERGING)

    merge_adapter = unmerge_adapter = merge_and_unload

    def add_weighted_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """ConfigError: adapters with gates have no weighted sum."""
        raise ConfigError(
            "GRUN adapters have no weighted sum that is one adapter, since each has a gate of its own; for several "
            "requests at once put their folders on the bare base with grun.GrunStack"
        )

    # -- on disk: tensors by the names that they have in a GrunModel ------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], *_: Any, **__: Any
    ) -> dict[str, Tensor]:
        # PEFT leaves out of `state_dict` all names with that of another adapter in them, such as "pooled".
        own = {key: value for key, value in model.state_dict().items() if f"grun_adapters.{adapter_name}." in key}
        return {key: state_dict.get(key, value) for key, value in own.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        _, found, name = key.partition(f"grun_adapters.{adapter_name}.")
        if not found and "grun_adapters." not in key:
            raise ConfigError("GRUN adapters hold no embeddings: save_pretrained(..., save_embedding_layers=False)")
        return name if found else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """AdapterError: the tensors are not those that the config asks for."""
        where = f"weights of adapter {adapter_name!r}"
        check_finite(state_dict, where)
        check_tensors(cast(GrunPeftConfig, config), state_dict, where)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
