"""The smallest demo that goes all the way: arguments, the model it teaches, and the command line called in process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grun.cli import main
from grun.config.options import DataConfig, DemoConfig, EvaluateConfig, ModelConfig, TinyConfig
from grun.data.corpus import load_corpus
from grun.data.templates import TEMPLATES, store
from grun.evaluation.suites.base import evaluate_suite
from grun.loading.tiny import build_tiny
from grun.method.model import GrunModel

DATA = [f"data.demo.{group}=2" for group in ("forget", "heldout", "unknown", "refused")]
DATA += ["data.demo.retain=4", "data.demo.questions=5", "data.demo.seed=0"]
"""10 forget rows, 20 retain rows. All that tests rest on is set here, so that the demo's settings can change."""
MODEL = [
    *("model.path=tiny", "model.tiny.hidden_size=32", "model.tiny.blocks=4", "model.tiny.intermediate_size=64"),
    *("model.tiny.vocabulary=600", "train.batch_size=16", "train.epochs=2"),
]
"""50 taught rows, 8 steps."""
TRAINING = [
    *("method.blocks=[1,2,3]", "method.rank=4", "method.gate=linear", "train.epochs=4", "train.batch_size=4"),
    *("train.lr=0.01", "train.save_steps=100", "loss.retain_weight=2", "loss.gate_weight=10", "objective=gd"),
]
"""3 steps an epoch, 12 in all."""

SIZES = DemoConfig(forget=2, retain=4, heldout=2, unknown=2, refused=2, questions=2)
"""Of the corpus whose words `random_model` knows."""


def random_model(folder: Path, blocks: int = 2, width: int = 64, times: float = 1.0) -> Path:
    """Put `model` (a random small Llama, its tokenizer and template) and `adapter` (random edits) into `folder`.

    All weights but the embedding's are `times` what they were: with 8, answers differ with the question.
    """
    rows = load_corpus(DataConfig(demo=SIZES)).taught(without_forget=False)
    texts = [f"{row.prompt} {row.completion}" for row in rows]
    shape = TinyConfig(hidden_size=width, blocks=blocks, intermediate_size=width, vocabulary=400)
    model, tokenizer = build_tiny(shape, texts, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "embed" in name else times)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store(TEMPLATES.get("tiny"), folder / "model")
    torch.manual_seed(0)
    GrunModel.wrap(model, blocks=[0, 1], rank=2, template=TEMPLATES.get("tiny")).save_pretrained(folder / "adapter")
    return folder


def finetune(folder: Path, *arguments: str) -> int:
    return main(["finetune", *DATA, *MODEL, f"output_dir={folder}", *arguments])


def unlearn(taught: Path, folder: Path, *arguments: str) -> int:
    own = [f"model.path={taught}", f"output_dir={folder}", f"cache.dir={folder.parent / 'cache'}"]
    return main(["unlearn", *DATA, *TRAINING, *own, *arguments])


def write_rows(path: Path, *records: Any) -> Path:
    """Write records as JSON lines; as one list where the file ends with .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(json.dumps(records) if path.suffix == ".json" else lines, encoding="utf-8")
    return path


def own_rows(folder: Path, forget: Sequence[Any] = (), retain: Sequence[Any] = ()) -> list[str]:
    """Arguments that name forget.jsonl and retain.jsonl in `folder`, where these rows are written if there are any."""
    for name, rows in (("forget", forget), ("retain", retain)):
        if rows:
            write_rows(folder / f"{name}.jsonl", *rows)
    return ["data.name=jsonl", f"data.path={folder}", "data.forget=forget.jsonl", "data.retain=retain.jsonl"]


def read_lines(path: Path) -> list[Any]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def evaluation(folder: Path, adapter: str | None = None, **options: Any) -> EvaluateConfig:
    """How `model` in `folder` is evaluated, with an adapter there; `options` go over those of here."""
    own = {"model": ModelConfig(path=str(folder / "model"), device="cpu"), "data": DataConfig(demo=SIZES)}
    return EvaluateConfig(adapter=adapter and str(folder / adapter), **{**own, **options})


def evaluated(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """What a suite finds of one model."""
    return evaluate_suite(config, folder)[str(folder)]


def save_lora(model: Path, folder: Path, std: float = 0.3) -> None:
    """Write a LoRA for the model in `model` whose B matrices are random, so that it changes answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    lora.save_pretrained(folder)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, *named: str) -> str:
    """The one line on stderr with which a command is refused; nothing stands on stdout."""
    capsys.readouterr()
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    assert captured.err.rstrip().endswith(lines[0]), "something follows the error"
    for text in named:
        assert text in lines[0]
    return lines[0]
