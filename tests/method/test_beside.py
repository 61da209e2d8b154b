"""A request that is trained while others are in force: they act, none of them is trained or saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import MIXED, PUBLISHED, ROBUST, agree, generated, member, single, stacked
from engine_steps import cached, difference, edited, step_of, task_of
from tiny import RULES, padded, random_rows, tiny
from torch import Tensor

from grun import GrunModel, GrunStack
from grun.config.options import MethodConfig, UnlearnConfig
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.requests.store import RequestStore

DESIGNS = {"published": PUBLISHED, "robust": ROBUST}


def store_of(folder: Path, members: dict[str, Any], **options: Any) -> RequestStore:
    store = RequestStore.create(folder / "store", **options)
    for name, one in members.items():
        single(one).save_pretrained(folder / name)
        store.add(name, folder / name, forget_rows=[Row(f"Who is {name}?", name)], config={})
    return store


def earlier(rule: tuple[str, str, str]) -> dict[str, Any]:
    """Two requests, one at a block below those of the request under test and one at a block of it."""
    return {"a": member(1, rule, blocks=(0, 3)), "b": member(2, rule, blocks=(1,), gate="mlp_3")}


def method(rule: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(("gate_read", "gate_accumulate", "edit_write"), rule, strict=True))


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_what_is_trained_is_what_the_stack_will_be(design: str, tmp_path: Path) -> None:
    """Logits with the new adapter beside the others are those of the stack of all of them."""
    rule = DESIGNS[design]
    store = store_of(tmp_path, earlier(rule))
    model = edited(task_of(beside=str(store.folder), **method(rule))).eval()
    batch = padded(random_rows([9, 6]), "left")
    found = model(**batch)
    assert set(found.gates) == {1, 3}  # of its own gates alone
    stack = GrunStack(tiny()).eval()
    own = model.config, {name: values.clone() for name, values in model.state_dict().items()}
    stack.add_weights({**earlier(rule), "own": own})
    agree(found.logits, stack(**batch).logits)
    for block, gates in stack.request_gates["own"].items():
        agree(found.gates[block], gates)


def beside(rule: tuple[str, str, str], threshold: float | None, **options: Any) -> tuple[GrunModel, GrunStack]:
    """A new request beside two, and a stack that serves all three."""
    base = tiny()
    others = GrunStack(base, gate_threshold=threshold)
    others.add_weights(earlier(rule))
    others.unwrap()
    torch.manual_seed(5)
    model = GrunModel.wrap(base, blocks=(1, 3), rank=3, beside=others, **method(rule), **options).eval()
    model.gate_threshold = threshold
    own = model.config, {name: values.clone() for name, values in model.state_dict().items()}
    return model, stacked({**earlier(rule), "own": own}, gate_threshold=threshold)


@pytest.mark.parametrize(("rule", "threshold"), [*((rule, 0.45) for rule in RULES), (RULES[-1], None)], ids=str)
@torch.no_grad()
def test_over_a_cache_the_others_remember_too(rule: tuple[str, str, str], threshold: float | None) -> None:
    model, stack = beside(rule, threshold)
    prompts = random_rows([9, 6])
    tokens, wanted = generated(stack, prompts)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        found, logits = generated(model, prompts, **options)
        assert torch.equal(found, tokens)
        agree(logits, wanted)
    ids = torch.tensor(prompts[:1])
    beams = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}  # rows of the cache change places
    assert torch.equal(model.generate(ids, **beams), stack.generate(ids, **beams))


@pytest.mark.parametrize("rule", [PUBLISHED, *RULES], ids="-".join)
@torch.no_grad()
def test_where_its_own_gate_is_shut_the_others_act_alone(rule: tuple[str, str, str]) -> None:
    model, _ = beside(rule, 0.3, gate_bias=-30.0)
    others = stacked(earlier(rule), gate_threshold=0.3)
    batch = padded(random_rows([9, 6]), "left")
    assert torch.equal(model(**batch).logits, others(**batch).logits)
    prompts = random_rows([9, 6])
    assert torch.equal(generated(model, prompts)[1], generated(others, prompts)[1])
    assert not torch.equal(others(**batch).logits, tiny()(**batch).logits)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("objective", ["idk", "npo"])
def test_both_engines_train_it_alike(design: str, objective: str, tmp_path: Path) -> None:
    rule = DESIGNS[design]
    store = store_of(tmp_path, earlier(rule), gate_threshold=0.3)
    task = task_of(objective, beside=str(store.folder), **method(rule))
    found, expected = step_of(task, cached(task)), step_of(task)
    assert difference(found, expected) < 1e-9  # float64
    alone = step_of(task_of(objective, **method(rule)))
    assert difference(found, alone) > 1e-3


def test_the_others_are_neither_trained_nor_saved(tmp_path: Path) -> None:
    store = store_of(tmp_path, earlier(PUBLISHED))
    task = task_of(beside=str(store.folder))
    names = {f"edits.{block}.{part}" for block in (1, 3) for part in (
        "edit.rotation", "edit.source.weight", "edit.source.bias", "gate.0.weight", "gate.0.bias"
    )}  # fmt: skip
    model = edited(task)
    assert dict(task.parametrization.trainable_parameters()).keys() == names == model.state_dict().keys()
    model.save_pretrained(tmp_path / "own")
    loaded = GrunModel.from_pretrained(tiny(), tmp_path / "own")
    assert loaded.config.blocks == [1, 3]


@torch.no_grad()
def test_requests_that_are_disabled_do_not_act(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"a": member(1, blocks=(0, 3))})
    batch = padded(random_rows([9, 6]), "left")

    def logits(**more: Any) -> Tensor:
        return edited(task_of(**more)).eval()(**batch).logits

    assert not torch.equal(logits(beside=str(store.folder)), logits())
    store.set_state("a", "disabled")
    assert torch.equal(logits(beside=str(store.folder)), logits())


def test_requests_of_other_designs_cannot_be_beside_it(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"linear": MIXED["linear"]})
    with pytest.raises(ConfigError, match="must read and write where they do: .* or train it on the bare base"):
        task_of(beside=str(store.folder), **method(ROBUST))


def test_only_edits_can_be_trained_beside_requests() -> None:
    config = UnlearnConfig(method=MethodConfig(parametrization="full", beside="store"))
    with pytest.raises(ConfigError, match=r"method\.beside concerns edits; method\.parametrization=full"):
        check(config)
