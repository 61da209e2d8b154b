"""Passes of few launches, as on a GPU: they give what the model's own modules give, and are left where they do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engine_steps import cached, difference, edited, step_of, task_of
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from grun.cache import fused
from grun.cache.attention import Pack
from grun.cache.packed import PackedModel

CPU = torch.device("cpu")
CLOSE = 1e-9
"""Relative, in float64: the order of sums leaves 1e-13 or so."""


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU the code thinks that each operator costs a launch."""
    for room in ("cache.attention", "cache.packed", "cache.suffix", "method.edit"):
        monkeypatch.setattr(f"grun.{room}.launches", lambda device: True)


class Launches(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def finished(base: Any, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states of two rows and the gradient of what went into block `first`."""
    states = torch.randn(14, 32, generator=torch.Generator().manual_seed(2)).to(base.dtype).requires_grad_()
    final, _ = PackedModel(base).run(Pack([9, 5], [0, 0], {}, CPU), states, first=first)
    final.square().sum().backward()
    assert states.grad is not None
    return final.detach(), states.grad


@pytest.mark.parametrize(
    ("family", "fewest"),
    [("llama", 17), ("qwen2", 17), ("mistral", 17), ("gemma2", 20), ("qwen3", 24), ("olmo2", 16), ("gpt2", 0)],
    ids=str,
)
def test_states_and_gradients_are_the_models_own(
    family: str, fewest: int, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, to its rounding: 1e-5 is some hundred roundings. Norms, MLPs and attentions of four blocks."""
    base = tiny(family, dtype=torch.float32).requires_grad_(False)
    for name, weight in base.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    replaced = []
    monkeypatch.setattr("grun.cache.packed.fuse", lambda model: replaced.append(fused.fuse(model)))
    found = finished(base)
    assert replaced[0] >= fewest and (fewest or not replaced[0])
    monkeypatch.setattr("grun.cache.packed.fuse", lambda model: 0)
    for one, other in zip(found, finished(base), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"])
def test_a_whole_step_is_the_plain_one(family: str, as_on_a_gpu: None) -> None:
    """Rows of all lengths together, with their prompts as prefixes; a window is shorter than some."""
    for objective, method in (("gd", {}), ("npo", {"gate_read": "every_token", "gate_accumulate": "running_max"})):
        task = task_of(objective, tiny(family), **method)
        assert difference(step_of(task, cached(task)), step_of(task)) < CLOSE


def test_edits_alike_share_one_decomposition_and_others_have_their_own(as_on_a_gpu: None) -> None:
    for options in ({"blocks": [1, 2, 3]}, {"activation": "relu"}):
        task = task_of("gd", **options)
        with Launches() as launches:
            found = step_of(task, cached(task))
        assert launches.found["linalg_qr"] == 1
        assert difference(found, step_of(task)) < CLOSE
        assert all(edit.edit.next_basis is None for edit in edited(task).own_edits().values())


def test_weights_that_are_trained_get_their_gradients(as_on_a_gpu: None) -> None:
    found = []
    for few in (True, False):
        base = tiny("llama").requires_grad_(True)
        packed = PackedModel(base)
        if not few:
            for module in packed._decoder.modules():
                module.__dict__.pop("forward", None)
        final, _ = packed.run(Pack([9, 5], [0, 0], {}, CPU), torch.arange(1, 15))
        final.square().sum().backward()
        found.append({name: weight.grad for name, weight in base.named_parameters()})
    for name, wanted in found[1].items():
        assert (wanted is None) == (found[0][name] is None), name
        assert wanted is None or torch.allclose(found[0][name], wanted, rtol=CLOSE, atol=CLOSE), name


def test_a_block_computes_its_products_and_little_else_and_an_attention_that_differs_keeps_its_own(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven products forward and seven backward, and two gathers each way, without a copy between them."""
    one_block = {"mm": 11, "addmm_": 3, "index_select": 4, "cat": 1, "addcmul_": 4, "silu": 1, "silu_backward": 1}
    counts = []
    for first in (1, 2):
        base = tiny("llama").requires_grad_(False)
        with Launches() as launches:
            finished(base, first)
        counts.append(launches.found)
    assert not (counts[0] - counts[1]).keys() & {"clone", "copy_", "new_zeros", "index_copy", "index_put"}
    assert not one_block.items() - (counts[0] - counts[1]).items()

    def halved(query: Any, key: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return query * cos.unsqueeze(1) / 2, key * sin.unsqueeze(1)

    monkeypatch.setitem(type(base.model.layers[0].self_attn).forward.__globals__, fused.ROTATE, halved)
    packed = PackedModel(base)
    assert not any("forward" in vars(block.self_attn) for block in packed.blocks)
    assert all("forward" in vars(block.mlp) for block in packed.blocks)
