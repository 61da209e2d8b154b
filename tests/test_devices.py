"""A model that accelerate spread: where edits live and tokens go. Devices are one CPU, behind hooks, and meta."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook
from tiny import blocks_of, padded, random_rows, tiny

from grun.checks import check
from grun.config import EvaluateConfig, ModelConfig
from grun.data.encoding import EncodedRow
from grun.devices import device_of, input_device
from grun.errors import ConfigError, RunError
from grun.evaluation import items
from grun.evaluation.generation import generate_answers
from grun.evaluation.scoring import score
from grun.evaluation.subject import Subject
from grun.method.model import GrunModel

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
    """All blocks on the CPU, each behind accelerate's hooks, as on several GPUs."""
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
    monkeypatch.setattr("grun.processes.count", lambda: 2)
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
