"""Relearning as a grid: what trains in each cell, that nothing of it stays, and that the worst cell is what counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import who_plays_what
from attacked_models import ROWS, changed, everything_else, logits, state, with_lora
from tiny import tiny
from torch import Tensor

from grun.config.options import EvaluateConfig
from grun.data.encoding import collate
from grun.data.rows import Row
from grun.data.templates import TEMPLATES
from grun.evaluation.attacks import grid
from grun.evaluation.attacks.base import ATTACKS, Material
from grun.evaluation.attacks.grid import parts_of, unrelated
from grun.evaluation.attacks.parts import linear_layers, low_rank, training
from grun.evaluation.metrics.averages import wilson
from grun.evaluation.relearning import fine_tune
from grun.method.model import GrunModel

GRID: Any = ATTACKS.get("relearn_grid_10")

MAKE = {
    "full": lambda: tiny().eval(),
    "lora": lambda: with_lora(tiny()).get_base_model(),
    "grun": lambda: GrunModel.wrap(tiny(), blocks=[1, 2], rank=2, gate_bias=1.0).eval(),
}


@pytest.mark.parametrize("part", ["adapter", "lora", "all"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_part_trains_alone_and_the_model_is_as_before_afterwards(kind: str, part: Any) -> None:
    model = MAKE[kind]()
    if part not in parts_of(model):
        assert (kind, part) == ("full", "adapter")
        return
    before, also, said = state(model), everything_else(model), logits(model)
    with pytest.raises(RuntimeError, match="broken off"), training(model, part, 0) as (weights, lr):
        steps = fine_tune(model, weights, ROWS, lr=lr, batch_size=6, micro_batch_size=6, pad_id=0, seed="0")
        assert next(steps) == 1 and next(steps) == 2
        assert not torch.equal(logits(model), said)
        moved = changed(before, model) & state(model).keys()
        own = {name for name in before if "lora_" in name or name in dict(model.named_parameters())}
        edits = set(model.state_dict()) if kind == "grun" else {name for name in before if "lora_" in name}
        if part == "all":
            assert moved == (set(before) if kind == "grun" else own - edits)
        else:
            assert moved == (edits if part == "adapter" else set())
        raise RuntimeError("broken off")
    assert not changed(before, model) and everything_else(model) == also


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_lora_is_a_product_that_is_added_to_the_weights(family: str) -> None:
    """Against the same sum put into the weights by hand, and the chain rule."""
    model, merged = tiny(family, dtype=torch.float64).eval(), tiny(family, dtype=torch.float64).eval()
    batch = collate(ROWS, 0)

    def loss(one: Any) -> Tensor:
        found: Tensor = one(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        return found

    plain = loss(model)
    with low_rank(model, 0) as weights:
        assert torch.equal(loss(model), plain)  # as long as B is zero
        torch.manual_seed(1)
        for b in weights[1::2]:
            b.data.normal_(std=0.1)
        layers = linear_layers(merged)
        assert len(layers) == len(weights) // 2 > 0
        for layer, a, b in zip(layers, weights[::2], weights[1::2], strict=True):
            layer.weight.data += b.detach() @ a.detach()
        found = loss(model)
        assert torch.allclose(found, loss(merged)) and not torch.allclose(found, plain, atol=1e-3)
        gradients = torch.autograd.grad(found, weights)
        wanted = torch.autograd.grad(loss(merged), [layer.weight for layer in layers])
        for at, full in enumerate(wanted):
            a, b = weights[2 * at], weights[2 * at + 1]
            # transformers computes the loss in float32
            assert torch.allclose(gradients[2 * at], b.T @ full, rtol=1e-4, atol=1e-7)
            assert torch.allclose(gradients[2 * at + 1], full @ a.T, rtol=1e-4, atol=1e-7)


def test_what_is_learned_is_never_what_is_asked_nor_holds_its_facts() -> None:
    forget = [Row(f"Question {n}?", "So.", {"fact": fact}) for n, fact in enumerate(("Oxygen", "viola", "Seven", "7"))]
    retain, near = [Row(f"Kept {n}?", "Yes.") for n in range(90)], [Row("Near?", "Yes.")]
    material = Material(TEMPLATES.get("tiny"), None, others=[], forget=forget, retain=retain, seed=0)
    learned = GRID.learned(material, None)
    assert learned["forget"] == forget[:1] and len(learned["neighbors"]) == len(learned["unrelated"]) == 64
    assert [row for row in forget if row in learned["forget"]] == forget[:1]
    texts = [f"{row.prompt} {row.completion}".casefold() for row in unrelated(forget)]
    assert len(texts) > 64 and not any("oxygen" in text or " 7." in text for text in texts)
    assert any("oxygen" in f"{row.prompt} {row.completion}".casefold() for row in unrelated(forget[1:2]))
    assert {name: len(rows) for name, rows in GRID.learned(material, 5).items()} == {
        "forget": 1, "neighbors": 5, "unrelated": 5,
    }  # fmt: skip
    own = Material(TEMPLATES.get("tiny"), None, [], forget, retain, 0, neighbors=near)
    assert GRID.learned(own, None)["neighbors"] == near


def test_the_worst_cell_counts_every_cell_is_told_and_the_floor_is_chosen_alike(
    playing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that knows is reached, before and after edits made it refuse; one that never learned is not."""
    monkeypatch.setattr(grid, "RATES", (1.0, 3.0))
    found = {}
    for adapter in (None, "adapter"):
        config: EvaluateConfig = demo.evaluation(
            playing, adapter, suite="attacks", attacks=["plain", "relearn_grid_10"], max_new_tokens=6,
            data=who_plays_what.data(playing),
        )  # fmt: skip
        folder = tmp_path / str(adapter)
        found[adapter] = demo.evaluated(config, folder)["attacks"]
        result, lines = found[adapter]["relearn_grid_10"], demo.read_lines(folder / "attacks.jsonl")
        parts = ("lora", "all") if adapter is None else ("adapter", "lora", "all")
        names = {
            f"{rows}, {part}, rate x {times}"
            for rows in ("forget", "neighbors", "unrelated")
            for part in parts
            for times in (1, 3)
        }
        for numbers, rows in ((result, "forget"), (result["floor"], "unknown")):
            leaks: dict[str, list[float]] = {}
            for line in lines:
                if (line["attack"], line["set"]) == ("relearn_grid_10", rows):
                    leaks.setdefault(line["variant"], []).append(line["leak"])
            assert set(numbers["cells"]) == set(leaks) == names
            means = {name: sum(own) / len(own) for name, own in leaks.items()}
            assert numbers["leak"] == pytest.approx(max(means.values())) == pytest.approx(means[numbers["worst_cell"]])
            for name, cell in numbers["cells"].items():
                assert cell["leak"] == pytest.approx(means[name]) and cell["rows"] == len(leaks[name])
                assert cell["interval"] == pytest.approx(wilson(means[name], len(leaks[name])))
        assert (result["access"], result["rows"], result["floor"]["rows"]) == ("weights", 7, 8)
        assert result["leak"] > 0.8 > 0.4 > result["floor"]["leak"]
    assert found[None]["plain"]["leak"] == 1.0 and found["adapter"]["plain"]["leak"] < 0.3
