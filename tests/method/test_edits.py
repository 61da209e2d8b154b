"""An edit from elsewhere is trained, saved, loaded and refused where it cannot be computed, by its name alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import padded, random_rows, tiny
from torch import Tensor, nn

from grun import GrunModel, GrunStack
from grun.errors import AdapterError, ConfigError
from grun.method.edits import EDITS, edit
from grun.runtime.runs import identity


class Shift(nn.Module):
    """One vector that is added."""

    def __init__(self, hidden_size: int, rank: int, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.vector.expand_as(hidden)


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(EDITS, "_entries", dict(EDITS._entries))
    edit("shift")(Shift)
    yield "shift"


@torch.no_grad()
def test_an_edit_of_another_name_is_saved_and_loaded_and_does_what_it_says(shift: str, tmp_path: Path) -> None:
    model = GrunModel.wrap(tiny(), blocks=[1], gate="none", edit=shift).eval()
    batch = padded(random_rows([6, 9]), "left")
    states = [model(**batch, output_hidden_states=True).base_output.hidden_states[2]]
    with model.disabled():
        states.append(model(**batch, output_hidden_states=True).base_output.hidden_states[2])
    torch.testing.assert_close(states[0][:, -1] - states[1][:, -1], model.edits["1"].edit.vector.expand(2, -1))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["edit"] == shift
    again = GrunModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_stack_refuses_it_and_an_unknown_one_is_named(shift: str, tmp_path: Path) -> None:
    GrunModel.wrap(tiny(), blocks=[1], edit=shift).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="request 'a': its edit is shift; a stack takes loreft alone"):
        GrunStack(tiny()).add("a", tmp_path)
    with pytest.raises(ConfigError, match="unknown edit 'shfit': did you mean 'shift'"):
        GrunModel.wrap(tiny(), blocks=[1], edit="shfit")


def test_the_published_edit_is_written_nowhere_so_that_older_runs_and_adapters_stay_what_they_are(
    tmp_path: Path,
) -> None:
    GrunModel.wrap(tiny(), blocks=[1]).save_pretrained(tmp_path)
    assert "edit" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert identity({"method": {"edit": "loreft", "rank": 4}}) == {"config": {"method": {"rank": 4}}}
    assert identity({"method": {"edit": "other"}}) == {"config": {"method": {"edit": "other"}}}
