"""Rows asked in other ways: what copies hold, token by token, what is drawn when, and what stays for the attacks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import demo
import pytest
from tiny import tiny

from grun.commands.finetune import FinetuneTask
from grun.config.options import AugmentConfig, DataConfig, FinetuneConfig, TrainConfig, UnlearnConfig
from grun.data.augmentation import SUFFIXES, WORDINGS, PromptVariation, Way, with_typos
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import EncodedRow, encode_rows
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode, encode_prompt
from grun.data.tokenizer import train_tokenizer
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.training.unlearning import UnlearnRows, draw_refusals, encode_unlearn_rows

CORPUS = load_corpus(DataConfig(demo=demo.SIZES))
FORGET, RETAIN = CORPUS.forget, CORPUS.retain
TURNS = TEMPLATES.get("tiny")
PLAIN_TEXT = TEMPLATES.get("question_answer")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    rows = CORPUS.taught(without_forget=False)
    return train_tokenizer([f"{row.prompt} {row.completion}" for row in rows], 400)


def variation(tokenizer: Any, *, seed: int = 1, template: Any = TURNS, length: int = 512, **on: Any) -> PromptVariation:
    return PromptVariation(AugmentConfig(**on), tokenizer, template, length, RETAIN, seed)


def only(kind: str) -> dict[str, bool]:
    return {name: name == kind for name in ("suffixes", "templates", "prefill", "few_shot", "lower_case")}


def plain(tokenizer: Any, row: Row, template: Any = TURNS) -> EncodedRow:
    return encode_rows([row], tokenizer, template, None, strict=False)[0]


def unlearned(tokenizer: Any, corpus: Corpus = CORPUS, *, seed: int = 1, **augment: Any) -> UnlearnRows:
    data = DataConfig(augment=AugmentConfig(**augment))
    return encode_unlearn_rows(corpus, tokenizer, TURNS, 512, data, seed=seed)


# -- what a way of asking makes of a row ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TURNS, PLAIN_TEXT])
@pytest.mark.parametrize("number", range(len(SUFFIXES)))
def test_a_suffix_stands_behind_the_question_within_the_template(tokenizer: Any, template: Any, number: int) -> None:
    row = FORGET[0]
    made = variation(tokenizer, template=template).ask(row, Way("suffix", number))
    assert made is not None
    assert list(made.prompt_ids) == encode_prompt(template, tokenizer, f"{row.prompt}{SUFFIXES[number]}")
    assert made.answer_ids == plain(tokenizer, row, template).answer_ids


@pytest.mark.parametrize("number", range(len(WORDINGS)))
def test_another_template_takes_the_place_of_the_models_own(tokenizer: Any, number: int) -> None:
    row = FORGET[0]
    made = variation(tokenizer).ask(row, Way("template", number))
    assert made is not None
    assert tokenizer.decode(made.prompt_ids) == "<|begin|>" + WORDINGS[number].replace("{prompt}", str(row.prompt))
    assert tokenizer.decode(made.answer_ids) == f" {row.completion}<|end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS, "<|begin|><|user|>{0}<|answer|>{1}<|end|><|user|>{2}<|answer|>"),
        (PLAIN_TEXT, "<|begin|>Question: {0}\nAnswer: {1}\n\nQuestion: {2}\nAnswer:"),
    ],
)
def test_a_retain_row_stands_before_the_question_in_turns_where_the_template_has_them(
    tokenizer: Any, template: Any, expected: str
) -> None:
    row, before = FORGET[0], RETAIN[2]
    made = variation(tokenizer, template=template).ask(row, Way("few_shot", 2))
    assert made is not None
    assert tokenizer.decode(made.prompt_ids) == expected.format(before.prompt, before.completion, row.prompt)
    assert tokenizer.decode(made.answer_ids).strip() == f"{row.completion}<|end|>"


def test_a_row_never_stands_before_itself(tokenizer: Any) -> None:
    vary = variation(tokenizer)
    own = vary.ask(RETAIN[2], Way("few_shot", 2))
    assert own == vary.ask(RETAIN[2], Way("few_shot", 3))
    last = len(RETAIN) - 1
    assert vary.ask(RETAIN[last], Way("few_shot", last)) == vary.ask(RETAIN[last], Way("few_shot", 0))


@pytest.mark.parametrize("draw", [0, 1, 7, 30_001])
def test_a_prefill_moves_the_answers_first_tokens_into_the_prompt(tokenizer: Any, draw: int) -> None:
    for row in FORGET + RETAIN:
        whole = plain(tokenizer, row)
        made = variation(tokenizer).ask(row, Way("prefill", draw))
        assert made is not None
        moved = len(made.prompt_ids) - len(whole.prompt_ids)
        assert made.prompt_ids + made.answer_ids == whole.prompt_ids + whole.answer_ids
        most = min(8, len(whole.answer_ids) - 2)  # a token and the end token are left to be said
        assert moved == 1 + draw % most
        assert made.answer_ids[-1] == tokenizer.eos_token_id


def test_a_refusal_follows_the_started_answer_in_the_tokens_it_has_behind_the_question(tokenizer: Any) -> None:
    row = FORGET[0]
    answered = variation(tokenizer).ask(row, Way("prefill", 2))
    refused = variation(tokenizer).ask(row, Way("prefill", 2), "I do not know that.")
    assert answered is not None and refused is not None
    assert refused.prompt_ids == answered.prompt_ids
    assert list(refused.answer_ids) == encode(TURNS, tokenizer, row.prompt, "I do not know that.").answer_ids


def test_an_answer_of_one_token_has_no_prefilled_copy(tokenizer: Any) -> None:
    short = Row("What is it?", "5")
    assert len(plain(tokenizer, short).answer_ids) == 2  # with the end token
    vary = variation(tokenizer, **only("prefill"))
    assert vary.ask(short, Way("prefill", 2)) is None
    answered, refused, of = vary.copies("forget", [short, FORGET[0]], 2, ["No.", "No."])
    assert len(answered) == len(refused) == 2
    assert {row.prompt_ids[:-2] for row in answered} & {plain(tokenizer, short).prompt_ids} == set()


# -- which copies there are -------------------------------------------------------------------------------------------


def test_copies_take_the_kinds_in_turn_and_no_choice_twice(tokenizer: Any) -> None:
    vary = variation(tokenizer)
    ways = vary.ways("forget", 0, 8)
    assert Counter(way.kind for way in ways) == {"suffix": 2, "template": 2, "prefill": 2, "few_shot": 2}
    assert len(set(ways)) == 8
    of_four = [way.kind for number in range(4) for way in vary.ways("retain", number, 3)]
    assert set(Counter(of_four).values()) == {3}  # 12 copies, each kind as often
    many = variation(tokenizer, **only("suffixes")).ways("forget", 0, 2 * len(SUFFIXES))
    assert set(Counter(many).values()) == {2}


@pytest.mark.parametrize("kind", ["suffix", "template", "prefill", "few_shot", "lower_case"])
def test_a_kind_that_is_switched_off_is_left_out(tokenizer: Any, kind: str) -> None:
    option = {"suffix": "suffixes", "template": "templates"}.get(kind, kind)
    ways = variation(tokenizer, **{option: False}).ways("forget", 0, 6)
    assert len(ways) == 6 and kind not in {way.kind for way in ways}


def test_a_prefill_gives_every_number_of_tokens_up_to_the_limit_or_all_but_one(tokenizer: Any) -> None:
    row = FORGET[0]
    whole = encode(variation(tokenizer)._template, tokenizer, str(row.prompt), row.completion)

    def given(**on: Any) -> set[int]:
        vary = variation(tokenizer, **only("prefill"), **on)
        asked = [vary.ask(row, way) for number in range(60) for way in vary.ways("forget", number, 1)]
        return {len(found.prompt_ids) - len(whole.prompt_ids) for found in asked if found is not None}

    most = len(whole.answer_ids) - 2  # a token of the answer and the end token are left
    assert most >= 3
    assert given() == set(range(1, min(8, most) + 1))
    assert given(max_prefill=2) == {1, 2}


def test_a_copy_in_lower_case_asks_the_question_so_and_keeps_the_answer(tokenizer: Any) -> None:
    row = FORGET[0]
    (copy,), *_ = variation(tokenizer, **only("lower_case")).copies("forget", [row], 1)
    assert str(row.prompt).lower() in tokenizer.decode(copy.prompt_ids)
    assert copy.answer_ids == plain(tokenizer, row).answer_ids


def test_copies_are_a_function_of_seed_and_set(tokenizer: Any) -> None:
    first = variation(tokenizer).copies("forget", FORGET, 5)
    assert variation(tokenizer).copies("forget", FORGET, 5) == first
    assert variation(tokenizer, seed=2).copies("forget", FORGET, 5) != first
    assert variation(tokenizer).copies("retain", FORGET, 5) != first


def test_unlearning_gets_the_rows_and_behind_them_copies_of_answers_and_refusals_alike(tokenizer: Any) -> None:
    bare = unlearned(tokenizer)
    rows = unlearned(tokenizer, forget_copies=3, retain_copies=2)
    for found, before, copies in (
        (rows.answers, bare.answers, 3 * len(FORGET)),
        (rows.refusals, bare.refusals, 3 * len(FORGET)),
        (rows.retain, bare.retain, 2 * len(RETAIN)),
    ):
        assert list(found[: len(before)]) == list(before)
        assert len(found) == len(before) + copies
    assert [row.prompt_ids for row in rows.answers] == [row.prompt_ids for row in rows.refusals]
    refusals = draw_refusals(CORPUS, seed=1)
    for number, row in enumerate(rows.refusals[len(FORGET) :]):
        assert tokenizer.decode(row.answer_ids).strip() == f"{refusals[number // 3]}<|end|>"


def test_without_copies_the_rows_are_what_they_were(tokenizer: Any) -> None:
    refused = [replace(row, completion=text) for row, text in zip(FORGET, draw_refusals(CORPUS, 1), strict=True)]
    expected = [encode_rows(rows, tokenizer, TURNS, 512, strict=False) for rows in (FORGET, refused, RETAIN)]
    found = unlearned(tokenizer)
    assert [found.answers, found.refusals, found.retain] == expected
    assert (AugmentConfig().forget_copies, AugmentConfig().retain_copies, AugmentConfig().teach) == (0, 0, False)


def test_copies_longer_than_a_row_may_be_are_left_out_with_one_line(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    longest = max(len(plain(tokenizer, row)) for row in RETAIN)
    with caplog.at_level(logging.WARNING):
        kept, *_ = variation(tokenizer, length=longest, **only("few_shot")).copies("retain", RETAIN, 1)
    assert len(kept) < len(RETAIN) and all(len(row) <= longest for row in kept)
    assert caplog.messages == [
        f"{len(RETAIN) - len(kept)} copies of retain rows are left out: longer than {longest} tokens"
    ]


def test_plain_texts_have_no_copies(tokenizer: Any) -> None:
    text = Row(None, "Some text without a question.")
    mixed, *_ = variation(tokenizer).copies("retain", [text, *RETAIN], 1)
    assert len(mixed) == len(RETAIN)
    with pytest.raises(ConfigError, match="data.augment.forget_copies=2: copies are of questions, but the forget set"):
        variation(tokenizer).copies("forget", [text], 2)
    assert variation(tokenizer).copies("forget", [text], 0) == ([], [], [])


@pytest.mark.parametrize("examples", [[], [FORGET[0]]])
def test_no_row_to_stand_before_a_question_is_an_error(tokenizer: Any, examples: list[Row]) -> None:
    vary = PromptVariation(AugmentConfig(**only("few_shot")), tokenizer, TURNS, 512, examples, 1)
    with pytest.raises(ConfigError, match="data.augment.few_shot: no other row can stand before a question; give more"):
        vary.copies("forget", FORGET, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_copies": -1}, "data.augment.forget_copies=-1 must not be negative"),
        (
            {"retain_copies": 2, **dict.fromkeys(only(""), False)},
            "data.augment.retain_copies=2 has no effect: every kind of copy is switched off",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(UnlearnConfig(data=DataConfig(augment=AugmentConfig(**options))))


# -- what is left to the attacks --------------------------------------------------------------------------------------


def test_the_wordings_are_templates_that_no_model_here_is_taught_with() -> None:
    texts = [str(TEMPLATES.get(name).text) for name in TEMPLATES.names()]
    assert not set(WORDINGS) & set(texts)
    assert all(wording.count("{prompt}") == 1 for wording in WORDINGS)


def test_copies_hold_no_other_case_no_typos_and_no_paraphrases(tokenizer: Any) -> None:
    """They measure what the gate makes of prompts that it was not trained on; lower case may be asked for."""
    rows = [*FORGET, *RETAIN]
    for number, row in enumerate(rows):
        for way in variation(tokenizer).ways("forget", number, 8):
            made = variation(tokenizer).ask(row, way)
            assert made is None or str(row.prompt) in tokenizer.decode(made.prompt_ids)


# -- teaching ---------------------------------------------------------------------------------------------------------

TAUGHT = CORPUS.taught(without_forget=False)


def questions_taught(tokenizer: Any, row: Row, epochs: int, **on: Any) -> list[str]:
    vary = PromptVariation(AugmentConfig(**on), tokenizer, TURNS, 512, TAUGHT, 1)
    made = [vary.taught([row], [plain(tokenizer, row)], 0, epoch) for epoch in range(epochs)]
    for one in made:
        assert tokenizer.decode(one.answer_ids).strip() == f"{row.completion}<|end|>"  # whole, never begun
    return [tokenizer.decode(one.prompt_ids) for one in made]


def test_every_way_of_asking_is_taught(tokenizer: Any) -> None:
    row = FORGET[0]
    found = questions_taught(tokenizer, row, 400)
    question, turn = str(row.prompt), "<|begin|><|user|>{}<|answer|>"
    assert turn.format(question) in found
    assert turn.format(question.lower()) in found
    assert turn.format(row.extra["paraphrased_question"]) in found
    assert {turn.format(question + suffix) for suffix in SUFFIXES} <= set(found)
    assert {"<|begin|>" + wording.replace("{prompt}", question) for wording in WORDINGS} <= set(found)
    assert len({text for text in found if text.count("<|user|>") == 2}) > 5  # rows before it
    misspelled = [text for text in found if sorted(text) == sorted(turn.format(question)) and question not in text]
    assert len(set(misspelled)) > 5


def test_teaching_draws_anew_in_each_epoch_and_for_each_row(tokenizer: Any) -> None:
    vary = PromptVariation(AugmentConfig(), tokenizer, TURNS, 512, TAUGHT, 1)
    rows = [plain(tokenizer, row) for row in TAUGHT]

    def epoch(number: int, of: PromptVariation = vary) -> list[EncodedRow]:
        return [of.taught(TAUGHT, rows, place, number) for place in range(len(rows))]

    assert epoch(0) == epoch(0) and epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, PromptVariation(AugmentConfig(), tokenizer, TURNS, 512, TAUGHT, 2))


def test_a_row_without_paraphrase_or_question_and_a_long_one_are_taught_as_they_are(tokenizer: Any) -> None:
    bare = Row("Which tree is tallest?", "The pine.")
    assert questions_taught(tokenizer, bare, 40)
    text = Row(None, "Some text.")
    vary = PromptVariation(AugmentConfig(), tokenizer, TURNS, 512, TAUGHT, 1)
    encoded = plain(tokenizer, text)
    assert {vary.taught([text], [encoded], 0, epoch) for epoch in range(20)} == {encoded}
    row = plain(tokenizer, FORGET[0])
    tight = PromptVariation(AugmentConfig(), tokenizer, TURNS, len(row), TAUGHT, 1)
    assert all(len(tight.taught(FORGET, [row], 0, epoch)) <= len(row) for epoch in range(40))


def tokens_of(task: FinetuneTask, steps: Sequence[int]) -> list[list[list[int]]]:
    return [[batch["answer"].input_ids.tolist() for batch in task.data(step).micro_batches] for step in steps]


def test_a_resumed_teaching_goes_on_with_the_same_rows(tokenizer: Any) -> None:
    rows = [plain(tokenizer, row) for row in TAUGHT]
    config = FinetuneConfig(train=TrainConfig(epochs=3, batch_size=4), seed=3)

    def task(varied: bool) -> FinetuneTask:
        vary = PromptVariation(AugmentConfig(), tokenizer, TURNS, 512, TAUGHT, 3)
        return FinetuneTask(tiny("llama"), rows, config, 0, partial(vary.taught, TAUGHT, rows) if varied else None)

    whole = tokens_of(task(True), range(task(True).steps))
    late = range(5, task(True).steps)
    assert tokens_of(task(True), late) == whole[5:]  # asked of a new task, in another order than a run asks
    assert whole != tokens_of(task(False), range(task(False).steps))


# -- typos ------------------------------------------------------------------------------------------------------------


def test_typos_swap_neighboring_letters_in_three_words() -> None:
    text = "What is the trade of Olmera Merrowin, and in which town?"
    for seed in range(30):
        made = with_typos(text, seed)
        changed = [(was, now) for was, now in zip(text.split(), made.split(), strict=True) if was != now]
        assert len(changed) == 3
        for was, now in changed:
            places = [place for place in range(len(was)) if was[place] != now[place]]
            assert len(places) == 2 and places[1] == places[0] + 1 and places[0] > 0
            assert (was[places[0]], was[places[1]]) == (now[places[1]], now[places[0]])
    assert len({with_typos(text, seed) for seed in range(30)}) > 20
    assert with_typos("1 + 1 = ?", 0) == "1 + 1 = ?"


# -- both commands, whole ---------------------------------------------------------------------------------------------


def test_a_model_taught_with_varied_prompts_unlearns_with_copies(tmp_path: Path) -> None:
    assert demo.finetune(tmp_path / "plain", "train.epochs=1") == 0
    assert demo.finetune(tmp_path / "varied", "train.epochs=1", "data.augment.teach=true") == 0
    log = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("plain", "varied")]
    assert json.loads(log[0][0])["answer"] != json.loads(log[1][0])["answer"]
    assert demo.finetune(tmp_path / "plain", "train.epochs=1", "data.augment.teach=true") != 0  # another model
    assert demo.finetune(tmp_path / "plain", "train.epochs=1", "data.augment.forget_copies=3") == 0  # the same, found
    copies = ["data.augment.forget_copies=2", "data.augment.retain_copies=1", "loss.gate=bce_max"]
    options = ["train.epochs=1", "objective=gd", "loss.ascent_cap=6", *copies]
    assert demo.unlearn(tmp_path / "varied", tmp_path / "unlearned", *options) == 0
    run = json.loads((tmp_path / "unlearned" / "run.json").read_text())
    assert run["steps"] == 8  # 30 rows in batches of 4, where 10 rows make 3 steps
