"""Task vectors: the formula on weights that were trained apart, and a run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from tiny import ragged_rows, tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from baselines.task_vector import TaskVector
from grun.cli import main
from grun.config.options import FullConfig, MethodConfig, TaskVectorConfig, TrainConfig, UnlearnConfig
from grun.errors import ModelError
from grun.experiments.sweep.plan import make_plan
from grun.loading.checks import objective_of
from grun.loading.resolve import resolve
from grun.training.train import train
from grun.training.unlearning import UnlearnRows, UnlearnTask

DATA = UnlearnRows(ragged_rows(6, 1), ragged_rows(6, 2), ragged_rows(9, 3))
METHOD = MethodConfig("task_vector", full=FullConfig(freeze_head=False), task_vector=TaskVectorConfig(scale=0.7))
CONFIG = UnlearnConfig(
    objective="npo", method=METHOD, train=TrainConfig(epochs=3, batch_size=6, lr=0.01, max_grad_norm=0)
)


def learned_by_hand(base: Any) -> None:
    """Three steps of AdamW, without weight decay, on the mean CE of the answer tokens of rows run alone."""
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3)  # linear, no warm-up
        total, tokens = torch.zeros(()), 0
        for row in DATA.answers:
            ids = torch.tensor([row.prompt_ids + row.answer_ids])
            start = len(row.prompt_ids)
            logits = base(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            total = total + cross_entropy(logits, ids[0, start:], reduction="sum")
            tokens += len(row.answer_ids)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()


def test_what_learning_the_forget_set_adds_is_subtracted(tmp_path: Path) -> None:
    base, untouched, learned = tiny("llama"), tiny("llama"), tiny("llama")
    vector = TaskVector(METHOD)
    vector.prepare(base, None)
    task = UnlearnTask(vector, objective_of(CONFIG), DATA, CONFIG, pad_id=0, device=base.device)
    train(task, CONFIG.train, tmp_path, seed=0)
    learned_by_hand(learned)
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter, learned.get_parameter(name), rtol=1e-6, atol=1e-9)
    vector.take_away()
    for name, parameter in base.named_parameters():
        before, after = untouched.get_parameter(name), learned.get_parameter(name)
        torch.testing.assert_close(parameter, before - 0.7 * (after - before), rtol=1e-6, atol=1e-9)
    with pytest.raises(ModelError, match="taken away already"):
        vector.take_away()


def test_a_run_makes_the_answers_to_forget_less_likely_and_names_no_objective(tmp_path: Path) -> None:
    assert demo.finetune(tmp_path / "taught", "train.epochs=6") == 0
    own = ["method.parametrization=task_vector", "train.lr=1e-3", "train.monitor_epochs=1"]
    assert demo.unlearn(tmp_path / "taught", tmp_path / "run", *own) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["objective"], run["terms"], run["parametrization"]) == (None, {"forget": 1.0}, "task_vector")
    losses = [json.loads(line)["forget"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]  # it learns
    found = {}
    for name in ("taught", "run"):
        folder = tmp_path / f"{name}-evaluation"
        own = [f"model.path={tmp_path / name}", f"output_dir={folder}", "sets=[forget]", "max_new_tokens=2"]
        assert main(["evaluate", *demo.DATA, *own]) == 0
        found[name] = json.loads((folder / "evaluation.json").read_text())["sets"]["forget"]["probability"]
    assert found["run"] < found["taught"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")  # a whole model, as any other


def test_a_matrix_has_one_task_vector_a_seed_whatever_the_objectives() -> None:
    arguments = ["sweep=demo", "objectives=[gd,idk]", "parametrizations=[full,task_vector]", "seeds=[1,2]"]
    cells = [cell.name for cell in make_plan(resolve("sweep", arguments)).cells]
    assert sorted(name for name in cells if "task_vector" in name) == ["gd-task_vector-s1", "gd-task_vector-s2"]
    assert len(cells) == 2 * 2 + 2
