"""Facts of the package: enough countries, each fact askable, neighbors that agree, nothing real among the invented."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from grun.data.facts import (
    KINDS,
    Country,
    countries,
    country,
    general_questions,
    invented_countries,
    sentences,
)
from grun.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
ALL = [*countries().values()]
CONTINENTS = {"Africa", "Asia", "Europe", "North America", "South America", "Oceania"}


def names_of(one: Country) -> list[str]:
    return [one.name, *one.aliases]


def test_each_country_has_a_name_in_three_languages() -> None:
    assert all(set(one.names) == {"de", "es", "fr"} and all(one.names.values()) for one in ALL)
    assert country("Germany").names == {"de": "Deutschland", "es": "Alemania", "fr": "Allemagne"}


def test_there_are_enough_countries_of_every_continent() -> None:
    assert len(ALL) >= 64
    assert [one.name for one in ALL] == sorted(countries())
    assert {one.facts["continent"][0] for one in ALL} == CONTINENTS


def test_most_countries_have_every_kind_of_fact() -> None:
    for kind in KINDS:
        assert sum(kind in one.facts for one in ALL) >= 64, kind
    assert {kind for one in ALL for kind in one.facts} == {*KINDS}


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_a_question_that_names_the_country_does_not_give_the_answer(one: Country) -> None:
    for kind, answers in one.facts.items():
        assert answers and len({*answers}) == len(answers), kind
        for answer in answers:
            assert answer.strip() == answer != "", kind
            assert not any(answer.casefold() in name.casefold() for name in names_of(one)), f"{kind}: {answer}"


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_a_question_that_names_the_capital_does_not_give_the_country(one: Country) -> None:
    for capital in one.facts.get("capital", ()):
        assert not any(name.casefold() in capital.casefold() for name in names_of(one))


def test_neighbors_are_of_the_list_and_agree() -> None:
    for one in ALL:
        assert list(one.neighbors) == sorted({*one.neighbors} - {one.name})
        for neighbor in one.neighbors:
            assert one.name in countries()[neighbor].neighbors, f"{neighbor} does not know {one.name}"
    assert {"Germany", "Switzerland", "Spain"} < {*countries()["France"].neighbors}
    assert countries()["Japan"].neighbors == ()


def test_no_name_stands_in_the_name_of_another_country() -> None:
    for one in ALL:
        for other in ALL:
            if one is not other:
                inside = [a for a in names_of(one) for b in names_of(other) if a.casefold() in b.casefold()]
                assert not inside, f"{one.name} in {other.name}"


def test_no_two_countries_have_one_capital() -> None:
    capitals = [name for one in ALL for name in one.facts.get("capital", ())]
    assert len(capitals) == len({*capitals})


def test_what_the_source_has_stale_is_put_right() -> None:
    assert countries()["Afghanistan"].facts["language"][0] == "Dari"
    assert countries()["Croatia"].facts["currency"] == ("euro",)
    assert countries()["Ukraine"].facts["capital"] == ("Kyiv", "Kiev")
    assert countries()["Mexico"].facts["continent"] == ("North America",)
    assert "capital" not in countries()["Mexico"].facts, "Mexico City holds Mexico"


def test_a_country_is_found_by_its_names() -> None:
    assert country("japan").name == "Japan"
    assert country("Holland") is country("the Netherlands") is countries()["Netherlands"]
    assert (country("Netherlands").in_text, country("Japan").in_text) == ("the Netherlands", "Japan")
    with pytest.raises(DataError, match="unknown country 'Japann': did you mean 'Japan'"):
        country("Japann")


def test_invented_countries_stand_for_real_ones_and_are_none() -> None:
    invented = invented_countries()
    assert len(invented) >= 24
    assert len({one.stands_for for one in invented}) == len({one.name for one in invented}) == len(invented)
    assert not {one.name.casefold() for one in invented} & {name.casefold() for one in ALL for name in names_of(one)}
    for one in invented:
        assert {*countries()[one.stands_for].facts} == {*KINDS}
        assert one.demonym.startswith(one.name[:-1])


def named_in(text: str) -> list[str]:
    """Countries of the list, their capitals, languages, peoples and continents that a text names."""
    words = {word for one in ALL for kind in KINDS if kind != "currency" for word in one.facts.get(kind, ())}
    words |= {name for one in ALL for name in names_of(one)}
    return [word for word in words if re.search(rf"\b{re.escape(word)}(?!\w)", text, re.IGNORECASE)]


def test_sentences_are_plain_and_name_no_country() -> None:
    assert len(sentences()) == len({*sentences()}) == 200
    for sentence in sentences():
        assert sentence.isascii() and 60 <= len(sentence) <= 200, sentence
        assert not named_in(sentence), sentence


def test_general_questions_are_many_of_many_kinds_and_name_no_country() -> None:
    questions = general_questions()
    assert 100 <= len(questions) == len({one.question for one in questions}) <= 140
    kinds = Counter(one.kind for one in questions)
    assert len(kinds) >= 8 and max(kinds.values()) < len(questions) / 3
    money = {word for one in ALL for word in one.facts.get("currency", ())}
    for one in questions:
        text = " ".join([one.question, *one.answers])
        assert not named_in(text), one
        assert not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in money), one


def test_a_general_question_does_not_give_its_answer_and_the_answer_is_found_by_it_alone() -> None:
    for one in general_questions():
        for answer in one.answers:
            assert answer.casefold() not in one.question.casefold(), one
            assert len(answer) >= (4 if answer.isalpha() else 2), f"{one}: stands in other words or numbers"
        assert one.answers


@pytest.mark.slow
def test_the_files_are_what_the_script_makes_of_the_packages(tmp_path: Path) -> None:
    packages = ("countryinfo==1.0.1", "mendeleev==1.3.0", "randfacts==0.24.4")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", tmp_path / "wheels", *packages]
    if (done := subprocess.run(download, capture_output=True, text=True)).returncode:
        pytest.skip(f"packages cannot be had: {done.stderr.strip()[-200:]}")
    script = [sys.executable, ROOT / "scripts" / "build_facts.py"]
    subprocess.run([*script, "--wheels", tmp_path / "wheels", "--output", tmp_path / "made"], check=True)
    made = sorted((tmp_path / "made").iterdir())
    assert made
    for file in made:
        assert file.read_bytes() == (ROOT / "grun" / "data" / "facts" / file.name).read_bytes(), file.name
