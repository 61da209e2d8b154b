"""Noise on prompts: where it is written, how strong it is made, and that no cache or neighbor changes an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_with_countries
from demo import refused
from tiny import PAD, padded, random_rows, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import GrunModel
from grun.cli import main
from grun.data.encoding import EncodedRow
from grun.data.templates import TEMPLATES, encode_prompt
from grun.errors import ConfigError, ModelError
from grun.evaluation.generation import generate_answers
from grun.training.corruption import STRENGTHS, set_noise

NOISE: dict[str, Any] = {
    **{"blocks": [0], "edit": "corrupt", "gate_blocks": [0], "gate_pool": "mean", "edit_write": "prompt"},
    "reset_ids": [7],
}


def noisy(opening: float = 30.0) -> GrunModel:
    """A model whose gate is open, or shut, whatever it reads."""
    model = GrunModel.wrap(tiny(), **NOISE).eval()
    with torch.no_grad():
        model.pooled.last_layer.weight.zero_()
        model.pooled.last_layer.bias.fill_(opening)
        vector = model.own_edits()[0].edit.vector
        vector.copy_(torch.randn(len(vector), generator=torch.Generator().manual_seed(0)))
    return model


@torch.no_grad()
def test_noise_is_added_to_the_last_turn_of_the_prompt_alone() -> None:
    model, rows = noisy(), random_rows([7, 10])
    rows = [[token if token != 7 else 8 for token in row] for row in rows]
    rows[1][3] = 7  # a turn begins
    batch = padded(rows, "left")
    states = model(**batch, prompt_lengths=torch.tensor([5, 8]), output_hidden_states=True).base_output.hidden_states[1]
    with model.disabled():
        plain = model.base(**batch, output_hidden_states=True).hidden_states[1]
    wanted = torch.zeros(2, 10)
    wanted[0, 3:8], wanted[1, 3:8] = 1, 1  # the first row is padded by three
    vector = model.own_edits()[0].edit.vector
    torch.testing.assert_close(states - plain, wanted[..., None] * vector, atol=1e-5, rtol=1e-5)
    shut = noisy(-30.0)
    shut.gate_threshold = 0.5
    assert torch.equal(shut(**batch).logits, shut.base(**batch).logits)


@torch.no_grad()
def test_answers_are_those_of_whole_rows_with_and_without_a_cache() -> None:
    model = noisy()
    prompt = torch.tensor(random_rows([9]))
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None)[0]
    for count in range(9, 15):
        logits = model(written[None, :count], prompt_lengths=torch.tensor([9])).logits
        assert int(logits[0, -1].argmax()) == int(written[count])
    with pytest.raises(ModelError, match="noise is written on a whole turn.*hand a user's turn over in one pass"):
        model.generate(prompt, max_new_tokens=2, prefill_chunk_size=4, pad_token_id=PAD)
    with model.disabled():
        assert not torch.equal(
            model.base.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None)[0],
            written,
        )


@torch.no_grad()
def test_the_strength_is_the_first_that_leaves_no_more_than_another_question_does() -> None:
    """Against logits of the base, with the noise added by a hook of the test's own."""
    model, base = noisy(), tiny()
    ends = random_rows([2, 5, 3, 4], seed=1)
    rows = [EncodedRow(tuple(prompt), tuple(end)) for prompt, end in zip(random_rows([4, 7, 5, 6]), ends, strict=True)]
    chosen = set_noise(model, rows, 3, PAD)
    noise = torch.randn(base.config.hidden_size, generator=torch.Generator().manual_seed(3)).to(base.dtype)
    size = model.own_edits()[0].edit.vector.norm() / noise.norm() / chosen
    torch.testing.assert_close(model.own_edits()[0].edit.vector, chosen * size * noise)

    def left(strength: float, asked: list[EncodedRow]) -> float:
        total = 0.0
        for prompt, row in zip(asked, rows, strict=True):
            count = len(prompt.prompt_ids)

            def add(_: Any, __: Any, output: Any, count: int = count) -> Any:
                output[:, :count] += strength * size * noise
                return output

            handle = base.model.layers[0].register_forward_hook(add)
            scores = base(torch.tensor([prompt.prompt_ids + row.answer_ids])).logits[0].log_softmax(-1)
            handle.remove()
            total += sum(float(scores[count - 1 + n, token]) for n, token in enumerate(row.answer_ids)) / len(
                row.answer_ids
            )
        return total / len(rows)

    wanted = left(0.0, rows[2:] + rows[:2])
    values = {strength: left(strength, rows) for strength in STRENGTHS}
    enough = [strength for strength in STRENGTHS if values[strength] <= wanted]
    assert chosen == (enough[0] if enough else min(values, key=lambda strength: values[strength]))
    assert not any(parameter.requires_grad for parameter in model.own_edits()[0].parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_countries(tmp_path_factory.mktemp("noise"))


def run(folder: Path, name: str, *arguments: str) -> list[str]:
    return [
        *("unlearn", "method.gate_blocks=[0]", "method.gate_pool=mean", "method.edit_write=sticky"),
        *("method.gate_fit=logistic", "method.edit=corrupt", "objective=idk", "train.epochs=1", "data.name=jsonl"),
        *("data.forget=forget.jsonl", "data.retain=retain.jsonl", "model.device=cpu", "cache.dir=null"),
        *(f"model.path={folder / 'model'}", f"output_dir={folder / name}", f"data.path={folder}", *arguments),
    ]


def test_a_run_trains_nothing_and_answers_depend_on_no_neighbor(folder: Path) -> None:
    assert main(run(folder, "made")) == 0
    record = json.loads((folder / "made" / "run.json").read_text())
    assert (record["objective"], record["steps"], record["parameters"]["trained"]) == ("corrupt", 0, 0)
    base, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    model = GrunModel.from_pretrained(base, folder / "made")
    assert (model.config.edit_write, model.config.blocks, model.gate_threshold) == ("prompt", [0], 0.5)
    asked = [f"What is the capital of {one}?" for one in ("Japan", "Egypt", "Norway", "Peru")]
    prompts = [encode_prompt(TEMPLATES.get("chat"), tokenizer, text) for text in asked]
    together = generate_answers(model, tokenizer, prompts, 4, 8, PAD)
    alone = [generate_answers(model, tokenizer, [prompt], 1, 8, PAD)[0] for prompt in prompts]
    assert [one.text for one in together] == [one.text for one in alone]
    assert any(one.gates is not None and one.gates[0] >= 0.5 for one in together)
    with model.disabled():
        bare = generate_answers(model.base, tokenizer, prompts, 4, 8, PAD)
    for one, plain in zip(together, bare, strict=True):
        assert one.gates is not None and (one.gates[0] >= 0.5 or one.text == plain.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.gate_fit=joint"], "method.edit=corrupt is not trained, and needs a gate that is fitted"),
        (["method.activation=relu"], "edit=corrupt adds a vector, on which activation has no effect"),
        (["method.edit=loreft", "method.edit_write=prompt"], "edit=corrupt goes with edit_write=prompt"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, run(folder, "refused", *arguments), 2, message)


def test_noise_goes_with_its_places_alone() -> None:
    with pytest.raises(ConfigError, match="edit=corrupt goes with edit_write=prompt"):
        GrunModel.wrap(tiny(), **{**NOISE, "edit_write": "sticky"})
