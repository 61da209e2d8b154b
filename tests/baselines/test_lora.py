"""LoRA as a parametrization: what it trains, what it leaves alone, and what peft makes of its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import demo
import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, WIDTH, bfloat16_kernels, blocks_of, ragged_rows, tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from baselines.lora import Lora
from grun.config.options import LoraConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.data.encoding import Batch, collate
from grun.data.templates import TEMPLATES, load
from grun.errors import AdapterError, ConfigError
from grun.loading.adapters import _put_on
from grun.loading.checks import check
from grun.loading.resolve import resolve
from grun.method.gated import Grun
from grun.method.parametrization import Parametrization
from grun.objectives.objective import build_objective
from grun.training.recomputation import recompute_blocks
from grun.training.train import train
from grun.training.unlearning import UnlearnRows, UnlearnTask

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def batch() -> Batch:
    return collate(ragged_rows(4, 9), 0)


def lora(base: Any, *, seed: int = 0, **options: Any) -> Lora:
    """On `base`, with the published options but for `options`."""
    made = Lora(MethodConfig(lora=LoraConfig(**options)))
    torch.manual_seed(seed)
    made.prepare(base, TEMPLATES.get("tiny"))
    return made


def moved(parametrization: Lora) -> Lora:
    """As if trained: B, which is 0 at the start, is set to random numbers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in parametrization.trainable_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return parametrization


@torch.no_grad()
def logprobs(parametrization: Parametrization) -> torch.Tensor:
    return parametrization.run(batch()).answer_logprobs


def test_rank_4_of_every_linear_layer_of_llama_8b_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8,
            )
        )  # fmt: skip
    found = lora(base)
    assert sum(p.numel() for _, p in found.trainable_parameters()) == 10_485_760
    assert sum(p.numel() for p in found.module.parameters()) == 10_485_760
    assert {name.split(".")[-4] for name, _ in found.trainable_parameters()} == LINEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_every_model_is_its_own_reference_and_all_that_is_trained_gets_gradients(family: str) -> None:
    untouched = tiny(family)
    found = lora(tiny(family), dropout=0.0)
    found.module.train()
    before = found.run(batch()).answer_logprobs
    with found.reference():
        reference = found.run(batch()).answer_logprobs
    plain = Grun(MethodConfig(blocks=[0]))
    plain.prepare(untouched, None)
    with plain.reference():
        assert torch.equal(reference, plain.run(batch()).answer_logprobs)
    assert torch.equal(before, reference)
    assert not reference.requires_grad
    before.sum().backward()
    assert all(p.grad is not None for p in found.module.parameters())
    assert [p for p in found.model.parameters() if p.grad is not None] == list(found.module.parameters())
    linear = [m for m in blocks_of(untouched, family).modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(list(found.module.parameters())) == 2 * len(linear)


def test_the_reference_is_the_untouched_model_after_training_too_and_leaves_the_mode_as_it_was() -> None:
    found = lora(tiny("llama"), dropout=0.5)
    untouched = logprobs(found)
    moved(found).module.train()
    random = torch.get_rng_state()
    with found.reference():
        assert torch.equal(logprobs(found), untouched)
    assert found.module.training
    assert torch.equal(torch.get_rng_state(), random)
    found.module.eval()
    assert not torch.allclose(logprobs(found), untouched)
    with pytest.raises(RuntimeError, match="boom"), found.reference():
        raise RuntimeError("boom")
    assert not torch.allclose(logprobs(found), untouched)


def test_gradients_are_those_of_the_adapter_though_the_reference_ran_between() -> None:
    found = moved(lora(tiny("llama"), dropout=0.0))
    found.run(batch()).answer_logprobs.sum().backward()
    wanted = [p.grad.clone() for p in found.module.parameters() if p.grad is not None]
    found.module.zero_grad()
    output = found.run(batch())
    with found.reference():
        found.run(batch())
    output.answer_logprobs.sum().backward()
    for parameter, gradient in zip(found.module.parameters(), wanted, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)


def test_alpha_scales_the_change_by_alpha_over_rank() -> None:
    """Against W + (alpha / rank) B A written by hand, on one layer; one rounding apart."""
    base, by_hand = tiny("llama"), tiny("llama")
    found = moved(lora(base, rank=2, alpha=6.0, targets=["layers.1.mlp.up_proj"]))
    named = {name.split(".")[-3]: p.detach() for name, p in found.trainable_parameters()}
    assert set(named) == {"lora_A", "lora_B"} and named["lora_A"].shape == (2, WIDTH)
    weight: Any = by_hand.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data += 3.0 * named["lora_B"] @ named["lora_A"]
    same = Grun(MethodConfig(blocks=[0]))
    same.prepare(by_hand, None)
    with same.reference():
        torch.testing.assert_close(logprobs(found), logprobs(same), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rank_and_targets_say_how_many_parameters_there_are(family: str) -> None:
    def trained(**options: Any) -> dict[str, torch.Tensor]:
        return dict(lora(tiny(family), **options).trainable_parameters())

    name = "down_proj" if family == "llama" else "mlp.c_proj"
    wide = 48 if family == "llama" else 4 * WIDTH
    assert sum(p.numel() for p in trained(rank=3, targets=[name]).values()) == 4 * 3 * (WIDTH + wide)
    assert sum(p.numel() for p in trained(rank=6).values()) == 2 * sum(p.numel() for p in trained(rank=3).values())
    assert len(trained()) > len(trained(targets=[name]))


@pytest.mark.parametrize("target", ["lm_head", "proj", "q_projj", "embed_tokens"])
def test_an_unknown_target_is_an_error_that_names_the_layers_there_are(target: str) -> None:
    base = tiny("llama")
    with pytest.raises(ConfigError, match=rf"called '{target}'; there are q_proj, k_proj, v_proj, o_proj, gate_proj"):
        lora(base, targets=["q_proj", target])
    assert all("lora" not in name for name, _ in base.named_parameters())


def test_dropout_acts_in_training_only_and_the_base_stays_in_evaluation_mode() -> None:
    found = moved(lora(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), dropout=0.5))
    calm = logprobs(found)
    assert torch.equal(calm, logprobs(found))
    found.module.train()
    torch.manual_seed(0)
    first = logprobs(found)
    assert not torch.allclose(first, logprobs(found))
    assert not found.model.training
    found.module.eval()
    assert torch.equal(calm, logprobs(found))
    without = moved(lora(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), dropout=0.0))
    without.module.train()
    assert torch.equal(calm, logprobs(without))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_the_same_where_blocks_are_run_again(family: str) -> None:
    """With dropout, on a base whose embeddings and blocks are frozen."""
    gradients = []
    for recompute in (False, True):
        base = tiny(family)
        made = moved(lora(base, dropout=0.3))
        made.module.train()
        if recompute:
            recompute_blocks(blocks_of(base, family))
        torch.manual_seed(5)
        made.run(batch()).answer_logprobs.sum().backward()
        gradients.append([p.grad for p in made.module.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None and plain.abs().sum() > 0
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_float32_whatever_the_base_and_survive_saving_bit_by_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny("llama", dtype=dtype)
    found = moved(lora(base, rank=3, alpha=5.0, dropout=0.1))
    assert {p.dtype for _, p in found.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in base.parameters() if not p.requires_grad} == {dtype}
    found.save(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").glob(".*")] == []
    other = Lora(MethodConfig())
    other.load(tmp_path / "lora", tiny("llama", dtype=dtype))
    pairs = zip(found.trainable_parameters(), other.trainable_parameters(), strict=True)
    assert all(one == two and torch.equal(a, b) and a.dtype == b.dtype for (one, a), (two, b) in pairs)
    assert torch.equal(logprobs(other), logprobs(found))
    other.save(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors", "grun_template.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()


def test_stock_peft_loads_what_is_saved_and_the_template_lies_beside_it(tmp_path: Path) -> None:
    from peft import PeftModel

    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = moved(lora(base))
    found.save(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (4, 32.0, 0.05, "none")
    assert config["target_modules"] == sorted(LINEAR)
    assert load(tmp_path / "lora") == TEMPLATES.get("tiny")
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == 2 * 4 * len(LINEAR)
    again = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    stock = PeftModel.from_pretrained(again, str(tmp_path / "lora"))
    ids = batch().input_ids
    assert torch.equal(stock(ids).logits, base(ids).logits)
    merged = stock.merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, rtol=1e-10, atol=1e-10)


def test_an_adapter_of_another_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    lora(tiny("llama")).save(tmp_path)
    for load_it in (lambda base: Lora(MethodConfig()).load(tmp_path, base), lambda base: _put_on(base, tmp_path)):
        with pytest.raises(AdapterError, match="does not go on this base") as error:
            load_it(tiny("llama", hidden_size=64))
        assert "\n" not in str(error.value)


def test_an_adapter_with_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    lora(tiny("llama")).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path)
    with pytest.raises(AdapterError, match=f"tensor {name!r} holds NaN"):
        _put_on(tiny("llama"), tmp_path)


LAYERS = ["q_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"target_modules": [*LAYERS, "embed_tokens"], "modules_to_save": ["lm_head"], "use_dora": True},
    "ALORA": {"target_modules": LAYERS, "alora_invocation_tokens": [5, 6]},
    "XLORA": {"hidden_size": WIDTH, "adapters": {"0": "nowhere"}},
    "ADALORA": {"target_modules": LAYERS, "total_step": 9},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 3},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "IA3": {"target_modules": LAYERS, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(64))},
    "VBLORA": {"target_modules": ["q_proj"], "vector_length": 16, "num_vectors": 8},
    "BOFT": {"target_modules": ["q_proj"], "boft_block_size": 4},
    "OFT": {"target_modules": ["q_proj"], "oft_block_size": 4},
    "C3A": {"target_modules": ["q_proj"], "block_size": 8},
    "ROAD": {"target_modules": ["q_proj"], "group_size": 16},
    "MISS": {"target_modules": LAYERS, "r": 4},
    "SHIRA": {"target_modules": LAYERS, "r": 4},
    "WAVEFT": {"target_modules": LAYERS, "n_frequency": 16},
    "FOURIERFT": {"target_modules": LAYERS, "n_frequency": 16},
} | dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"), {"num_virtual_tokens": 3})
REFUSED = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"}
REFUSED |= {"ALORA", "XLORA", "POLY", "SHADOW"}


@pytest.mark.parametrize("kind", ["ALORA", *(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)])
@torch.no_grad()
def test_an_adapter_of_peft_does_what_it_does_there_or_is_refused(kind: str, tmp_path: Path) -> None:
    make = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("LORA" if kind == "ALORA" else kind)]
    config = make(task_type="CAUSAL_LM", **OPTIONS.get(kind, {"target_modules": LAYERS}))
    if kind == "XLORA":  # made of other adapters
        config.save_pretrained(str(tmp_path))
    else:
        made = peft.get_peft_model(tiny("llama", dtype=torch.float32), config)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
        made.save_pretrained(str(tmp_path))
    base = tiny("llama", dtype=torch.float32)
    if kind in REFUSED:
        with pytest.raises(AdapterError, match=rf"is of PEFT's type {kind.replace('ALORA', 'LORA')} and ") as caught:
            _put_on(base, tmp_path)
        assert "\n" not in str(caught.value)
        return
    ids = batch().input_ids
    untouched = base(ids).logits
    found = _put_on(base, tmp_path)(ids).logits
    wanted = peft.PeftModel.from_pretrained(tiny("llama", dtype=torch.float32), str(tmp_path)).eval()
    assert torch.equal(found, wanted(input_ids=ids).logits)
    assert not torch.allclose(found, untouched)


@pytest.mark.parametrize("depths", [(5, 4), (3, 4)], ids=["deeper", "shallower"])
def test_an_adapter_of_a_model_of_another_depth_is_refused(depths: tuple[int, int], tmp_path: Path) -> None:
    lora(tiny("llama", num_hidden_layers=depths[0])).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": sorted(LINEAR)}))
    with pytest.raises(AdapterError, match=r"\d+ tensors belong to one of the two alone"):
        _put_on(tiny("llama", num_hidden_layers=depths[1]), tmp_path)


def test_saving_that_fails_leaves_no_half_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lora(tiny("llama"))

    def full_disk(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("baselines.lora.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        found.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("quantization", "kernels"), [("8bit", False), ("4bit", False), ("4bit", True)])
def test_beside_a_quantized_base_a_lora_trains(
    quantization: str, kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16_kernels(monkeypatch, kernels)
    tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    eight = quantization == "8bit"
    settings = BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=not eight, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map={"": "cpu"})
    found = lora(base, dropout=0.0)
    frozen = {name: p.clone() for name, p in base.named_parameters() if not p.requires_grad}
    assert {p.dtype for _, p in found.trainable_parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(found.module.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = -found.run(batch()).answer_logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(base.get_parameter(name), weight) for name, weight in frozen.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map={"": "cpu"})
    found.save(tmp_path / "lora")
    other = Lora(MethodConfig())
    other.load(tmp_path / "lora", again)
    assert torch.equal(logprobs(other), logprobs(found))


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    base = tiny("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    found = lora(base)
    config = TrainConfig(epochs=1, batch_size=3, lr=0.01, save_steps=1, keep_all_checkpoints=True)
    options = UnlearnConfig(objective="npo", train=config)
    objective = build_objective("npo", options.loss, gated=False)
    data = UnlearnRows(ragged_rows(6, 1), ragged_rows(6, 2), ragged_rows(9, 3))
    train(UnlearnTask(found, objective, data, options, pad_id=0, device=base.device), config, tmp_path, seed=0)
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "trained.safetensors")
    assert sum(tensor.numel() for tensor in kept.values()) == sum(p.numel() for _, p in found.trainable_parameters())
    for name, parameter in base.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
        else:
            assert parameter.abs().sum() > 0


def test_a_lora_is_unlearned_evaluated_and_found_again(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from grun.cli import main

    folder = tmp_path / "lora"
    arguments = ["method.parametrization=lora", "objective=npo", "train.epochs=1", "train.monitor_epochs=1"]
    assert demo.unlearn(taught, folder, *arguments) == 0
    run = json.loads((folder / "run.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(taught)
    assert run["parameters"]["base"] == sum(p.numel() for p in model.parameters())
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert run["saved_bytes"] == size
    assert 4 * run["parameters"]["trained"] < size < 4 * run["parameters"]["trained"] + 20_000  # and names
    assert run["engine"] == "plain"
    assert run["cache"]["rows"] == 10 and run["cache"]["where"] == "memory"
    assert not (folder / "tokenizer.json").exists()
    capsys.readouterr()
    assert demo.unlearn(taught, folder, *arguments) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    own = [*demo.DATA, f"model.path={taught}", "max_new_tokens=2", "data.limit=2"]
    assert main(["evaluate", *own, f"adapter={folder}", f"output_dir={tmp_path / 'evaluation'}"]) == 0
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["identity"]["adapter"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.lora.rank=0", "method.lora.rank=0 must be greater than 0"),
        ("method.lora.alpha=-1", "method.lora.alpha=-1.0 must be greater than 0"),
        ("method.lora.dropout=1", "method.lora.dropout=1.0 must lie in [0, 1)"),
        ("cache.disk_budget=much", "cache.disk_budget=much is no size"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_runs(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(resolve("unlearn", ["method.parametrization=lora", option]))


@pytest.mark.parametrize(("kind", "lr"), [("full", 1e-5), ("lora", 1e-4)])
def test_the_profile_of_tofu_has_the_published_settings_of_both_baselines(kind: str, lr: float) -> None:
    for objective, weights in (("gd", (None, 1.0)), ("npo", (0.1375, 1.0)), ("simnpo", (0.1375, 1.0))):
        config = resolve("unlearn", ["profile=llama3.1", f"method.parametrization={kind}", f"objective={objective}"])
        check(config)
        train = config.train
        assert (train.lr, train.weight_decay, train.epochs, train.batch_size) == (lr, 0.01, 10, 32)
        assert (train.warmup, train.schedule, train.max_grad_norm) == (0.1, "linear", 1.0)
        assert (config.loss.forget_weight, config.loss.retain_weight) == weights
        lora = config.method.lora
        assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (4, 32.0, 0.05, [])
    assert resolve("unlearn", ["profile=llama3.1", "objective=npo"]).loss.forget_weight == 100.0  # GRUN's own
