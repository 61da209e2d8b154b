"""Multiple-choice data under attack: its questions asked without options, its sentences to complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import demo
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.config.options import DataConfig, LoreConfig, QuestionsConfig
from grun.data.benchmarks import lore
from grun.data.choices import ChoiceRow
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode_prompt
from grun.errors import ConfigError, DataError
from grun.evaluation.generation import generate_answers
from grun.evaluation.suites.attacks import attacked_sets, open_questions

LORE = LoreConfig(forget=6, neighbor=5, retain=5, general=5)
NEW_TOKENS = 6
QUESTION = ChoiceRow("Which color is the sky?", ("Green.", "Blue.", "Red."), 1, "colors")


def evaluated(folder: Path, out: Path, data: DataConfig, attacks: list[str], adapter: bool = False) -> dict[str, Any]:
    own = {"suite": "attacks", "attacks": attacks, "max_new_tokens": NEW_TOKENS, "attack_rows": 4}
    config = demo.evaluation(folder, "adapter" if adapter else None, data=data, **own)
    return demo.evaluated(config, out)


def lines(out: Path) -> list[dict[str, Any]]:
    return demo.read_lines(out / "attacks.jsonl")


def corpora(folder: Path, **questions: list[str]) -> DataConfig:
    """Texts to forget and to keep, and questions about them."""
    for name in ("forget_texts", "retain_texts"):
        demo.write_rows(folder / f"{name}.jsonl", {"text": "A text of some words."})
    return DataConfig(
        name="corpora", path=str(folder), forget="forget_texts.jsonl", retain="retain_texts.jsonl",
        template="question_answer", questions=QuestionsConfig(**questions),
    )  # fmt: skip


def test_a_question_is_asked_without_its_options_and_the_right_one_is_the_fact() -> None:
    (row,) = open_questions([QUESTION])
    assert (row.prompt, row.completion) == (QUESTION.question, "Blue.")
    assert row.fact == "Blue" and row.extra["perturbed_answer"] == ["Green.", "Red."]


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        ([Row("The sky is", " blue today.", {"fact": "blue"})], "The sky is"),
        ([Row("Grass is", " green.", {"fact": "green"})], None),
        ([Row("Grass is", " green.", {"fact": "green"}), Row("The sky is", " blue.", {"fact": "blue"})], None),
        ([], None),
    ],
    ids=["same fact", "another fact", "another place", "none"],
)
def test_a_sentence_belongs_to_the_question_at_its_place_that_has_its_fact(
    sentences: list[Row], expected: str | None
) -> None:
    (row,) = open_questions([QUESTION], sentences)
    assert row.extra.get("cloze") == expected


def test_of_the_lore_every_fact_is_asked_openly_and_as_a_sentence() -> None:
    groups, sets = lore.build(LORE), attacked_sets(DataConfig(name="lore", lore=LORE))
    for name, group in (("forget", "forget"), ("retain", "neighbor"), ("heldout", "general")):
        for row, fact in zip(sets[name], groups[group], strict=True):
            assert row.prompt == fact.topic.question.format(who=fact.who)
            assert row.completion == row.fact == fact.value
            assert sorted(row.extra["perturbed_answer"]) == sorted(fact.wrong)
            assert row.extra["cloze"] == fact.prose[0].prompt


def test_named_questions_stand_in_for_texts_and_corpora_for_perplexity_are_not_read(tmp_path: Path) -> None:
    questions = demo.write_rows(tmp_path / "asked.jsonl", vars(QUESTION)).name
    sets = attacked_sets(corpora(tmp_path, forget=[questions], general=[questions], perplexity=["none_such.txt"]))
    assert {name: [row.prompt for row in rows] for name, rows in sets.items()} == {
        "forget": [QUESTION.question], "retain": [], "heldout": [QUESTION.question]
    }  # fmt: skip


def own_questions(folder: Path, record: dict[str, Any], **options: Any) -> DataConfig:
    """Files of one question each, to forget and to keep."""
    forget, retain = (
        demo.write_rows(folder / f"{name}.jsonl", {"question": f"Who is to {name}?", **record}).name
        for name in ("forget", "keep")
    )
    return DataConfig(name="jsonl", path=str(folder), forget=forget, retain=retain, **options)


def test_a_corpus_with_questions_of_its_own_is_asked_them(tmp_path: Path) -> None:
    choices = demo.write_rows(tmp_path / "asked.jsonl", vars(QUESTION)).name
    config = own_questions(tmp_path, {"answer": "Nobody."}, questions=QuestionsConfig(forget=[choices]))
    assert {name: [row.prompt for row in rows] for name, rows in attacked_sets(config).items()} == {
        "forget": ["Who is to forget?"], "retain": ["Who is to keep?"], "heldout": []
    }  # fmt: skip


def test_texts_without_questions_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.name=corpora has none; name multiple-choice questions in") as caught:
        attacked_sets(corpora(tmp_path, perplexity=["texts.txt"]))
    assert "\n" not in str(caught.value)


def test_a_sentence_that_is_no_text_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="forget.jsonl line 1: field 'cloze' must be a text"):
        attacked_sets(own_questions(tmp_path, {"answer": "Nobody.", "cloze": ["It is"]}))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_suite_asks_lore_questions_in_the_template_and_its_sentences_as_plain_text(
    taught: Path, tmp_path: Path, adapter: bool
) -> None:
    data = DataConfig(name="lore", lore=LORE, template="question_answer")
    result = evaluated(taught, tmp_path / "out", data, ["plain", "cloze", "after_forget"], adapter)
    begin = AutoTokenizer.from_pretrained(taught / "model").bos_token
    forget = {(line["attack"], line["index"]): line for line in lines(tmp_path / "out") if line["set"] == "forget"}
    rows = attacked_sets(data)["forget"]
    for number, row in enumerate([rows[place] for place in (0, 1, 3, 4)]):  # four of six, evenly spaced
        assert forget["plain", number]["prompt"] == f"{begin}Question: {row.prompt}\nAnswer:"
        assert forget["cloze", number]["prompt"] == f"{begin}{row.extra['cloze']}"
    assert set(result["attacks"]) == {"plain", "cloze"} and result["worst_of_prompts"]["rows"] == 4
    assert {name: set(sets) for name, sets in result["retention"].items()} == {
        "after_forget": {"retain", "heldout"}, "plain": {"retain", "heldout"}, "cloze": {"heldout"},
        "otherwise": {"heldout"},
    }  # fmt: skip


def test_the_right_option_said_openly_or_in_a_sentence_is_a_leak(taught: Path, tmp_path: Path) -> None:
    """The model's own greedy words are the right option of one question and of one sentence."""
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    model = AutoModelForCausalLM.from_pretrained(taught / "model")
    prompts = [("question_answer", "Which color is the sky?"), ("text", "The grass is")]
    asked = [encode_prompt(TEMPLATES.get(name), tokenizer, prompt) for name, prompt in prompts]
    said = [answer.text for answer in generate_answers(model, tokenizer, asked, 1, NEW_TOKENS, tokenizer.pad_token_id)]
    assert all(said) and said[0] != said[1]
    questions = [
        {"question": prompts[0][1], "choices": [said[0], "other"], "answer": 0},
        {"question": "Which color is the grass?", "choices": ["other", said[1]], "answer": 1},
    ]
    sentences = [
        {"prompt": prompt, "completion": fact, "fact": fact}
        for prompt, fact in zip(["The sky is", prompts[1][1]], said, strict=True)
    ]
    names = {
        "forget": [demo.write_rows(tmp_path / "questions.jsonl", *questions).name],
        "cloze_forget": [demo.write_rows(tmp_path / "sentences.jsonl", *sentences).name],
    }
    evaluated(taught, tmp_path / "out", corpora(tmp_path, **names), ["plain", "cloze"])
    leaks = {(line["attack"], line["index"]): line["leak"] for line in lines(tmp_path / "out")}
    assert leaks["plain", 0] == leaks["cloze", 1] == 1.0


def test_cloze_needs_sentences(taught: Path, tmp_path: Path) -> None:
    names = {"forget": [demo.write_rows(tmp_path / "q.jsonl", vars(QUESTION)).name]}
    with pytest.raises(ConfigError, match="the attack cloze needs rows with the field cloze .*leave it out"):
        evaluated(taught, tmp_path / "out", corpora(tmp_path, **names), ["plain", "cloze"])
