"""Several requests on one base in one pass: equal to the sum that this file computes token by token by hooks."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from edited_models import DESIGNS, MIXED, PUBLISHED, ROBUST, Member, agree, generated, member, single, stacked
from tiny import PAD, WIDTH, blocks_of, formula, padded, random_rows, tiny
from torch import Tensor, nn
from transformers import DynamicCache
from watched import Recorded

import grun.method.stack.gates
from grun import GrunModel, GrunStack
from grun.errors import AdapterError, ConfigError, ModelError
from grun.evaluation.attacks.base import ATTACKS
from grun.evaluation.shared_scoring import Subject
from grun.loading.adapters import Loaded
from grun.method.adapter import AdapterConfig
from grun.method.gate import GATES, GateBuilder
from grun.method.stack.combination import RULES as COMBINATIONS
from grun.method.stack.group import Kind
from grun.method.stack.stacked import StackedIntervention


def noisy_input(hidden: Tensor, gate: str) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() if gate == "noisy_mlp_3" else hidden


def terms(one: Member, block: int, hidden: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in force [tokens], where they count, and the ungated edit of hidden states [tokens, width] of one row."""
    config, weights = one
    own = {name.removeprefix(f"edits.{block}."): value for name, value in weights.items()}
    basis = own["edit.rotation"]
    basis, triangle = torch.linalg.qr(basis)
    basis = basis * triangle.diagonal().sign()
    target = hidden @ own["edit.source.weight"].T + own["edit.source.bias"]
    if config.activation:
        target = target.relu()
    edit = (target - hidden @ basis) @ basis.T
    values = noisy_input(hidden, config.gate)
    layers = sorted({int(name.split(".")[1]) for name in own if name.startswith("gate.")})
    for number, layer in enumerate(layers):
        values = values @ own[f"gate.{layer}.weight"].T + own[f"gate.{layer}.bias"]
        if number < len(layers) - 1:
            values = values.relu()
    logits = values.squeeze(1)
    columns = torch.arange(len(hidden))
    if config.gate_read == "last_prompt":
        logits = logits[last].expand(len(hidden))
    elif config.gate_accumulate == "running_max":
        logits = torch.stack([logits[: end + 1].max() for end in range(len(hidden))])
    written = {"last_prompt": columns == last, "sticky": columns >= last, "every_token": columns >= 0}
    return logits, written[config.edit_write], edit


def summed(members: dict[str, Member], combination: str, block: int, hidden: Tensor, last: int) -> Tensor:
    """hidden + sum over requests, token by token, by what `grun.method.stack.combination` says of each rule."""
    there = [one for one in members.values() if block in one[0].blocks]
    found = [terms(one, block, hidden, last) for one in there]
    edited = hidden.clone()
    for token in range(len(hidden)):
        acting = [(float(logits[token]), edit[token]) for logits, written, edit in found if written[token]]
        gates = [1 / (1 + torch.exp(torch.tensor(-logit, dtype=torch.float64))) for logit, _ in acting]
        total = sum(torch.exp(torch.tensor(logit, dtype=torch.float64)) for logit, _ in acting)
        for (logit, edit), gate in zip(acting, gates, strict=True):
            weight = {
                "sum": gate,
                "grun_paper": (0.6 * len(there) + 0.6) * gate,
                "max_gate": gate if gate == max(gates) else 0.0,
                "softmax_gate": gate * torch.exp(torch.tensor(logit, dtype=torch.float64)) / total,
            }[combination]
            edited[token] += weight * edit
    return edited


def whole_pass(members: dict[str, Member], combination: str, row: list[int], last: int) -> Tensor:
    """Logits [tokens, vocabulary] of one row whose prompt ends at column `last`, by hooks of this file."""
    base = tiny()

    def hook(block: int, _: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        edited = summed(members, combination, block, hidden[0], last).unsqueeze(0)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    for block, module in enumerate(blocks_of(base, "llama")):
        module.register_forward_hook(functools.partial(hook, block))
    with torch.no_grad():
        logits: Tensor = base(torch.tensor([row])).logits[0]
    return logits


# -- what a pass computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", list(COMBINATIONS))
@pytest.mark.parametrize("names", [["linear", "second"], ["robust", "robust2"], list(MIXED)], ids="+".join)
@torch.no_grad()
def test_generation_is_that_of_whole_passes_with_every_requests_edit(names: list[str], combination: str) -> None:
    members = {**MIXED, "robust2": member(7, ROBUST, gate="noisy_mlp_3", rank=3)}
    members = {name: members[name] for name in names}
    stack = stacked(members, rule=combination)
    prompts = random_rows([9, 6])
    tokens, logits = generated(stack, prompts)
    for index, prompt in enumerate(prompts):
        row = prompt + tokens[index, :-1].tolist()
        wanted = whole_pass(members, combination, row, len(prompt) - 1)
        agree(logits[index], wanted[-6:])
        assert (wanted - tiny()(torch.tensor([row])).logits[0]).abs().max() > 0.01


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 3}], ids=str)
@torch.no_grad()
def test_chunks_beams_and_passes_without_cache_find_the_same(options: dict[str, Any]) -> None:
    stack = stacked(MIXED)
    prompts = random_rows([9, 6])
    if "num_beams" in options:
        batch = torch.tensor(prompts[:1])
        answer = stack.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=5, num_return_sequences=3,
            do_sample=False, eos_token_id=None, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True,
            length_penalty=0.0, **options,
        )  # fmt: skip
        assert len({tuple(row) for row in answer.sequences.tolist()}) == 3
        for row, score in zip(answer.sequences.tolist(), answer.sequences_scores, strict=True):
            logp = whole_pass(MIXED, "sum", row[:-1], 8)[8:].log_softmax(-1)
            agree(score, logp[torch.arange(5), torch.tensor(row[9:])].sum())
        return
    wanted, logits = generated(stack, prompts)
    tokens, again = generated(stack, prompts, **options)
    assert torch.equal(tokens, wanted)
    agree(again, logits)


@pytest.mark.parametrize("rule", DESIGNS, ids="-".join)
@pytest.mark.parametrize("combination", [name for name in COMBINATIONS if name != "grun_paper"])
@torch.no_grad()
def test_a_stack_of_one_is_the_adapter_alone(rule: tuple[str, str, str], combination: str) -> None:
    one = member(1, rule, gate="mlp_3")
    alone, stack = single(one), stacked({"only": one}, rule=combination)
    prompts = random_rows([9, 6])
    tokens, logits = generated(alone, prompts)
    found, again = generated(stack, prompts)
    assert torch.equal(found, tokens)
    agree(again, logits)
    batch = padded(prompts, "left")
    outputs = alone(**batch), stack(**batch)
    for block, gate in outputs[0].gates.items():
        agree(outputs[1].gates[block], gate)
        agree(stack.request_gates["only"][block], gate)


@torch.no_grad()
def test_the_published_rule_edits_one_request_1_2_times_and_two_1_8_times() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    one, other = MIXED["linear"], MIXED["second"]
    changes = [formula(weights, 1, hidden)[0] - hidden for _, weights in (one, other)]
    for members, gain in (({"a": one}, 1.2), ({"a": one, "b": other}, 1.8)):
        edit = stacked(members, rule="grun_paper").edit_at()[1]
        agree(edit(hidden).output - hidden, gain * sum(changes[: len(members)]))


@torch.no_grad()
def test_the_order_of_requests_changes_nothing_and_gates_go_by_name() -> None:
    batch = padded(random_rows([9, 6]), "left")
    stack, turned = stacked(MIXED), stacked(dict(reversed(MIXED.items())))
    agree(stack(**batch).logits, turned(**batch).logits)
    assert list(stack.request_gates) == list(MIXED)
    for name, by_block in stack.request_gates.items():
        assert set(by_block) == set(MIXED[name][0].blocks)
        for block, gates in by_block.items():
            agree(turned.request_gates[name][block], gates)
            assert bool((gates <= stack.last_gates[block] + 1e-12).all())


@pytest.mark.parametrize("removed", list(MIXED))
@torch.no_grad()
def test_removing_a_request_gives_the_stack_of_the_others_bit_for_bit(removed: str) -> None:
    batch = padded(random_rows([9, 6]), "left")
    stack = stacked(MIXED)
    stack(**batch)
    stack.remove(removed)
    others = stacked({name: one for name, one in MIXED.items() if name != removed})
    assert torch.equal(stack(**batch).logits, others(**batch).logits)
    assert stack.names == others.names


@torch.no_grad()
def test_a_stack_without_requests_and_an_unwrapped_base_are_the_base() -> None:
    batch = padded(random_rows([9, 6]), "left")
    untouched = tiny()(**batch).logits
    stack = stacked(MIXED)
    assert not torch.equal(stack(**batch).logits, untouched)
    for name in MIXED:
        stack.remove(name)
    assert torch.equal(stack(**batch).logits, untouched) and stack.last_gates == {}
    base = stacked(MIXED).unwrap()
    assert torch.equal(base(**batch).logits, untouched)
    assert single(MIXED["linear"])(**batch).logits.shape == untouched.shape


# -- thresholds -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_below_the_threshold_nothing_is_computed_and_above_only_what_is_open() -> None:
    members = {"open": member(1, gate_bias=30.0), "shut": member(2, gate_bias=-30.0)}
    batch = padded(random_rows([9, 6]), "left")
    untouched = tiny()(**batch).logits
    assert torch.equal(stacked({"shut": members["shut"]}, gate_threshold=0.5)(**batch).logits, untouched)
    both, one = (stacked(kept, gate_threshold=0.5)(**batch).logits for kept in (members, {"open": members["open"]}))
    agree(both, one)
    assert (both - untouched).abs().max() > 0.01


@torch.no_grad()
def test_tokens_at_which_no_gate_is_open_stay_as_they_are() -> None:
    """Only edits of the tokens and requests above the threshold act, the same as without it."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 1, WIDTH, dtype=torch.float64)
    edit = stacked({"a": MIXED["linear"], "b": MIXED["second"]}).edit_at()[1]
    gates = torch.sigmoid(edit(hidden).opening)[:, 0]
    edit.threshold = threshold = float(gates.flatten().sort().values[4:6].mean())  # between two of ten
    found = edit(hidden).output[:, 0]
    assert 0 < int((gates >= threshold).any(1).sum()) < 5
    for row in range(5):
        wanted = hidden[row, 0].clone()
        for place, name in enumerate(("linear", "second")):
            if gates[row, place] >= threshold:
                wanted += formula(MIXED[name][1], 1, hidden[row, 0])[0] - hidden[row, 0]
        agree(found[row], wanted)
        assert bool((gates[row] >= threshold).any()) or torch.equal(found[row], hidden[row, 0])


# -- state and cost ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_that_was_filled_under_other_requests_is_refused() -> None:
    stack = stacked({"a": MIXED["robust"]})
    cache = DynamicCache()
    ids = torch.tensor(random_rows([6]))
    stack(input_ids=ids, past_key_values=cache)
    copied = copy.deepcopy(cache)
    stack(input_ids=ids[:, :1], past_key_values=copied)
    stack.add_weights({"b": MIXED["linear"]})
    with pytest.raises(ModelError, match="filled under other edits"):
        stack(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("gate", ["linear", "mlp_3"])
def test_the_gates_of_all_requests_are_one_matrix_product_a_layer(gate: str) -> None:
    edit = StackedIntervention(WIDTH, torch.zeros(0, dtype=torch.float64), "sum", 0.5)
    members = {str(seed): member(seed, gate=gate, blocks=(1,), gate_bias=-30.0) for seed in range(9)}
    weights = [{name[8:]: values for name, values in one[1].items()} for one in members.values()]
    edit.append(Kind.of(members["0"][0]), list(members), weights)
    with Recorded() as recorded, torch.no_grad():
        assert edit(torch.randn(2, 1, WIDTH, dtype=torch.float64)).output is None
    products = [name for name in recorded.names if any(kind in name for kind in ("addmm", "mm.", "bmm"))]
    assert len(products) == {"linear": 1, "mlp_3": 3}[gate]


@pytest.mark.parametrize("gate", ["linear", "noisy_mlp_3"])
@torch.no_grad()
def test_gates_that_are_computed_a_few_at_a_time_are_the_same(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stacked({str(seed): member(seed, ROBUST, gate=gate) for seed in range(5)})
    batch = padded(random_rows([9, 6]), "left")
    wanted = stack(**batch).logits
    monkeypatch.setattr(grun.method.stack.gates, "SLICE", 1)
    agree(stack(**batch).logits, wanted)


# -- gates of a user's own --------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    """A gate without a linear layer, with buffers of which one is no float."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(width))
        self.register_buffer("center", torch.randn(width))
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, hidden: Tensor) -> Tensor:
        return ((hidden - self.center) / self.seen * self.direction).mean(-1, keepdim=True)


def shared(width: int) -> nn.Module:
    one, other = nn.Linear(width, width), nn.Linear(width, width)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), one, other, nn.Linear(width, 1))


OWN_GATES: dict[str, GateBuilder] = {
    "norm_first": lambda width: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1)),
    "norm_inside": lambda width: nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1)),
    "unbiased": lambda width: nn.Sequential(OrderedDict(score=nn.Linear(width, 1, bias=False), bound=nn.Tanh())),
    "parametrized": lambda width: nn.utils.parametrizations.weight_norm(nn.Linear(width, 1)),
    "dropout": lambda width: nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 1, bias=False)),
    "together": lambda width: nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.LayerNorm(8, elementwise_affine=False),
                                            nn.Linear(8, 1), nn.Tanh()),
    "buffered": Buffered,
    "shared": shared,
    "orthogonal": lambda width: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(width, 4)),
                                              nn.Linear(4, 1)),
}  # fmt: skip


@pytest.fixture
def own_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GATES, "_entries", dict(GATES._entries))
    for name, build in OWN_GATES.items():
        GATES.add(name, build, "of a user")


@pytest.mark.parametrize("gate", OWN_GATES)
@torch.no_grad()
def test_a_gate_of_a_users_own_does_in_a_stack_what_it_does_alone(gate: str, own_gates: None, tmp_path: Path) -> None:
    for number, rule in enumerate((ROBUST, ROBUST, PUBLISHED)):
        read, accumulate, write = rule
        torch.manual_seed(number)
        where = {"gate_read": read, "gate_accumulate": accumulate, "edit_write": write}
        GrunModel.wrap(tiny(), blocks=[1, 3], gate=gate, **where).save_pretrained(tmp_path / str(number))
    stack = GrunStack(tiny())
    before = torch.get_rng_state()
    stack.add_all({name: tmp_path / name for name in "012"})
    stack.add_weights({"linear": MIXED["linear"], "robust": MIXED["robust"]})
    stack.train()  # nothing of it is trained
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(stack.parameters()) and not stack.state_dict()
    batch = padded(random_rows([9, 6]), "left")
    stack(**batch)
    for name in "012":
        alone = GrunModel.from_pretrained(tiny(), tmp_path / name)
        only = GrunStack(tiny())
        only.add(name, tmp_path / name)
        agree(only(**batch).logits, alone(**batch).logits)
        agree(alone.last_gates[1][:, -1], stack.request_gates[name][1][:, -1])  # the first block that is edited
        tokens, logits = generated(alone, random_rows([9, 6]))
        assert torch.equal(generated(only, random_rows([9, 6]))[0], tokens)
        agree(generated(only, random_rows([9, 6]))[1], logits)
    stack.remove("1")
    others = GrunStack(tiny())
    others.add_all({name: tmp_path / name for name in "02"})
    others.add_weights({"linear": MIXED["linear"], "robust": MIXED["robust"]})
    assert torch.equal(stack(**batch).logits, others(**batch).logits)


def test_a_bias_for_a_gate_without_one_is_refused(own_gates: None) -> None:
    with pytest.raises(ConfigError, match="gate_bias sets the bias of a gate's last linear layer"):
        GrunModel.wrap(tiny(), blocks=[1], gate="buffered", gate_bias=-2.0)


# -- in use -----------------------------------------------------------------------------------------------------------


def test_published_requests_share_passes_in_evaluation_and_others_do_not() -> None:
    shared = Subject(stacked({"a": MIXED["linear"], "b": MIXED["second"]})).edits
    assert shared is not None and set(shared) == {1, 3}
    assert Subject(stacked(MIXED)).edits is None


def test_attacks_that_train_an_adapter_pass_over_a_stack() -> None:
    loaded = Loaded(stacked({"a": MIXED["linear"]}), cast(Any, None), None, {})
    assert "name one request's adapter" in str(ATTACKS.get("relearn_retain_10").unfit(loaded))
    assert ATTACKS.get("adapter_removed").unfit(loaded) is None


def test_what_cannot_be_stacked_is_one_line(tmp_path: Path) -> None:
    stack = stacked({"a": MIXED["linear"]})
    with pytest.raises(ConfigError, match="request 'a' is on the model already"):
        stack.add_weights({"a": MIXED["second"]})
    with pytest.raises(ConfigError, match="unknown request 'b'"):
        stack.remove("b")
    with pytest.raises(AdapterError, match="request 'b': no gate at block 1; a stack takes gated edits alone"):
        stack.add_weights({"b": member(1, gate="none")})
    with pytest.raises(ConfigError, match="unknown rule 'mean'"):
        GrunStack(tiny(), rule="mean")
    with pytest.raises(ConfigError, match="gate_threshold 2 must be a probability"):
        GrunStack(tiny(), gate_threshold=2)
    with pytest.raises(ConfigError, match="carries GRUN edits already"):
        GrunStack(stack.base)
    GrunModel(tiny(num_hidden_layers=5), AdapterConfig([1], 2, "linear", WIDTH, 5)).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="made for hidden size 32 and 5 blocks, this base has hidden size 32 and 4"):
        stack.add("c", tmp_path)
    assert stack.names == ["a"]
