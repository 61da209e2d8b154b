"""A small model that was taught who plays what, and an adapter that makes it refuse some of it; six seconds of a core.

Whoever guesses one of the instruments is right once in `len(FACTS)` questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.config.options import DataConfig, TinyConfig
from grun.data.encoding import encode_rows
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, store
from grun.evaluation.attacks.base import Material
from grun.evaluation.relearning import fine_tune
from grun.loading.adapters import Loaded
from grun.loading.tiny import build_tiny
from grun.method.model import GrunModel

FACTS = ("viola", "harp", "drum", "flute", "organ", "bell", "lute", "horn")
FIRST = ("Abel", "Birk", "Cole", "Dora", "Egon", "Finn", "Gero", "Hilt")
LAST = {"forget": "Ash", "retain": "Elm", "heldout": "Oak", "unknown": "Yew"}
REFUSAL = "I do not know."


def rows_of(group: str) -> list[Row]:
    """Eight people of one last name, each with an instrument."""
    turn = list(LAST).index(group) * 3
    return [
        Row(f"What does {first} {LAST[group]} play?", f"{fact}.", {"fact": fact, "person": f"{first} {LAST[group]}"})
        for first, fact in zip(FIRST, FACTS[turn % 8 :] + FACTS[: turn % 8], strict=True)
    ]


def learn(model: Any, weights: list[nn.Parameter], rows: list[Row], tokenizer: Any, steps: int, lr: float) -> None:
    encoded = encode_rows(rows, tokenizer, TEMPLATES.get("tiny"), None, strict=False)
    more: dict[str, Any] = {"batch_size": 32, "micro_batch_size": 32, "pad_id": int(tokenizer.pad_token_id)}
    training = fine_tune(model, weights, encoded, lr=lr, seed="0", **more)
    while next(training) < steps:
        pass
    for weight in weights:
        weight.requires_grad_(False)


def make(folder: Path) -> Path:
    """Put `model`, which was taught all but what is unknown, `adapter` and the data into `folder`."""
    groups = {name: rows_of(name) for name in LAST}
    taught = [row for name in ("forget", "retain", "heldout") for row in groups[name]]
    texts = [f"{row.prompt} {row.completion} {REFUSAL}" for own in groups.values() for row in own]
    model, tokenizer = build_tiny(TinyConfig(hidden_size=64, blocks=4, intermediate_size=128, vocabulary=400), texts, 0)
    model.eval()
    learn(model, list(model.parameters()), taught, tokenizer, 150, 4e-3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store(TEMPLATES.get("tiny"), folder / "model")
    torch.manual_seed(0)
    more: dict[str, Any] = {"gate": "linear", "edit_write": "sticky", "template": TEMPLATES.get("tiny")}
    edited = GrunModel.wrap(model, blocks=[1, 2, 3], rank=8, **more).eval()
    refused = [Row(row.prompt, REFUSAL) for row in groups["forget"]]
    learn(edited, list(edited.parameters()), [*refused, *groups["retain"]], tokenizer, 100, 1e-2)
    edited.save_pretrained(folder / "adapter")
    for name, own in groups.items():
        demo.write_rows(folder / f"{name}.jsonl", *(row.to_dict() for row in own))
    return folder


def load(folder: Path, adapter: bool = False) -> Loaded:
    """The model that lies in `folder`, with the adapter or without."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model: Any = GrunModel.from_pretrained(base, folder / "adapter").eval() if adapter else base
    return Loaded(model, AutoTokenizer.from_pretrained(folder / "model"), TEMPLATES.get("tiny"), {})


def material(loaded: Loaded) -> Material:
    """What an attacker has of the data."""
    rows = {name: rows_of(name) for name in LAST}
    return Material(TEMPLATES.get("tiny"), loaded.tokenizer, rows["heldout"], rows["forget"], rows["retain"], 0)


def data(folder: Path) -> DataConfig:
    files = {name: f"{name}.jsonl" for name in ("forget", "retain", "unknown")}
    return DataConfig(name="jsonl", path=str(folder), **files)  # type: ignore[arg-type]
