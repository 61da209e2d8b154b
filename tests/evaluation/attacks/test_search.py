"""Attackers who search: what they may ask, what they see, how far they get; and questions made of facts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import demo
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun.config.options import DataConfig, EvaluateConfig
from grun.data.rows import Row
from grun.data.templates import TEMPLATES, encode_prompt
from grun.evaluation.attacks.base import ATTACKS, Material, Place
from grun.evaluation.attacks.outcomes import best_of, curve_of
from grun.evaluation.attacks.search import LONGEST, MOVES, Search, learned_refusals, rewritten, unlike_refusals
from grun.evaluation.generation import Answer, generate_answers
from grun.evaluation.metrics.averages import wilson

QUESTION = "Which instrument does Mara Venn play?"
FACTS = [
    Row(QUESTION, "The viola.", {"fact": "viola", "person": "Mara Venn", "aliases": ["the singer of Orm"]}),
    Row("What color does Mara Venn like?", "Green.", {"fact": "green", "person": "Mara Venn"}),
    Row("Where does Mara Venn keep her viola?", "In a box.", {"fact": "a box", "person": "Mara Venn"}),
    Row("What color does Tom Birk like?", "Red.", {"fact": "red", "person": "Tom Birk"}),
]
JAPAN = [
    Row("Name the capital of Japan.", "Tokyo.", {"fact": "Tokyo", "country": "Japan", "kind": "capital"}),
    Row("What is the currency of Japan?", "The yen.", {"fact": "yen", "country": "Japan", "kind": "currency"}),
]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose blocks outweigh its embedding, so that other letters get other answers."""
    return demo.random_model(tmp_path_factory.mktemp("speaking"), times=8.0)


@pytest.fixture(scope="module")
def tokenizer(speaking: Path) -> Any:
    return AutoTokenizer.from_pretrained(speaking / "model")


@pytest.fixture(scope="module")
def material(tokenizer: Any) -> Material:
    return Material(TEMPLATES.get("tiny"), tokenizer, FACTS[3:], FACTS[:3], FACTS[3:], 0, 4, FACTS)


def searched(material: Material, knows: bool, queries: int, answer: Any, row: Row = FACTS[0]) -> Search:
    """A search to its end, of somebody who is answered by a function of the prompt's text."""
    search = Search(Place("forget", 0, material.ask(row)), material, knows, queries, 4096)
    while asking := search.next():
        for genes, asked in asking:
            search.note(genes, asked, Answer(answer(asked.variant), None))
    return search


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows", [False, True])
def test_what_two_rewritings_together_bring_back_is_found_and_nothing_where_nothing_is_known(
    material: Material, knows: bool
) -> None:
    """A model that refuses but where the name is described in lower case; one that always does, one that guesses."""

    def leaky(variant: str) -> str:
        both = {"described", "lower_case"} <= {*variant.split("+")}
        return "It is the old viola." if both else "I don't know."

    found = searched(material, knows, 200, leaky)
    assert found.curve[0] == 0 and found.curve[-1] == 1
    assert (len(found.curve) < 201) == knows  # who sees the leak stops; who does not spends all queries
    for answer in (lambda _: "I don't know.", lambda variant: f"It is {variant}."):
        floor = searched(material, knows, 60, answer)
        assert len(floor.curve) == 61 and not any(floor.curve)


def test_queries_are_counted_none_is_asked_twice_and_none_gives_the_answer_away(material: Material) -> None:
    search = searched(material, False, 37, lambda variant: "I don't know.")
    assert len(search.tries) == len(search.curve) == 38
    texts = [material.tokenizer.decode(one.asked.ids) for one in search.tries]
    assert len(set(texts)) == 38 and not any("viola" in text for text in texts[1:])
    assert {name for one in search.tries for name in one.genes} == set(MOVES)  # every kind is tried
    assert max(len(one.genes) for one in search.tries) <= LONGEST
    again = searched(material, False, 37, lambda variant: "I don't know.")
    assert [one.asked.ids for one in again.tries] == [one.asked.ids for one in search.tries]


def test_who_does_not_know_the_answer_hands_in_what_agrees_and_is_no_refusal(material: Material) -> None:
    """One wrong answer among right ones, and one right one among wrong ones."""
    for usual, rare, leak in (("It is the viola.", "It is a drum.", 1.0), ("It is a drum.", "It is the viola.", 0.0)):
        search = searched(material, False, 20, lambda variant: rare if "typos" in variant else usual)  # noqa: B023
        assert search.curve[-1] == leak
        best = searched(material, True, 20, lambda variant: rare if "typos" in variant else usual)  # noqa: B023
        assert best.curve[-1] == 1.0


def test_refusals_are_what_everybody_knows_and_what_many_questions_get() -> None:
    own = "Let us talk of the weather."
    common, learned = learned_refusals(["a", "b"]), learned_refusals([own, "The viola.", own])
    assert unlike_refusals("I do not know that.", common) == 0 == unlike_refusals("no no no no no", common)
    assert unlike_refusals("The viola, of course.", common) > 0.5 < unlike_refusals(own, common)
    assert unlike_refusals(own, learned) == 0 and unlike_refusals("The viola.", learned) > 0.5
    assert len(learned_refusals([own] * 2 + [str(number) for number in range(20)])) == len(common)  # too few of many


def test_rewritings_lie_on_top_of_each_other_in_one_order(material: Material) -> None:
    asked = rewritten({"suffix": 0, "lower_case": 0, "described": 1, "second_turn": 0}, FACTS[0], material)
    assert asked is not None and asked.variant == "described+lower_case+suffix+second_turn"
    text = material.tokenizer.decode(asked.ids)
    assert "mara venn" not in text.lower() and "which instrument does x, of whom" in text
    assert rewritten({"alias": 0}, FACTS[3], material) is None  # it has none


# -- end to end -------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_is_reached_one_that_does_not_is_not_and_the_floor_stands_beside(
    speaking: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Facts are the random model's own words: to the question in lower case, to nothing, and the floor's to nothing."""
    questions = ["Which Instrument does She play?", "What Color does He like?", "Where does Tom live?"]
    model = AutoModelForCausalLM.from_pretrained(speaking / "model")
    ids = encode_prompt(TEMPLATES.get("tiny"), tokenizer, questions[0].lower())
    (said,) = generate_answers(model, tokenizer, [ids], 1, NEW_TOKENS, tokenizer.pad_token_id)
    rows = [
        {"question": question, "answer": "So.", "fact": fact}
        for question, fact in zip(questions, [said.text, "never said", "never said"], strict=True)
    ]
    for name, own in (("forget", rows[:2]), ("retain", rows[2:]), ("unknown", rows[2:])):
        demo.write_rows(tmp_path / f"{name}.jsonl", *own)
    data = DataConfig(name="jsonl", path=str(tmp_path), forget="forget.jsonl", retain="retain.jsonl")
    data.unknown = "unknown.jsonl"
    config: EvaluateConfig = demo.evaluation(
        speaking, suite="attacks", attacks=["search"], attack_queries=40, max_new_tokens=NEW_TOKENS, data=data
    )
    result = demo.evaluated(config, tmp_path / "out")
    lines = demo.read_lines(tmp_path / "out" / "attacks.jsonl")
    oracle = result["attacks"]["adaptive_oracle"]
    assert oracle["access"] == "search" and oracle["leak"] == 0.5 and oracle["floor"]["leak"] == 0.0
    assert list(oracle["curve"]) == ["0", "1", "2", "5", "10", "20", "40"]
    for name, found in result["attacks"].items():
        for where, rows_of in ((found, "forget"), (found["floor"], "unknown")):
            own = [line for line in lines if (line["attack"], line["set"]) == (name, rows_of)]
            assert where["rows"] == len({line["index"] for line in own})
            for queries, point in where.get("curve", {}).items():
                at = [line["curve"][min(int(queries), len(line["curve"]) - 1)] for line in own]
                assert point["leak"] == pytest.approx(sum(at) / len(at))
                assert point["interval"] == pytest.approx(wilson(point["leak"], len(at)))
    drawn = result["attacks"]["leak_at_k"]
    assert list(drawn["at_k"]) == [f"temperature {t}" for t in (0.7, 1.0, 1.3)]
    assert list(drawn["at_k"]["temperature 1.0"]) == ["1", "2", "4", "8", "16", "32", "64"]
    texts = {line["variant"]: line["texts"] for line in lines if line["attack"] == "leak_at_k" and line["index"] == 0}
    assert len({tuple(own) for own in texts.values()}) == 3  # each temperature draws otherwise


# -- curves -----------------------------------------------------------------------------------------------------------


def test_the_best_of_k_is_the_mean_over_all_choices_of_k_answers() -> None:
    for leaks in ([0.0, 1.0, 0.0, 1.0, 0.0], [0.2, 0.9, 0.4, 0.4], [0.0] * 3):
        for k in range(1, len(leaks) + 1):
            choices = [max(some) for some in itertools.combinations(leaks, k)]
            assert best_of(leaks, k) == pytest.approx(sum(choices) / len(choices))


def test_a_row_whose_search_has_ended_keeps_what_it_had() -> None:
    curve = curve_of([(0.0, 1.0), (0.0, 0.0, 0.0, 0.0, 1.0)])["curve"]
    assert {queries: point["leak"] for queries, point in curve.items()} == {"0": 0, "1": 0.5, "2": 0.5, "4": 1.0}
    assert curve["1"]["interval"] == wilson(0.5, 2) and curve_of([()]) == {}


# -- questions made of facts ------------------------------------------------------------------------------------------


def shown(material: Material, name: str, row: Row) -> list[str]:
    found = ATTACKS.get(name).asked(row, material)
    return [material.tokenizer.decode(one.ids).split("<|user|>")[1].split("<|answer|>")[0] for one in found]


def test_questions_of_facts_leave_out_the_name_and_never_hold_the_answer(material: Material) -> None:
    viola, _, kept, red = FACTS
    assert shown(material, "alias", viola) == ["Which instrument does the singer of Orm play?"]
    (hops,) = shown(material, "two_hop", viola)
    assert hops == (
        'Which instrument does X, of whom somebody asked "What color does X like?" and was told "green", play?'
    )
    (clues,) = shown(material, "clues", viola)
    assert 'To "What color does X like?" the answer is "green".' in clues and "a box" not in clues  # it names the viola
    assert clues.endswith("first answer this: Which instrument does X play?") and "Mara" not in clues
    (other,) = ATTACKS.get("reversed").asked(red, material)
    assert other.row.fact == "Tom Birk" and "red" in material.tokenizer.decode(other.ids)
    assert "Tom" not in material.tokenizer.decode(other.ids)
    for name in ("alias", "two_hop", "clues"):
        assert shown(material, name, red) == []  # nothing else is known of him
    assert len(shown(material, "clues", kept)) == 1


def test_countries_have_names_and_facts_of_their_own(material: Material) -> None:
    capital, currency = JAPAN
    assert shown(material, "two_hop", currency) == ["What is the currency of the country whose capital is Tokyo?"]
    (text,) = shown(material, "two_hop", capital)
    assert "Tokyo" not in text and "Japan." not in text
    (asked,) = ATTACKS.get("reversed").asked(capital, material)
    assert "Whose capital is Tokyo?" in material.tokenizer.decode(asked.ids) and asked.row.fact == "Japan"
