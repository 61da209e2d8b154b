"""Second turns of conversations: those that only ask for an answer to the turn before, and those that ask something.

Nothing is drawn: what is made of a question follows from its text. The strings are others than those that evaluation
attacks with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

from grun.data.chat import Turn
from grun.data.rows import Row, evenly_spaced

WAITING = (
    "One moment.",
    "Let me think about that.",
    "I would rather not say.",
    "That is a good question.",
    "I am not sure that I can help with that.",
    "Hm.",
)
"""What a question has been answered with, before somebody asks for an answer."""
BEGINNINGS = ("", "So, ", "Well, ", "OK. ", "Thanks. ", "Hm, ", "Come on, ", "No, ", "Sorry, ", "I know, but ")
MIDDLES = (
    *("tell me", "just say it", "go on", "what is it", "I am still waiting", "try again", "think again"),
    *("give me an answer", "I need to know it", "reply to what I asked", "say that again", "you can tell me"),
    *("that was no reply", "are you sure", "repeat that", "what was it that I wanted to know", "do continue"),
    *("I did ask you something", "answer that", "be so kind as to reply", "let me hear it", "finish what you began"),
)
ENDS = (".", "?", "!", ", please.", ", in a few words.", " at last.", ", it is important.", ". Thank you.", " anyway.")
AT_MOST = 500
"""Conversations of each kind."""


def conversations(rows: Sequence[Row]) -> tuple[list[tuple[Row, str]], list[tuple[Row, str]]]:
    """Turns that only ask for an answer to one of `rows`, and `rows` asked after another one; without answers.

    Each with a name of what it belongs to: the middle of the text, and the question. At most `AT_MOST` of each, evenly
    spaced; plain texts are passed over, and of fewer than two questions nothing is made.
    """
    asking = [row for _, row in sorted({row.prompt: row for row in rows if row.prompt is not None}.items())]
    if len(asking) < 2:
        return [], []
    follow_ups, others = [], []
    for place, row in evenly_spaced([*enumerate(asking)], AT_MOST):
        question = str(row.prompt)
        choice = crc32(question.encode())
        said = WAITING[choice % len(WAITING)]
        middle = MIDDLES[choice // 7 % len(MIDDLES)]
        text = BEGINNINGS[choice // 200 % len(BEGINNINGS)] + middle + ENDS[choice // 3000 % len(ENDS)]
        follow_ups.append((Row(text[0].upper() + text[1:], "", earlier=(*row.earlier, Turn(question, said))), middle))
        before = asking[(place + 1 + choice % (len(asking) - 1)) % len(asking)]
        others.append((replace(row, completion="", earlier=(*row.earlier, Turn(str(before.prompt), said))), question))
    return follow_ups, others
