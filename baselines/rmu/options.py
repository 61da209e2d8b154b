"""The flags of the published RMU tool (`python3 -m rmu.unlearn` of wmdp), and a few more."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Self

from baselines.command_line import Options, flag, model_flag
from grun.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RmuOptions(Options):
    """RMU with the flags of the published tool (`python3 -m rmu.unlearn` of wmdp), and a few more."""

    COMPAT = "wmdp"
    MODULE_STR = "{model_name}.model.layers[{layer_id}]"
    FOLDER_FLAG = "--output_dir"
    PARAM_IDS = [6]
    ACCEPTED = {"max_len": (int, "the published tool never used it; texts are cut at 512 or 768 tokens")}

    model_name_or_path: str = model_flag("HuggingFaceH4/zephyr-7b-beta")
    output_dir: str = flag("folder of the result; unset: models/ and a name made of the model and the settings")
    retain_corpora: list[str] = flag("one for each topic", "wikitext,wikitext")
    forget_corpora: list[str] = flag("one for each topic", "bio-forget-corpus,cyber-forget-corpus")
    alpha: list[float] = flag("weight of the retain loss, for each topic", "100,100", least=0)
    steering_coeffs: list[float] = flag("length of the control vector, for each topic", "20,20")
    lr: float = flag("learning rate", 5e-5, above=0)
    min_len: int = flag("texts of this many characters or fewer are left out", 0)
    batch_size: int = flag("texts of a batch", 4, least=1)
    max_num_batches: int = flag("steps over all topics, which take turns", 80, least=1)
    seed: int = flag("of the control vectors", 42)
    verbose: bool = flag("log cosines and norms of the activations in every step")
    optimizer: str = flag(
        "AdamW: transformers' former one (eps 1e-6, before bias correction) or torch's",
        "legacy",
        choices=("legacy", "torch"),
        corrected="torch",
    )
    loss_mask: str = flag(
        "positions of the loss: all, padding included; tokens; or tokens but for the first of each text",
        "all",
        choices=("all", "attended", "attended_no_bos"),
        corrected="attended",
    )
    jsonl_mode: str = flag(
        "text of a line: its field `text`, or the raw line; published: the line, but of bio-forget-corpus the field",
        "published",
        choices=("published", "field", "raw"),
        corrected="field",
    )
    length_rule: str = flag(
        "forget texts are cut at 512 tokens; at 768 from the second topic on, or if the corpus is called cyber",
        "position",
        choices=("position", "name"),
        corrected="name",
    )
    padding_side: str = flag("side of the padding", "left", choices=("left", "right"), corrected="right")
    pad_token: str = flag(
        "what pads: the end token, or the tokenizer's own pad token", "eos", choices=("eos", "own"), corrected="own"
    )
    master_dtype: str = flag(
        "what the trained tensors are held in: the model's type, or float32",
        "param",
        choices=("param", "fp32"),
        corrected="fp32",
    )
    save: str = flag("the whole model, or the changed tensors alone", "full", choices=("full", "delta"), further=True)

    @property
    def folder(self) -> str:
        """Where the result goes."""
        return self.output_dir

    @classmethod
    def resolve(cls, given: argparse.Namespace) -> Self:
        """Without --output_dir as the published tool names it, but for brackets, the model's owner and the time."""
        if given.output_dir is None:
            model = given.model_name_or_path.rstrip("/").rpartition("/")[2]
            alpha = "-".join(f"{value:g}" for value in given.alpha)
            batches, layer = given.max_num_batches, given.layer_id
            given.output_dir = f"models/{model}_alpha-{alpha}_batches-{batches}_layer-{layer}"
        return super().resolve(given)

    def check(self) -> None:
        """ConfigError unless there is one of everything for each topic."""
        topics = len(self.forget_corpora)
        for name in ("retain_corpora", "alpha", "steering_coeffs"):
            if len(getattr(self, name)) != topics:
                raise ConfigError(
                    f"--{name} has {len(getattr(self, name))} entries and --forget_corpora {topics}; give one for "
                    "each topic, separated by commas"
                )
