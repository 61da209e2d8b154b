"""Files of the published GRUN code become adapters that compute the same; whatever is wrong with them is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import pyvene
import torch
from demo import refused
from safetensors.torch import load_file
from tiny import DEPTH, WIDTH, plain_hooks, random_rows, tiny
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import LlamaForCausalLM

from grun import GrunModel
from grun.cli import main
from grun.data import templates
from grun.data.templates import TEMPLATES

WIDTHS = {"linear": [1], "mlp_3": [256, 64, 1], "mlp_5": [1024, 512, 256, 64, 1], "none": []}
"""Of the gate's linear layers, spec 1.2."""
DOTS = "intkey_layer.{}.comp.block_output.unit.pos.nunit.1#0.bin"
UNDERSCORES = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#0.bin"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in a folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny(dtype=torch.float32).save_pretrained(folder)
    return folder


def layer_state(gate: str, seed: int, *, rank: int = 4, width: int = WIDTH) -> State:
    """One block's tensors by the names and in the shapes that upstream gives them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = {
        "weight": draw(rank, width) / 4,
        "bias": draw(rank),
        "rotate_layer": torch.linalg.qr(draw(width, rank))[0] * torch.tensor([1.0, -1.0, -1.0, 1.0] * 4)[:rank],
    }
    inputs = width
    for number, outputs in enumerate(WIDTHS[gate]):
        place = "gate_func" if gate == "linear" else f"gate_func.{2 * number}"
        state[f"{place}.weight"] = draw(outputs, inputs) / inputs**0.5
        state[f"{place}.bias"] = draw(outputs) / 2
        inputs = outputs
    return state


def write(folder: Path, states: dict[int, State], name: str = DOTS) -> Path:
    folder.mkdir(exist_ok=True)
    for block, state in states.items():
        torch.save(state, folder / name.format(block))
    return folder


def run(folder: Path, base: Path, out: Path, *more: str) -> int:
    return main(["import", f"upstream={folder}", f"model={base}", f"output_dir={out}", *more])


def assert_refused(
    capsys: Any, expected: str, folder: Path, base: Path, out: Path, *more: str, status: int = 1
) -> None:
    """One line that says what is wrong, and nothing is written."""
    refused(capsys, ["import", f"upstream={folder}", f"model={base}", f"output_dir={out}", *more], status, expected)
    assert not out.exists()


def as_weights(states: dict[int, State]) -> State:
    """The tensors by the names that an adapter gives them, for the formula that is written in `tiny`."""
    places = {"weight": "edit.source.weight", "bias": "edit.source.bias", "rotate_layer": "edit.rotation"}
    linear = {"gate_func.weight": "gate.0.weight", "gate_func.bias": "gate.0.bias"}
    return {
        f"edits.{block}.{(places | linear).get(name) or name.replace('gate_func', 'gate')}": value
        for block, state in states.items()
        for name, value in state.items()
    }


@torch.no_grad()
def assert_same(folder: Path, base: Path, states: dict[int, State]) -> None:
    ids = torch.tensor(random_rows([9, 9, 9], seed=5))
    plain = LlamaForCausalLM.from_pretrained(base)
    untouched = plain(ids).logits
    with plain_hooks(plain, "llama", as_weights(states), [[5]] * 3) as gates:
        expected = plain(ids).logits
    assert (expected - untouched).abs().max() > 0.1  # the edit shows
    model = GrunModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder, strict=True)
    found = model(ids, prompt_lengths=torch.tensor([6, 6, 6]))
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    gated = any(name.startswith("gate") for name in states[min(states)])
    assert set(found.gates) == (set(states) if gated else set())
    for block, probability in found.gates.items():
        wanted = torch.cat([torch.stack(of_row) for of_row in gates[block]]).sigmoid()
        torch.testing.assert_close(probability.flatten(), wanted, rtol=1e-5, atol=1e-5)


# -- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DOTS, UNDERSCORES], ids=["dots", "underscores"])
@pytest.mark.parametrize("gate", list(WIDTHS))
def test_an_imported_adapter_computes_what_upstreams_formula_says(
    gate: str, name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {1: layer_state(gate, 1), 3: layer_state(gate, 2)}
    out = tmp_path / "made" / "adapter"
    assert run(write(tmp_path / "files", states, name), base, out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(os.listdir(out))
    stored = json.loads((out / "adapter_config.json").read_text())
    assert (stored["blocks"], stored["rank"], stored["gate"], stored["template"]) == ([1, 3], 4, gate, None)
    assert_same(out, base, states)
    record = json.loads((out / "run.json").read_text())
    assert set(record) == {
        *("files", "command", "objective", "parametrization", "config", "upstream", "base_fingerprint", "parameters"),
        "versions",
    }
    assert record["parametrization"] == ("reft" if gate == "none" else "grun")
    assert list(record["upstream"]) == [name.format(block) for block in states]


def through_torch(rank: int, steps: int) -> nn.Module:
    """A rotation as upstream holds it: torch's orthogonal parametrization with trivialization, trained a little."""

    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linalg.qr(torch.randn(WIDTH, rank))[0])

    layer = orthogonal(Rotation())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.0)
    target = torch.randn(WIDTH, rank)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    return layer


def full_state(gate: str, layer: nn.Module, seed: int) -> State:
    """A state dict that keeps the parametrization's own tensors and pyvene's sizes."""
    state = layer_state(gate, seed)
    del state["rotate_layer"]
    renamed = {f"learned_source.{name}" if "." not in name else name: value for name, value in state.items()}
    inner = {f"rotate_layer.{name}": value.clone() for name, value in layer.state_dict().items()}
    return {"embed_dim": torch.tensor(WIDTH), "interchange_dim": torch.tensor(WIDTH), **renamed, **inner}


@pytest.mark.parametrize("gate", ["none", "linear"])
def test_a_rotation_stored_by_torchs_parametrization_is_computed_from_it(gate: str, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    layers = {block: through_torch(4, steps=20) for block in (0, 2)}
    stored = {block: full_state(gate, layer, block) for block, layer in layers.items()}
    assert "rotate_layer.parametrizations.weight.0.base" in stored[0]
    with torch.no_grad():
        slim = {
            block: {**layer_state(gate, block), "rotate_layer": layer.weight.detach().clone()}
            for block, layer in layers.items()
        }
    assert run(write(tmp_path / "files", stored), base, tmp_path / "out") == 0
    assert_same(tmp_path / "out", base, slim)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    torch.testing.assert_close(written["edits.2.edit.rotation"], slim[2]["rotate_layer"], rtol=0, atol=1e-6)


class Loreft(pyvene.SourcelessIntervention, pyvene.TrainableIntervention, pyvene.DistributedRepresentationIntervention):
    """As the published ungated one: its whole state dict is saved."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, keep_last_dim=True)
        self.learned_source = nn.Linear(WIDTH, 4)
        self.rotate_layer = through_torch(4, steps=3)


def test_files_that_stock_pyvene_writes_are_read(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    made = {block: Loreft(embed_dim=WIDTH, low_rank_dimension=4) for block in (1, 2)}
    places = [
        {"layer": block, "component": "block_output", "low_rank_dimension": 4, "intervention": intervention}
        for block, intervention in made.items()
    ]
    pyvene.IntervenableModel(places, tiny(dtype=torch.float32)).save(str(tmp_path / "files"))
    assert UNDERSCORES.format(1) in os.listdir(tmp_path / "files")
    assert run(tmp_path / "files", base, tmp_path / "out") == 0
    with torch.no_grad():
        slim = {
            block: {
                "weight": intervention.learned_source.weight.clone(),
                "bias": intervention.learned_source.bias.clone(),
                "rotate_layer": intervention.rotate_layer.weight.clone(),
            }
            for block, intervention in made.items()
        }
    assert_same(tmp_path / "out", base, slim)


def test_bfloat16_tensors_become_float32_with_the_same_values(base: Path, tmp_path: Path) -> None:
    state = {
        name: value if name == "rotate_layer" else value.bfloat16() for name, value in layer_state("mlp_3", 1).items()
    }
    assert run(write(tmp_path / "files", {2: state}), base, tmp_path / "out") == 0
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert torch.equal(stored["edits.2.gate.2.weight"], state["gate_func.2.weight"].float())
    assert_same(tmp_path / "out", base, {2: {name: value.float() for name, value in state.items()}})


def test_the_template_is_the_named_one_else_the_one_beside_the_base(base: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "files", {1: layer_state("linear", 1)})

    def template(out: str, folder: Path, *more: str) -> Any:
        assert run(files, folder, tmp_path / out, *more) == 0
        stored = json.loads((tmp_path / out / "adapter_config.json").read_text())["template"]
        return stored and stored["name"]

    assert template("none", base) is None
    assert template("named", base, "template=grun_paper") == "grun_paper"
    beside = tmp_path / "beside"
    tiny(dtype=torch.float32).save_pretrained(beside)
    templates.store(TEMPLATES.get("llama2"), beside)
    assert template("stored", beside) == "llama2"
    assert template("both", beside, "template=grun_paper") == "grun_paper"


# -- where it is written -----------------------------------------------------------------------------------------------


def test_an_import_that_fails_while_writing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path / "files", {1: layer_state("linear", 1)})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grun.runtime.runs.finish_run", fail)
    assert_refused(capsys, "No space left on device", files, base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["files"]


# -- refused -----------------------------------------------------------------------------------------------------------


def without(name: str) -> Any:
    return lambda state: state.pop(name)


def times(name: str, factor: float) -> Any:
    return lambda state: state.update({name: state[name] * factor})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (without("weight"), "tensor 'weight' is missing"),
        (without("rotate_layer"), "tensor 'rotate_layer' is missing"),
        (without("gate_func.bias"), "make none of the gates linear, mlp_3, mlp_5"),
        (lambda state: state.update(extra=torch.zeros(2)), "unknown tensor 'extra'"),
        (lambda state: state.update({"gate_func.weight": torch.zeros(7, WIDTH)}), "shapes [7, 32], [1]"),
        (times("rotate_layer", 0.99), "rotate_layer are not orthonormal (off by 0.02, at most 0.001)"),
        (times("weight", torch.nan), "'weight' holds numbers that are not finite"),
        (lambda state: state.update(weight=torch.zeros(3, WIDTH)), "needs weight [4, 32] and bias [4]"),
        (lambda state: state.update(rotate_layer=torch.zeros(4)), "is no matrix [hidden size, rank]"),
    ],
    ids=range(9),
)
def test_a_file_that_is_not_upstreams_is_refused(
    spoil: Any, expected: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = layer_state("linear", 1)
    spoil(state)
    assert_refused(capsys, expected, write(tmp_path / "files", {1: state}), base, tmp_path / "out")


def test_weight_decay_that_destroyed_a_stored_parametrization_is_seen(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(4)
    state = full_state("none", through_torch(4, steps=0), 1)
    state["rotate_layer.parametrizations.weight.original"] *= 0.999  # its diagonal is read as an integer: 0
    assert_refused(capsys, "not orthonormal (off by 1,", write(tmp_path / "files", {1: state}), base, tmp_path / "out")


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm-done-by-a-pickle",)


@pytest.mark.parametrize("kind", ["pickle", "text", "cut", "tensor", "numbers"])
def test_a_file_that_is_no_state_dict_is_refused_and_never_run(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "files", {1: layer_state("linear", 1)}) / DOTS.format(1)
    if kind == "pickle":
        torch.save({"weight": Harmful()}, path)
    elif kind == "text":
        path.write_text("not at all")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        torch.save(torch.zeros(3) if kind == "tensor" else {"weight": 3}, path)
    expected = "holds no state dict" if kind in ("tensor", "numbers") else "cannot be read as tensors alone"
    assert_refused(capsys, expected, path.parent, base, tmp_path / "out")
    assert not (tmp_path / "harm-done-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({1: ("linear", {}), 3: ("linear", {"rank": 3})}, "blocks 1 and 3 differ in their rank (4 and 3)"),
        ({1: ("linear", {}), 3: ("mlp_3", {})}, "blocks 1 and 3 differ in their gate (linear and mlp_3)"),
        ({1: ("linear", {}), 3: ("none", {})}, "blocks 1 and 3 differ in their gate (linear and none)"),
        ({1: ("linear", {}), 3: ("linear", {"width": 48})}, "differ in their hidden size (32 and 48)"),
        ({1: ("linear", {"width": 48})}, "made for hidden size 48, the base has 32"),
        ({1: ("linear", {}), DEPTH: ("linear", {})}, "block 4 lies beyond the base's 4 blocks, 0..3"),
    ],
    ids=range(6),
)
def test_files_that_contradict_each_other_or_the_base_are_refused(
    states: Any, expected: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {block: layer_state(gate, block, **options) for block, (gate, options) in states.items()}
    assert_refused(capsys, expected, write(tmp_path / "files", made), base, tmp_path / "out")


def test_folders_without_usable_files_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert_refused(capsys, "no such folder", tmp_path / "nowhere", base, out)
    (tmp_path / "files").mkdir()
    assert_refused(capsys, "holds no file intkey_layer", tmp_path / "files", base, out)
    inner = write(tmp_path / "files" / "intervenable_model", {1: layer_state("linear", 1)})
    assert_refused(capsys, f"there are some in {inner}", inner.parent, base, out)
    write(inner, {1: layer_state("linear", 2)}, UNDERSCORES)
    assert_refused(capsys, "edit the same block 1", inner, base, out)
    other = write(tmp_path / "other", {1: layer_state("linear", 1)}, DOTS.replace("block_output", "mlp_output"))
    assert_refused(capsys, "does not edit one position of a block's output", other, base, out)


def test_options_that_are_missing_or_unknown_are_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = write(tmp_path / "files", {1: layer_state("linear", 1)}), tmp_path / "out"
    assert main(["import", f"upstream={files}", f"output_dir={out}"]) == 2
    assert "model is not set" in capsys.readouterr().err
    assert_refused(capsys, "unknown template 'lama2'", files, base, out, "template=lama2", status=2)
    assert_refused(capsys, "no such folder", files, tmp_path / "nowhere", out)
    assert main(["import", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {option}=" in printed for option in ("upstream", "model", "output_dir", "overwrite", "template"))
