"""Sentences on the elements: none is in two lists, none gives its fact away, and what is to stay names no element."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from grun.data import elements
from grun.data.corpus import ROLES, load_corpus, load_knowledge
from grun.data.elements import Sentences, build, wordings
from grun.data.facts import elements as known_elements
from grun.data.rows import ALTERNATIVES, Row
from grun.data.texts import load_texts
from grun.loading.resolve import resolve


@pytest.fixture(scope="module")
def made() -> Sentences:
    return build()


def whole(row: Row) -> str:
    return f"{row.prompt} {row.completion}"


def every_list(made: Sentences) -> dict[str, list[str]]:
    asked = {role: [str(row.prompt) for row in rows] for role, rows in made.asked.items()}
    return {"read": [str(row.prompt) for row in [*made.forget, *made.retain]], "texts": made.texts} | asked


def test_no_sentence_stands_in_two_lists_or_twice(made: Sentences) -> None:
    counts = Counter(text for texts in every_list(made).values() for text in texts)
    assert len(counts) > 1000 and max(counts.values()) == 1
    assert not {whole(row) for row in made.retain} & {*made.texts}


def test_nothing_that_is_asked_of_what_stays_is_about_what_unlearning_reads(made: Sentences) -> None:
    read = {row.extra["about"] for row in made.retain}
    for role in ("neighbor", "general"):
        assert not read & {row.extra["about"] for row in made.asked[role]}


def test_what_is_to_stay_names_no_element(made: Sentences) -> None:
    names = re.compile("|".join(rf"\b{one.name}\b" for one in known_elements()), re.IGNORECASE)
    assert names.search("a spoon of silver")
    for text in [*map(whole, [*made.retain, *made.asked["general"]]), *made.texts]:
        assert not names.search(text), text


def test_a_sentence_does_not_give_its_fact_and_ends_in_the_first_name_of_it(made: Sentences) -> None:
    for row in [*made.forget, *(row for rows in made.asked.values() for row in rows)]:
        facts = str(row.fact).split(ALTERNATIVES)
        assert row.completion == f"{facts[0]}."
        for fact in facts:
            assert not re.search(rf"\b{re.escape(fact)}\b", str(row.prompt), re.IGNORECASE), row
            assert row.extra["whole_words"] is True


def test_elements_are_read_and_asked_in_wordings_of_their_own(made: Sentences) -> None:
    """Known by hand."""
    read, asked = ({str(row.prompt): row.completion for row in rows} for rows in (made.forget, made.asked["forget"]))
    assert read["The symbol for the element sodium is"] == "Na."
    assert asked["The atomic number of gold is"] == "79."
    assert asked["The chemical element with the symbol Fe is"] == "Iron."
    assert asked["In the periodic table, neon belongs to the family of the"] == "noble gases."
    forms = [text for kind in wordings()["kinds"].values() for form in kind.values() for text in form]
    assert len(forms) == len({*forms})
    assert {row.extra["about"] for row in made.forget} == {one.name for one in known_elements()}


def test_symbols_that_are_words_are_not_asked_for(made: Sentences) -> None:
    facts = {row.fact for row in [*made.forget, *made.asked["forget"]]}
    assert "Na" in facts and not {"I", "In", "As", "At", "He", "Be", "No"} & facts


def test_sentences_of_the_package_are_cut_in_the_middle(made: Sentences) -> None:
    cut = [row for row in made.retain if row.fact is None]
    assert len(cut) >= 90
    for row in cut:
        assert whole(row) == row.extra["about"]
        assert 0 <= len(row.completion.split()) - len(str(row.prompt).split()) <= 1


def test_files_hold_what_is_known_and_are_read_by_every_method(made: Sentences, tmp_path: Path) -> None:
    def keep(rows: Sequence[Row]) -> list[Row]:
        return [*rows[:5]]

    counts = elements.write(tmp_path, keep)
    assert counts == {role: (5, len(made.asked[role])) for role in ROLES}
    for side in ("forget", "retain"):
        assert load_texts(side, folder=str(tmp_path)) == [whole(row) for row in getattr(made, side)]
    config = resolve("unlearn", ["profile=wmdp_smollm2", f"data.path={tmp_path}"]).data
    corpus = load_corpus(config)
    assert [*map(whole, corpus.forget)] == [*map(whole, made.forget)]
    assert [*map(whole, corpus.retain)] == [*map(whole, made.retain)]
    asked = load_knowledge(replace(config, name="jsonl"))
    assert asked.cloze == {role: made.asked[role][:5] for role in ROLES}
    assert asked.texts == {"sentences.jsonl": made.texts}
    (first, *_) = (tmp_path / "forget_cloze.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first).keys() == {"prompt", "completion", "fact", "about", "whole_words"}
