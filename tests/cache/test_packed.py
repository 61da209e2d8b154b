"""Packed passes give what the model itself gives for each row alone, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from tiny import DEPTH, PACKABLE, WIDTH, random_rows, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from grun.cache import attention, suffix
from grun.cache.attention import Pack
from grun.cache.packed import PackedModel
from grun.cache.suffix import token_logprobs
from grun.method.model import GrunModel
from grun.method.plain import capture

LENGTHS = [13, 1, 9, 2, 9, 21, 5]
"""Rows within the sliding window of 8 and beyond it."""
ROWS = random_rows(LENGTHS, seed=4)
CPU = torch.device("cpu")
CLOSE = 1e-9
"""The order of sums leaves 1e-14 or so in float64, a wrong position or mask changes the first digit."""


def run(packed: PackedModel, rows: Sequence[Sequence[int]]) -> list[dict[Any, Tensor]]:
    """For each row its logits and, by block, its hidden states, from one packed pass in two parts."""
    pack = Pack([len(row) for row in rows], [0] * len(rows), {}, CPU)
    with torch.no_grad():
        _, states = packed.run(pack, torch.tensor([token for row in rows for token in row]), last=1, capture=[0, 1])
        final, above = packed.run(pack, states[1], first=2, capture=range(2, DEPTH))
        found: dict[Any, Tensor] = {"logits": packed.logits(final), **states, **above}
    parts = {name: values.split([len(row) for row in rows]) for name, values in found.items()}
    return [{name: parts[name][index] for name in parts} for index in range(len(rows))]


def alone(model: PreTrainedModel, row: Sequence[int]) -> dict[Any, Tensor]:
    """The same from the model itself."""
    found: dict[Any, Tensor] = {}
    with torch.no_grad(), capture(model, range(DEPTH), found):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
    return {"logits": logits[0], **{block: states[0] for block, states in found.items()}}


def assert_same(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], close: float = CLOSE) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", PACKABLE)
def test_rows_of_a_packed_pass_equal_each_row_alone(family: str) -> None:
    model = tiny(family)
    for row, found in zip(ROWS, run(PackedModel(model), ROWS), strict=True):
        assert_same(found, alone(model, row))


def test_what_a_block_is_given_goes_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model over several devices; here they are all the CPU."""
    packed, moved = PackedModel(tiny("llama")), []

    def counted(given: Any, device: torch.device) -> Any:
        moved.append(device)
        return send_to_device(given, device)

    monkeypatch.setattr("grun.cache.packed.send_to_device", counted)
    expected = run(packed, ROWS)
    assert not moved and not packed.is_spread
    packed.is_spread, packed._head_device = True, CPU
    for row, other in zip(run(packed, ROWS), expected, strict=True):
        assert_same(row, other)
    assert moved == [CPU] * DEPTH


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
def test_how_rows_are_attended_together_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedModel(tiny(family))
    order = sorted(range(len(ROWS)), key=lambda index: LENGTHS[index])
    expected = [run(packed, [row])[0] for row in ROWS]
    groups = attention._groups
    for all_rows in (False, True):
        monkeypatch.setattr(attention, "_groups", lambda lengths, *, together, all_=all_rows: groups(lengths, all_))
        for rows in (range(len(ROWS)), order):
            for found, index in zip(run(packed, [ROWS[index] for index in rows]), rows, strict=True):
                assert_same(found, expected[index])


def test_neighbors_of_one_length_are_a_group_or_all_rows_are() -> None:
    assert list(attention._groups([4, 4, 9, 4], together=False)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(attention._groups([4, 4, 9, 4], together=True)) == [slice(0, 4)]


# -- the base ---------------------------------------------------------------------------------------------------------


def everything_of(model: PreTrainedModel) -> dict[str, Any]:
    """What could have been changed: every attribute and hook of every module, the config, where weights lie."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        found[f"{name}, attributes"] = {key: id(value) for key, value in vars(module).items()}
        hooks = {key: value for key, value in vars(module).items() if "hooks" in key}
        found[f"{name}, hooks"] = {
            key: list(value) if hasattr(value, "__iter__") else value for key, value in hooks.items()
        }
        found[f"{name}, modules"] = {key: id(child) for key, child in module._modules.items()}
        found[f"{name}, forward"] = "forward" in vars(module)
    for name, value in model.state_dict().items():
        found[name] = value.data_ptr(), value._version, value.clone()
    return found


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple):
        return all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_nothing_of_the_base_is_changed_and_it_computes_bit_for_bit_the_same(family: str, wrapped: bool) -> None:
    model = tiny(family)
    if wrapped:
        GrunModel.wrap(model, blocks=[1])
    before, logits = everything_of(model), [alone(model, row)["logits"] for row in ROWS]
    run(PackedModel(model), ROWS)
    after = everything_of(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not equal(before[name], after[name])] == []
    for row, expected in zip(ROWS, logits, strict=True):
        assert torch.equal(alone(model, row)["logits"], expected)


def test_hooks_and_edits_on_the_base_do_not_act_in_packed_passes() -> None:
    """Whether they were there before the packed model was made or came later."""
    model = tiny("llama")
    expected = run(PackedModel(model), ROWS)

    def spoil(_: nn.Module, args: Any, output: Any = None) -> Any:
        return args if output is None else output + 100 if isinstance(output, Tensor) else None

    earlier = PackedModel(model)
    for name in ("model", "model.layers.1", "model.layers.2.self_attn.q_proj", "model.norm", "lm_head"):
        model.get_submodule(name).register_forward_hook(spoil)
        model.get_submodule(name).register_forward_pre_hook(lambda *_: pytest.fail("a hook of the base acts"))
    for made in (earlier, PackedModel(model)):
        for found, row in zip(run(made, ROWS), expected, strict=True):
            assert all(torch.equal(found[name], row[name]) for name in row)

    other = tiny("llama")
    torch.manual_seed(0)
    GrunModel.wrap(other, blocks=[1])
    assert not torch.equal(alone(other, ROWS[0])["logits"], expected[0]["logits"])
    assert torch.equal(run(PackedModel(other), ROWS)[0]["logits"], expected[0]["logits"])


def test_weights_changed_or_moved_in_place_are_seen() -> None:
    model = tiny("llama")
    packed = PackedModel(model)
    before = run(packed, ROWS)[0]["logits"]
    with torch.no_grad():
        model.get_submodule("model.layers.2.self_attn.v_proj").weight.mul_(1.5)
        model.get_submodule("lm_head").weight[3] += 1
    found = run(packed, ROWS)[0]["logits"]
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, alone(model, ROWS[0])["logits"], rtol=CLOSE, atol=CLOSE)
    nn.Module.to(model, torch.float32)
    assert run(packed, ROWS)[0]["logits"].dtype == torch.float32


# -- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("per_slice", [1, 3, 100])
def test_token_log_probabilities_and_gradient_are_those_of_log_softmax(
    family: str, per_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps its logits after the head. 1e-12: sums of 64 numbers in float64."""
    packed = PackedModel(tiny(family))
    monkeypatch.setattr(suffix, "SLICE", per_slice * packed.vocabulary)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(10, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(0, packed.vocabulary, (10,), generator=generator)
    weight = torch.randn(10, dtype=torch.float64, generator=generator)

    expected = torch.log_softmax(packed.logits(hidden), dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), hidden)
    slices: list[int] = []
    logits = packed.logits

    def counted(states: Tensor) -> Tensor:
        slices.append(len(states))
        return logits(states)

    monkeypatch.setattr(packed, "logits", counted)
    found = token_logprobs(packed, hidden, targets)
    (gradient,) = torch.autograd.grad((found * weight).sum(), hidden)
    assert slices == {1: [1] * 10, 3: [3, 3, 3, 1], 100: [10]}[per_slice]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(packed, hidden.detach(), targets), expected, rtol=1e-12, atol=1e-12)


def test_log_probabilities_are_computed_in_float32_at_least() -> None:
    packed = PackedModel(tiny("llama", dtype=torch.bfloat16))
    hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    found = token_logprobs(packed, hidden, torch.tensor([1, 2, 3, 4]))
    expected = torch.log_softmax(packed.logits(hidden).float(), dim=1)[range(4), [1, 2, 3, 4]]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # logits rounded once, sums in float32
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
