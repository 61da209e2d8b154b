"""Multiple-choice questions: their wording, the orders of their options, and what is read from the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from grun.config.options import TinyConfig
from grun.data.choices import ChoiceRow
from grun.data.encoding import EncodedRow
from grun.errors import DataError
from grun.evaluation.metrics.averages import wilson
from grun.evaluation.multiple_choice import accuracy, encode_choices, orders_of, prompt_text, score_choices
from grun.evaluation.perplexity import sliding_perplexity
from grun.evaluation.scoring import score
from grun.loading.tiny import build_tiny
from grun.method.model import GrunModel

QUESTION = ChoiceRow("What is glimmerite? ", ("a stone", "a fish", "a song", "a boat"), 0, "invented_minerals")
ROWS = [
    QUESTION,
    ChoiceRow("Where is it mined?", ("in Ald", "in Orm, by the sea", "nowhere"), 1, "invented_minerals"),
    ChoiceRow("Is it hard?", ("yes", "no"), 1, "hardness"),
    ChoiceRow("Which color?", ("red", "blue", "green", "grey", "white"), 4, "hardness"),
]
LETTERS = "Answer: A Answer: B Answer: C Answer: D Answer: E "


def tiny_model(texts: str = LETTERS, context: int = 256) -> tuple[Any, Any]:
    """A random float64 Llama; its tokenizer knows " A" as one token if `texts` hold it."""
    config = TinyConfig(hidden_size=32, blocks=3, intermediate_size=48, vocabulary=300, context=context)
    model, tokenizer = build_tiny(config, [texts] * 20, 0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that options differ
    return torch.nn.Module.double(model).eval(), tokenizer


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return tiny_model()


@pytest.fixture
def edited() -> tuple[GrunModel, Any]:
    model, tokenizer = tiny_model()
    torch.manual_seed(1)
    return GrunModel.wrap(model, blocks=[0, 2], rank=4, gate_bias=2.0).eval(), tokenizer


# -- wording ----------------------------------------------------------------------------------------------------------


def test_the_harness_wording_is_that_of_its_task_files() -> None:
    """Of wmdp_bio.yaml and the file of defaults that it includes, filled in by hand."""
    row = ChoiceRow("  Which one?\n", ("w", "x", "y", "z"), 2, "wmdp_bio")
    assert prompt_text(row, "harness") == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "Which one?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert "about college computer science.\n\n" in prompt_text(
        ChoiceRow("?", ("w", "x"), 0, "college_computer_science"), "harness"
    )


def test_gruns_wording_ends_with_a_blank_that_stays_a_token(plain: tuple[Any, Any]) -> None:
    _, tokenizer = plain
    text = prompt_text(QUESTION, "grun_paper")
    assert text == (
        "The following is a multiple choice question with answers.\n"
        "What is glimmerite? \nA. a stone\nB. a fish\nC. a song\nD. a boat\nAnswer: "
    )
    rows = encode_choices(QUESTION, tokenizer, "grun_paper")
    assert {row.prompt_ids for row in rows} == {tuple(tokenizer(text).input_ids)}
    assert [row.answer_ids for row in rows] == [(tokenizer.convert_tokens_to_ids(letter),) for letter in "ABCD"]


@pytest.mark.parametrize("texts", [LETTERS, "nothing of the kind"])
def test_letters_are_tokenized_as_they_are_behind_the_whole_prompt(texts: str) -> None:
    _, tokenizer = tiny_model(texts)
    for row in ROWS:
        text = prompt_text(row, "harness")
        for letter, encoded in zip("ABCDE", encode_choices(row, tokenizer, "harness"), strict=False):
            assert [*encoded.prompt_ids, *encoded.answer_ids] == tokenizer(f"{text} {letter}").input_ids
            assert len(encoded.answer_ids) == (1 if texts == LETTERS else 2)


def test_a_suffix_stands_behind_answer_and_belongs_to_the_prompt(plain: tuple[Any, Any]) -> None:
    _, tokenizer = plain
    assert prompt_text(QUESTION, "harness", "The letter is").endswith("\nAnswer: The letter is")
    assert prompt_text(QUESTION, "grun_paper", " The letter is ").endswith("\nAnswer: The letter is ")
    row = encode_choices(QUESTION, tokenizer, "harness", "The letter is")[1]
    text = prompt_text(QUESTION, "harness", "The letter is")
    assert list(row.prompt_ids) == tokenizer(text).input_ids
    assert tokenizer.decode(row.answer_ids) == " B"


def test_more_options_than_letters_are_an_error() -> None:
    row = ChoiceRow("Which?", tuple(map(str, range(27))), 0, "numbers")
    with pytest.raises(DataError, match="a question has 27 options, and letters end at 26; leave some out"):
        prompt_text(row, "harness")


# -- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_rotations_put_the_right_option_at_every_place_once(row: ChoiceRow) -> None:
    shown = orders_of(row, "rotations", seed=0)
    assert [one.answer for one in shown] == [(row.answer + by) % len(row.choices) for by in range(len(row.choices))]
    assert {one.choices[one.answer] for one in shown} == {row.choices[row.answer]}
    assert all(sorted(one.choices) == sorted(row.choices) for one in shown)


def test_a_seeded_order_moves_the_right_option_alone_and_spreads_over_all_places() -> None:
    rows = [ChoiceRow(f"Question {number}?", ("w", "x", "y", "z"), number % 4, "s") for number in range(400)]
    shown = [orders_of(row, "seeded", seed=42) for row in rows]
    assert all(len(one) == 1 for one in shown)
    for row, (one,) in zip(rows, shown, strict=True):
        right = row.choices[row.answer]
        assert one.choices[one.answer] == right
        assert [text for text in one.choices if text != right] == [text for text in row.choices if text != right]
    places = [one.answer for (one,) in shown]
    # 100 each are expected, with a standard deviation of 8.7; 35 is four of them
    assert all(abs(places.count(place) - 100) < 35 for place in range(4))
    assert [orders_of(row, "seeded", seed=42) for row in rows[200:]] == shown[200:]  # whatever else is asked
    assert [orders_of(row, "seeded", seed=43) for row in rows] != shown


# -- scores -----------------------------------------------------------------------------------------------------------


def test_options_are_read_at_the_last_prompt_token(plain: tuple[Any, Any]) -> None:
    """Against a pass by hand of each prompt alone."""
    model, tokenizer = plain
    found = score_choices(model, tokenizer, ROWS, batch_size=3)
    for row, of_row in zip(ROWS, found, strict=True):
        ids = torch.tensor([tokenizer(prompt_text(row, "harness")).input_ids])
        with torch.no_grad():
            logp = model(ids).logits[0, -1].log_softmax(-1)
        letters = [tokenizer.convert_tokens_to_ids(f"Ġ{letter}") for letter in "ABCDE"[: len(row.choices)]]
        assert of_row.logp == pytest.approx(logp[letters].tolist(), abs=1e-10)  # float64
        assert of_row.chosen == int(logp[letters].argmax())
        assert of_row.gates is None


@pytest.mark.parametrize("texts", [LETTERS, "nothing of the kind"])
@pytest.mark.parametrize("format", ["harness", "grun_paper"])
def test_a_gated_models_options_are_what_the_scorer_of_rows_says(texts: str, format: str) -> None:
    """Letters of one token and of two; the edit sits at the last prompt token in both."""
    base, tokenizer = tiny_model(texts)
    before = score_choices(base, tokenizer, ROWS, format=format)
    torch.manual_seed(1)
    model = GrunModel.wrap(base, blocks=[0, 2], rank=4, gate_bias=2.0).eval()
    found = score_choices(model, tokenizer, ROWS, format=format, batch_size=2)
    for row, of_row, without in zip(ROWS, found, before, strict=True):
        expected = score(model, encode_choices(row, tokenizer, format), 8, 0)
        assert of_row.logp == pytest.approx([sum(one.logp) for one in expected], abs=1e-10)
        assert of_row.gates == pytest.approx(expected[0].gates, abs=1e-10)
        assert max(abs(x - y) for x, y in zip(of_row.logp, without.logp, strict=True)) > 0.01


def test_each_prompt_is_run_once_and_its_letters_are_not(
    plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = plain
    shapes: list[tuple[int, int]] = []
    done: list[int] = []
    forward = model.forward

    @functools.wraps(forward)  # what it takes is looked up
    def counted(input_ids: torch.Tensor, **more: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids, **more)

    monkeypatch.setattr(model, "forward", counted)
    score_choices(model, tokenizer, [*ROWS, QUESTION], advance=done.append)
    longest = max(len(tokenizer(prompt_text(row, "harness")).input_ids) for row in ROWS)
    assert shapes == [(len(ROWS), longest)]
    assert sum(done) == sum(len(row.choices) for row in [*ROWS, QUESTION])


def test_a_prompt_beyond_the_context_loses_its_beginning() -> None:
    model, tokenizer = tiny_model(context=64)
    row = ChoiceRow("long " * 50, ("w", "x"), 0, "s")
    (found,) = score_choices(model, tokenizer, [row])
    ids = tokenizer(prompt_text(row, "harness")).input_ids
    assert len(ids) > 64
    with torch.no_grad():
        logp = model(torch.tensor([ids[-64:]])).logits[0, -1].log_softmax(-1)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in ("ĠA", "ĠB")]
    assert found.logp == pytest.approx(logp[letters].tolist(), abs=1e-10)


def test_a_suffix_moves_gate_and_edit_to_its_last_token(edited: tuple[GrunModel, Any]) -> None:
    model, tokenizer = edited
    (plain,) = score_choices(model, tokenizer, [QUESTION])
    (moved,) = score_choices(model, tokenizer, [QUESTION], suffix="The letter is")
    ids = torch.tensor([tokenizer(prompt_text(QUESTION, "harness", "The letter is")).input_ids])
    with torch.no_grad():
        out = model(ids, prompt_lengths=torch.tensor([ids.shape[1]]))
    assert moved.gates == pytest.approx({block: float(gate) for block, gate in out.gates.items()}, abs=1e-10)
    assert moved.gates != pytest.approx(plain.gates, abs=1e-3)


# -- accuracy ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_wilsons() -> None:
    """Values of the formula in its textbook form, for 10 of 20 and for none of 10."""
    assert wilson(0.5, 20) == pytest.approx((0.299298, 0.700702), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson(0.0, 0) is None


def test_a_sets_accuracy_counts_questions_and_its_macro_mean_counts_subjects() -> None:
    found = accuracy([1.0, 0.5, 0.0, 0.25], ["virology", "virology", "virology", "anatomy"])
    assert found["accuracy"] == pytest.approx(1.75 / 4)
    assert found["accuracy_macro"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["questions"] == 4 and found["right"] == 1.75
    assert found["interval"] == wilson(1.75 / 4, 4)
    assert found["subjects"]["virology"] == {"accuracy": 0.5, "interval": wilson(0.5, 3), "right": 1.5, "questions": 3}


# -- continuations, perplexity ----------------------------------------------------------------------------------------


def test_continuations_of_any_length_are_scored_as_rows_are(edited: tuple[GrunModel, Any]) -> None:
    model, _ = edited
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in ((3, 1), (9, 5), (4, 1), (6, 2), (1, 7)):
        ids = torch.randint(5, 250, (prompt + answer,), generator=generator).tolist()
        rows += [EncodedRow(tuple(ids[:prompt]), tuple(ids[prompt:-1]) + (last,)) for last in (ids[-1], 7)]
    rows.append(rows[0])
    found, expected = score(model, rows, 3, 0, whole=False), score(model, rows, 3, 0)
    for one, two in zip(found, expected, strict=True):
        assert one.hit == two.hit
        assert one.logp == pytest.approx(two.logp, abs=1e-10)
        assert one.gates == pytest.approx(two.gates, abs=1e-10)


@pytest.mark.parametrize(("window", "stride"), [(12, 4), (12, 50), (200, 8)])
def test_perplexity_scores_every_token_once_with_what_the_window_gives(
    plain: tuple[Any, Any], window: int, stride: int
) -> None:
    """Against a loop that runs each window alone."""
    model, tokenizer = plain
    texts = ["Glimmerite is a stone.", "It is mined in Orm."]
    found = sliding_perplexity(model, tokenizer, texts, window=window, stride=stride)
    begin, *ids = tokenizer("\n\n".join(texts)).input_ids
    losses, means, start, done = [], [], 0, 0
    while done < len(ids):
        shown = ids[start : start + window - 1]
        with torch.no_grad():
            logp = model(torch.tensor([[begin, *shown]])).logits[0, :-1].log_softmax(-1)
        own = [-float(logp[place, token]) for place, token in enumerate(shown)][done - start :]
        losses += own
        means.append(sum(own) / len(own))
        done = start + len(shown)
        start += min(stride, window - 1)
    assert len(losses) == len(ids) == found.tokens
    assert found.windows == len(means)
    assert found.perplexity == pytest.approx(float(torch.tensor(losses).double().mean().exp()), rel=1e-5)
    assert found.window_mean == pytest.approx(float(torch.tensor(means).double().mean().exp()), rel=1e-5)


def test_perplexity_of_a_gated_model_is_that_of_text_after_the_start_token(edited: tuple[GrunModel, Any]) -> None:
    model, tokenizer = edited
    text = "Glimmerite is a stone. It is mined in Orm."
    found = sliding_perplexity(model, tokenizer, [text], window=100, batch_size=1)
    ids = tokenizer(text).input_ids
    (row,) = score(model, [EncodedRow(tuple(ids[:1]), tuple(ids[1:]))], 1, 0)
    assert found.perplexity == pytest.approx(float(torch.tensor(row.logp).double().mean().neg().exp()), rel=1e-5)
    with model.disabled() as base:
        without = sliding_perplexity(base, tokenizer, [text], window=100)
    assert found.perplexity != pytest.approx(without.perplexity, rel=1e-3)


def test_without_a_start_token_the_first_token_of_all_is_not_scored(plain: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = plain
    tokenizer.save_pretrained(tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    bare.bos_token = None
    text = "Glimmerite is a stone."
    ids = bare(text).input_ids
    assert ids[0] != tokenizer.bos_token_id
    for window, stride in ((8, 8), (100, 8)):
        assert sliding_perplexity(model, bare, [text], window=window, stride=stride).tokens == len(ids) - 1
    with pytest.raises(DataError, match="two tokens or more"):
        sliding_perplexity(model, bare, [""], window=8)
