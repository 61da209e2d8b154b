"""Steering vectors: differences of means computed row by row, added where a gate is open, and nothing trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_model import save_with_countries
from demo import refused
from tiny import PAD, random_rows, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from grun import GrunModel
from grun.cli import main
from grun.data.encoding import EncodedRow
from grun.errors import ConfigError
from grun.training.steering import set_vectors

BLOCKS = (1, 2)
STEERED = [
    *("unlearn", "method.gate_blocks=[0]", "method.gate_pool=mean", "method.edit_write=sticky"),
    *("method.gate_fit=logistic", "method.blocks=[1,2]", "method.edit=steer", "objective=idk", "train.epochs=1"),
    *("data.name=jsonl", "data.forget=forget.jsonl", "data.retain=retain.jsonl", "model.device=cpu", "cache.dir=null"),
]


def answers(seed: int) -> list[EncodedRow]:
    """More rows than one pass takes, prompts and answers of several lengths; the same prompts whatever the seed."""
    prompts, ends = random_rows([4, 7, 5] * 4), random_rows([2, 6, 3, 5] * 3, seed=seed)
    return [EncodedRow(tuple(prompt), tuple(end)) for prompt, end in zip(prompts, ends, strict=True)]


def mean_of(rows: list[EncodedRow], block: int) -> Tensor:
    base, found = tiny(), []
    for row in rows:
        states = base(torch.tensor([row.prompt_ids + row.answer_ids]), output_hidden_states=True).hidden_states
        found.append(states[block + 1][0, len(row.prompt_ids) :].mean(dim=0))
    return torch.stack(found).mean(dim=0)


@torch.no_grad()
def test_vectors_lead_from_mean_states_of_answers_to_those_of_refusals() -> None:
    options = {"blocks": BLOCKS, "edit": "steer", "gate_blocks": [0], "gate_pool": "mean", "edit_write": "sticky"}
    model = GrunModel.wrap(tiny(), **options).eval()
    set_vectors(model, answers(1), answers(2), 1.5, PAD)
    for block, edit in model.own_edits().items():
        wanted = 1.5 / len(BLOCKS) * (mean_of(answers(1), block) - mean_of(answers(2), block))
        torch.testing.assert_close(edit.edit.vector, wanted, atol=1e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in edit.parameters())
    ids = torch.tensor([random_rows([6])[0]])
    found = model(ids, prompt_lengths=torch.tensor([4]), output_hidden_states=True)
    with model.disabled():
        plain = model.base(ids, output_hidden_states=True).hidden_states[2]
    change = found.base_output.hidden_states[2] - plain
    vector = found.gates[0][0, -1] * model.own_edits()[1].edit.vector
    torch.testing.assert_close(change[0], vector * torch.tensor([0, 0, 0, 1, 1, 1])[:, None], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_countries(tmp_path_factory.mktemp("steering"))


def run(folder: Path, name: str, *arguments: str) -> list[str]:
    own = [f"model.path={folder / 'model'}", f"output_dir={folder / name}", f"data.path={folder}"]
    return [*STEERED, *own, *arguments]


def test_a_run_sets_vectors_and_trains_nothing(folder: Path) -> None:
    assert main(run(folder, "once")) == 0
    assert main(run(folder, "twice", "method.steer_strength=2")) == 0
    record = json.loads((folder / "once" / "run.json").read_text())
    assert (record["objective"], record["steps"], record["parameters"]["trained"]) == ("steer", 0, 0)
    once, twice = (
        GrunModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / name)
        for name in ("once", "twice")
    )
    assert {name for name in once.state_dict() if "edits" in name} == {f"edits.{b}.edit.vector" for b in (1, 2)}
    for name, vector in once.state_dict().items():
        if "edits" in name:
            assert vector.abs().max() > 0 and torch.allclose(twice.state_dict()[name], 2 * vector)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.gate_fit=joint"], "method.edit=steer is not trained, and needs a gate that is fitted"),
        (["method.edit=loreft", "method.steer_strength=2"], "method.steer_strength is for method.edit=steer"),
        (["method.steer_strength=0"], "method.steer_strength=0"),
        (["method.activation=relu"], "edit=steer adds a vector, on which activation has no effect"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, run(folder, "refused", *arguments), 2, message)


def test_no_activation_acts_on_a_vector() -> None:
    with pytest.raises(ConfigError, match="edit=steer adds a vector"):
        GrunModel.wrap(tiny(), blocks=[1], edit="steer", activation="relu")
