"""Activation patching: which states are put where, what the score is, and what it says of models that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import who_plays_what
from torch import Tensor

from grun.config.options import EvaluateConfig
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.evaluation.attacks.base import ATTACKS, Material, Place
from grun.evaluation.attacks.patching import elsewhere, fact_states, left, losses, span_of
from grun.loading.adapters import Loaded
from grun.method.model import GrunModel

PATCHING: Any = ATTACKS.get("activation_patching")


@pytest.fixture(scope="module")
def material(playing: Path) -> Material:
    return who_plays_what.material(who_plays_what.load(playing))


@pytest.fixture
def model(playing: Path) -> Any:
    return who_plays_what.load(playing).model


def test_the_span_is_the_fact_alone_after_whatever_stands_before_it(material: Material) -> None:
    row = Row("What does Abel Ash play?", "It is the viola of old.", {"fact": "viola", "person": "Abel Ash"})
    span, decode = span_of(row, material), material.tokenizer.decode
    assert decode(span.ids[span.start :]).strip() == "viola"
    assert decode(span.ids[span.prompt : span.start]).strip() == "It is the"
    others = elsewhere(row, material)
    assert (
        len(others) == 3 == len({other.prompt for other in others}) and others[0].prompt == "What does Abel Elm play?"
    )
    assert [decode(span_of(other, material).ids[span_of(other, material).start :]).strip() for other in others] == [
        "viola"
    ] * 3
    whole = span_of(Row("What does Abel Ash play?", "So be it.", {"person": "Abel Ash"}), material)
    assert whole.start == whole.prompt and decode(whole.ids[whole.start :]).strip() == "So be it."


def test_what_is_lost_is_that_of_passes_with_states_put_in_by_hand(model: Any, material: Material) -> None:
    """The rest of the blocks run by themselves on the changed states."""
    one, other = material.forget[:2]
    span, source = span_of(one, material), span_of(other, material)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([source.ids]), output_hidden_states=True).hidden_states
    states = fact_states(model, source)
    n = min(len(span.ids) - span.start, len(source.ids) - source.start)
    assert n > 0
    for block in range(3):  # transformers gives the last block's state after the norm
        assert torch.allclose(states[block], theirs[block + 1][0, source.start - 1 : -1], atol=1e-5)
    states = torch.randn(4, len(span.ids) - span.start, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([span.ids])

    def fact(hidden: Tensor) -> float:
        scores = model.lm_head(model.model.norm(hidden))[0].log_softmax(-1)
        return sum(float(scores[at - 1, span.ids[at]]) for at in range(span.start, len(span.ids))) / (
            len(span.ids) - span.start
        )

    with torch.no_grad():
        found = losses(model, span, states)
        embedded = model.model.embed_tokens(ids)
        places = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(embedded, places)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]

        def run(patched: int | None) -> float:
            hidden = embedded
            for number, block in enumerate(model.model.layers):
                hidden = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
                hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).clone()
                if number == patched:
                    hidden[0, span.start - 1 : -1] = states[number]
            return fact(hidden)

        wanted = [run(None) - run(block) for block in range(4)]
    assert found == pytest.approx(wanted, abs=1e-4) and max(wanted) > 1


def test_the_score_is_the_weighted_mean_of_the_shares_that_are_lost() -> None:
    lost, most = [9.0, 0.5, 3.0, -1.0], [0.01, 1.0, 2.0, 4.0]
    shares = [min(max(a / b, 0), 1) for a, b in zip(lost[1:], most[1:], strict=True)]
    depth = sum(b * share for b, share in zip(most[1:], shares, strict=True)) / sum(most[1:])
    share, holding = left(lost, most)
    assert share == pytest.approx(1 - depth) and holding == [1, 2, 3]
    assert left(lost, [0.05] * 4) == (0.0, []) == left(lost, [])
    assert left([0.0] * 4, most)[0] == 1 and left(most, most)[0] == 0


def leaks(model: Any, material: Material, rows: list[Row]) -> list[float]:
    loaded = Loaded(model, material.tokenizer, material.template, {})
    config, places = (
        EvaluateConfig(),
        [Place("forget", n, PATCHING.asked(row, material)[0]) for n, row in enumerate(rows)],
    )
    with PATCHING.model(loaded, config, material) as inside:
        return [one.leak for one in PATCHING.read(inside, places, loaded, config, lambda done: None)]


def test_edits_that_do_not_act_leave_all_and_edits_of_every_state_leave_little(model: Any, material: Material) -> None:
    more: dict[str, Any] = {"gate": "none", "edit_write": "sticky", "template": material.template}
    edited = GrunModel.wrap(model, blocks=[0, 1, 2, 3], rank=8, **more).eval()
    with edited.disabled():
        assert leaks(edited, material, material.forget[:3]) == [1.0] * 3
    torch.manual_seed(1)
    for parameter in edited.parameters():
        parameter.data.normal_(std=3.0)
    assert max(leaks(edited, material, material.forget[:3])) < 0.5
    assert PATCHING.asked(Row("Who?", "She."), material) == []


def test_the_suite_tells_it_with_interval_and_floor_and_asks_for_an_adapter(playing: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "suite": "attacks",
        "attacks": ["activation_patching"],
        "data": who_plays_what.data(playing),
    }
    config: EvaluateConfig = demo.evaluation(playing, "adapter", **more)
    found = demo.evaluated(config, tmp_path / "out")["attacks"]["activation_patching"]
    assert (found["access"], found["rows"], found["floor"]["rows"]) == ("weights", 8, 8)
    assert 0 < found["leak"] < 1 and found["interval"][0] < found["leak"] < found["interval"][1]
    assert len(found["floor"]["interval"]) == 2 and found["floor"]["leak"] < found["leak"]
    with pytest.raises(ConfigError, match="activation_patching needs an adapter that can be taken off"):
        demo.evaluated(demo.evaluation(playing, None, **more), tmp_path / "none")
