"""Gate and edit as modules: orthonormality, sizes, arithmetic in the adapter's own type, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import PAD, formula, padded, random_rows, tiny
from torch import Tensor, nn
from torch.nn import functional

from grun import GrunModel
from grun.method.adapter import AdapterConfig
from grun.method.edit import LoReftEdit, orthonormal_columns
from grun.method.gate import GATES, NOISE
from grun.method.gating import GaussianNoise
from grun.method.intervention import GatedIntervention, gated_intervention


def off_orthonormal(basis: Tensor) -> float:
    """Largest entry of |R^T R - 1|."""
    return float((basis.mT @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).detach().abs().max())


def batch_with_labels(rows: int = 4) -> dict[str, Tensor]:
    batch = padded(random_rows([9] * rows), "right")
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100
    return {**batch, "labels": labels}


# -- the rotation ------------------------------------------------------------------------------------------------------


def train(model: GrunModel, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    batch = batch_with_labels()
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(**batch)
        assert output.loss is not None
        output.loss.backward()
        optimizer.step()


def test_rotation_stays_orthonormal_through_training_saving_reloading_and_more_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GrunModel.wrap(tiny(dtype=torch.float32, num_hidden_layers=2), blocks=[1], rank=4)
    start = model.edits["1"].edit.rotation.detach().clone()
    train(model, 500)
    rotation = model.edits["1"].edit.rotation
    assert (rotation - start).abs().max() > 0.1  # it was trained, and went away from orthonormal itself
    assert off_orthonormal(rotation) > 1e-2
    assert off_orthonormal(orthonormal_columns(rotation)) < 1e-5
    model.save_pretrained(tmp_path)
    model.unwrap()
    again = GrunModel.from_pretrained(model.base, tmp_path).train()
    assert torch.equal(again.edits["1"].edit.rotation, rotation)
    train(again, 100)
    assert not torch.equal(again.edits["1"].edit.rotation, rotation)
    assert off_orthonormal(orthonormal_columns(again.edits["1"].edit.rotation)) < 1e-5


def test_edit_replaces_the_projection_on_the_subspace_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    edit = LoReftEdit(16, 3).double()
    hidden = torch.randn(5, 16).double()
    edited = hidden + edit(hidden)
    basis = orthonormal_columns(edit.rotation)
    torch.testing.assert_close(edited @ basis, edit.source(hidden))
    outside = torch.eye(16).double() - basis @ basis.T
    torch.testing.assert_close(edited @ outside, hidden @ outside)


def test_basis_spans_the_columns_and_is_smooth_and_blind_to_scale() -> None:
    torch.manual_seed(0)
    free = torch.randn(32, 4).double()
    basis = orthonormal_columns(free)
    torch.testing.assert_close(basis @ (basis.T @ free), free)
    torch.testing.assert_close(orthonormal_columns(basis), basis)
    for scale in (1e-3, 0.5, 100.0):
        torch.testing.assert_close(orthonormal_columns(free * scale), basis)
    steps = [orthonormal_columns(free + size * torch.randn(32, 4).double()) - basis for size in (1e-2, 1e-4, 1e-6)]
    for size, step in zip((1e-2, 1e-4, 1e-6), steps, strict=True):
        assert step.abs().max() < 5 * size  # a sign that flips would jump by up to 2
    path = torch.linspace(0, 1, 2001).double()
    other = torch.randn(32, 4).double()
    bases = torch.stack([orthonormal_columns(free * (1 - t) + other * t) for t in path])
    assert (bases[1:] - bases[:-1]).abs().max() < 0.01


def test_nothing_as_large_as_the_square_of_the_hidden_size_is_kept() -> None:
    hidden_size, rank = 512, 4
    for gate in GATES.names():
        module = gated_intervention(config(hidden_size, gate, rank))
        largest = max(tensor.numel() for tensor in module.state_dict().values())
        widest = max((layer.out_features for layer in linear_layers(module.gate or nn.Module())), default=1)
        assert largest <= hidden_size * max(rank, widest)
        assert list(module.buffers()) == []


# -- sizes -------------------------------------------------------------------------------------------------------------


def config(hidden_size: int, gate: str, rank: int = 4) -> AdapterConfig:
    return AdapterConfig(blocks=[20, 25, 31], rank=rank, gate=gate, hidden_size=hidden_size, depth=32)


@pytest.mark.parametrize(
    ("gate", "count"), [("linear", 110_607), ("mlp_3", 3_294_351), ("mlp_5", 14_702_223), ("none", 98_316)]
)
def test_parameter_counts_at_the_published_sizes(gate: str, count: int) -> None:
    one = gated_intervention(config(4096, gate))
    assert 3 * sum(parameter.numel() for parameter in one.parameters()) == count
    assert all(parameter.requires_grad for parameter in one.parameters())


def linear_layers(gate: nn.Module) -> list[nn.Linear]:
    return [layer for layer in gate.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    ("gate", "widths"),
    [("linear", [8, 1]), ("mlp_3", [8, 256, 64, 1]), ("mlp_5", [8, 1024, 512, 256, 64, 1])],
)
def test_gates_have_the_published_layers(gate: str, widths: list[int]) -> None:
    module = GATES.get(gate)(8)
    assert module is not None
    layers = linear_layers(module)
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths
    between = [layer for layer in module.children() if not isinstance(layer, nn.Linear)]
    assert len(between) == len(layers) - 1 and all(isinstance(layer, nn.ReLU) for layer in between)


def test_a_noisy_gate_reads_the_normalized_state_and_adds_noise_in_training_alone() -> None:
    torch.manual_seed(0)
    gate, plain = GATES.get("noisy_mlp_3")(8), GATES.get("mlp_3")(8)
    assert gate is not None and plain is not None
    for noisy, layer in zip(linear_layers(gate), linear_layers(plain), strict=True):
        layer.load_state_dict(noisy.state_dict())
    states = torch.randn(5, 3, 8)
    root = states.pow(2).mean(dim=-1, keepdim=True).sqrt()
    gate.eval()
    assert torch.allclose(gate(states), plain(states / root), atol=1e-5)  # float32; RMSNorm adds 1e-6 to the square
    assert torch.allclose(gate(100 * states), gate(states), atol=1e-5)
    gate.train()
    assert not torch.equal(gate(states), gate(states))
    noise = [module for module in gate.modules() if isinstance(module, GaussianNoise)]
    added = torch.cat([noise[0](torch.zeros(1000, 8)) for _ in range(10)])
    assert added.std().item() == pytest.approx(NOISE, rel=0.02) and abs(added.mean().item()) < 0.01  # 80,000 draws


@pytest.mark.parametrize("gate", ["linear", "mlp_3", "mlp_5", "none"])
@torch.no_grad()
def test_intervention_equals_the_formula(gate: str) -> None:
    torch.manual_seed(0)
    module = gated_intervention(config(32, gate)).double().eval()
    hidden = torch.randn(3, 1, 32).double()
    result = module(hidden)
    weights = {f"edits.0.{name}": value for name, value in module.state_dict().items()}
    edited, logits = formula(weights, 0, hidden)
    torch.testing.assert_close(result.output, edited)
    if gate == "none":
        assert result.gate is None
    else:
        torch.testing.assert_close(result.gate, logits)


@torch.no_grad()
def test_activation_acts_on_the_affine_map() -> None:
    torch.manual_seed(0)
    edit = LoReftEdit(16, 3, torch.nn.functional.relu).double()
    hidden = torch.randn(5, 16).double()
    basis = orthonormal_columns(edit.rotation)
    torch.testing.assert_close((hidden + edit(hidden)) @ basis, edit.source(hidden).clamp(min=0))


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@torch.no_grad()
def test_adapter_is_float32_or_float64_and_the_base_keeps_its_type(
    of_base: torch.dtype, of_adapter: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = GrunModel.wrap(tiny(dtype=of_base), blocks=[1, 3], gate="mlp_3").eval()
    assert {parameter.dtype for parameter in model.parameters()} == {of_adapter}
    output = model(**padded(random_rows([6, 4]), "left"), output_hidden_states=True)
    assert output.logits.dtype == of_base
    assert {logits.dtype for logits in output.gate_logits.values()} == {of_adapter}
    assert {states.dtype for states in output.base_output.hidden_states} == {of_base}


@torch.no_grad()
def test_autocast_does_not_reach_the_adapter() -> None:
    torch.manual_seed(0)
    module = gated_intervention(config(32, "mlp_3")).eval()
    hidden = torch.randn(4, 1, 32)
    expected = module(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.edit.source(hidden).dtype == torch.bfloat16  # autocast is on
        result = module(hidden)
    assert torch.equal(result.gate, expected.gate) and result.gate.dtype == torch.float32
    assert torch.equal(result.output, expected.output)
    coarse = module(hidden.bfloat16())  # a bfloat16 base: only input and output are rounded
    assert coarse.output.dtype == torch.bfloat16
    exact = module(hidden.bfloat16().float())
    assert torch.equal(coarse.gate, exact.gate)
    assert torch.equal(coarse.output, exact.output.bfloat16())


def test_a_wide_open_gate_on_a_retain_row_still_gets_a_gradient() -> None:
    """In bfloat16, sigmoid(20) is exactly 1 and BCE on it has no gradient; on a float32 logit it is 1."""
    base = tiny(dtype=torch.bfloat16)
    model = GrunModel.wrap(base, blocks=[1], gate_bias=20.0)
    nn.init.zeros_(model.edits["1"].gate[0].weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**padded(random_rows([6, 4]), "left")).gate_logits[1]
        assert logits.flatten().tolist() == [20.0, 20.0]
        loss = functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
    loss.backward()
    assert model.edits["1"].gate[0].bias.grad.item() == pytest.approx(1.0)
    assert model.edits["1"].gate[0].weight.grad.abs().max() > 0


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradcheck_of_edit_and_gate() -> None:
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))  # smooth, as finite differences need
    module = GatedIntervention(LoReftEdit(5, 2), gate).double()
    names = [name for name, _ in module.named_parameters()]

    def run(hidden: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        result = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden,))
        return result.output, result.gate

    hidden = torch.randn(2, 1, 5).double().requires_grad_()
    values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(run, (hidden, *values))


@pytest.mark.parametrize("family", ["llama", "odd"])
def test_edits_are_trained_through_the_blocks_above_and_the_base_gets_no_gradient(family: str) -> None:
    torch.manual_seed(0)
    base = tiny(family)
    model = GrunModel.wrap(base, blocks=[0, 2], gate="mlp_3")
    batch = batch_with_labels()
    output = model(**batch)
    assert output.loss is not None
    output.loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_of_a_low_edit_equals_finite_differences_through_the_blocks_above() -> None:
    torch.manual_seed(0)
    model = GrunModel.wrap(tiny("odd"), blocks=[0, 2])  # float64 throughout, unlike norms that go through float32
    batch, step = batch_with_labels(), 1e-5
    bias = model.edits["0"].edit.source.bias

    def loss() -> Tensor:
        return model(**batch).logits.log_softmax(-1)[..., 7].sum()

    loss().backward()
    with torch.no_grad():
        bias[0] += step
        above = loss()
        bias[0] -= 2 * step
        below = loss()
    assert bias.grad[0].item() == pytest.approx(float(above - below) / (2 * step), rel=1e-6)


# -- dropout and bias --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_hidden", [False, True])
def test_dropout_acts_in_training_on_the_change_or_on_the_whole_state(on_hidden: bool) -> None:
    torch.manual_seed(0)
    module = gated_intervention(config(64, "none"))
    module.dropout, module.dropout_on_hidden = 0.5, on_hidden
    hidden = torch.randn(8, 1, 64)
    before = torch.zeros_like(hidden) if on_hidden else hidden
    whole = module.eval()(hidden).output - before
    assert torch.equal(module(hidden).output - before, whole)
    dropped = module.train()(hidden).output - before
    kept = dropped != 0
    assert 0.35 < kept.float().mean() < 0.65
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], atol=1e-5, rtol=1e-4)  # float32 differences


def test_wrap_passes_dropout_on() -> None:
    model = GrunModel.wrap(tiny(), blocks=[1], dropout=0.25, dropout_on_hidden=True)
    assert model.edits["1"].dropout == 0.25 and model.edits["1"].dropout_on_hidden
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3)}
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(**batch).logits, model(**batch).logits)
        assert not model.base.training  # dropout of the base itself stays off
        model.eval()
        assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("gate", ["linear", "mlp_3", "mlp_5"])
def test_gate_bias_sets_the_logit_of_a_gate_that_sees_nothing(gate: str) -> None:
    model = GrunModel.wrap(tiny(), blocks=[1], gate=gate, gate_bias=-3.0)
    last = [layer for layer in model.edits["1"].gate.modules() if isinstance(layer, nn.Linear)][-1]
    assert last.bias.tolist() == [-3.0]
    nn.init.zeros_(last.weight)
    assert model(torch.tensor([[3, 4, PAD]])).gate_logits[1].item() == -3.0
