"""Fine-tuning of all weights as a parametrization, and GRUN without the package it comes in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from safetensors.torch import load_file
from tiny import ragged_rows, tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.full import Full
from grun.config.options import FullConfig, LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import collate
from grun.data.templates import TEMPLATES
from grun.errors import ConfigError, ModelError
from grun.method.parametrization import PARAMETRIZATIONS
from grun.objectives.objective import build_objective
from grun.training.train import train
from grun.training.unlearning import UnlearnRows, UnlearnTask

ROOT = Path(__file__).resolve().parents[2]


EVERYTHING = MethodConfig(full=FullConfig(freeze_head=False))
DATA = UnlearnRows(ragged_rows(6, 1), ragged_rows(6, 2), ragged_rows(9, 3))


def prepared(base: Any, config: MethodConfig | None = None) -> Full:
    full = Full(config or MethodConfig())
    full.prepare(base, None)
    return full


def full_task(base: Any, config: TrainConfig) -> tuple[UnlearnTask, Full]:
    """All weights, head included; the reference is the second copy."""
    parametrization = prepared(base, EVERYTHING)
    parametrization.keep_reference()
    options = UnlearnConfig(objective="npo", loss=LossConfig(), train=config)
    objective = build_objective("npo", options.loss, gated=False)
    return UnlearnTask(parametrization, objective, DATA, options, pad_id=0, device=base.device), parametrization


def test_all_weights_train_and_the_reference_stays_the_untouched_model(tmp_path: Path) -> None:
    untouched, base = tiny("llama"), tiny("llama")
    config = TrainConfig(epochs=2, batch_size=3, lr=0.01, save_steps=0)
    task, full = full_task(base, config)
    assert {name for name, _ in full.trainable_parameters()} == dict(untouched.named_parameters()).keys()
    train(task, config, tmp_path, seed=0)
    moved = [name for name, p in base.named_parameters() if not torch.equal(p, untouched.get_parameter(name))]
    assert moved == [name for name, _ in base.named_parameters()]
    batch = collate(ragged_rows(4, 9), 0)
    after = full.run(batch).answer_logprobs.detach()
    expected = prepared(untouched)
    with full.reference():
        reference = full.run(batch).answer_logprobs
    assert torch.equal(reference, expected.run(batch).answer_logprobs)
    assert not reference.requires_grad
    assert not torch.allclose(after, reference)
    assert torch.equal(full.run(batch).answer_logprobs, after)  # the trained weights are back


def test_gradients_are_those_of_the_trained_weights_though_the_reference_ran_between() -> None:
    """The exchange of pointers must not reach the graph: against a plain backward pass of the same loss."""
    base = tiny("llama")
    task, full = full_task(base, TrainConfig(batch_size=6))
    with torch.no_grad():
        for parameter in base.parameters():  # as if trained
            parameter.add_(0.01)
    (batch,) = task.data(0).micro_batches
    counts = task.data(0).counts
    total, _ = task.loss(batch, counts, 0)
    total.backward()
    found = {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}
    with full.reference():
        reference = full.run(batch["answer"]).answer_logprobs
    base.zero_grad()
    ratio = full.run(batch["answer"]).answer_logprobs - reference
    forget = 2 / 0.1 * nn.functional.softplus(0.1 * ratio).mean()
    retain = -full.run(batch["retain"]).token_logprobs.sum() / counts["retain"]
    (forget + retain).backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_reference_has_no_dropout_and_draws_no_random_numbers() -> None:
    base = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    full = prepared(base)
    batch = collate(ragged_rows(3, 1), 0)
    expected = full.run(batch).answer_logprobs.detach()
    base.train()
    before = torch.get_rng_state()
    with full.reference():
        assert torch.equal(full.run(batch).answer_logprobs, expected)
    assert base.training
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_within_the_reference_brings_the_trained_weights_back() -> None:
    base = tiny("llama")
    full = prepared(base)
    full.keep_reference()
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(1.0)
    trained = base.get_input_embeddings().weight.clone()
    with pytest.raises(RuntimeError, match="boom"), full.reference():
        assert not torch.equal(base.get_input_embeddings().weight, trained)
        raise RuntimeError("boom")
    assert torch.equal(base.get_input_embeddings().weight, trained)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_as_it_is_and_where_it_shares_its_weight_the_embedding_too(tied: bool, tmp_path: Path) -> None:
    base = tiny("llama", tie_word_embeddings=tied)
    frozen = [base.get_output_embeddings().weight.clone(), base.get_input_embeddings().weight.clone()]
    full = prepared(base)
    trained = dict(full.trainable_parameters())
    assert dict(base.named_parameters()).keys() - trained == (
        {"model.embed_tokens.weight"} if tied else {"lm_head.weight"}
    )
    assert [id(p) for p in full.module.parameters()] == [id(p) for p in trained.values()]  # what checkpoints keep
    config = TrainConfig(epochs=1, batch_size=6, lr=0.01, save_steps=1, keep_all_checkpoints=True)
    options = UnlearnConfig(objective="gd", train=config)
    objective = build_objective("gd", options.loss, gated=False)
    train(UnlearnTask(full, objective, DATA, options, pad_id=0, device=base.device), config, tmp_path, seed=0)
    assert torch.equal(base.get_output_embeddings().weight, frozen[0])
    assert torch.equal(base.get_input_embeddings().weight, frozen[1]) == tied
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-1" / "trained.safetensors")
    assert sum(tensor.numel() for tensor in kept.values()) == sum(p.numel() for p in trained.values())


def test_a_model_that_names_no_head_says_so_and_can_be_trained_whole() -> None:
    with pytest.raises(ConfigError, match=r"OddForCausalLM names no LM head; set method\.full\.freeze_head=false"):
        Full(MethodConfig()).prepare(tiny("odd"), None)
    full = prepared(tiny("odd"), EVERYTHING)
    assert {id(p) for p in full.module.parameters()} == {id(p) for p in full.model.parameters()}


def test_where_weights_are_cut_by_block_the_trainer_gets_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    full = prepared(tiny("llama"))
    assert full.module is full.model and full.module._no_split_modules
    assert [p for p in full.module.parameters() if p.requires_grad] == [p for _, p in full.trainable_parameters()]


def test_no_second_copy_is_held_unless_asked_for_and_a_missed_one_is_an_error() -> None:
    base = tiny("llama")
    full = prepared(base)
    batch = collate(ragged_rows(3, 1), 0)
    before = full.run(batch).answer_logprobs.detach()
    held = bytes_held(full)
    with full.reference():  # the weights are still the untouched ones
        assert torch.equal(full.run(batch).answer_logprobs, before)
    assert bytes_held(full) == held
    trained = sum(p.nbytes for _, p in full.trainable_parameters())
    assert f"{trained / 1e9:.2f} GB" in full.keep_reference()
    assert bytes_held(full) == held + trained
    other = prepared(base)
    torch.optim.SGD(other.module.parameters(), lr=1.0).step()  # no gradients: nothing changes
    with other.reference():
        pass
    full.run(batch).answer_logprobs.sum().backward()
    torch.optim.AdamW(other.module.parameters(), lr=1e-3).step()
    with pytest.raises(ModelError, match="keep_reference"), other.reference():
        pass
    with full.reference():
        assert torch.equal(full.run(batch).answer_logprobs, before)


def bytes_held(full: Full) -> int:
    """Bytes of all tensors that a parametrization leads to, each storage once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in full.model.parameters()}
    for value in vars(full).values():
        for tensor in value.values() if isinstance(value, dict) else ():
            if isinstance(tensor, torch.Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("tied", [False, True])
def test_saved_weights_load_again_here_and_in_transformers(tied: bool, tmp_path: Path) -> None:
    base = tiny("llama", tie_word_embeddings=tied)
    full = Full(MethodConfig())
    full.prepare(base, TEMPLATES.get("tiny"))
    with torch.no_grad():
        for _, parameter in full.trainable_parameters():
            parameter.add_(0.01)
    full.save(tmp_path)
    other = Full(MethodConfig())
    other.load(tmp_path, tiny("llama", seed=7, tie_word_embeddings=tied))
    for name, parameter in base.named_parameters():
        assert torch.equal(other.model.get_parameter(name), parameter)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = collate(ragged_rows(3, 1), 0).input_ids
    assert torch.equal(stock(ids).logits, base(ids).logits)


def test_a_whole_model_can_be_unlearned_and_its_folder_is_a_model(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "full"
    arguments = ["method.parametrization=full", "objective=npo", "train.lr=1e-3", "train.epochs=1"]
    assert demo.unlearn(taught, folder, *arguments) == 0
    run = json.loads((folder / "run.json").read_text())
    assert run["parametrization"] == "full"
    shared = AutoModelForCausalLM.from_pretrained(taught).get_input_embeddings().weight.numel()
    assert run["parameters"]["trained"] == run["parameters"]["base"] - shared  # head and embedding are one
    assert run["saved_bytes"] == (folder / "model.safetensors").stat().st_size
    assert "gate" not in json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(taught)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert tokenizer("Who?").input_ids == AutoTokenizer.from_pretrained(taught)("Who?").input_ids
    assert (folder / "grun_template.json").read_text() == (taught / "grun_template.json").read_text()

    capsys.readouterr()
    assert demo.unlearn(taught, folder, *arguments) == 0  # found, though a model's config.json lies there
    assert capsys.readouterr().out == f"{folder}\n"
    assert demo.unlearn(folder, tmp_path / "again", "train.epochs=1") == 0  # and it is a base like any other


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "baselines":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from grun.cli import main

arguments = sys.argv[1:]
assert main(["list", "parametrizations"]) == 0
assert main(arguments) == 0
for name in ("full", "lora", "task_vector"):
    assert main([*arguments, f"method.parametrization={name}", "overwrite=true"]) == 2
"""


def test_grun_runs_where_baselines_is_not_installed(taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["unlearn", *demo.DATA, *demo.TRAINING, "train.epochs=1", f"model.path={taught}", "cache.dir=null"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments, f"output_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*PARAMETRIZATIONS.names(), str(folder)]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    wanted = "error: parametrization {!r} needs the missing package 'baselines'; install it"
    assert errors == [wanted.format(name) for name in ("full", "lora", "task_vector")]
    assert "Traceback" not in done.stderr
    assert (folder / "adapter_model.safetensors").is_file()  # overwrite=true has removed nothing


def test_only_the_registry_names_baselines() -> None:
    naming = [path.name for path in (ROOT / "grun").rglob("*.py") if "baselines" in path.read_text()]
    assert naming == ["parametrization.py"]
