"""transformers' Trainer trains a GrunModel as it trains other models, and finds in its output what it looks for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited_models import PUBLISHED, ROBUST, wrapped
from safetensors.torch import load_file
from tiny import padded, random_rows, tiny
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from grun import GrunModel, GrunOutput
from grun.data.tokenizer import train_tokenizer
from grun.errors import AdapterError

BATCH = padded(random_rows([9, 9, 9, 9, 6, 6, 6, 6]), "left")
ROWS = [
    {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(torch.arange(9) < first, -100)}
    for ids, mask, first in zip(BATCH["input_ids"], BATCH["attention_mask"], [5, 6, 7, 8] * 2, strict=True)
]
"""With 4, 3, 2 and 1 labels: a mean over micro-batches is not one over the step."""


def edited(**options: Any) -> GrunModel:
    return wrapped(tiny(dtype=torch.float32), blocks=[1, 3], **options)


def trainer(model: GrunModel, folder: Path, *, metrics: bool = False, **options: Any) -> Trainer:
    values = {"max_steps": 6, "learning_rate": 0.02, "per_device_train_batch_size": 4, "report_to": "none", **options}
    tokenizer = values.pop("processing_class", None)
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **values)
    return Trainer(
        model, arguments, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer,
        compute_metrics=accuracy if metrics else None,
    )  # fmt: skip


def accuracy(found: EvalPrediction) -> dict[str, float]:
    assert isinstance(found.predictions, np.ndarray) and found.predictions.shape == (8, 9, 64)
    right = found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]
    return {"accuracy": float(right[found.label_ids[:, 1:] != -100].mean())}


def state(model: GrunModel) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], 0.0, atol) for name in one)


@pytest.mark.parametrize("rule", [PUBLISHED, ROBUST], ids=["published", "robust"])
@torch.no_grad()
def test_an_output_is_read_as_those_of_transformers(rule: tuple[str, str, str]) -> None:
    model = edited(rule=rule)
    found = model(**BATCH, labels=torch.stack([row["labels"] for row in ROWS]))
    assert list(found) == ["loss", "logits", "gate_logits", "gates", "base_output"] == list(found.keys())
    assert found[0] is found["loss"] is found.loss is found.get("loss") and found[1] is found.logits
    assert found[1:3] == (found.logits, found.gate_logits) and len(found.to_tuple()) == 5
    without = model(**BATCH)
    assert "loss" not in without and without.loss is None and without[0] is without.logits
    assert isinstance(found.base_output, CausalLMOutputWithPast) and list(found.gates) == [1, 3]
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, GrunOutput) and torch.equal(again[1], found.logits)
    assert torch.equal(again.gates[3], found.gates[3])
    leaves, form = torch.utils._pytree.tree_flatten(found)
    assert torch.utils._pytree.tree_unflatten(leaves, form).gates.keys() == found.gates.keys()


@pytest.mark.parametrize("rule", [PUBLISHED, ROBUST], ids=["published", "robust"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"bf16_full_eval": True},
        {"label_names": ["labels"], "eval_accumulation_steps": 1, "batch_eval_metrics": False},
        {"report_to": "tensorboard", "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3,
         "save_steps": 3},
        {"processing_class": "a tokenizer"},
        {"eval_do_concat_batches": True, "remove_unused_columns": False, "max_grad_norm": 0.5, "optim": "sgd"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_it_trains_the_edits_and_evaluates(
    options: dict[str, Any], rule: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a tracker writes into the current folder
    model = edited(rule=rule)
    frozen, before = {name: values.clone() for name, values in model.base.state_dict().items()}, state(model)
    options = dict(options)
    if "processing_class" in options:
        options["processing_class"] = train_tokenizer(["some text"], 300)
    run = trainer(model, tmp_path, metrics=True, per_device_eval_batch_size=3, **options)
    first = run.evaluate()
    run.train()
    last = run.evaluate()
    assert last["eval_loss"] < first["eval_loss"] - (0.2 if "optim" not in options else 0)
    assert last["eval_accuracy"] >= first["eval_accuracy"]
    assert all(torch.equal(frozen[name], values) for name, values in model.base.state_dict().items())
    after = state(model)
    assert not any(torch.equal(before[name], values) for name, values in after.items())
    assert {values.dtype for values in after.values()} == {torch.float32}
    given = {name: torch.stack([row[name] for row in ROWS]) for name in ROWS[0]}
    with torch.no_grad():
        wanted = model.eval()(**given).logits
    found = run.predict(ROWS).predictions  # type: ignore[arg-type]
    coarse = {"bf16", "bf16_full_eval"} & options.keys()
    np.testing.assert_allclose(found, wanted, atol=0.5 if coarse else 1e-4)


def test_micro_batches_give_the_step_of_the_whole_batch_as_they_do_on_the_bare_base(tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = edited()
        trainer(
            model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2
        ).train()
        found.append(state(model))
    # AdamW divides by the root of squared gradients: rounding shows where these are near 0.
    assert same(found[0], found[1], 1e-4) and same(found[0], found[2], 1e-4)
    model = edited()
    run = trainer(model, tmp_path)
    bare = Trainer(tiny(dtype=torch.float32), run.args)
    assert run.model_accepts_loss_kwargs == bare.model_accepts_loss_kwargs
    assert run._loss_shifts_labels == bare._loss_shifts_labels
    assert run.label_names == bare.label_names == ["labels"]


def test_what_it_saves_can_be_put_back(tmp_path: Path) -> None:
    whole, half = edited(dropout=0.2), edited(dropout=0.2)
    trainer(whole, tmp_path, save_steps=3).train()
    run = trainer(half, tmp_path, save_steps=3)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state(half), state(whole))
    run.save_model(str(tmp_path / "saved"))
    other = edited(dropout=0.2)
    other.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    assert same(state(other), state(whole))
    with pytest.raises(AdapterError, match=r"is a checkpoint of transformers' Trainer, .* then save_pretrained"):
        GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "saved")
    other.save_pretrained(tmp_path / "adapter")
    loaded = GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "adapter")
    assert same(state(loaded), state(whole)) and loaded.config == whole.config
