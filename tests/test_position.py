"""Where the gate reads and the edit writes: the order of the published rule, and a rule of another kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import PAD, blocks_of, formula, padded, random_rows, tiny
from torch import Tensor

from grun import GrunModel
from grun.config import MethodConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import ConfigError, DataError
from grun.method.intervention import GatedIntervention
from grun.method.parametrization import Grun
from grun.method.position import Call, LastPrompt, PromptOfCall, position_rule
from pyvene_custom import GatedOutput, Sites

# Five columns. Row 0 is whole, row 1 padded on the left, row 2 on the right.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 7, 7], [-100, -100, -100, -100, 7], [-100, 7, 7, -100, -100]])


def columns(**given: Any) -> list[int | None]:
    """Column edited in each row under the published rule; None where there is none."""
    values: dict[str, Any] = {
        "rows": 3,
        "columns": 5,
        "past": 0,
        "device": torch.device("cpu"),
        **dict.fromkeys(("attention_mask", "labels", "prompt_lengths", "prompt")),
    }
    sites = LastPrompt().locate(Call(**{**values, **given}))
    if sites is None:
        return [None] * 3
    assert torch.equal(sites.read, sites.write) and torch.equal(sites.read_mask, sites.write_mask)
    assert sites.read.shape == sites.read_mask.shape == (3, 1)
    pairs = zip(sites.read.flatten().tolist(), sites.read_mask.flatten().tolist(), strict=True)
    return [column if counts else None for column, counts in pairs]


def test_prompt_lengths_come_first_and_count_attended_tokens() -> None:
    lengths = torch.tensor([2, 2, 2])
    assert columns(prompt_lengths=lengths, attention_mask=MASK, labels=LABELS) == [1, 3, 1]
    assert columns(prompt_lengths=lengths, labels=LABELS) == [1, 1, 1]
    assert columns(prompt_lengths=torch.tensor([5, 3, 3]), attention_mask=MASK) == [4, 4, 2]
    holes = torch.tensor([[1, 0, 1, 1, 0]] * 3)
    assert columns(prompt_lengths=lengths, attention_mask=holes) == [2, 2, 2]
    assert columns(prompt_lengths=lengths, attention_mask=torch.ones(3, 9), past=4) == [1, 1, 1]


def test_then_the_token_before_the_first_label() -> None:
    assert columns(labels=LABELS, attention_mask=MASK) == [1, 3, 0]
    assert columns(labels=LABELS) == [1, 3, 0]
    assert columns(labels=LABELS, attention_mask=torch.ones(3, 9), past=4) == [1, 3, 0]


def test_rows_without_labels_beside_rows_with_labels_use_their_last_attended_token() -> None:
    some = LABELS.clone()
    some[1:] = -100
    assert columns(labels=some, attention_mask=MASK) == [1, 4, 2]
    assert columns(labels=some) == [1, 4, 4]
    assert columns(labels=torch.full_like(LABELS, -100), attention_mask=MASK) == [4, 4, 2]


def test_a_row_labeled_from_its_first_column_has_no_prompt_and_is_not_edited() -> None:
    labels = LABELS.clone()
    labels[0] = 7
    assert columns(labels=labels, attention_mask=MASK) == [None, 3, 0]


def test_then_the_last_attended_token_then_the_last_column() -> None:
    assert columns(attention_mask=MASK) == [4, 4, 2]
    assert columns() == [4, 4, 4]
    empty = MASK.clone()
    empty[1] = 0
    assert columns(attention_mask=empty) == [4, None, 2]


def test_a_bare_pass_with_a_filled_cache_is_a_decode_step() -> None:
    assert columns(past=4) == [None] * 3
    assert columns(past=4, attention_mask=torch.ones(3, 9)) == [None] * 3
    assert columns(past=4, labels=torch.full_like(LABELS, -100)) == [None] * 3


def test_in_generate_the_prompt_of_the_call_decides() -> None:
    prompt = PromptOfCall(torch.tensor([4, 6, 8]), 9)
    assert columns(prompt=prompt, past=4, attention_mask=torch.ones(3, 9)) == [0, 2, 4]
    assert columns(prompt=prompt, past=5) == [None, 1, 3]
    assert columns(prompt=prompt, past=9) == [None] * 3
    assert columns(prompt=PromptOfCall(torch.tensor([3]), 4)) == [3, 3, 3]  # three beams or samples of one prompt


@pytest.mark.parametrize("lengths", [[0, 1, 1], [6, 1, 1], [1, 4, 1], [1, -1, 1]])
def test_prompt_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError, match="between 1 and the attended tokens"):
        columns(prompt_lengths=torch.tensor(lengths), attention_mask=MASK)


def test_prompt_lengths_out_of_range_are_refused_without_a_mask_too() -> None:
    with pytest.raises(DataError, match=r"\[5, 5, 5\]"):
        columns(prompt_lengths=torch.tensor([1, 6, 1]))


@pytest.mark.parametrize("lengths", [torch.tensor([1, 2]), torch.tensor(2), torch.ones(3, 1).long()])
def test_prompt_lengths_of_another_shape_are_refused(lengths: Tensor) -> None:
    with pytest.raises(DataError, match="one length for each"):
        columns(prompt_lengths=lengths, attention_mask=MASK)


def test_unknown_rules_name_the_known_one() -> None:
    with pytest.raises(ConfigError, match=r"gate_read=every_token.*gate_read=last_prompt"):
        position_rule("every_token", "none", "last_prompt")
    with pytest.raises(ConfigError, match="edit_write=answer"):
        GrunModel.wrap(tiny(), blocks=[1], edit_write="answer")


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # their positional arguments come in different orders
@torch.no_grad()
def test_arguments_given_by_place_count_like_those_given_by_name(family: str) -> None:
    base = tiny(family)
    model = GrunModel.wrap(base, blocks=[1])
    batch = padded(random_rows([3, 6]), "right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    named = base(input_ids=ids, attention_mask=mask).logits
    gates = model.last_gates[1]
    placed = base(ids, mask) if family == "llama" else base(ids, None, mask)
    assert torch.equal(placed.logits, named)
    assert torch.equal(model.last_gates[1], gates)
    embedded = base(inputs_embeds=base.get_input_embeddings()(ids), attention_mask=mask)
    assert torch.equal(embedded.logits, named)


@torch.no_grad()
def test_the_model_edits_where_the_rule_says() -> None:
    model = GrunModel.wrap(tiny(), blocks=[1]).eval()
    batch = padded(random_rows([8, 5]), "left")
    labels = batch["input_ids"].clone()
    labels[:, :6] = -100
    by_length = model(**batch, prompt_lengths=[6, 3])  # a list will do
    by_label = model(**batch, labels=labels)
    assert torch.equal(by_length.logits, by_label.logits)
    by_end = model(**batch)
    assert torch.equal(by_end.logits, model(**batch, prompt_lengths=torch.tensor([8, 5])).logits)
    assert not torch.equal(by_end.logits[:, :-1], by_length.logits[:, :-1])
    with model.disabled():
        plain = model(**batch)
    assert torch.equal(by_end.logits[:, :-1], plain.logits[:, :-1])  # nothing before the edited token changes
    assert (by_end.logits[:, -1] - plain.logits[:, -1]).abs().max() > 1e-3

    labels[0] = batch["input_ids"][0]  # no prompt: this row is the base's, the other one is edited
    mixed = model(**batch, labels=labels)
    torch.testing.assert_close(mixed.logits[0], plain.logits[0], atol=0, rtol=0)
    torch.testing.assert_close(mixed.logits[1], by_label.logits[1], atol=0, rtol=0)

    cached = model(**batch, use_cache=True).base_output.past_key_values
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], dim=1)
    step = model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cached)
    assert step.gates == {}


# -- another kind of rule: every token is read and edited, with state carried from pass to pass -----------------------


class EveryToken:
    """Reads and writes every attended token; a pass with an empty cache begins a new sequence."""

    def __init__(self) -> None:
        self.carry: dict[str, Tensor] = {}

    def locate(self, call: Call) -> Sites:
        if call.past == 0:
            self.carry = {}
        where = torch.arange(call.columns).expand(call.rows, -1)
        counts = torch.ones_like(where, dtype=torch.bool)
        if call.attention_mask is not None:
            counts = call.attention_mask[:, -call.columns :] != 0
        return Sites(where, counts, where, counts, self.carry)


class RunningMaximum(GatedIntervention):
    """A gate that never closes again: the greatest logit of all tokens so far."""

    def forward(
        self,
        base: Tensor,
        source: Any = None,
        subspaces: Any = None,
        *,
        read: Tensor | None = None,
        sites: Sites | None = None,
        carry: Tensor | None = None,
    ) -> GatedOutput:
        assert self.gate is not None and sites is not None
        logits = self.gate(base).squeeze(-1).masked_fill(~sites.read_mask, -torch.inf)  # [batch, positions]
        if carry is not None:
            logits = torch.maximum(logits, carry)
        running = logits.cummax(dim=1).values
        output = base + torch.sigmoid(running).unsqueeze(-1) * self.edit(base)
        return GatedOutput(output=output, gate=running, carry=running[:, -1:])


@pytest.fixture
def every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grun.method.model.position_rule", lambda *_: EveryToken())
    monkeypatch.setattr("grun.method.model.GatedIntervention", RunningMaximum)


def full_pass(family: str, weights: dict[str, Tensor], row: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits and running maxima of one row in one pass without a cache, by hooks of this test."""
    twin = tiny(family)
    maxima: dict[int, Tensor] = {}

    def hook(block: int) -> Any:
        def edit(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            edited, logits = formula(weights, block, hidden)
            change = (edited - hidden) / torch.sigmoid(logits).unsqueeze(-1)
            maxima[block] = torch.stack([logits[0, : end + 1].max() for end in range(len(row))])
            edited = hidden + torch.sigmoid(maxima[block])[:, None] * change
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    for block in (0, 2):
        blocks_of(twin, family)[block].register_forward_hook(hook(block))
    with torch.no_grad():
        return twin(input_ids=torch.tensor([row]), use_cache=False).logits[0], maxima


@pytest.mark.usefixtures("every_token")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "odd"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
@torch.no_grad()
def test_a_rule_that_edits_every_token_works_from_prefill_to_the_last_decode_step(
    family: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    model = GrunModel.wrap(tiny(family), blocks=[0, 2]).eval()
    prompts = random_rows([10, 6])
    batch = padded(prompts, "left")
    del batch["position_ids"]
    answer = model.generate(
        **batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    last = {block: logits[:, -1] for block, logits in model.intervenable.gates.items()}
    assert list(last) == [0, 2]  # the last decode step was edited
    for index, prompt in enumerate(prompts):
        row = prompt + answer.sequences[index, -6:-1].tolist()
        logits, maxima = full_pass(family, model.state_dict(), row)
        got = torch.stack([step[index] for step in answer.logits])
        # Norms go through float32 and cached passes sum in another order; transformers returns logits in float32.
        torch.testing.assert_close(got.double(), logits[-6:], atol=5e-5, rtol=1e-5)
        for block, maximum in maxima.items():
            torch.testing.assert_close(last[block][index], maximum[-1], atol=5e-5, rtol=1e-5)
    untouched = tiny(family)(torch.tensor([row])).logits[0, -6:]
    assert (logits[-6:] - untouched).abs().max() > 0.01


@pytest.mark.usefixtures("every_token")
@torch.no_grad()
def test_a_step_output_says_which_gate_positions_count() -> None:
    parametrization = Grun(MethodConfig(blocks=[0, 2], rank=4, gate="linear"))
    parametrization.prepare(tiny(), None)
    rows = [EncodedRow(tuple(row[:3]), tuple(row[3:])) for row in random_rows([8, 5])]
    output = parametrization.run(collate(rows, PAD))
    assert output.gate_logits is not None and output.gate_mask is not None
    assert output.gate_logits[0].shape == output.gate_mask.shape == (2, 8)
    assert torch.equal(output.gate_mask, output.attended)


@torch.no_grad()
def test_a_step_output_of_the_published_rule_has_one_gate_position_per_row() -> None:
    parametrization = Grun(MethodConfig(blocks=[1], rank=4, gate="linear"))
    parametrization.prepare(tiny(), None)
    rows = [EncodedRow((3, 4, 5), (6,)), EncodedRow((3,), (4, 5, 6))]
    output = parametrization.run(collate(rows, PAD))
    assert output.gate_mask is not None and output.gate_mask.tolist() == [[True], [True]]
    with parametrization.reference():
        assert parametrization.run(collate(rows, PAD)).gate_logits is None
