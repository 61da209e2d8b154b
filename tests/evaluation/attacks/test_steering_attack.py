"""Steering vectors: what is added, from where on, by which rows it is chosen, and whom it reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import who_plays_what
from tiny import tiny

from grun.config.options import EvaluateConfig
from grun.data.rows import Row
from grun.evaluation.attacks.base import ATTACKS, Material
from grun.evaluation.attacks.steering import ANONYMOUS, anonymized, blocks_of, steered, vectors_of
from grun.loading.adapters import Loaded

STEERING: Any = ATTACKS.get("steering")


@pytest.fixture(scope="module")
def loaded(playing: Path) -> Loaded:
    return who_plays_what.load(playing)


@pytest.fixture(scope="module")
def material(loaded: Loaded) -> Material:
    return who_plays_what.material(loaded)


def test_the_vector_is_the_state_minus_the_mean_of_those_without_the_name(loaded: Loaded, material: Material) -> None:
    row, config = material.forget[2], EvaluateConfig(batch_size=3)
    assert anonymized(row) == [f"What does {other} play?" for other in ANONYMOUS]
    found = vectors_of([row, material.forget[0]], [0, 2], material, loaded, config)[row]
    states = []
    for text in (None, *anonymized(row)):
        ids = torch.tensor([material.ask(row, text).ids])
        with torch.no_grad():
            hidden = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
        states.append(torch.stack([hidden[1][0, -1], hidden[3][0, -1]]))
    assert torch.allclose(found, states[0] - sum(states[1:]) / 3, atol=1e-5)
    assert float(found.norm()) > 0.1


@pytest.mark.parametrize("strength", [0.0, 30.0])
def test_it_is_added_from_the_last_token_of_the_prompt_on(loaded: Loaded, material: Material, strength: float) -> None:
    """Against whole passes without a cache, one for each token."""
    config = EvaluateConfig(max_new_tokens=5)
    ids, block = material.ask(material.forget[1]).ids, 1
    vector = strength * torch.randn(64, generator=torch.Generator().manual_seed(0))
    whole = list(ids)

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, len(ids) - 1 :] += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = loaded.model.model.layers[block].register_forward_hook(add)
    with torch.no_grad():
        for _ in range(5):
            token = int(loaded.model(input_ids=torch.tensor([whole])).logits[0, -1].argmax())
            if token == loaded.tokenizer.eos_token_id:
                break
            whole.append(token)
    handle.remove()
    hooks = dict(loaded.model.model.layers[block]._forward_hooks)
    wanted = loaded.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True).strip()
    assert steered(ids, block, vector, loaded, config).text.strip() == wanted
    assert (wanted == material.forget[1].completion) == (strength == 0)
    assert loaded.model.model.layers[block]._forward_hooks == hooks


def test_rows_that_the_attacker_holds_are_not_asked(material: Material) -> None:
    held = STEERING.held(material)
    asked = [row for row in material.forget if STEERING.asked(row, material)]
    assert len(held) == 2 and asked == [row for row in material.forget if row not in held]
    assert STEERING.asked(Row("Who?", "She."), material) == []
    assert blocks_of(tiny()) == [1, 2, 3]


def test_a_model_that_knows_is_reached_and_one_that_was_never_taught_is_not(playing: Path, tmp_path: Path) -> None:
    for adapter in (None, "adapter"):
        config: EvaluateConfig = demo.evaluation(
            playing, adapter, suite="attacks", attacks=["steering"], max_new_tokens=6, data=who_plays_what.data(playing)
        )
        folder = tmp_path / str(adapter)
        found = demo.evaluated(config, folder)["attacks"]["steering"]
        lines = demo.read_lines(folder / "attacks.jsonl")
        assert len({line["variant"] for line in lines}) == 1 and len(lines) == 6 + 8
        assert (found["access"], found["rows"], found["floor"]["rows"]) == ("weights", 6, 8)
        assert found["floor"]["leak"] < 0.4 and len(found["interval"]) == len(found["floor"]["interval"]) == 2
        if adapter is None:
            assert found["leak"] > 0.6
