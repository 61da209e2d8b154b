"""A model that accelerate spread: where edits live and tokens go. Devices are one CPU, under hooks, and meta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook
from tiny import bfloat16_kernels, blocks_of, padded, random_rows, tiny
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grun.config.options import EvaluateConfig, ModelConfig
from grun.data.encoding import EncodedRow
from grun.errors import ConfigError, ModelError, RunError
from grun.evaluation import items
from grun.evaluation.generation import generate_answers
from grun.evaluation.scoring import score
from grun.evaluation.shared_scoring import Subject
from grun.loading.checks import check
from grun.loading.models import load_weights
from grun.method.model import GrunModel
from grun.runtime.devices import device_of, input_device, keep_unpacked

META = torch.device("meta")


def test_each_edit_lives_where_its_block_computes() -> None:
    base = tiny("llama")
    blocks = blocks_of(base, "llama")
    blocks[3].to(META)
    blocks[2]._hf_hook = ModelHook()
    blocks[2]._hf_hook.execution_device = META  # its weights lie elsewhere until they are needed
    model = GrunModel(base, GrunModel.wrap(tiny("llama"), blocks=[1, 2, 3]).config)
    where = {block: {parameter.device for parameter in edit.parameters()} for block, edit in model.edit_at().items()}
    assert where == {1: {torch.device("cpu")}, 2: {META}, 3: {META}}


def test_token_ids_go_to_the_embedding() -> None:
    base = tiny("llama")
    assert input_device(base) == base.device
    base.hf_device_map = {"model.embed_tokens": "meta", "": "cpu"}
    base.get_input_embeddings().to(META)
    assert input_device(base) == META
    assert GrunModel(base, GrunModel.wrap(tiny("llama"), blocks=[1]).config).device == META
    assert device_of(blocks_of(base, "llama")[0]) == torch.device("cpu")


def test_a_dispatched_model_gives_what_it_gives_undispatched() -> None:
    """All blocks on the CPU, each under accelerate's hooks, as on several GPUs."""
    rows = random_rows([5, 9, 7])
    outputs = []
    for dispatched in (False, True):
        base = tiny("llama")
        if dispatched:
            places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
            places |= {f"model.layers.{number}": "cpu" for number in range(4)}
            dispatch_model(base, places, main_device="cpu", force_hooks=True)
            assert hasattr(blocks_of(base, "llama")[1], "_hf_hook")
        torch.manual_seed(0)
        model = GrunModel.wrap(base, blocks=[1, 3]).eval()
        logits = model(**padded(rows, "right"), prompt_lengths=torch.tensor([3, 4, 5])).logits
        scored = score(model, [EncodedRow(tuple(row[:3]), tuple(row[3:])) for row in rows], 2, 0)
        tokenizer = Tokens()
        answers = generate_answers(model, tokenizer, rows, 2, 4, 0)
        outputs.append((logits, [row.logp for row in scored], [row.gates for row in scored], answers))
        model.unwrap()
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1:] == outputs[1][1:]


class Tokens:
    """Decodes ids as numbers."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def test_a_device_map_goes_with_no_named_device_and_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check(EvaluateConfig(model=ModelConfig(device_map="auto")))
    with pytest.raises(ConfigError, match="balanced"):
        check(EvaluateConfig(model=ModelConfig(device_map="balanced")))
    with pytest.raises(ConfigError, match="model.device=cpu and model.device_map are both given"):
        check(EvaluateConfig(model=ModelConfig(device_map="auto", device="cpu")))
    monkeypatch.setattr("grun.runtime.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match="start it without torchrun"):
        check(EvaluateConfig(model=ModelConfig(device_map="auto")))


def test_scoring_and_answering_that_run_out_of_memory_advise_a_smaller_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Padding:
        pad_token_id = 0

    config = EvaluateConfig(batch_size=8)
    monkeypatch.setattr("grun.evaluation.shared_scoring.score_together", refuse)
    with pytest.raises(RunError, match=r"scoring ran out of memory; .*batch_size=4 \(it is 8 now\)"):
        items.score_items([Subject(tiny("llama"))], Padding(), [], config)
    monkeypatch.setattr("grun.evaluation.generation.generate_answers", refuse)
    with pytest.raises(RunError, match=r"answering ran out of memory; .*model.quantization=8bit"):
        items.answer_questions(items.Table(), tiny("llama"), Padding(), {}, [], config)


# -- 4-bit weights on every make of CPU -------------------------------------------------------------------------------

NARROW = {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 50}
WIDE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "intermediate_size": 128}
"""Widths that no kernel was made for, and such that every kernel takes (multiples of 64)."""
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def dequantized(base: nn.Module, folder: Path) -> nn.Module:
    """The unquantized model with the weights that the layers of `base` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    exact = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in base.named_modules():
        if hasattr(layer, "quant_state"):
            exact.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return exact


@pytest.mark.parametrize("widths", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("kernels", [True, False])
def test_edits_of_a_4bit_base_get_the_gradients_of_its_weights_on_every_cpu(
    kernels: bool, widths: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16_kernels(monkeypatch, kernels)
    tiny("llama", dtype=torch.float32, **widths).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FOUR_BITS, device_map={"": "cpu"})
    gradients, logits = [], []
    for loaded in (dequantized(base, tmp_path), base):
        torch.manual_seed(0)
        model = GrunModel.wrap(loaded, blocks=[0])
        batch = padded(random_rows([5, 9]), "right")
        with torch.no_grad():  # the pass at which weights would be repacked
            logits.append(model(**batch).logits)
        model(**batch).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        saved = loaded.state_dict()
        assert torch.equal(model(**batch).logits.detach(), logits[-1]), saved.keys()
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_a_quantized_base_that_the_kernels_here_refuse_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16_kernels(monkeypatch, False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr("bitsandbytes.matmul_4bit", refuse)
    tiny("llama", dtype=torch.float32, **NARROW).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.quantization=4bit: .* \(N must be divisible by block_n\); leave"):
        load_weights(ModelConfig(path=str(tmp_path), device="cpu", quantization="4bit"))


def test_a_4bit_base_whose_weights_were_repacked_already_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny("llama", dtype=torch.float32, **WIDE).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FOUR_BITS, device_map={"": "cpu"})
    layer = blocks_of(base, "llama")[1].self_attn.k_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    layer.support_avx512bf16_for_cpu = True
    for take in (keep_unpacked, lambda model: GrunModel.wrap(model, blocks=[0])):
        with pytest.raises(ModelError, match=r"layers.1.self_attn.k_proj were repacked .* load the model anew"):
            take(base)
