"""How weights are trained: float32 masters behind bfloat16 models, and blocks that run again in the backward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from safetensors.torch import load_file
from tiny import random_rows, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from watched import CutOff, assert_equal, parameters, saved_bytes, whole_step

from baselines.full import Full
from grun.commands.finetune import FinetuneTask
from grun.commands.unlearn import make_parametrization
from grun.config.options import FinetuneConfig, FullConfig, LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import ConfigError
from grun.method.fingerprint import fingerprint
from grun.method.gated import Grun
from grun.method.intervention import GatedIntervention
from grun.method.plain import run_plain
from grun.method.precision import Masters
from grun.objectives.objective import build_objective
from grun.runtime.runs import identity
from grun.training.checkpoints import checkpoints_in
from grun.training.recomputation import recompute_blocks
from grun.training.train import train
from grun.training.unlearning import UnlearnRows, UnlearnTask
from pyvene_custom import find_blocks

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def rows(count: int, seed: int) -> list[EncodedRow]:
    """Rows of random tokens and ragged lengths."""
    lengths = torch.randint(4, 14, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [EncodedRow(tuple(ids[: len(ids) // 2]), tuple(ids[len(ids) // 2 :])) for ids in random_rows(lengths, seed)]


def finetune_task(model: Any, config: TrainConfig) -> FinetuneTask:
    return FinetuneTask(model, rows(32, seed=1), FinetuneConfig(train=config, seed=3), pad_id=0)


def unlearn_task(parametrization: Any, base: Any, config: TrainConfig, objective: str = "npo") -> UnlearnTask:
    torch.manual_seed(5)
    parametrization.prepare(base, None)
    parametrization.keep_reference()
    gated = isinstance(parametrization, Grun)
    options = UnlearnConfig(objective=objective, loss=LossConfig(), train=config, seed=3)
    made = build_objective(objective, options.loss, gated=gated)
    data = UnlearnRows(rows(8, seed=1), rows(8, seed=2), rows(12, seed=3))
    return UnlearnTask(parametrization, made, data, options, pad_id=0, device=base.device)


def share_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    return changed / sum(value.numel() for value in before.values())


# -- float32 masters ---------------------------------------------------------------------------------------------------

SLOW = TrainConfig(epochs=1, batch_size=8, lr=1e-5, weight_decay=0.01, schedule="constant", save_steps=0)
"""4 steps at the published rate."""


def test_small_updates_of_a_bfloat16_model_are_kept_where_bfloat16_weights_lose_them(tmp_path: Path) -> None:
    task = finetune_task(tiny(dtype=BF16), SLOW)
    before = parameters(task.module)
    assert {value.dtype for value in before.values()} == {F32}
    assert_equal(before, {name: value.float() for name, value in parameters(tiny(dtype=BF16)).items()})
    train(task, SLOW, tmp_path, seed=0)
    assert share_changed(before, parameters(task.module)) > 0.99

    naive = tiny(dtype=BF16)
    optimizer = torch.optim.AdamW(naive.parameters(), lr=SLOW.lr, weight_decay=SLOW.weight_decay)
    untrained = parameters(naive)
    for step in range(task.steps):
        data = task.data(step)
        for batch in data.micro_batches:
            (-run_plain(naive, batch["answer"]).token_logprobs.sum() / data.counts["answer"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert share_changed(untrained, parameters(naive)) < 0.5


@pytest.mark.parametrize(
    ("stored", "precision", "masters", "autocast"),
    [
        (BF16, "auto", F32, True),
        (BF16, "float32", F32, False),
        (torch.float16, "auto", F32, False),
        (F32, "auto", F32, False),
        (F32, "bfloat16", F32, True),
        (F64, "auto", F64, False),
    ],
)
def test_precision_says_what_forward_passes_compute_in(
    stored: torch.dtype, precision: str, masters: torch.dtype, autocast: bool
) -> None:
    model = tiny(dtype=stored)
    wrapped = Masters(model, precision)
    assert {parameter.dtype for parameter in model.parameters()} == {masters}
    batch = collate(rows(4, seed=9), 0)
    with wrapped.forward():
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        logprobs = run_plain(model, batch).token_logprobs
    assert logits.dtype == (BF16 if autocast else masters)
    assert logprobs.dtype == masters  # the loss is never in bfloat16
    with wrapped.as_stored() as as_stored:
        assert {parameter.dtype for parameter in as_stored.parameters()} == {stored}
        assert_equal(parameters(as_stored), parameters(tiny(dtype=stored)))
    assert {parameter.dtype for parameter in model.parameters()} == {masters}


def test_a_float32_model_is_trained_bit_for_bit_as_by_plain_torch(tmp_path: Path) -> None:
    model = tiny(dtype=F32)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    task = finetune_task(model, SLOW)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    train(task, SLOW, tmp_path, seed=0)
    plain = tiny(dtype=F32)
    decayed = [parameter for name, parameter in plain.named_parameters() if "norm" not in name]
    others = [parameter for name, parameter in plain.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": SLOW.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SLOW.lr, fused=True)
    for step in range(task.steps):
        data = task.data(step)
        (batch,) = data.micro_batches
        (-run_plain(plain, batch["answer"]).token_logprobs.sum() / data.counts["answer"]).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(parameters(model), parameters(plain))


def test_a_quantized_model_is_refused() -> None:
    model = tiny(dtype=F32)
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ConfigError, match="quantized"):
        Masters(model)


@pytest.mark.parametrize("kind", ["finetune", "full"])
def test_a_bfloat16_run_cut_off_and_resumed_equals_one_that_was_not(kind: str, tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, batch_size=8, micro_batch_size=3, lr=1e-4, save_steps=1, gradient_checkpointing=True)

    def make() -> Any:
        base = tiny(dtype=BF16)
        recompute_blocks(find_blocks(base)[1])
        return finetune_task(base, config) if kind == "finetune" else unlearn_task(Full(MethodConfig()), base, config)

    whole, resumed = make(), make()
    train(whole, config, tmp_path / "whole", seed=0)
    with pytest.raises(KeyboardInterrupt):
        train(CutOff(make(), at=whole.steps - 1), config, tmp_path / "run", seed=0)
    newest = checkpoints_in(tmp_path / "run" / "checkpoints")[0]
    assert {value.dtype for value in load_file(newest / "trained.safetensors").values()} == {F32}
    assert train(resumed, config, tmp_path / "run", seed=0).resumed_from >= whole.steps - 2 > -1
    assert_equal(parameters(resumed.module), parameters(whole.module))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_a_taught_bfloat16_model_is_saved_in_bfloat16_and_can_be_unlearned(tmp_path: Path) -> None:
    taught, full = tmp_path / "taught", tmp_path / "full"
    more = ["model.dtype=bfloat16", "train.gradient_checkpointing=true", "train.save_steps=0"]
    assert demo.finetune(taught, *more) == 0
    arguments = ["method.parametrization=full", "train.lr=1e-3", "train.epochs=1", "train.gradient_checkpointing=true"]
    assert demo.unlearn(taught, full, *arguments) == 0
    for folder in (taught, full):
        assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {BF16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(taught, dtype="auto")
    assert model.dtype == BF16
    assert json.loads((taught / "run.json").read_text())["fingerprint"] == fingerprint(model)
    assert json.loads((full / "run.json").read_text())["base_fingerprint"] == fingerprint(model)
    assert demo.finetune(taught, "model.dtype=bfloat16", "train.save_steps=0") == 0  # found: memory is no identity


def test_full_starts_as_its_own_reference_and_keeps_it_while_bfloat16_weights_train(tmp_path: Path) -> None:
    full = Full(MethodConfig())
    config = TrainConfig(epochs=1, batch_size=4, lr=1e-3, save_steps=0)
    task = unlearn_task(full, tiny(dtype=BF16), config)
    assert {parameter.dtype for parameter in full.model.parameters()} == {F32}
    batch = collate(rows(4, seed=9), 0)

    def reference() -> Tensor:
        with full.reference():
            return full.run(batch).answer_logprobs

    first = reference()
    assert torch.equal(first, full.run(batch).answer_logprobs)
    train(task, config, tmp_path, seed=0)
    assert torch.equal(reference(), first)
    assert not torch.allclose(full.run(batch).answer_logprobs, first)
    full.save(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert_equal(stored, {name: value.to(BF16) for name, value in parameters(full.model).items()})
    assert {parameter.dtype for parameter in full.model.parameters()} == {F32}  # and training could go on


def test_precision_reaches_full_alone_and_a_grun_base_stays_as_it_is() -> None:
    config = UnlearnConfig(
        method=MethodConfig(parametrization="full"), train=TrainConfig(precision="float32"), objective="npo"
    )
    full = make_parametrization(config, [])
    full.prepare(tiny(dtype=BF16), None)
    batch = collate(rows(2, seed=9), 0)
    assert full.run(batch).logits(batch.labels != -100).dtype == F32
    config.method = MethodConfig(blocks=[1])
    config.train.precision = "bfloat16"
    grun = make_parametrization(config, [])
    base = tiny(dtype=BF16)
    grun.prepare(base, None)
    assert {parameter.dtype for parameter in base.parameters()} == {BF16}
    assert {parameter.dtype for _, parameter in grun.trainable_parameters()} == {F32}


def test_an_identity_has_the_options_that_decide_the_result() -> None:
    def of(**options: Any) -> dict[str, Any]:
        return identity({"train": {"lr": 1.0, **options}, "output_dir": "x"}, data="hash")

    plain = {"config": {"train": {"lr": 1.0}}, "data": "hash"}
    assert of() == of(gradient_checkpointing=True) == of(precision="auto") == plain
    assert of(precision="bfloat16") != plain


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["finetune", "full", "grun"])
@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [("llama", F64, {}), ("odd", F64, {}), ("gpt2", F64, {"resid_pdrop": 0.3}), ("llama", BF16, {})],
    ids=["llama", "tuples", "dropout", "bfloat16"],
)
def test_gradients_are_those_without_checkpointing(
    kind: str, family: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Bit for bit: the same operations run again on the same numbers, with the same random draws."""
    found = []
    for again in (False, True):
        base = tiny(family, dtype=dtype, **changes)
        config = TrainConfig(batch_size=8, micro_batch_size=5)
        if kind == "finetune":
            task: Any = finetune_task(base, config)
        else:
            whole = FullConfig(freeze_head=family != "odd")  # which names no head
            method = MethodConfig(blocks=[1, 3], dropout=0.2, full=whole)
            task = unlearn_task(Full(method) if kind == "full" else Grun(method), base, config)
        if again:
            recompute_blocks(find_blocks(base)[1])
        torch.manual_seed(7)
        task.module.train()
        found.append(whole_step(task))
        used = {name for name, _ in task.module.named_parameters() if "decoy" not in name}
        assert found[-1].gradients.keys() == used  # every one has a gradient
    plain, recomputed = found
    assert (recomputed.loss, recomputed.parts) == (plain.loss, plain.parts)
    assert any(bool(gradient.any()) for gradient in recomputed.gradients.values())
    assert_equal(recomputed.gradients, plain.gradients)


def test_less_is_kept_for_the_backward_pass_and_an_edit_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = GatedIntervention.forward

    def counted(self: GatedIntervention, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GatedIntervention, "forward", counted)
    sizes = {}
    for recomputed in (False, True):
        base = tiny(dtype=F32)
        parametrization = Grun(MethodConfig(blocks=[0, 2]))
        parametrization.prepare(base, None)
        if recomputed:
            recompute_blocks(find_blocks(base)[1])
        batch = collate(rows(16, seed=9), 0)
        sizes[recomputed] = saved_bytes(lambda p=parametrization, b=batch: p.run(b).token_logprobs)
        calls.clear()
        output = parametrization.run(batch)
        gates = dict(output.gate_logits or {})
        assert set(gates) == {0, 2} and all(gate.shape == (16, 1) for gate in gates.values())
        output.token_logprobs.sum().backward()
        assert len(calls) == 2  # one for each block; none again in the backward pass
        assert all(torch.equal(parametrization.model.intervenable.gates[block], gates[block]) for block in gates)
    assert sizes[True] < 0.6 * sizes[False]


def test_passes_without_gradients_and_generation_are_as_before() -> None:
    base, other = tiny(dtype=F64), tiny(dtype=F64)
    recompute_blocks(find_blocks(other)[1])
    ids = torch.tensor(random_rows([7, 7], seed=3))
    assert torch.equal(base.generate(ids, max_new_tokens=5), other.generate(ids, max_new_tokens=5))
    kept = other(ids, use_cache=True).past_key_values  # with gradients, and a cache that must be filled once
    assert kept.get_seq_length() == 7
