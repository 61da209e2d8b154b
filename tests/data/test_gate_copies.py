"""Copies of prompts for a gate that is fitted: what each kind makes of a question, and which rows have one."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import demo
import pytest

from grun.config.options import GATE_COPIES, AugmentConfig, DataConfig
from grun.data.augmentation import DRAWS, REWRITTEN, WORDINGS, PromptVariation, Way
from grun.data.corpus import load_corpus
from grun.data.rows import Row
from grun.data.templates import TEMPLATES
from grun.data.tokenizer import train_tokenizer
from grun.evaluation.attacks import prompts as of_attacks
from grun.evaluation.attacks.retention import REFUSAL

CORPUS = load_corpus(DataConfig(demo=demo.SIZES))
ROWS = [(row, f"row {number}") for number, row in enumerate(CORPUS.forget)]
QUESTION = "Where was Ada Lovelace born?"
WHOLE = ("suffix", "around", "beside", "framed", "code", "language", "template")
"""Kinds in which the question stands as it is."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([f"{row.prompt} {row.completion}" for row in CORPUS.taught(without_forget=False)], 400)


def variation(tokenizer: Any, examples: list[Row] | None = None, length: int = 512) -> PromptVariation:
    examples = CORPUS.retain if examples is None else examples
    return PromptVariation(AugmentConfig(), tokenizer, TEMPLATES.get("tiny"), length, examples, 0)


def asked(tokenizer: Any, kind: str, choice: int, question: str = QUESTION) -> str:
    made = variation(tokenizer).ask(Row(question, ""), Way(kind, choice))
    assert made is not None
    return str(tokenizer.decode(made.prompt_ids))


def test_every_way_that_the_option_names_can_be_asked() -> None:
    assert set(GATE_COPIES) == {*REWRITTEN, "template", "few_shot"}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_question_stands_whole_in_many_settings(tokenizer: Any, kind: str) -> None:
    found = {asked(tokenizer, kind, choice) for choice in range(40)}
    assert len(found) >= 4
    assert all(text.count(QUESTION) == 1 and len(text) > len(QUESTION) + 5 for text in found)


def test_a_question_in_other_letters_is_the_same_question() -> None:
    assert REWRITTEN["lower_case"](QUESTION, 3) == "where was ada lovelace born?"
    assert REWRITTEN["upper_case"](QUESTION, 3) == "WHERE WAS ADA LOVELACE BORN?"
    for choice in range(2):
        spelled = REWRITTEN["spelled"]("Does Ada live in Otter?", choice)
        assert re.sub(r"(?<=\w)([ _/*]| \. )(?=\w)", "", spelled) == "DoesAdaliveinOtter?"
        assert spelled.startswith("Does A") and " live in O" in spelled and "Ada" not in spelled
        spaced = REWRITTEN["spaced"](QUESTION, choice)
        assert spaced.startswith("W h e r e  ") and spaced.replace(" ", "") == QUESTION.replace(" ", "")
        assert [word.replace(" ", "") for word in re.split(" {2,}", spaced)] == QUESTION.split()
    wrong = {REWRITTEN["typos"](QUESTION, choice) for choice in range(20)}
    assert len(wrong) > 10 and all(Counter(text) == Counter(QUESTION) and text != QUESTION for text in wrong)


def test_settings_are_none_that_evaluation_attacks_with() -> None:
    attacks = [*of_attacks.SUFFIXES, str(of_attacks.OTHER_TEMPLATE.text), of_attacks.WAITING, of_attacks.ASK_AGAIN]
    attacks += [REFUSAL]
    assert of_attacks.OTHER_TEMPLATE.text not in WORDINGS
    for kind in WHOLE[:-1]:
        made = {REWRITTEN[kind]("{prompt}", choice) for choice in range(40)}
        assert not [text for text in made for attack in attacks if attack.strip().lower() in text.lower()]


def test_copies_keep_their_units_and_have_no_answer(tokenizer: Any) -> None:
    prompts, units = variation(tokenizer).of_prompts(ROWS, GATE_COPIES, 1)
    each = sum(DRAWS.get(kind, 1) for kind in GATE_COPIES)
    assert Counter(units) == {unit: each for _, unit in ROWS}
    assert not any(prompt.answer_ids for prompt in prompts)
    for row, unit in ROWS:
        own = [str(tokenizer.decode(p.prompt_ids)) for p, of in zip(prompts, units, strict=True) if of == unit]
        assert len({*own}) == each
        assert sum(str(row.prompt) in text for text in own) >= len(WHOLE)


def test_a_part_of_the_rows_is_asked_in_each_way_and_order_means_nothing(tokenizer: Any) -> None:
    prompts, units = variation(tokenizer).of_prompts(ROWS, GATE_COPIES, 3)
    assert len(ROWS) * len(GATE_COPIES) / 5 < len(prompts) < len(ROWS) * len(GATE_COPIES) / 2 + len(ROWS)
    turned = variation(tokenizer).of_prompts(ROWS[::-1], GATE_COPIES, 3)
    assert Counter(zip(prompts, units, strict=True)) == Counter(zip(*turned, strict=True))
    alone = variation(tokenizer).of_prompts(ROWS[1:2], GATE_COPIES, 3)
    assert {*alone[0]} == {p for p, unit in zip(prompts, units, strict=True) if unit == ROWS[1][1]}


def test_what_asks_nothing_is_too_long_or_has_no_example_is_left_out(tokenizer: Any) -> None:
    assert variation(tokenizer).of_prompts([(Row(None, "A text."), "text")], GATE_COPIES, 1) == ([], [])
    assert variation(tokenizer, length=4).of_prompts(ROWS, GATE_COPIES, 1) == ([], [])
    for examples in ([], CORPUS.retain[:1]):
        assert variation(tokenizer, examples).of_prompts(ROWS, ["few_shot"], 1) == ([], [])
