"""The packaged questions about a name, and what is read from lists and sentences."""

from __future__ import annotations

import string

import pytest

from grun.data.subject import (
    KINDS,
    aliases,
    check,
    find_kind,
    find_wordings,
    first_sentence,
    is_other,
    mentions,
    names,
    statements,
    with_blank,
)
from grun.errors import ConfigError


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_asks_twenty_questions_in_three_wordings_that_name_the_subject(name: str) -> None:
    kind = find_kind(name)
    assert len(kind.questions) >= 20 and len(kind.others) >= 10
    assert all(len(wordings) >= 3 for wordings in kind.questions)
    texts = [wording for wordings in kind.questions for wording in wordings]
    assert len(set(texts)) == len(texts)
    for text in (*texts, kind.neighbors):
        assert [field for _, field, _, _ in string.Formatter().parse(text) if field] == ["subject"]


def test_an_unknown_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown kind 'country': known: organization, person, place, topic, work"):
        find_kind("country")


def test_wordings_of_any_kind_have_their_places() -> None:
    asked = find_wordings()
    assert all("{subject}" in text for text in asked.facts)
    assert all("{sentence}" in text for text in (*asked.blanks, asked.question)) and len(asked.blanks) >= 2


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("He was born in Ulm. He died in Princeton.", "He was born in Ulm."),
        ("Dr. J. R. Smith lived in St. Louis. He died.", "Dr. J. R. Smith lived in St. Louis."),
        ('She said "No!" Then she left.', 'She said "No!"'),
        ("It is 3.5 km long. It is", "It is 3.5 km long."),
        ("A sentence that was cut", None),
        ("His works include:\n1. Hamlet.", None),
    ],
)
def test_the_first_sentence_is_whole_or_none(text: str, first: str | None) -> None:
    assert first_sentence(text) == first


def test_names_come_from_numbered_lines_and_from_commas_and_sentences_are_none() -> None:
    assert names("1. Niels Bohr: a physicist\n2. **Max Planck**\n3. he worked on light\n") == [
        "Niels Bohr",
        "Max Planck",
    ]
    assert names("Rome, Vatican City, and the sea") == ["Rome", "Vatican City"]
    assert names("Here is what I think about it all.") == []


def test_names_that_hold_the_subject_or_that_it_holds_are_no_others() -> None:
    assert [is_other(name, "Marie Curie") for name in ("Curie", "marie curie", "Dr. Marie Curie", "Pierre Curie")] == [
        *(False, False, False),
        True,
    ]
    assert not is_other("The Odyssey", "Odyssey")
    assert is_other("Pariser Platz", "Paris")


def test_a_person_is_mentioned_by_the_last_name_too_unless_a_neighbor_has_it() -> None:
    assert aliases("Albert Einstein", "person", ["Niels Bohr"]) == ["Albert Einstein", "Einstein"]
    assert aliases("Marie Curie", "person", ["Pierre Curie"]) == ["Marie Curie"]
    assert aliases("Romeo and Juliet", "work", []) == ["Romeo and Juliet"]
    assert mentions("He met einstein.", ["Albert Einstein", "Einstein"])
    assert not mentions("Einsteinium is an element", ["Einstein"])


def test_statements_name_the_subject_and_blanks_leave_out_its_last_name_number_or_long_word() -> None:
    text = "1. Albert Einstein was born in Ulm.\n2. He was awarded the Nobel Prize in 1921\n3. Many liked music."
    found = list(statements(text, "Albert Einstein"))
    assert found == ["Albert Einstein was born in Ulm.", "Albert Einstein was awarded the Nobel Prize in 1921."]
    blanks = [with_blank(sentence, "Albert Einstein") for sentence in found]
    assert blanks == ["Albert Einstein was born in ___.", "Albert Einstein was awarded the Nobel Prize in ___."]
    assert with_blank("Albert Einstein was a patient man.", "Albert Einstein") == "Albert Einstein was a ___ man."
    assert with_blank("Albert Einstein was a kind man.", "Albert Einstein") is None


@pytest.mark.parametrize(
    ("subject", "neighbors", "message"),
    [
        (" ", [], "subject is empty"),
        ("?", [], "subject is empty"),
        ("Marie Curie", ["Curie", "Pierre Curie"], "neighbors: 1 of 2 differ from 'Marie Curie'"),
        ("Marie Curie", ["Pierre Curie", "Pierre Curie"], "neighbors: 1 of 2"),
    ],
)
def test_a_subject_without_a_name_or_without_neighbors_is_one_line(
    subject: str, neighbors: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(subject, neighbors)
