"""Multiple-choice questions, and what `evaluate suite=knowledge` asks: names, files of every shape, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo import write_rows

from grun.config.options import DataConfig, QuestionsConfig
from grun.data.choices import ChoiceRow, load_choices, read_choices
from grun.data.corpus import load_knowledge
from grun.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")  # the folder `data` is relative

PLAIN = {"question": "Which is a bird?", "choices": ["carp", "wren", "oak", "moss"], "answer": 1}
UPSTREAM = {**PLAIN, "corrtect": "wren", "in_correct_choices": ["carp", "oak", "moss"]}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("answer", [1, "B", "b", "1"])
def test_an_answer_is_an_index_from_0_or_a_letter(answer: int | str, suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"birds{suffix}", {**PLAIN, "answer": answer}, {**PLAIN, "subject": "zoology"})
    first, second = read_choices(path)
    assert first == ChoiceRow("Which is a bird?", ("carp", "wren", "oak", "moss"), 1, "birds")
    assert second.subject == "zoology"


def test_upstreams_misspelt_key_must_agree_with_the_index(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bio_test.jsonl", UPSTREAM)
    assert read_choices(path)[0].answer == 1
    write_rows(path, UPSTREAM, {**UPSTREAM, "answer": 2})
    with pytest.raises(
        DataError, match="line 2: field 'answer' names option 2 .from 0., and 'corrtect' another; correct one"
    ):
        read_choices(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["wren"], "answer": 0}, "at least 2 options; it has 1"),
        ({"choices": []}, "at least 2 options; it has 0"),
        ({"choices": "wren"}, "field 'choices' must be a list of texts"),
        ({"choices": ["wren", 2]}, "field 'choices' must be a list of texts"),
        ({"answer": 4}, "answer 4 is none of the 4 options; expected 0 to 3 or A to D"),
        ({"answer": -1}, "answer -1 is none of the 4 options"),
        ({"answer": "E"}, "answer (a text) is none of the 4 options"),
        ({"answer": "wren"}, "answer (a text) is none of the 4 options"),
        ({"answer": ""}, "answer (an empty text) is none of the 4 options"),
        ({"answer": True}, "answer (true or false) is none of the 4 options"),
        ({"answer": None}, "answer (null) is none of the 4 options"),
        ({"question": " "}, "field 'question' must be a text that is not empty"),
    ],
)
def test_a_malformed_question_is_named_by_its_row(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    for file, place in (("a.jsonl", "a.jsonl line 2: "), ("a.json", "a.json row 2: ")):
        path = write_rows(tmp_path / file, PLAIN, {**PLAIN, **change})
        with pytest.raises(DataError) as refusal:
            read_choices(path)
        assert place in str(refusal.value) and message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["question", "choices", "answer"])
def test_a_missing_field_is_named_by_its_row(field: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", PLAIN, {key: value for key, value in PLAIN.items() if key != field})
    with pytest.raises(
        DataError, match=f"a.jsonl line 2: field '{field}' is missing; a row needs question, choices, answer"
    ):
        read_choices(path)


def test_rows_that_are_no_objects_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: expected an object"):
        read_choices(write_rows(tmp_path / "a.jsonl", "text"))
    with pytest.raises(DataError, match="a.json holds no rows"):
        read_choices(write_rows(tmp_path / "a.json"))


def test_rotating_moves_the_right_option_with_the_others() -> None:
    row = ChoiceRow("q", ("a", "b", "c"), 0, "s")
    turned = row.rotated(1)
    assert turned.choices == ("c", "a", "b") and turned.answer == 1
    assert row.rotated(3) == row


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "subject"),
    [
        ("wmdp_bio", ("cais/wmdp", "wmdp-bio", "test"), "wmdp_bio"),
        ("wmdp_cyber", ("cais/wmdp", "wmdp-cyber", "test"), "wmdp_cyber"),
        ("wmdp_chem", ("cais/wmdp", "wmdp-chem", "test"), "wmdp_chem"),
        ("mmlu", ("cais/mmlu", "all", "test"), "virology"),
        ("mmlu:virology", ("cais/mmlu", "virology", "test"), "virology"),
    ],
)
def test_names_stand_for_data_sets_of_the_hub(name: str, asked: tuple[str, str, str], subject: str, hub: Any) -> None:
    hub.rows = [{**PLAIN, "subject": "virology"} if name.startswith("mmlu") else PLAIN]
    (row,) = load_choices(name)
    assert hub.asked == [asked]
    assert row == ChoiceRow("Which is a bird?", ("carp", "wren", "oak", "moss"), 1, subject)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("wmdp_bio", "wmdp_bio.jsonl"),
        ("wmdp_bio", "bio_test.jsonl"),
        ("wmdp_cyber", "cyber_test.jsonl"),
        ("mmlu", "merged_mmlu_text.jsonl"),
        ("mmlu:virology", "mmlu_virology.json"),
        ("birds", "birds.json"),
        ("birds.jsonl", "birds.jsonl"),
    ],
)
def test_a_local_file_wins_over_the_hub(name: str, file: str, hub: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "questions" / file, UPSTREAM)
    (row,) = load_choices(name, str(tmp_path / "questions"))
    assert row.choices[row.answer] == "wren"
    assert hub.asked == []


def test_an_unknown_set_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"did you mean 'wmdp_bio'\? known: mmlu, mmlu:SUBJECT, wmdp_bio.*or a file"):
        load_choices("wmdp_boi")


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_knowledge_has_the_roles_that_are_named_and_no_others(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", PLAIN)
    write_rows(tmp_path / "b.jsonl", PLAIN, PLAIN)
    write_rows(tmp_path / "gaps.jsonl", {"prompt": "A wren is a", "completion": "bird.", "fact": "bird"})
    write_rows(tmp_path / "texts.jsonl", {"text": "one"}, {"text": ""}, {"text": "two"})
    knowledge = load_knowledge(
        DataConfig(
            name="corpora",
            path=str(tmp_path),
            questions=QuestionsConfig(
                forget=["a.jsonl", "b.jsonl"], cloze_general=["gaps.jsonl"], perplexity=["texts.jsonl"]
            ),
        )
    )
    assert {role: len(rows) for role, rows in knowledge.choices.items()} == {"forget": 3}
    ((role, (row,)),) = knowledge.cloze.items()
    assert (role, row.prompt, row.completion, row.fact) == ("general", "A wren is a", "bird.", "bird")
    assert knowledge.texts == {"texts.jsonl": ["one", "", "two"]}


def test_nothing_to_ask_says_what_to_name() -> None:
    with pytest.raises(ConfigError, match="nothing to ask: name sets in data.questions.forget"):
        load_knowledge(DataConfig(name="jsonl"))


@pytest.mark.parametrize("row", [{"prompt": "A wren is a", "completion": "bird."}, {"prompt": None, "completion": "x"}])
def test_a_sentence_to_complete_needs_its_fact(row: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "gaps.jsonl", {"prompt": "a", "completion": "b", "fact": "b"}, row)
    with pytest.raises(DataError, match="gaps.jsonl row 2: .*prompt, completion and fact"):
        load_knowledge(DataConfig(path=str(tmp_path), questions=QuestionsConfig(cloze_forget=["gaps.jsonl"])))


def test_lore_brings_questions_of_its_own() -> None:
    with pytest.raises(ConfigError, match="data.name=lore brings questions of its own"):
        load_knowledge(DataConfig(name="lore", questions=QuestionsConfig(forget=["a.jsonl"])))
