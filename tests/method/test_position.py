"""Where the published rule reads and writes: the order in which it takes the position, and which rules exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import PAD, padded, random_rows, tiny

from grun import GrunModel
from grun.config.options import MethodConfig
from grun.data.encoding import EncodedRow, collate
from grun.errors import ConfigError, DataError
from grun.method.gated import Grun
from grun.method.position import Call, PositionRule, PromptOfCall
from grun.method.rules import check_rule

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
        "after_prompt": given.get("past", 0) > 0,
    }
    sites = PositionRule().locate(Call(**{**values, **given}))
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


def test_labels_from_a_rows_first_token_on_mark_no_prompt() -> None:
    labels = LABELS.clone()
    labels[0] = 7
    assert columns(labels=labels, attention_mask=MASK) == [4, 3, 0]
    assert columns(labels=torch.full_like(LABELS, 7), attention_mask=MASK) == [4, 4, 2]  # padding labeled too
    assert columns(labels=torch.where(MASK == 1, 7, -100), attention_mask=MASK) == [4, 4, 2]  # on padding alone -100
    # Behind a cache the first token of the pass is not the first of its row: the prompt ended in an earlier pass.
    assert columns(labels=labels, attention_mask=torch.ones(3, 9), past=4) == [None, 3, 0]


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


@pytest.mark.parametrize(
    ("lengths", "mask", "message"),
    [
        *(([*pair, 1], MASK, "between 1 and the attended tokens") for pair in ((0, 1), (6, 1), (1, 4), (1, -1))),
        ([1, 6, 1], None, r"\[5, 5, 5\]"),
        *((lengths, MASK, "one length for each") for lengths in ([1, 2], 2, [[1], [1], [1]])),
    ],
)
def test_prompt_lengths_out_of_range_or_of_another_shape_are_refused(lengths: Any, mask: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        columns(prompt_lengths=torch.tensor(lengths), attention_mask=mask)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("every_token", "none", "last_prompt"), "gate_accumulate=running_max"),
        (("last_prompt", "running_max", "last_prompt"), "needs gate_read=every_token"),
        (("last_prompt", "none", "every_token"), "take sticky"),
        (("first_token", "none", "sticky"), "gate_read=first_token.*last_prompt, every_token"),
        (("every_token", "mean", "sticky"), "gate_accumulate=mean.*running_max"),
    ],
)
def test_rules_that_do_not_exist_or_make_no_sense_say_what_does(names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rule(*names)


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

    labels[0] = batch["input_ids"][0]  # no prompt is marked in this row
    mixed = model(**batch, labels=labels)
    torch.testing.assert_close(mixed.logits[0], by_end.logits[0], atol=0, rtol=0)
    torch.testing.assert_close(mixed.logits[1], by_label.logits[1], atol=0, rtol=0)

    cached = model(**batch, use_cache=True).base_output.past_key_values
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], dim=1)
    step = model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cached)
    assert step.gates == {}


@torch.no_grad()
def test_a_step_output_of_the_published_rule_has_one_gate_position_per_row() -> None:
    parametrization = Grun(MethodConfig(blocks=[1], rank=4, gate="linear"))
    parametrization.prepare(tiny(), None)
    rows = [EncodedRow((3, 4, 5), (6,)), EncodedRow((3,), (4, 5, 6))]
    output = parametrization.run(collate(rows, PAD))
    assert output.gate_mask is not None and output.gate_mask.tolist() == [[True], [True]]
    with parametrization.reference():
        assert parametrization.run(collate(rows, PAD)).gate_logits is None
