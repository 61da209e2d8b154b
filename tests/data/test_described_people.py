"""The demo corpus with `naming=descriptions`: nobody is named, and no word alone tells whom a question is about."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from grun.config.options import DataConfig, DemoConfig, FinetuneConfig
from grun.config.options import DemoSizes as Sizes
from grun.data.benchmarks.demo import GROUPS, POST, build, pools
from grun.data.corpus import load_corpus
from grun.errors import ConfigError
from grun.loading.checks import check

TRADES, TOWNS, ATTRIBUTES = pools().trades, pools().towns, pools().attributes
PEOPLE_PER_GROUP = pools().people_per_group
EPITHET = re.compile(f"the (?:{'|'.join(TRADES)}) of (?:{'|'.join(TOWNS)})")

Corpus = dict[str, list[dict[str, Any]]]

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
