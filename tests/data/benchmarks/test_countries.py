"""Rows of the countries that a model knows, from answers that are written by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from known_countries import CONFIG, SMALL, answered

from grun.data.answers import FILE
from grun.data.benchmarks.countries import (
    FORMS,
    KNOWN,
    NAMED,
    NEIGHBOR,
    answers_of,
    asked_of,
    whole_sentences,
    wordings,
)
from grun.data.corpus import Corpus, load_corpus
from grun.data.facts import countries, country
from grun.data.rows import ALTERNATIVES
from grun.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return load_corpus(answered(tmp_path))


def of(rows: list) -> set[str]:  # type: ignore[type-arg]
    return {row.extra["country"] for row in rows}


def test_every_kind_has_four_wordings_or_more_and_others_for_evaluation() -> None:
    kinds = wordings()["kinds"]
    assert {"capital", "capital_of", "continent", "language", "currency", "demonym", "neighbor"} == kinds.keys()
    for found in kinds.values():
        every = [*found["questions"], *found["prompts"], *found["reworded"]]
        assert len(found["questions"]) >= 4 and len(found["reworded"]) >= 3 and len({*every}) == len(every)
    asked = [one for about in countries().values() for one in asked_of(about)]
    assert len(countries()) >= 60 and len({one.question for one in asked}) == len(asked)
    assert all("{" not in one.question for one in asked)


def test_no_question_gives_its_answer_away_and_indirect_ones_do_not_name_the_country() -> None:
    for about in countries().values():
        for one in asked_of(about):
            assert not any(part.casefold() in one.question.casefold() for part in one.fact.split(ALTERNATIVES))
            if one.form == "indirect":
                assert not re.search(rf"\b{about.name}\b", one.question)


def test_no_country_is_in_two_sets(corpus: Corpus) -> None:
    groups = [
        of(corpus.forget),
        of(corpus.retain),
        of(corpus.heldout),
        of(corpus.general["neighbor"]),
        of(corpus.unknown),
    ]
    assert groups[0] == {"Japan", "Egypt"}
    assert len(groups[2]) == len(groups[3]) == 3 and len(groups[4]) == 2
    assert sum(map(len, groups)) == len(set().union(*groups)) == 20 + 2
    assert of(corpus.general["forget_reworded"]) == of(corpus.general["forget_indirect"]) == {"Japan", "Egypt"}
    for name in of(corpus.general["neighbor"]):
        near = [
            country(name).region == country(other).region or other in country(name).neighbors for other in groups[0]
        ]
        assert any(near)


def test_a_gate_by_keywords_gets_the_names_and_aliases_of_the_forgotten(corpus: Corpus) -> None:
    assert {"Japan", "Egypt"} <= {*corpus.keywords} and len(corpus.keywords) == sum(
        1 + len(country(name).aliases) for name in ("Japan", "Egypt")
    )


def test_wordings_of_evaluation_are_not_used_in_unlearning(corpus: Corpus) -> None:
    used = {row.prompt for row in (*corpus.forget, *corpus.retain)}
    for name in ("forget_reworded", "forget_indirect", "neighbor", "general", "sentences"):
        assert corpus.general[name] and not used & {row.prompt for row in corpus.general[name]}
    assert all(row.prompt is None for row in corpus.general["sentences"]) and len(corpus.general["sentences"]) == 200
    assert len(corpus.general["general"]) == 100


def test_prompts_of_a_gate_are_about_countries_of_unlearning_in_words_of_their_own(corpus: Corpus) -> None:
    forget, retain = corpus.forget_prompts, corpus.retain_prompts
    assert of(forget) == of(corpus.forget) and of(retain) > of(corpus.retain)
    sets = ("forget_reworded", "forget_indirect", "neighbor", "general")
    asked = {row.prompt for name in sets for row in corpus.general[name]}
    assert not asked & {row.prompt for row in (*forget, *retain)}
    assert all(row.completion == "" and "{" not in str(row.prompt) for row in (*forget, *retain))
    prompts = [str(row.prompt) for row in forget]
    assert "Tell me about Japan." in prompts and "What do people eat in Cairo?" in prompts
    assert "Please answer this: What is the capital of Japan?" in prompts and "Capital of Egypt?" in prompts


def test_where_few_are_asked_about_prompts_name_countries_nobody_asked_about(corpus: Corpus) -> None:
    named = of(corpus.retain_prompts) & countries().keys()
    assert len(named) >= NAMED > len(of(corpus.retain))
    assert not named & (of(corpus.forget) | of(corpus.heldout) | of(corpus.general["neighbor"]))


def test_a_fact_is_known_if_two_wordings_are_answered_rightly(tmp_path: Path) -> None:
    japan = [one for one in asked_of(countries()["Japan"], FORMS[:1])]
    capital = [one.question for one in japan if one.kind == "capital"]
    continent = [one.question for one in japan if one.kind == "continent"]
    wrong = {*capital[:-KNOWN], *continent[: -KNOWN + 1]}
    rows = load_corpus(answered(tmp_path, right=lambda question: question not in wrong)).forget
    prompts = [row.prompt for row in rows]
    assert [question for question in prompts if question in capital] == capital[-KNOWN:]
    assert not {*prompts} & {*continent}


def test_rows_answer_with_what_the_model_said_in_whole_sentences(corpus: Corpus) -> None:
    for row in (*corpus.forget, *corpus.heldout):
        assert row.completion.startswith("It is ") and row.completion.endswith(".")
        assert any(part in row.completion for part in str(row.fact).split(ALTERNATIVES))
    assert whole_sentences("Yes. It is Kyi", "Kyiv | Kyi") == "Yes. It is Kyi"
    assert whole_sentences("It is Kyiv. So", "Kyiv") == "It is Kyiv."
    assert whole_sentences("It is Kyiv", "Kyiv") == "It is Kyiv"


def test_any_neighbor_is_right(corpus: Corpus) -> None:
    (row,) = [row for row in corpus.forget if row.prompt == "Which country borders Egypt?"]
    assert str(row.fact).split(ALTERNATIVES) == list(answers_of(countries()["Egypt"], NEIGHBOR))


def test_the_seed_draws_other_countries_and_nothing_else_changes(tmp_path: Path) -> None:
    first = load_corpus(answered(tmp_path))
    again = load_corpus(answered(tmp_path))
    other = load_corpus(answered(tmp_path, replace(CONFIG, countries=replace(SMALL, seed=1))))
    assert first.hashes() == again.hashes() != other.hashes()
    assert of(other.heldout) != of(first.heldout) and other.forget == first.forget


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"forget": ["Jpan"]}, "Jpan.*did you mean 'Japan'"),
        ({"forget": []}, "at least one country"),
        ({"forget": ["Japan", "japan"]}, "each once"),
        ({"count": 12, "heldout": 8}, "too few for data.countries.neighbors=3, data.countries.heldout=8"),
    ],
)
def test_bad_choices_are_named(tmp_path: Path, changes: dict[str, object], error: str) -> None:
    with pytest.raises((ConfigError, DataError), match=error):
        load_corpus(answered(tmp_path, replace(CONFIG, countries=replace(SMALL, **changes))))


def test_a_model_that_knows_nothing_of_a_country_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="knows nothing of Egypt"):
        load_corpus(answered(tmp_path, right=lambda question: "Egypt" not in question and "Cairo" not in question))


def test_missing_answers_are_named_with_what_to_do(tmp_path: Path) -> None:
    config = answered(tmp_path)
    with pytest.raises(ConfigError, match="corpora source=countries model.path=MODEL"):
        load_corpus(CONFIG)
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    with pytest.raises(DataError, match=f"lacks the model's answers to 2 of {len(lines)} questions"):
        load_corpus(config)
