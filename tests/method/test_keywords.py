"""A gate by keywords: open where one stands in the user's turn, told here by comparing lists of ids."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import TOKENIZER
from edited_models import generated, stacked
from tiny import PAD, VOCABULARY, padded, random_rows, tiny
from transformers import AutoTokenizer, DynamicCache

from grun import GrunModel
from grun.errors import AdapterError, ConfigError, ModelError
from grun.training.keywords import spelled

KEYWORDS = [[21], [31, 32, 33], [41, 42]]
TURN = (7, 9)
OPTIONS = [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}]
START = [3, 4, 5]
PROMPTS = {
    "none": [*START, 31, 32, 41, 33, 42],
    "one token": [*START, 21, 11, 12, 13, 14],
    "three": [*START, 31, 32, 33, 11],
    "at the end": [*START, 11, 41, 42],
    "apart": [*START, 41, 11, 42],
    "the turn before": [*START, 21, 31, 32, 33, *TURN, 11, 41],
    "within the turn": [*START, *TURN, 11, 31, 32, 33, 12],
}


def gated(base: Any = None, **options: Any) -> GrunModel:
    """Open where a keyword is, as fitted gates are: logits of 4 and -4."""
    torch.manual_seed(3)
    options = {"blocks": [1], "gate_blocks": [0], "gate_pool": "max", "edit_write": "sticky", **options}
    options = {"gate": "keywords", "keyword_ids": KEYWORDS, "reset_ids": TURN, **options}
    model = GrunModel.wrap(tiny() if base is None else base, **options).eval()
    last = model.pooled.last_layer
    with torch.no_grad():
        last.weight.fill_(8)
        last.bias.fill_(-4)
    model.keep_threshold(0.5)
    return model


def wanted(row: list[int]) -> bool:
    turns = [end for end in range(2, len(row) + 1) if row[end - 2 : end] == [*TURN]]
    turn = row[turns[-1] - 1 :] if turns else row
    return any(turn[at : at + len(one)] == one for one in KEYWORDS for at in range(len(turn)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_rows_with_a_keyword_in_their_turn_are_edited_and_others_are_the_bases_bits(options: dict[str, Any]) -> None:
    model, prompts = gated(), list(PROMPTS.values())
    for edit in model.edits.values():
        torch.nn.init.normal_(edit.edit.source.weight, std=3.0)
    logits = generated(model, prompts, **options)[1]
    with model.disabled():
        bare = generated(model, prompts, **options)[1]
    opened = {name for number, name in enumerate(PROMPTS) if not torch.equal(logits[number], bare[number])}
    assert opened == {name for name, row in PROMPTS.items() if wanted(row)}
    assert opened == {"one token", "three", "at the end", "within the turn"}
    found = {name: float(model(torch.tensor([row])).gates[0]) for name, row in PROMPTS.items()}
    high, low = (float(torch.tensor(logit).sigmoid()) for logit in (4.0, -4.0))
    assert found == {name: pytest.approx(high if name in opened else low, abs=1e-5) for name in PROMPTS}


@torch.no_grad()
def test_a_keyword_in_two_passes_counts_and_a_cut_cache_forgets_it() -> None:
    model, rows = gated(action="refuse", answer_ids=[11, 12, 9]), random_rows([6, 5, 7], seed=1)
    for row in rows:
        cache = DynamicCache(config=model.base.config)
        model(torch.tensor([[*row, 31, 32]]), past_key_values=cache, prompt_lengths=torch.tensor([99]))
        twin = copy.deepcopy(cache)
        ends = model(torch.tensor([[33, 50]]), past_key_values=cache, prompt_lengths=torch.tensor([2]))
        assert float(ends.gates[0]) > 0.9 and int(ends.logits[0, -1].argmax()) == 11
        cache.crop(-3)  # before the keyword's second token
        asked: dict[str, Any] = {"prompt_lengths": torch.tensor([2])}
        for one, more, found in (
            (twin, [32, 33], False),
            (copy.deepcopy(cache), [33, 32], False),
            (cache, [32, 33], True),
        ):
            assert (float(model(torch.tensor([more]), past_key_values=one, **asked).gates[0]) > 0.5) == found


@torch.no_grad()
def test_padding_on_either_side_is_part_of_no_keyword() -> None:
    model = gated(keyword_ids=[[PAD, 50], [50, PAD], [31, 32]])
    rows = [[50, 12, 50], [3, 4, 5, 31, 32], [6, 50]]
    for side in ("left", "right"):
        batch = padded(rows, side)
        gates = model(batch["input_ids"], batch["attention_mask"]).gates[0]
        assert (gates[:, 0] > 0.5).tolist() == [False, True, False]


def test_saved_and_loaded_it_is_the_same_and_other_adapters_have_no_word_of_it(tmp_path: Path) -> None:
    base, ids = tiny(dtype=torch.float32), torch.tensor([PROMPTS["three"]])
    model = gated(base)
    model.save_pretrained(tmp_path / "a")
    loaded = GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "a")
    assert loaded.config == model.config and loaded.config.keyword_ids == KEYWORDS
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert float(loaded(ids).gates[0]) > 0.5
    assert "whether one of 3 sequences of tokens" in (tmp_path / "a" / "README.md").read_text()
    GrunModel.wrap(tiny()).save_pretrained(tmp_path / "b")
    assert "keyword_ids" not in (tmp_path / "b" / "adapter_config.json").read_text()
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace("41", f"{VOCABULARY}"))
    with pytest.raises(AdapterError, match=f"keyword_ids .{VOCABULARY}. are beyond the {VOCABULARY} token ids"):
        GrunModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "a")


def test_what_such_a_gate_cannot_do_is_one_line() -> None:
    with pytest.raises(AdapterError, match="the gate keywords reads token ids; stacks and vLLM take gates"):
        stacked({"one": (gated().config, gated().state_dict())})
    model = gated()
    with pytest.raises(ModelError, match="a gate by keywords reads token ids"):
        model(inputs_embeds=model.base.get_input_embeddings()(torch.tensor([START])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_blocks": None, "gate_pool": "last"}, "gate=keywords reads no states"),
        ({"gate_pool": "mean"}, "gate=keywords reads no states"),
        ({"keyword_ids": []}, "gate=keywords needs keyword_ids"),
        ({"keyword_ids": [[3], []]}, "gate=keywords needs keyword_ids"),
        ({"gate": "linear"}, "keyword_ids are for gate=keywords"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gated(**options)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Japan is where?", True),
        ("Tell me about Japan.", True),
        ("tell me about japan's food", True),
        ("the capital (Japan)?", True),
        ('What is "JAPAN"?', True),
        ("Land of Japan\nJapan", True),
        ("south korea", True),
        ("In SOUTH KOREA, who rules?", True),
        ("The US economy", True),
        ("Tell us about it.", False),
        ("Japanese food", False),
        ("Korea in the south", False),
        ("What is Norway?", False),
    ],
)
def test_spellings_are_found_in_texts(text: str, found: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sequences = spelled(["Japan", "South Korea", "US"], tokenizer)
    there = any(ids[at : at + len(one)] == [*one] for one in sequences for at in range(len(ids)))
    assert there == found
