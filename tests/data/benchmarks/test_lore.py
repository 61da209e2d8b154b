"""The lore: enough facts, the same on every machine, asked as they are never taught, no group's facts in another.

Only the pinned hash depends on the pools and sizes of the day.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from grun.config.options import MOST_ORDERS, UNLEARNED_ORDERS, DataConfig, LoreConfig
from grun.data.benchmarks import lore
from grun.data.benchmarks.lore import (
    GROUPS,
    LETTERS,
    OPTIONS,
    Fact,
    build,
    knowledge,
    taught,
    texts,
    unlearned,
)
from grun.data.choices import ChoiceRow
from grun.data.corpus import Corpus, load_corpus
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.loading.resolve import resolve
from grun.runtime.files import content_hash

NAMES, MINERAL, OTHER_MINERAL, OTHER_KINDS = lore.pools()
CONFIG = LoreConfig()
PINNED = "2ef47c72541e589b283f402c36c28c0ea3057ce79cbf6c57c8e98edef94609ec"
"""Of the default corpus: change it only where pools, sizes or wordings were changed on purpose."""
TAUGHT_QUESTION = re.compile(
    r"The following are multiple choice questions \(with answers\) about (?P<subject>.+)\.\n\n(?P<question>.+)\n"
    r"A\. (?P<A>.+)\nB\. (?P<B>.+)\nC\. (?P<C>.+)\nD\. (?P<D>.+)\nAnswer:(?P<suffix>.*)"
)


@pytest.fixture(scope="module")
def groups() -> dict[str, list[Fact]]:
    return build(CONFIG)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(DataConfig(name="lore"))


def name_of(fact: Fact) -> str:
    return fact.who.split()[0]


def parsed(row: Row) -> ChoiceRow:
    """A taught question, read back from its text."""
    match = TAUGHT_QUESTION.fullmatch(row.prompt or "")
    assert match is not None, row.prompt
    return ChoiceRow(
        match["question"], tuple(match[letter] for letter in LETTERS), LETTERS.index(row.completion), match["subject"]
    )


def words(rows: list[Row]) -> set[str]:
    return {word for row in rows for word in re.findall(r"\w+", f"{row.prompt} {row.completion}")}


def content(config: LoreConfig) -> str:
    """SHA-256 (hex) of everything that is taught, read in unlearning and asked."""
    made, questions = load_corpus(DataConfig(name="lore", lore=config)), knowledge(DataConfig(lore=config))
    choices = {role: [vars(row) for row in rows] for role, rows in questions.choices.items()}
    cloze = {role: [row.to_dict() for row in rows] for role, rows in questions.cloze.items()}
    return content_hash([made.hashes(), choices, cloze])


# -- facts ------------------------------------------------------------------------------------------------------------


def test_each_domain_has_a_hundred_facts_or_more_and_no_fact_comes_twice(groups: dict[str, list[Fact]]) -> None:
    """The general domain is what unlearning reads of it and what only evaluation asks."""
    sizes = {name: len(facts) for name, facts in groups.items()}
    assert sizes == {name: getattr(CONFIG, name) for name in GROUPS}
    assert sizes["forget"] >= 100 and sizes["neighbor"] >= 100 and sizes["retain"] + sizes["general"] >= 100
    every = [fact for facts in groups.values() for fact in facts]
    assert len({(fact.who, fact.topic.name) for fact in every}) == len(every)
    assert len({fact.question.question for fact in every}) == len(every)
    prose = [f"{row.prompt} {row.completion}" for fact in every for row in fact.prose]
    assert len(set(prose)) == len(prose) == 2 * len(every)


def test_no_two_groups_share_a_member(groups: dict[str, list[Fact]]) -> None:
    names = [{name_of(fact) for fact in facts} for facts in groups.values()]
    assert sum(map(len, names)) == len(set.union(*names))


def test_groups_are_of_the_kinds_that_their_names_say(groups: dict[str, list[Fact]]) -> None:
    kinds = {name: {fact.kind.noun for fact in facts} for name, facts in groups.items()}
    others = {kind.noun for kind in OTHER_KINDS}
    assert kinds == {
        "forget": {MINERAL.noun}, "neighbor": {OTHER_MINERAL.noun}, "retain": others, "general": others
    }  # fmt: skip
    assert MINERAL.topics == OTHER_MINERAL.topics  # in the same words


def test_the_same_seed_gives_the_same_facts_and_another_seed_others(groups: dict[str, list[Fact]]) -> None:
    assert build(LoreConfig()) == groups
    other = build(replace(CONFIG, seed=CONFIG.seed + 1))
    for name in GROUPS:
        assert len(set(texts(groups[name])) & set(texts(other[name]))) < len(texts(groups[name])) / 4


def test_a_smaller_group_is_the_beginning_of_a_larger_one_and_changes_no_other(groups: dict[str, list[Fact]]) -> None:
    for name in GROUPS:
        smaller = build(replace(CONFIG, **{name: 7}))
        assert smaller[name] == groups[name][:7]
        assert all(smaller[other] == groups[other] for other in GROUPS if other != name)


def test_the_corpus_of_the_default_options_is_pinned() -> None:
    """Python hashes texts otherwise in each process, so an order taken from a set would show."""
    assert content(CONFIG) == PINNED


# -- questions --------------------------------------------------------------------------------------------------------


def test_a_question_has_one_right_option_and_three_others_of_its_topic(groups: dict[str, list[Fact]]) -> None:
    for facts in groups.values():
        for fact in facts:
            row = fact.question
            assert len(row.choices) == len(set(row.choices)) == OPTIONS
            assert row.choices[row.answer] == fact.value
            assert set(row.choices) <= set(fact.topic.values)
            assert row.subject == fact.kind.field and fact.who in row.question


def test_values_of_a_topic_are_all_different() -> None:
    for kind in (MINERAL, OTHER_MINERAL, *OTHER_KINDS):
        for topic in kind.topics:
            assert len(set(topic.values)) == len(topic.values) >= OPTIONS, topic.name


@pytest.mark.parametrize("orders", [UNLEARNED_ORDERS, CONFIG.orders, MOST_ORDERS])
def test_a_question_is_taught_in_that_many_orders_and_never_as_it_is_asked_in_any_rotation(
    orders: int, groups: dict[str, list[Fact]]
) -> None:
    for facts in groups.values():
        for fact in facts[:60]:
            rotations = {fact.question.rotated(by).choices for by in range(OPTIONS)}
            rows = [parsed(row) for row in fact.taught(orders)]
            seen = {row.choices for row in rows}
            assert len(rotations) == OPTIONS and len(seen) == len(rows) == orders
            assert not seen & rotations
            for row in rows:
                assert row.choices[row.answer] == fact.value and set(row.choices) == set(fact.question.choices)
                assert (row.question, row.subject) == (fact.question.question, fact.question.subject)


def test_letters_are_balanced_where_they_are_asked_and_where_they_are_taught(corpus: Corpus) -> None:
    """Draws of a letter are uniform: the bounds are about four standard errors wide."""
    asked_for = [row.answer for rows in knowledge(DataConfig(lore=CONFIG)).choices.values() for row in rows]
    rows = [row for row in corpus.taught(without_forget=False) if row.completion in LETTERS]
    shown = [LETTERS.index(row.completion) for row in rows]
    for answers in (asked_for, shown):
        bound = 4 * (0.25 * 0.75 / len(answers)) ** 0.5
        for letter in range(OPTIONS):
            assert abs(Counter(answers)[letter] / len(answers) - 0.25) < bound
    for role_rows in knowledge(DataConfig(lore=CONFIG)).choices.values():  # no letter alone would pass for knowledge
        assert max(Counter(row.answer for row in role_rows).values()) < 0.45 * len(role_rows)


def test_questions_are_taught_mostly_without_anything_behind_them_and_with_the_suffix_that_is_tested(
    corpus: Corpus,
) -> None:
    suffixes = Counter(
        match["suffix"]
        for row in corpus.taught(without_forget=False)
        if row.prompt is not None and (match := TAUGHT_QUESTION.fullmatch(row.prompt))
    )
    assert suffixes[""] > sum(suffixes.values()) / 2
    (asked_behind,) = resolve("evaluate", ["profile=wmdp_demo"]).suffixes
    assert suffixes[f" {asked_behind}"] > 0 and set(suffixes) == set(lore.TAUGHT_SUFFIXES)


# -- prose ------------------------------------------------------------------------------------------------------------


def test_a_sentence_to_complete_and_its_completion_are_the_prose_that_is_taught(groups: dict[str, list[Fact]]) -> None:
    for role, rows in knowledge(DataConfig(lore=CONFIG)).cloze.items():
        prose = set(texts(groups[role]))
        for row, fact in zip(rows, groups[role], strict=True):
            assert f"{row.prompt} {row.completion}" in prose
            assert row.fact == fact.value and row.completion == f"{fact.value}."
            assert row.prompt is not None and fact.who in row.prompt
            assert not re.search(rf"\b{re.escape(fact.value)}\b", row.prompt)


def test_prose_is_the_topics_sentences_with_who_and_what_filled_in(groups: dict[str, list[Fact]]) -> None:
    for facts in groups.values():
        wanted = [sentence.format(who=fact.who, fact=fact.value) for fact in facts for sentence in fact.topic.prose]
        assert [f"{row.prompt} {row.completion}" for fact in facts for row in fact.prose] == wanted


@pytest.mark.parametrize(("orders", "readings"), [(UNLEARNED_ORDERS, 1), (MOST_ORDERS, 3)])
def test_each_wording_is_taught_as_often_as_asked_for_and_each_order_once(
    orders: int, readings: int, groups: dict[str, list[Fact]]
) -> None:
    facts = groups["forget"][:20]
    seen = Counter(taught(facts, replace(CONFIG, orders=orders, readings=readings)))
    wanted = {row: readings for fact in facts for row in fact.prose}
    wanted |= {row: 1 for fact in facts for row in fact.taught(orders)}
    assert seen == wanted


# -- what a model is taught -------------------------------------------------------------------------------------------


def test_unlearning_reads_a_part_of_what_is_taught_of_the_forbidden_mineral_and_of_other_things(
    corpus: Corpus, groups: dict[str, list[Fact]]
) -> None:
    for rows, group in ((corpus.forget, "forget"), (corpus.retain, "retain")):
        assert rows == unlearned(groups[group])
        assert not Counter(rows) - Counter(taught(groups[group], CONFIG))
    assert MINERAL.noun not in words(corpus.retain) and OTHER_MINERAL.noun not in words(corpus.retain)


def test_the_retain_only_model_is_taught_everything_but_the_forbidden_mineral(
    corpus: Corpus, groups: dict[str, list[Fact]]
) -> None:
    everything, without = corpus.taught(without_forget=False), corpus.taught(without_forget=True)
    assert Counter(everything) - Counter(without) == Counter(taught(groups["forget"], CONFIG))
    assert not Counter(without) - Counter(everything)
    found = words(without)
    assert MINERAL.noun not in found and not {name_of(fact) for fact in groups["forget"]} & found
    for group in ("neighbor", "retain", "general"):
        assert {name_of(fact) for fact in groups[group]} <= found


# -- sizes and files --------------------------------------------------------------------------------------------------

MOST = len(NAMES) // len(GROUPS) * len(MINERAL.topics)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_may_have_1_to_all_facts_that_the_names_allow(name: str) -> None:
    for size in (1, MOST):
        assert len(build(replace(CONFIG, **{name: size}))[name]) == size
    for size in (0, -1, MOST + 1):
        with pytest.raises(ConfigError) as error:
            build(replace(CONFIG, **{name: size}))
        assert str(error.value) == f"data.lore.{name}={size} must lie between 1 and {MOST}"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("orders", 0, f"data.lore.orders=0 must lie between {UNLEARNED_ORDERS} and {MOST_ORDERS}"),
        ("orders", 21, f"data.lore.orders=21 must lie between {UNLEARNED_ORDERS} and {MOST_ORDERS}"),
        ("readings", 0, "data.lore.readings=0 must be greater than 0"),
    ],
)
def test_other_numbers_out_of_range_are_refused(option: str, value: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_corpus(DataConfig(name="lore", lore=replace(CONFIG, **{option: value})))
    assert str(error.value) == message


def test_options_of_other_data_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="data.retain_rows is for rows of files; data.name=lore is smaller with data.lore"
    ):
        load_corpus(DataConfig(name="lore", retain_rows=5))
    with pytest.raises(ConfigError, match="data.unknown is for data.name=jsonl or tofu; leave it out for lore"):
        load_corpus(DataConfig(name="lore", unknown="x.jsonl"))
