"""The model `grun` of lm-evaluation-harness's own command line; importing this module registers it with the harness."""

from __future__ import annotations

import logging
from typing import Any

from lm_eval.api.registry import register_model

from grun.config.options import EvaluateConfig
from grun.config.values import argument
from grun.data.templates import in_force
from grun.errors import ConfigError, unknown_name
from grun.evaluation.suites.lm_harness import MODEL_ARGUMENTS
from grun.evaluation.suites.lm_harness_model import HarnessModel
from grun.loading.adapters import load_model
from grun.loading.checks import check
from grun.loading.resolve import resolve
from grun.method.adapter import find_adapter

log = logging.getLogger(__name__)


@register_model("grun")
class GrunHarnessModel(HarnessModel):
    """What `--model grun` of the harness' command line makes of its `--model_args`.

    The model is loaded, asked and scored as by `evaluate suite=lm_eval`. The harness puts its questions into the chat
    template that is stored with the adapter, or else with the model, where it is told to (`--apply_chat_template`).
    """

    def __init__(self, **arguments: Any) -> None:
        """`arguments` are those of `MODEL_ARGUMENTS`, with the harness' own flags batch_size and device.

        Raises:
            ConfigError: one is unknown or wrong, or no model is named.
            ModelError, AdapterError: as of `load_model`.
        """
        config = _config(arguments)
        loaded = load_model(config.model, config.adapter, strict=config.strict, gate_threshold=config.gate_threshold)
        loaded.refuse_guarded("lm-evaluation-harness")
        template = in_force(config, loaded.template, loaded.tokenizer)
        self._in_force, self._told, self._replaced = template, False, False
        chat = template if template.kind == "chat" else None
        super().__init__(loaded.model, loaded.tokenizer, config.batch_size, chat)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As of `HarnessModel`; the template's system prompt stands first where the harness has no system message."""
        if self.template is None:
            raise ConfigError(
                f"--apply_chat_template: the model was taught in the template {self._in_force.name!r}, which is no "
                "chat template; leave that flag out"
            )
        system, self._told = self.template.system_prompt, True
        if system is not None and (not chat_history or chat_history[0]["role"] != "system"):
            chat_history = [{"role": "system", "content": system}, *chat_history]
        elif system is not None and not chat_history[0]["content"].startswith(system) and not self._replaced:
            self._replaced = True
            log.warning(
                "--system_instruction, or a task's description, takes the place of the system prompt that it was "
                "taught with; that prompt as --system_instruction keeps it, before the description"
            )
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(self, *arguments: Any, **named: Any) -> list[tuple[float, bool]]:
        self._warn()
        return super()._loglikelihood_tokens(*arguments, **named)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate as the harness does, on the edited model."""
        self._warn()
        answers: list[str] = super().generate_until(requests, disable_tqdm)
        return answers

    def _warn(self) -> None:
        """Say once that the model was taught in a chat template, where the harness asks without one."""
        if self.template is not None and not self._told:
            log.warning(
                "the questions are put as the tasks word them, and the model was taught in its chat template, outside "
                "of which gates may not open: add --apply_chat_template"
            )
        self._told = True


def _config(arguments: dict[str, Any]) -> EvaluateConfig:
    """The options of `evaluate` that `--model_args` stand for, with what is stored with the model and the adapter."""
    size, device = arguments.pop("batch_size", None) or 1, arguments.pop("device", None)
    if not str(size).isdigit():
        raise ConfigError(f"batch_size={size} is not known to the model grun; give a number, such as --batch_size 16")
    given: dict[str, Any] = {"suite": "lm_eval", "tasks": ["any"], "batch_size": int(size)}
    if device not in (None, "cuda:0"):  # what the harness says where nobody names one, on machines without a GPU too
        given["model.device"] = device
    for name, value in arguments.items():
        if name not in MODEL_ARGUMENTS:
            raise ConfigError(unknown_name("argument of the model grun", name, list(MODEL_ARGUMENTS)))
        if (key := MODEL_ARGUMENTS[name]) in given:
            raise ConfigError("model_args: adapter and store are both given; a store is an adapter of its own")
        given[key] = value
    if given.get("adapter") is not None:
        given["adapter"] = str(find_adapter(str(given["adapter"])))  # of the hub: what is stored with it counts too
    elif given.get("model.path") is None:
        raise ConfigError("model_args name no model; give pretrained=MODEL, adapter=ADAPTER or both")
    config: EvaluateConfig = resolve("evaluate", [f"{key}={argument(value)}" for key, value in given.items()])
    check(config)
    return config
