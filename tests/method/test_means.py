"""Gates by means of prompts: cosines computed another way, and what is shut is the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import random_rows, tiny
from torch import Tensor
from torch.nn.functional import cosine_similarity

from grun import GrunModel
from grun.method.means import LOGIT, by_means, means_held_out

GATES = ["similarity", "condition"]


def sides(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of one length, float64 [40, 16], of which the first 12 are to open a gate."""
    values = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[:12, 2] += 3
    return 4 * torch.nn.functional.normalize(values, dim=1), torch.arange(40) < 12


@pytest.mark.parametrize("gate", GATES)
def test_the_logit_is_a_cosine_with_the_papers_vector_stretched_between_both_means(gate: str) -> None:
    features, target = sides()
    vector = features[:12].sum(dim=0) / 12
    if gate == "condition":
        vector = vector - features[12:].sum(dim=0) / 28
    cosines = cosine_similarity(features, vector.unsqueeze(0))
    middle = (cosines[:12].mean() + cosines[12:].mean()) / 2
    wanted = (cosines - middle) / (cosines[:12].mean() - middle) * LOGIT
    torch.testing.assert_close(by_means(features, target, gate).logits(features), wanted)


@pytest.mark.parametrize("gate", GATES)
def test_a_row_is_judged_by_means_without_its_unit(gate: str) -> None:
    features, target = sides()
    units = [f"unit {number // 2}" for number in range(40)]
    whole, held_out = means_held_out(features, target, units, gate)
    changed = features.clone()
    changed[0] *= -1  # with row 1 in a unit
    _, again = means_held_out(changed, target, units, gate)
    assert torch.equal(whole.logits(features), by_means(features, target, gate).logits(features))
    assert held_out[1] == again[1] and held_out[1] != whole.logits(features)[1]
    assert not torch.equal(held_out[2:], again[2:])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("action", ["edit", "refuse"])
@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_bits_and_shut_those_of_the_base(
    gate: str, action: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    rows = torch.tensor(random_rows([9, 9]))
    refusal = [11, 12, 9] if action == "refuse" else []
    model = GrunModel.wrap(
        tiny(), gate=gate, gate_blocks=[0], gate_pool="mean", edit_write="sticky", action=action, answer_ids=refusal,
        blocks=[1],
    ).eval()  # fmt: skip
    features = []
    model.base.model.layers[0].register_forward_hook(
        lambda _, __, out: features.append(out[0] if isinstance(out, tuple) else out)
    )
    model.keep_threshold(0.0)
    opened = model(rows)
    states = features[0] / (features[0].square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
    linear = model.pooled.last_layer
    cosines = cosine_similarity(states.mean(dim=1), linear.weight)
    wanted = cosines * linear.weight.norm() * states.shape[2] ** 0.5 + linear.bias
    torch.testing.assert_close(opened.gate_logits[0][:, -1].double(), wanted.double(), atol=1e-4, rtol=1e-4)
    with model.disabled():
        bare = model.base(rows).logits
    assert not torch.equal(opened.logits, bare)
    model.save_pretrained(tmp_path)
    again = GrunModel.from_pretrained(tiny(), tmp_path)
    assert again.config.gate == gate and torch.equal(again(rows).logits, opened.logits)
    again.gate_threshold = 1.0
    assert torch.equal(again(rows).logits, bare)
