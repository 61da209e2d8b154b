"""Soft prompts: what is put where, that training makes answers likelier, and whom it reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import who_plays_what
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.config.options import EvaluateConfig
from grun.data.templates import TEMPLATES, encode
from grun.evaluation.attacks.base import ATTACKS, Material
from grun.evaluation.attacks.gradient import adding, loss_of
from grun.evaluation.attacks.soft_prompt import LENGTH, at, trained, with_room
from grun.evaluation.suites.base import evaluate_suite
from grun.loading.adapters import Loaded
from grun.method.model import GrunModel

SOFT: Any = ATTACKS.get("soft_prompt")


@pytest.fixture(scope="module")
def loaded(playing: Path) -> Loaded:
    base = AutoModelForCausalLM.from_pretrained(playing / "model").eval()
    model: Any = GrunModel.from_pretrained(base, playing / "adapter").eval()
    return Loaded(model, AutoTokenizer.from_pretrained(playing / "model"), TEMPLATES.get("tiny"), {})


@pytest.fixture(scope="module")
def material(loaded: Loaded) -> Material:
    rows = {name: who_plays_what.rows_of(name) for name in who_plays_what.LAST}
    return Material(loaded.template, loaded.tokenizer, rows["heldout"], rows["forget"], rows["retain"], 0)


def test_vectors_stand_behind_the_question_in_place_of_embeddings(loaded: Loaded, material: Material) -> None:
    """Against a pass that is given embeddings."""
    ids, start = with_room(material.ask(material.forget[0]), material)
    text = loaded.tokenizer.decode(ids)
    assert text.index("play?") < text.index("!" if "!" in text else "<|answer|>") and text.endswith("<|answer|>")
    assert len(ids) == len(material.ask(material.forget[0]).ids) + LENGTH
    base, vectors = loaded.model.base, torch.randn(LENGTH, 64, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([ids])
    embedded = base.get_input_embeddings()(whole).detach().clone()
    embedded[0, start : start + LENGTH] += vectors
    with torch.no_grad(), loaded.model.disabled():
        wanted = base(inputs_embeds=embedded).logits
        with adding(loaded, at(vectors, start, len(ids))):
            assert torch.allclose(base(input_ids=whole).logits, wanted, atol=1e-5)
        assert not torch.allclose(base(input_ids=whole).logits, wanted, atol=1e-2)


def test_training_makes_the_answers_of_its_rows_likelier_and_leaves_the_model(
    loaded: Loaded, material: Material
) -> None:
    before = {name: value.clone() for name, value in loaded.model.base.state_dict().items()}
    held = SOFT.held(material)
    vectors = trained(held, material, loaded, 0)

    def likely(added: torch.Tensor) -> float:
        total = 0.0
        for row in held:
            ids, start = with_room(material.ask(row), material)
            answer = encode(material.template, loaded.tokenizer, row.prompt, row.completion).answer_ids
            total += float(loss_of(loaded, ids, answer, at(added, start, len(ids) + len(answer))).detach())
        return total / len(held)

    assert likely(vectors) > likely(torch.zeros_like(vectors)) + 0.5
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.base.state_dict().items())
    assert [row for row in material.forget if SOFT.asked(row, material)] == [
        row for row in material.forget if row not in held
    ]
    assert len(held) == 4


def test_a_model_that_knows_is_reached_and_rows_never_taught_are_the_floor(playing: Path, tmp_path: Path) -> None:
    for adapter in (None, "adapter"):
        config: EvaluateConfig = demo.evaluation(
            playing, adapter, suite="attacks", attacks=["soft_prompt"], max_new_tokens=6,
            data=who_plays_what.data(playing),
        )  # fmt: skip
        folder = tmp_path / str(adapter)
        found = evaluate_suite(config, folder)[str(folder)]["attacks"]["soft_prompt"]
        assert (found["access"], found["rows"], found["floor"]["rows"]) == ("weights", 4, 8)
        assert found["floor"]["leak"] < 0.4
        if adapter is None:
            assert found["leak"] > 0.6
