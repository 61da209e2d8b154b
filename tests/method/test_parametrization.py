"""A parametrization from elsewhere is treated by its traits, not by its name."""

from collections.abc import Iterator
from typing import Any

import pytest

from grun.commands.unlearn import check_blocks
from grun.config.options import LossConfig, MethodConfig, TrainConfig, UnlearnConfig
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.method.gated import Grun
from grun.method.parametrization import PARAMETRIZATIONS, Traits, traits_of
from grun.objectives.objective import build_objective


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(PARAMETRIZATIONS, "_entries", dict(PARAMETRIZATIONS._entries))
    monkeypatch.setattr(PARAMETRIZATIONS, "_traits", dict(PARAMETRIZATIONS._traits))
    return lambda **traits: PARAMETRIZATIONS.add("theirs", Grun, "theirs", Traits(**traits))


def config(**options: Any) -> UnlearnConfig:
    return UnlearnConfig(method=MethodConfig(parametrization="theirs", **options))


def test_one_with_a_gate_takes_designs_gate_terms_and_gate_pretraining(add: Any) -> None:
    add(gated=True, edits_blocks=True)
    asked = config(beside="store")
    asked.design, asked.train = "robust", TrainConfig(engine="cached", gate_pretraining=3)
    check(asked)
    assert traits_of(asked.method).gated
    assert not traits_of(MethodConfig(parametrization="theirs", gate="none")).gated


@pytest.mark.parametrize(
    ("asked", "words"), [({"design": "robust"}, "design=robust"), ({"beside": "store"}, "method.beside")]
)
def test_one_without_gate_and_edits_refuses_what_concerns_them(add: Any, asked: dict[str, str], words: str) -> None:
    add(changes_weights=True)
    with pytest.raises(ConfigError, match=words):
        check(UnlearnConfig(method=MethodConfig(parametrization="theirs", beside=asked.get("beside")),
                            design=asked.get("design", "published")))  # fmt: skip


def test_edits_that_no_state_read_can_train_are_refused_where_blocks_are_edited(add: Any) -> None:
    add(edits_blocks=True)
    objective = build_objective("rmu", LossConfig(rmu_block=1, steering=1.0), gated=False)
    with pytest.raises(ConfigError, match="would stay untrained"):
        check_blocks(objective, config(blocks=[1, 3]).method, 4, later_edits=False)
    check_blocks(objective, MethodConfig(parametrization="full", blocks=[1, 3]), 4, later_edits=False)
