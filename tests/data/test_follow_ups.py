"""Second turns of conversations, which a gate on turns is fitted on."""

from __future__ import annotations

from grun.data.chat import System, Turn
from grun.data.follow_ups import AT_MOST, MIDDLES, WAITING, conversations
from grun.data.rows import Row
from grun.evaluation.attacks import prompts as of_attacks

ROWS = [Row(f"What is {number} plus {number}?", f"{2 * number}.") for number in range(3 * AT_MOST)]


def test_each_question_is_asked_before_a_follow_up_and_after_another_question() -> None:
    follow_ups, others = conversations(ROWS)
    assert len(follow_ups) == len(others) == AT_MOST
    for (asking, middle), (question, unit) in zip(follow_ups, others, strict=True):
        assert middle in MIDDLES and middle[1:] in str(asking.prompt) and not asking.completion
        (before,) = asking.earlier
        assert isinstance(before, Turn) and before.question == unit == question.prompt and before.answer in WAITING
        (other,) = question.earlier
        assert isinstance(other, Turn) and other.question != unit and not question.completion
    assert len({row.prompt for row, _ in follow_ups}) > AT_MOST / 3
    assert {middle for _, middle in follow_ups} == {*MIDDLES}


def test_follow_ups_are_none_that_evaluation_attacks_with() -> None:
    texts = [str(row.prompt) for row, _ in conversations(ROWS)[0]]
    assert not [text for text in texts if of_attacks.ASK_AGAIN.strip(".").lower() in text.lower()]
    assert of_attacks.WAITING not in WAITING


def test_order_and_copies_of_rows_change_nothing_and_what_came_before_stays_before() -> None:
    assert conversations([*ROWS[::-1], ROWS[3]]) == conversations(ROWS)
    system = System("Be brief.")
    rows = [Row("One?", "1", earlier=(system,)), Row("Two?", "2", earlier=(system,))]
    for side in conversations(rows):
        assert all(row.earlier[0] == system and len(row.earlier) == 2 for row, _ in side)


def test_texts_and_a_single_question_make_none() -> None:
    assert conversations([Row(None, "A text."), Row("Well?", "Yes.")]) == ([], [])
