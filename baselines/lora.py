"""LoRA on a frozen model, by peft, as a parametrization."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from baselines.tensors import Trained
from grun.config.options import MethodConfig, UnlearnConfig
from grun.data import templates
from grun.data.encoding import Batch
from grun.data.templates import Template
from grun.errors import AdapterError, ConfigError
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE
from grun.method.parametrization import StepOutput
from grun.method.plain import run_plain
from grun.runtime.devices import keep_unpacked
from grun.runtime.files import make_folder, read_json, write_bytes, write_json, write_text
from pyvene_custom import find_blocks


class Lora:
    """Low-rank changes of linear layers, W + (alpha / rank) B A, with frozen weights (LoRA, arXiv 2106.09685).

    A and B are float32 whatever type the base has (float64 for a float64 base), and the base may be quantized. It
    stays in evaluation mode: of all that training mode switches on, only the dropout on the input of A acts.
    """

    model: PreTrainedModel
    module: Trained

    def __init__(self, config: MethodConfig) -> None:
        """`config.lora` applies."""
        self._options = config.lora
        self._template: Template | None = None

    @classmethod
    def make(cls, config: UnlearnConfig, quirks: Sequence[str]) -> Self:
        """See `grun.method.parametrization.Parametrization`; no quirk concerns it."""
        return cls(config.method)

    def prepare(self, base: PreTrainedModel, template: Template | None, *, turn_ids: Sequence[int] = ()) -> None:
        """Put layers that change nothing yet (B = 0) on `base`, in place; ConfigError for an unknown target."""
        import peft

        options = self._options
        layers = linear_layers(base)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]  # need not be whole: peft divides it by r
            lora_dropout=options.dropout,
            bias="none",
            target_modules=_chosen(list(layers), options.targets),
            fan_in_fan_out=any(not isinstance(layer, nn.Linear) for layer in layers.values()),
        )
        self._put(peft.get_peft_model(base, config), template)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A and B of every changed layer."""
        named = self.model.named_parameters()
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen base is its own reference."""
        training = self.module.training
        self.module.eval()
        try:
            with self._adapter.disable_adapter(), torch.no_grad():
                yield
        finally:
            self.module.train(training)

    def keep_reference(self) -> str:
        """Nothing to keep."""
        return "the frozen base is run a second time in every step"

    def run(self, batch: Batch, hidden: Collection[int] = ()) -> StepOutput:
        """One forward pass."""
        return run_plain(self.model, batch, hidden)

    def save(self, folder: Path) -> None:
        """Write what `peft.PeftModel.from_pretrained` loads, the config last, each file whole or absent."""
        make_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            self._adapter.save_pretrained(temporary, save_embedding_layers=False)
            staged = Path(temporary)
            config = read_json(staged / CONFIG_FILE)
            config["target_modules"] = sorted(config["target_modules"])  # peft writes a set, in any order
            if self._template is not None:
                templates.store(self._template, folder)
            write_text(folder / "README.md", _model_card(config))
            write_bytes(folder / WEIGHTS_FILE, (staged / WEIGHTS_FILE).read_bytes())
            write_json(folder / CONFIG_FILE, config)

    def load(self, folder: Path, base: PreTrainedModel) -> None:
        """Put the saved layers on `base`, in place; AdapterError if they do not go on it."""
        import peft
        from safetensors import SafetensorError

        try:
            adapter = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise AdapterError(f"the adapter {folder} does not go on this base model: {text}") from error
        self._put(adapter, templates.load(folder))

    def _put(self, adapter: Any, template: Template | None) -> None:
        from peft.tuners.lora import LoraLayer

        keep_unpacked(adapter)
        self._adapter = adapter
        self._template = template
        self.model = adapter.get_base_model()
        self.model.eval()
        dropouts = [layer.lora_dropout for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        self.module = Trained(dict(self.trainable_parameters()), dropouts)
        self.module.eval()


def linear_layers(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers of the decoder blocks by full name, quantized ones and transformers' Conv1D (GPT-2) among them."""
    path, blocks = find_blocks(base)
    return {
        f"{path}.{name}": module for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }


def _chosen(layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Those of `layers` whose names end with one of `targets`; no targets: all."""
    for target in targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            ends = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise ConfigError(
                f"method.lora.targets: no linear layer of the blocks is called {target!r}; there are {ends}"
            )
    return [name for name in layers if not targets or any(f".{name}".endswith(f".{target}") for target in targets)]


def _model_card(config: dict[str, Any]) -> str:
    layers = ", ".join(f"`{name}`" for name in sorted({name.rpartition(".")[2] for name in config["target_modules"]}))
    return f"""---
library_name: peft
tags: [unlearning, lora]
---

# LoRA for `{config["base_model_name_or_path"]}`

Low-rank changes (LoRA, arXiv 2106.09685; rank {config["r"]}, alpha {config["lora_alpha"]:g}) of
{layers}, trained so that the model no longer answers from the data to forget.

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "THIS_FOLDER")
```

**Limits.** The base weights still contain the data: the effect exists only where this adapter is loaded, or merged.
"""
