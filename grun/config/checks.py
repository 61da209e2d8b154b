"""Checks of a resolved config that need no model and no data, so that a wrong option fails before anything runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

from grun.config.options import (
    LARGEST,
    AugmentConfig,
    Bounds,
    CommandConfig,
    EvaluateConfig,
    FinetuneConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
    UnlearnConfig,
)
from grun.errors import ConfigError, unknown_name
from grun.runtime import processes
from grun.runtime.reading import kind_of

WORDS = (
    *("note", "template", "system_prompt", "suffixes", "category", "subject", "subjects", "neighbors"),
    "gate_keywords",
)
"""Options that hold words, not paths, wherever they stand."""

QUIRKS = {
    "retain_fixed_pairing": "each forget row meets the same retain row in every epoch (195 of 3,800 rows on forget05)",
    "dropout_on_hidden": "dropout acts on the whole edited state, not on the change alone",
    "kl_all_positions": "the retain term kl is a mean over every position, prompt and padding included",
    "undial_all_positions": "so is the term undial, whose ignored label -100 names a token from the vocabulary's end",
    "kl_row_sum": "the retain term kl is summed over every position, padding included, and divided by the rows alone",
    "rmu_answer_states": "rmu and activation_mse leave out the last prompt token, the one that is edited",
    "rmu_hidden_state_index": "loss.rmu_block counts the embeddings too (block k - 1), and later blocks may be edited",
    "max_entropy_all_positions": "the term max_entropy is a mean over every position, prompt and padding included",
    "random_mapping_all_positions": "so is the term random_mapping",
}
"""Published behavior that is not the default, by the name of its switch."""
COMPAT: dict[str, tuple[str, ...]] = {
    "grun-paper": (
        "retain_fixed_pairing",
        "dropout_on_hidden",
        "kl_row_sum",
        "rmu_answer_states",
        "rmu_hidden_state_index",
    ),
    "open-unlearning": ("kl_all_positions", "undial_all_positions"),
    "llm360": ("max_entropy_all_positions", "random_mapping_all_positions"),
}
"""Quirks that each published source has."""

EVALUATION_QUIRKS = {
    "eos_masked_attention": "the pad token (end-of-text where there is none) is masked wherever it stands",
    "extraction_strength_floor": "extraction strength is 1/L, not 0, where no token of the answer is hit",
    "ratio_epsilon": "1e-10 is added to the denominators of ratios",
}
"""Published behavior of evaluators that is not the default, by the name of its switch."""
EVALUATION_COMPAT = {"open-unlearning": tuple(EVALUATION_QUIRKS)}
"""Quirks that each published evaluator has."""
EVALUATION_COMPAT_OPTIONS: dict[str, dict[str, Any]] = {
    "open-unlearning": {
        "max_new_tokens": 200,
        "data": {"system_prompt": "You are a helpful assistant.", "date": "10 Apr 2025", "template": "chat"},
    }
}
"""Options that `compat` sets for `evaluate`, below what is given on the command line."""


FREE = ("template_arguments", "sources")
"""Mappings whose values are of any kind: what a chat template reads, and where options came from."""


def check_options(config: Any) -> None:
    """ConfigError for the first option whose value its field does not take, or that another one contradicts."""
    check_values(config)
    if hasattr(config, "data"):
        _check_device_map(config.model)
    if isinstance(config, CommandConfig):
        _check_text(config.data.text)
        _check_augment(config.data.augment)
    if isinstance(config, FinetuneConfig | UnlearnConfig):
        check_train(config.train)
    if isinstance(config, FinetuneConfig) and config.model.quantization is not None:
        raise ConfigError("model.quantization: quantized weights cannot be fine-tuned; leave it out of finetune")
    if isinstance(config, EvaluateConfig):
        _check_evaluate(config)


def check_values(config: Any, prefix: str = "") -> None:
    """ConfigError for the first value that its field does not take.

    That is a name that is none of its choices, a number outside its bounds or too large to compute with, and a path
    below the home of a user whom this machine does not have.
    """
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if field.name in FREE:
            continue
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.")
            continue
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(one, dict | list):
                raise ConfigError(f"{key}: expected plain values, found {kind_of(one)} among them")
            if isinstance(one, str):
                if "choices" in field.metadata:
                    one_of(key, one, field.metadata["choices"])
                elif field.name not in WORDS:
                    check_home(key, one)
            elif isinstance(one, int | float) and not isinstance(one, bool):
                bounds, largest = field.metadata.get("bounds", Bounds()), LARGEST[type(one)]
                if not bounds.hold(one):
                    raise ConfigError(f"{key}={one} {bounds}")
                if not abs(one) <= (bounds.high or largest):
                    raise ConfigError(f"{key}={one} must lie between {-largest} and {largest}")


def check_home(key: str, path: str) -> None:
    """ConfigError for `~nobody`, the home of a user whom this machine does not have."""
    try:
        Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={path}: there is no user {path[1:].partition('/')[0]!r}; write the folder") from error


def check_train(config: TrainConfig) -> None:
    """ConfigError for training options that are wrong, contradict each other, or need a package that is missing."""
    check_values(config, "train.")
    _check_optimizer(config)
    _check_trackers(config.report_to)


def _check_trackers(names: list[str]) -> None:
    if not names:
        return
    from transformers.integrations import integration_utils

    for name in names:
        one_of("train.report_to", name, tuple(sorted(integration_utils.INTEGRATION_TO_CALLBACK)))
        if name not in integration_utils.get_available_reporting_integrations():
            raise ConfigError(
                f"train.report_to={name} needs the package of that name, which is not installed: pip install {name}"
            )


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer != "schedule_free":
        return
    if config.schedule != "constant":
        raise ConfigError(
            f"train.schedule={config.schedule} and train.optimizer=schedule_free: averaging takes the place of a "
            "schedule; set train.schedule=constant (train.warmup is obeyed)"
        )
    if importlib.util.find_spec("schedulefree") is None:
        raise ConfigError(
            "train.optimizer=schedule_free needs schedulefree, which is not installed: "
            "pip install 'grun-unlearning[optimizers]'"
        )


def quirks_in_force(config: UnlearnConfig | EvaluateConfig) -> list[str]:
    """Names of the published quirks that `compat` and `quirks` switch on, in a fixed order."""
    quirks, compat = (QUIRKS, COMPAT) if isinstance(config, UnlearnConfig) else (EVALUATION_QUIRKS, EVALUATION_COMPAT)
    if config.compat is not None:
        one_of("compat", config.compat, tuple(compat))
    for quirk in config.quirks:
        one_of("quirk", quirk, tuple(quirks))
    wanted = {*config.quirks, *(compat[config.compat] if config.compat else ())}
    return [quirk for quirk in quirks if quirk in wanted]


def bytes_of(name: str, size: str) -> int:
    """Bytes that a size such as 4GiB, 500MB or 1000000 stands for; ConfigError if it is none."""
    units = {"": 1, "B": 1} | {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
    units |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None or match[2] not in units:
        raise ConfigError(f"{name}={size} is no size; write a number and a unit, such as 4GiB or 500MB")
    if len(match[1]) > 18:
        raise ConfigError(f"{name}={size} is larger than any disk; write a number and a unit, such as 4GiB or 500MB")
    return int(float(match[1]) * units[match[2]])


def require(config: Any, command: str, *options: str) -> None:
    """ConfigError for the first of `options` that is not set; `command` shows how they are."""
    for option in options:
        if getattr(config, option) is None:
            raise ConfigError(f"{option} is not set; the command is: {command}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """ConfigError unless value is known."""
    if value not in known:
        raise ConfigError(unknown_name(name, value, list(known)))


def _check_evaluate(config: EvaluateConfig) -> None:
    if set(config.continuations) == {"answer", "perturbed"}:
        raise ConfigError(
            "continuations=[answer,perturbed]: a truth ratio needs the paraphrased answer; add paraphrase"
        )
    _check_suite(config)
    _check_adapters(config)
    quirks_in_force(config)


def _check_suite(config: EvaluateConfig) -> None:
    """Options of one suite that are given to another are an error, rather than passed over."""
    own = {"tasks": "lm_eval", "task_folder": "lm_eval", "num_fewshot": "lm_eval", "judge": "judge"}
    own |= dict.fromkeys(("suffixes", "choices_at_least", "cloze_at_least"), "knowledge")
    own |= dict.fromkeys(("attacks", "attack_rows"), "attacks")
    own |= dict.fromkeys(("reference", "compat", "quirks"), "answers")
    for option, suite in own.items():
        if getattr(config, option) not in (None, []) and config.suite != suite:
            raise ConfigError(f"{option} is for suite={suite}; leave it out for suite={config.suite}")
    for option, suite in (("tasks", "lm_eval"), ("judge", "judge")):
        if config.suite == suite and not getattr(config, option):
            example = "tasks=[wmdp_bio,mmlu]" if option == "tasks" else "judge=MODEL or judge=callable:module:function"
            raise ConfigError(f"suite={suite} needs {option}, such as {example}")
    for option in ("formats", "orders"):
        if not getattr(config, option):
            raise ConfigError(f"{option} names nothing; `evaluate --help` lists what there is")
    if config.suite in ("lm_eval", "judge") and processes.count() > 1:
        raise ConfigError(f"suite={config.suite} runs in one process; start it without torchrun")


def adapter_name(folder_or_hub_id: str) -> str:
    """Name under which an adapter is evaluated: that of its folder."""
    return Path(folder_or_hub_id).expanduser().name or "adapter"


def _check_adapters(config: EvaluateConfig) -> None:
    if config.adapter is not None and config.adapters:
        raise ConfigError("adapter and adapters are both given; name one adapter, or several in adapters=[a,b]")
    names = [adapter_name(adapter) for adapter in config.adapters] + [config.with_base or ""]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"adapters: two are called {twice[0]}, and results go to output_dir/{twice[0]}; give two commands"
        )
    for option in ("suffix", "with_base"):
        if getattr(config, option) and not config.adapters:
            raise ConfigError(f"{option} is for adapters=[a,b]; name the folder of one evaluation by output_dir")
    if config.gate_threshold is not None and config.adapter is None and not config.adapters:
        raise ConfigError("gate_threshold needs an adapter: pass adapter=FOLDER, or leave gate_threshold out")


def _check_device_map(model: ModelConfig) -> None:
    if model.device_map is None:
        return
    if model.device != "auto":
        raise ConfigError(f"model.device={model.device} and model.device_map are both given; leave one of them out")
    if processes.count() > 1:
        raise ConfigError("model.device_map spreads a model over the GPUs of one process; start it without torchrun")


def _check_text(text: TextConfig) -> None:
    if text.copies > 1 and text.cut == "whole":
        raise ConfigError(
            f"data.text.copies={text.copies} has no effect: copies are of texts that are cut; set data.text.cut=random"
        )
    if text.cut in ("whole", "random"):
        return
    try:
        share = float(text.cut)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"data.text.cut={text.cut} must be whole, random or a share of tokens between 0 and 1")


def _check_augment(augment: AugmentConfig) -> None:
    for name in ("forget_copies", "retain_copies"):
        count, kinds = getattr(augment, name), ("suffixes", "templates", "prefill", "few_shot")
        if count and not any(getattr(augment, kind) for kind in kinds):
            raise ConfigError(
                f"data.augment.{name}={count} has no effect: every kind of copy is switched off; set one of suffixes, "
                "templates, prefill, few_shot to true"
            )
