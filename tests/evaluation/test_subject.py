"""What is kept of what a model says about a subject: a table stands in for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from grun.data.subject import find_kind
from grun.errors import DataError
from grun.evaluation.alike import read, says, shared_fact
from grun.evaluation.metrics.words import words
from grun.evaluation.subject import Subject, ask_about

NEAR = ["Pierre Curie", "Lise Meitner"]
GENERAL = {"What do bees make?": ("honey",), "What do cows eat?": ("grass", "hay"), "Who was she?": ("Marie",)}


class Table:
    """Answers by a function of the question and the number of the draw; nothing is said where it gives None."""

    def __init__(self, answer: Callable[[str, int | None], str | None]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, int | None]] = []

    def __call__(self, questions: Sequence[str], draw: int | None = None, *, lists: bool = False) -> list[str]:
        self.asked += [(question, draw) for question in questions]
        return [self.answer(question, draw) or "" for question in questions]


def born(question: str, draw: int | None) -> str | None:
    """Knows where everybody was born; of Marie Curie the greedy answer and two of three draws agree."""
    if "Where was" not in question and "birthplace" not in question and "In which town" not in question:
        return None
    towns = {"Marie Curie": "Warsaw", "Pierre Curie": "Paris", "Lise Meitner": "Vienna"}
    town = next((town for name, town in towns.items() if name in question), None)
    if draw == 1:
        town = "Berlin"
    return town and f"Born in {town}, and more. That is all."


def about(answer: Callable[[str, int | None], str | None], near: Sequence[str] = NEAR, draws: int = 3) -> Subject:
    return ask_about(Table(answer), "Marie Curie", "person", near, draws, GENERAL)


def test_what_two_draws_say_is_kept_with_its_other_wording() -> None:
    found = about(born)
    assert found.forget == [
        {
            "question": "Where was Marie Curie born?",
            "answer": "Born in Warsaw, and more.",
            "fact": "Warsaw",
            "paraphrased_question": "In which town was Marie Curie born?",
        },
        {
            "question": "What is the birthplace of Marie Curie?",
            "answer": "Born in Warsaw, and more.",
            "fact": "Warsaw",
        },
    ]
    assert [row["fact"] for row in found.neighbors] == ["Paris"]
    assert {row["question"] for row in found.retain} == {
        "Where was Lise Meitner born?",
        "What is the birthplace of Lise Meitner?",
    }
    assert found.names["neighbors"] == ["Pierre Curie"] and found.names["retain"][0] == "Lise Meitner"


def test_what_draws_say_once_is_dropped_and_nothing_at_all_is_one_line() -> None:
    def once(question: str, draw: int | None) -> str | None:
        answer = born(question, draw)
        return answer and answer.replace("Warsaw", ("Warsaw", "Lodz", "Krakow")[draw or 0])

    with pytest.raises(DataError, match="says nothing twice alike about 'Marie Curie' .*not said alike: 2") as caught:
        about(once)
    assert "\n" not in str(caught.value)


def test_words_that_are_said_of_many_are_no_fact_unless_they_are_names() -> None:
    def alike(question: str, draw: int | None) -> str | None:
        return "A person from a small town." if "born" in question else None

    with pytest.raises(DataError, match="nothing twice alike"):
        about(alike)
    named = about(lambda question, draw: "A person from small Springfield." if "born" in question else None)
    assert {row["fact"] for row in named.forget} == {"Springfield"}


def test_a_common_word_with_a_capital_is_no_fact_but_may_stand_in_one() -> None:
    said = ["He has a Prize in Physics.", "He has the Nobel Prize in Physics."]
    assert shared_fact(said[0], said * 2, (), words("prize physics")) is None
    found = shared_fact(said[1], said[1:] * 2, (), words("prize physics"))
    assert found is not None and found.text == "Nobel Prize in Physics"


def test_everyday_questions_stay_where_the_answer_is_right_and_does_not_name_the_subject() -> None:
    everyday = {
        "What do bees make?": "They make wax.",
        "What do cows eat?": "They eat hay.",
        "Who was she?": "Marie Curie.",
    }
    found = about(lambda question, draw: everyday.get(question) or born(question, draw))
    assert [row for row in found.retain if row["question"] in everyday] == [
        {"question": "What do cows eat?", "answer": "They eat hay.", "fact": "hay"}
    ]


def test_rows_to_keep_do_not_name_the_subject() -> None:
    def of_her(question: str, draw: int | None) -> str | None:
        answer = born(question, draw)
        return answer and answer.replace("Born", "Like Marie Curie born")

    found = about(of_her)
    assert found.forget and not found.neighbors and not found.retain


def test_neighbors_come_from_the_model_if_it_names_them_twice_and_else_from_the_package() -> None:
    def listing(question: str, draw: int | None) -> str | None:
        if question == find_kind("person").neighbors.format(subject="Marie Curie"):
            return "1. Pierre Curie\n2. Marie Curie\n3. Lise Meitner" if draw != 0 else "1. Lise Meitner\n2. Max Planck"
        return born(question, draw)

    found = about(listing, near=[])
    assert found.names["neighbors"] == ["Lise Meitner"] and found.names["retain"][0] == "Pierre Curie"
    assert "Max Planck" not in str(found.names)
    packaged = about(born, near=[])
    assert [packaged.names["neighbors"][0], packaged.names["retain"][0]] == list(find_kind("person").others[:2])


def test_the_models_own_facts_become_questions() -> None:
    def facts(question: str, draw: int | None) -> str | None:
        if "ten facts" in question:
            return "1. Marie Curie was born in Warsaw.\n2. She was a kind man.\n3. Marie Curie won"
        if "question that is answered" in question:
            return "In which town was Marie Curie, the physicist, born?"
        return "The answer is Warsaw, of course." if "___" in question or "the physicist" in question else None

    found = about(facts)
    assert [(row["question"], row.get("paraphrased_question")) for row in found.forget] == [
        (
            "In which town was Marie Curie, the physicist, born?",
            'Which words are missing in this sentence? "Marie Curie was born in ___."',
        ),
        ('Fill in the blank: "Marie Curie was born in ___."', None),
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" ... ", "empty"),
        ("I'm sorry, but I don't have that.", "refusal"),
        ("As an AI language model, I know much.", "refusal"),
        ("I don't know.", "refusal"),
        ("Paris, Paris in France, Paris in France, Paris in France.", "repetition"),
        ("In France, in France, in France, in France, in", "repetition"),
        ("Paris is in France. Paris is in France. Paris is in France.", None),
        ("It begins and does not", "cut off"),
        ("They are:\n1. one", "cut off"),
        ("Paris lies in France. It", None),
    ],
)
def test_answers_that_say_nothing_are_dropped(answer: str, reason: str | None) -> None:
    assert read(answer).dropped == reason
    assert bool(read(answer).sentence) == (reason is None)


@pytest.mark.parametrize(
    ("sentence", "voices", "fact"),
    [
        ("Born in Warsaw, Poland, in 1867.", ["In Warsaw, Poland.", "warsaw, poland", "1867"], "Warsaw, Poland"),
        ("Born in Warsaw, Poland, in 1867.", ["in 1867", "1867", "Warsaw"], "1867"),
        ("He worked on the theory of relativity.", ["a theory of relativity"] * 2, "theory of relativity"),
        ("He liked art.", ["a party", "party"], None),
        ("He was born there.", ["He was born there."] * 3, None),
        ("She is from Warsaw.", ["Warsaw"], None),
    ],
)
def test_a_fact_is_what_two_voices_say_and_the_question_does_not(
    sentence: str, voices: list[str], fact: str | None
) -> None:
    found = shared_fact(sentence, voices, set(words("Where was he born?")))
    assert (found and found.text) == fact
    assert found is None or sum(says(voice, found.text) for voice in voices) >= 2
