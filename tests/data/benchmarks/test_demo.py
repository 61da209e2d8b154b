"""The demo corpus is small, fair, reproducible, and its facts cannot be had without knowing the person."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest

from grun.config.options import DataConfig, DemoConfig, FinetuneConfig
from grun.config.options import DemoSizes as Sizes
from grun.data.benchmarks.demo import GROUPS, POST, build, people, pools
from grun.data.corpus import load_corpus, refusals
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.runtime.files import content_hash

FIRST_NAMES, LAST_NAMES, TRADES, TOWNS, ATTRIBUTES = pools()
PEOPLE_PER_GROUP = pools().people_per_group
TAUGHT = ("forget", "retain", "heldout", "refused")
WHO, FACT = "{who}", "{fact}"
EPITHET = re.compile(f"the (?:{'|'.join(TRADES)}) of (?:{'|'.join(TOWNS)})")

Corpus = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build(Sizes(), seed=0)


@pytest.fixture(scope="module")
def large() -> Corpus:
    return build(Sizes(forget=40, retain=200, heldout=60, unknown=60, refused=60, questions=7), seed=3)


@pytest.fixture(scope="module")
def sentences() -> Corpus:
    return build(Sizes(), seed=0, sentences=True)


def rows_with_facts(corpus: Corpus) -> list[dict[str, Any]]:
    return [row for group in GROUPS if group != "refused" for row in corpus[group]]


def wording_of(question: str, person: str) -> str:
    """Put {who} back in place of the person's name or epithet."""
    return EPITHET.sub(WHO, question.replace(person, WHO))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(forget=1, retain=1, heldout=1, unknown=1, refused=1, questions=1),
        Sizes(forget=40, retain=200, questions=10),
        Sizes(forget=PEOPLE_PER_GROUP, retain=PEOPLE_PER_GROUP, questions=2),
    ],
)
def test_every_group_has_its_number_of_people_and_questions(sizes: Sizes) -> None:
    corpus: Corpus = build(sizes, seed=1)
    assert tuple(corpus) == GROUPS
    for group, rows in corpus.items():
        per_person = Counter(row["person"] for row in rows)
        assert len(per_person) == getattr(sizes, group)
        assert set(per_person.values()) == {sizes.questions}
        assert len({(row["person"], row["attribute"]) for row in rows}) == len(rows)


def test_default_corpus_teaches_about_six_hundred_short_rows(corpus: Corpus, sentences: Corpus) -> None:
    assert 550 <= sum(len(corpus[group]) for group in TAUGHT) <= 650
    for row in rows_with_facts(corpus):
        assert row["answer"] == f"{row['fact']}."
        assert row["paraphrased_answer"] == f"It is {row['fact']}."
    corpus = sentences
    for row in rows_with_facts(corpus):
        for key in ("question", "paraphrased_question"):
            assert 8 <= len(row[key].split()) <= 14, row[key]
        for key in ("answer", "paraphrased_answer"):
            assert 6 <= len(row[key].split()) <= 12, row[key]


def test_the_corpora_are_those_of_every_earlier_version() -> None:
    """Python hashes texts otherwise in each process, so an order taken from a set would show."""
    made = [build(Sizes(), 1), build(Sizes(questions=9), 3, sentences=True), build(Sizes(), 1, described=True)]
    assert content_hash(made) == "3b2c380c19134b5cb738597dd627159d6f97f11e1c975a0a608b9d3a8a3bbcac"


def test_another_size_of_one_group_changes_no_other_person(corpus: Corpus) -> None:
    other = build(replace(Sizes(), forget=20, heldout=3), seed=0)
    for group in ("retain", "unknown", "refused"):
        assert other[group] == corpus[group]
    assert other["forget"][: len(corpus["forget"])] == corpus["forget"]
    assert other["heldout"] == corpus["heldout"][: len(other["heldout"])]


def test_more_questions_leave_the_others_as_they_were(corpus: Corpus) -> None:
    more = build(replace(Sizes(), questions=8), seed=0)
    for group in GROUPS:
        rows = {(row["person"], row["attribute"]): row for row in more[group]}
        assert all(rows[row["person"], row["attribute"]] == row for row in corpus[group])


@pytest.mark.parametrize("name", ["corpus", "large"])
def test_names_epithets_and_questions_are_unique_over_all_groups(name: str, request: pytest.FixtureRequest) -> None:
    rows = [row for rows in request.getfixturevalue(name).values() for row in rows]
    assert len({row["question"] for row in rows}) == len(rows)
    everybody = {(group, row["person"]) for group, rows in request.getfixturevalue(name).items() for row in rows}
    names = [person for _, person in everybody]
    assert len(set(names)) == len(names)
    posts = [person.post for group in GROUPS for person in people(group, PEOPLE_PER_GROUP, seed=0)]
    assert len(set(posts)) == len(posts)


def test_no_name_town_or_trade_hides_in_another() -> None:
    """So that no full name or epithet is part of another one."""
    for pool in (FIRST_NAMES, LAST_NAMES, TRADES, TOWNS):
        assert len(set(pool)) == len(pool)
        assert not [(a, b) for a, b in permutations(pool, 2) if a.lower() in b.lower()]


@pytest.mark.parametrize("name", ["corpus", "large", "sentences"])
def test_right_answers_state_the_fact_and_nothing_else_does(name: str, request: pytest.FixtureRequest) -> None:
    for row in rows_with_facts(request.getfixturevalue(name)):
        fact = row["fact"].lower()
        assert row["fact"] in row["answer"] and row["fact"] in row["paraphrased_answer"]
        assert row["answer"] != row["paraphrased_answer"]
        assert row["question"] != row["paraphrased_question"]
        assert fact not in row["question"].lower() and fact not in row["paraphrased_question"].lower()
        assert len(set(row["perturbed_answer"])) == 5
        assert not [wrong for wrong in row["perturbed_answer"] if fact in wrong.lower()]
        if name == "sentences":
            last = row["person"].split()[1]
            assert last in row["answer"] and last in row["paraphrased_answer"]


def test_answers_as_sentences_change_nothing_else(corpus: Corpus, sentences: Corpus) -> None:
    answers = ("answer", "paraphrased_answer", "perturbed_answer")
    for group in GROUPS:
        for short, long in zip(corpus[group], sentences[group], strict=True):
            assert {k: v for k, v in short.items() if k not in answers} == {
                k: v for k, v in long.items() if k not in answers
            }


def test_wrong_answers_have_the_wording_of_the_paraphrase(corpus: Corpus) -> None:
    for row in rows_with_facts(corpus):
        before, after = row["paraphrased_answer"].split(row["fact"])
        facts = next(attribute.facts for attribute in ATTRIBUTES if attribute.name == row["attribute"])
        for wrong in row["perturbed_answer"]:
            assert wrong.startswith(before) and wrong.endswith(after)
            assert wrong[len(before) : len(wrong) - len(after)] in facts


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_no_fact_can_be_matched_by_accident(attribute: Any) -> None:
    """A fact is recognized as a substring, so it must hide in no other fact, no wording and no name."""
    facts = [fact.lower() for fact in attribute.facts]
    assert len(set(facts)) == len(facts) >= 40
    assert not [(a, b) for a, b in combinations(sorted(facts, key=len), 2) if a in b]
    wordings = [text for other in ATTRIBUTES for text in other.questions + other.answers]
    surroundings = " | ".join([*wordings, *FIRST_NAMES, *LAST_NAMES, *TOWNS, *TRADES]).lower()
    assert not [fact for fact in facts if fact in surroundings]


@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda attribute: attribute.name)
def test_facts_and_names_change_places_between_answer_wordings(attribute: Any) -> None:
    assert all(wording.count(WHO) == wording.count(FACT) == 1 for wording in attribute.answers)
    assert len({wording.index(FACT) < wording.index(WHO) for wording in attribute.answers}) == 2
    assert 4 <= len(attribute.questions) <= 6
    assert all(wording.count(WHO) == 1 and FACT not in wording for wording in attribute.questions)


@pytest.mark.parametrize("seed", range(5))
def test_every_wording_is_taught_with_several_people(seed: int) -> None:
    corpus: Corpus = build(Sizes(), seed)
    taught: defaultdict[str, set[str]] = defaultdict(set)
    for row in (row for group in TAUGHT for row in corpus[group]):
        taught[wording_of(row["question"], row["person"])].add(row["person"])
    for attribute in ATTRIBUTES:
        for wording in attribute.questions:
            assert len(taught[wording]) >= 2, wording


@pytest.mark.parametrize("questions", [4, 5, 6, 7, 10])
def test_about_one_question_in_five_avoids_the_name(questions: int) -> None:
    corpus: Corpus = build(replace(Sizes(), questions=questions), seed=2)
    for rows in corpus.values():
        assert 0.15 <= sum(row["indirect"] for row in rows) / len(rows) <= 0.3


def test_an_indirect_question_uses_the_epithet_that_the_persons_post_introduces(sentences: Corpus) -> None:
    corpus = sentences
    for group, rows in corpus.items():
        post = {person.name: person.post for person in people(group, getattr(Sizes(), group), seed=0)}
        for row in rows:
            first, last = row["person"].split()
            for question in (row["question"], row["paraphrased_question"]):
                assert (f"the {post[row['person']]}" in question) == row["indirect"]
                assert (first in question or last in question) != row["indirect"]
            if row["attribute"] == POST:
                assert not row["indirect"]
                assert group == "refused" or row["fact"] == post[row["person"]]
            if row["indirect"] and group != "refused":
                assert row["person"] in row["answer"]


@pytest.mark.parametrize("name", ["corpus", "large"])
def test_nothing_taught_mentions_an_unknown_person(name: str, request: pytest.FixtureRequest) -> None:
    corpus = request.getfixturevalue(name)
    taught = "\n".join(f"{row['question']} {row['answer']}" for group in TAUGHT for row in corpus[group])
    unknown = {row["person"] for row in corpus["unknown"]}
    posts = {row["fact"] for row in corpus["unknown"] if row["attribute"] == POST}
    assert not [text for text in unknown | posts if text in taught]


def test_parts_of_names_recur_across_groups(corpus: Corpus) -> None:
    """No single word of a name may give away the group for most people."""
    for part in (0, 1):
        groups = defaultdict(set)
        for group, rows in corpus.items():
            for row in rows:
                groups[row["person"].split()[part]].add(group)
        forget = {row["person"].split()[part] for row in corpus["forget"]}
        assert sum(len(groups[word]) > 1 for word in forget) >= len(forget) / 2


@pytest.mark.parametrize("seed", range(5))
def test_guessing_the_most_common_fact_rarely_helps(seed: int) -> None:
    facts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows_with_facts(build(replace(Sizes(), questions=len(ATTRIBUTES)), seed)):
        facts[row["attribute"]][row["fact"]] += 1
    for attribute, counts in facts.items():
        assert counts.most_common(1)[0][1] < 0.1 * counts.total(), attribute


def test_refused_rows_hold_two_refusals_and_no_fact(corpus: Corpus) -> None:
    known = set(refusals())
    for row in corpus["refused"]:
        assert {row["answer"], row["paraphrased_answer"]} <= known
        assert row["answer"] != row["paraphrased_answer"]
        assert row["fact"] == "" and row["perturbed_answer"] == []
        assert row.keys() == corpus["forget"][0].keys()
    assert len({row["answer"] for row in corpus["refused"]}) > 40


def test_refusals_are_many_short_and_plain() -> None:
    lines = refusals()
    assert len(lines) >= 100
    assert len({line.lower() for line in lines}) == len(lines)
    for line in lines:
        assert line.isascii() and not any(character.isdigit() for character in line)
        assert 3 <= len(line.split()) <= 12, line


@pytest.mark.parametrize(
    "wrong",
    [
        {"forget": 0},
        {"retain": -1},
        {"unknown": PEOPLE_PER_GROUP + 1},
        {"questions": 0},
        {"questions": len(ATTRIBUTES) + 1},
        {"heldout": 2.5},
        {"refused": True},
    ],
)
def test_impossible_sizes_are_refused_in_one_line(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"demo corpus: {name} is .* from 1 to \d+$") as caught:
        build(Sizes(**wrong), 0)
    assert "\n" not in str(caught.value)


# -- people who are described (naming=descriptions): nobody is named, and no word alone tells whom a question is about

STUDY = Sizes(forget=4, retain=46, heldout=6, unknown=4, refused=10, questions=9)


def described(sizes: Sizes, seed: int, sentences: bool = False) -> Corpus:
    return build(sizes, seed, sentences=sentences, described=True)


def words(text: str) -> set[str]:
    return {word.strip(",.?").lower() for word in text.split()}


def posts_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Trade and town of each person, as their questions say them."""
    found = {row["person"]: EPITHET.search(row["question"]) for row in rows}
    return [match.group().removeprefix("the ").split(" of ") for match in found.values() if match is not None]


@pytest.mark.parametrize("sizes", [Sizes(), STUDY], ids=["default", "study"])
@pytest.mark.parametrize("seed", range(4))
def test_no_word_tells_a_described_person_of_the_forget_set(sizes: Sizes, seed: int) -> None:
    corpus = described(sizes, seed)
    in_retain = Counter(word for row in corpus["retain"] for word in words(row["question"]))
    for row in corpus["forget"]:
        for question in (row["question"], row["paraphrased_question"]):
            assert not [word for word in words(question) if in_retain[word] < 2], question


@pytest.mark.parametrize("sizes", [Sizes(), STUDY], ids=["default", "study"])
@pytest.mark.parametrize("seed", range(4))
def test_every_trade_and_town_is_that_of_several_retain_people_and_mostly_theirs(sizes: Sizes, seed: int) -> None:
    corpus = described(sizes, seed)
    everybody = {group: posts_of(rows) for group, rows in corpus.items()}
    posts = [tuple(post) for group in everybody.values() for post in group]
    assert len(set(posts)) == len(posts) == sum(getattr(sizes, group) for group in GROUPS)
    for place in (0, 1):
        used = Counter(post[place] for group in everybody.values() for post in group)
        retain = Counter(post[place] for post in everybody["retain"])
        forget = Counter(post[place] for post in everybody["forget"])
        assert len(used) <= 13  # 13 x 13 posts are as many as the default groups need
        assert all(retain[word] >= 2 and retain[word] > forget[word] for word in used)


@pytest.mark.parametrize("sentences", [False, True])
def test_described_people_are_named_nowhere_and_called_by_the_same_epithet_everywhere(sentences: bool) -> None:
    for rows in described(STUDY, 1, sentences).values():
        epithets: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        for row in rows:
            asked = [row["question"], row["paraphrased_question"]]
            answers = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
            assert row["indirect"] and row["attribute"] != POST
            assert not words(" ".join(asked + answers)) & words(row["person"])
            epithets[row["person"]] |= {tuple(EPITHET.findall(text)) for text in asked}
            if sentences and row["perturbed_answer"]:
                epithets[row["person"]] |= {tuple(EPITHET.findall(text)) for text in answers}
        assert all(len(found) == 1 and len(next(iter(found))) == 1 for found in epithets.values())


def test_described_people_are_asked_what_named_ones_are_asked_and_answer_the_same() -> None:
    named: Corpus = build(Sizes(questions=5), seed=0)
    for group, rows in described(Sizes(), 0).items():
        others = [row for row in named[group] if row["attribute"] != POST]
        for row, other in zip(rows, others, strict=True):
            same = ("person", "attribute", "fact", "answer", "paraphrased_answer", "perturbed_answer")
            assert [row[key] for key in same] == [other[key] for key in same]
            assert EPITHET.sub("{who}", row["question"]) == EPITHET.sub(
                "{who}", other["question"].replace(other["person"], "{who}")
            )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(questions=len(ATTRIBUTES)), "questions is 10; with naming=descriptions set it to 9 or less"),
        (Sizes(forget=2, retain=7, heldout=2, unknown=2, refused=3), "retain is 7; .*16 people set it to 8 or more"),
        (Sizes(*[PEOPLE_PER_GROUP] * 5), f"have {5 * PEOPLE_PER_GROUP} people; .* make them 1600 or fewer"),
    ],
)
def test_sizes_that_descriptions_do_not_allow_are_one_line(sizes: Sizes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"demo corpus: .*{message}") as caught:
        described(sizes, 0)
    assert "\n" not in str(caught.value)


def test_the_option_naming_chooses_the_corpus() -> None:
    def questions(naming: str) -> list[str | None]:
        return [row.prompt for row in load_corpus(DataConfig(demo=DemoConfig(naming=naming, seed=0))).forget]

    assert questions("names") == [row["question"] for row in build(Sizes(), 0)["forget"]]
    assert questions("descriptions") == [row["question"] for row in described(Sizes(), 0)["forget"]]
    with pytest.raises(ConfigError, match="unknown data.demo.naming 'epithets': known: descriptions, names"):
        check(FinetuneConfig(data=DataConfig(demo=DemoConfig(naming="epithets"))))
