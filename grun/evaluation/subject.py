"""Ask a model about a subject that is only a name, and keep what it says alike over several draws.

The idea of forgetting a known subject with nothing but its name, with other questions and neighbors to tell whether it
worked, is RWKU's (Jin et al. 2024, arXiv 2406.10890); here the questions are packaged, and the answers are the model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from grun.data import subject as parts
from grun.data.subject import BLANK, Kind, is_other
from grun.data.words import plain
from grun.errors import DataError
from grun.evaluation.alike import TWICE, Read, lower_words, read, says, shared_fact
from grun.evaluation.metrics.words import words


class Ask(Protocol):
    """What answers questions; `grun.evaluation.asking.Asking` is one."""

    def __call__(self, questions: Sequence[str], draw: int | None = None, *, lists: bool = False) -> list[str]:
        """Answers: greedy ones, or those of the draw of that number, from 0; `lists`: they may be longer."""


Record = dict[str, str]
"""A row as it is written: question, answer, fact and perhaps paraphrased_question."""
Question = Sequence[str]
"""One question in its wordings."""

MOST_NEIGHBORS = 4
"""Names of neighbors that a model gives and that are asked about."""
MOST_STATEMENTS = 16
"""Statements of a model about the subject that are made questions of."""
OF_OTHERS = 4
"""Questions about each of the well-known others."""
MANY = 3
"""Names of which a word is said that says little of any."""


@dataclass
class Subject:
    """What a model says about a subject, and about what is not the subject."""

    forget: list[Record] = field(default_factory=list)
    """To be forgotten; many have the field paraphrased_question, a wording that is not in this list."""
    neighbors: list[Record] = field(default_factory=list)
    """About neighbors, for evaluation."""
    retain: list[Record] = field(default_factory=list)
    """About other neighbors, well-known others and everyday things."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Who or what the rows are about, by the name of their list."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Answers about the subject that were not taken, by reason."""


def ask_about(
    ask: Ask, subject: str, kind: str, neighbors: Sequence[str], draws: int, general: Mapping[str, Sequence[str]]
) -> Subject:
    """Rows about a subject, its neighbors and other things, all of them what the model says.

    About the subject an answer is kept that says something which two draws say too; about others two wordings must be
    answered alike. Words that are said of several others count only where they are names or numbers.

    Args:
        ask: asks the model.
        subject: a name.
        kind: one of `grun.data.subject.KINDS`.
        neighbors: names; none: the model is asked for some, and well-known ones stand in where it has none.
        draws: how often each question about the subject is answered by a draw; they take turns with its wordings.
        general: right answers by everyday questions; a row is made of what the model answers rightly.

    Raises:
        ConfigError: the kind is unknown, the subject is empty, or fewer than two neighbors are left.
        DataError: the model says nothing twice alike.
    """
    parts.check(subject, neighbors)
    asked = parts.find_kind(kind)
    near = _neighbors(ask, asked, subject, neighbors)
    others = [name for name in asked.others if all(is_other(name, one) for one in (subject, *near))]
    about = {name: [wordings[:TWICE] for wordings in _put(asked, name)] for name in near}
    about |= {name: _few(asked, name, place) for place, name in enumerate(others)}
    own = _put(asked, subject)
    said = _Said(ask, [*own, *(wordings for questions in about.values() for wordings in questions), list(general)])
    found = Subject(names={"neighbors": near[::2], "retain": near[1::2] + others})
    common = _of_many(said, [*about.values()])
    found.forget = _forgotten(own, said, _drawn(ask, own, draws), common, found.dropped)
    if stated := _of_statements(ask, subject):
        voices = _drawn(ask, stated, draws)
        found.forget += _forgotten(stated, _Said(ask, stated), voices, common, found.dropped)
    if not found.forget:
        raise DataError(_nothing(subject, found.dropped))
    called = parts.aliases(subject, kind, near)
    for name, questions in about.items():
        for wordings in questions:
            rows = _rows(wordings, said, said.sentences(wordings), common)
            if name in found.names["neighbors"]:
                found.neighbors += rows[:1]
            else:
                found.retain += rows
    for question, answers in general.items():
        sentence = said[question].sentence
        if right := next((answer for answer in answers if says(sentence, answer)), None):
            found.retain.append({"question": question, "answer": sentence, "fact": right})
    for rows in (found.neighbors, found.retain):
        rows[:] = [row for row in rows if not parts.mentions(" ".join(row.values()), called)]
    return found


def _put(asked: Kind, name: str) -> list[Question]:
    """The questions about a name."""
    return [[wording.format(subject=name) for wording in wordings] for wordings in asked.questions]


def _few(asked: Kind, name: str, place: int) -> list[Question]:
    """Some of the questions, in two wordings, about the well-known other in that place of their list."""
    step = max(1, len(asked.questions) // OF_OTHERS)
    return [wordings[:TWICE] for wordings in _put(asked, name)[place % step :: step][:OF_OTHERS]]


class _Said:
    """Greedy answers to questions, as `read` takes them."""

    def __init__(self, ask: Ask, questions: Sequence[Question]) -> None:
        distinct = list(dict.fromkeys(wording for wordings in questions for wording in wordings))
        self._answers = dict(zip(distinct, map(read, ask(distinct)), strict=True))

    def __getitem__(self, question: str) -> Read:
        return self._answers[question]

    def sentences(self, wordings: Question) -> list[str]:
        """Sentences of the answers to a question in its wordings, without those that are dropped."""
        return [self[wording].sentence for wording in wordings if self[wording].sentence]


def _of_many(said: _Said, about: Sequence[Sequence[Question]]) -> set[str]:
    """Words, but for names and numbers, that are said of `MANY` names or more, whatever is asked; questions by name."""
    of_names = [[text for wordings in questions for text in said.sentences(wordings)] for questions in about]
    count = Counter(word for texts in of_names for word in {word for text in texts for word in lower_words(text)})
    return {word for word, times in count.items() if times >= MANY}


def _forgotten(
    questions: Sequence[Question],
    said: _Said,
    voices: Sequence[Sequence[str]],
    common: Collection[str],
    dropped: Counter[str],
) -> list[Record]:
    """`_rows` of all wordings but the last, which the first row gets as its other wording where it has the same fact.

    `voices` are what draws say, by question. Why answers are not taken is counted in `dropped`.
    """
    found = []
    for (*used, kept), heard in zip(questions, voices, strict=True):
        rows = _rows(used, said, heard, common, kept)
        dropped.update(reason for wording in used if (reason := said[wording].dropped))
        dropped["not said alike"] += len(said.sentences(used)) - len(rows)
        if rows and says(said[kept].sentence, rows[0]["fact"]):
            rows[0]["paraphrased_question"] = kept
        found += rows
    return found


def _rows(
    wordings: Question, said: _Said, voices: Sequence[str], common: Collection[str], kept: str = ""
) -> list[Record]:
    """A row for each wording whose answer says what two of `voices` say too, by other words than `common` ones.

    Words of the wordings, and of one more that is `kept` from these rows, are no news.
    """
    asked = {word for wording in (*wordings, kept) for word in words(wording)}
    shared = [shared_fact(sentence, voices, asked, common) for sentence in said.sentences(wordings)]
    best = max((fact for fact in shared if fact), key=lambda fact: fact.score, default=None)
    if best is None:
        return []
    return [
        {"question": wording, "answer": said[wording].sentence, "fact": best.text}
        for wording in wordings
        if says(said[wording].sentence, best.text)
    ]


def _drawn(ask: Ask, questions: Sequence[Question], draws: int) -> list[list[str]]:
    """Sentences that draws answer to each question; a draw asks one of its wordings, the next one another."""
    heard: list[list[str]] = [[] for _ in questions]
    for number in range(draws):
        answers = ask([wordings[number % len(wordings)] for wordings in questions], number)
        for voices, answer in zip(heard, answers, strict=True):
            if sentence := read(answer).sentence:
                voices.append(sentence)
    return heard


def _lists(ask: Ask, requests: Sequence[str]) -> list[str]:
    """Lists that a model writes: greedy ones, and two draws of each."""
    return [text for draw in (None, *range(TWICE)) for text in ask(requests, draw, lists=True)]


def _neighbors(ask: Ask, asked: Kind, subject: str, given: Sequence[str]) -> list[str]:
    """Names near the subject: the user's, else those that the model says twice, else well-known ones."""
    if given:
        return [name for name in dict.fromkeys(given) if is_other(name, subject)]
    lists = map(parts.names, _lists(ask, [asked.neighbors.format(subject=subject)]))
    said = Counter(name for names in lists for name in names)
    named = [name for name, count in said.most_common() if count >= TWICE]
    near: list[str] = []
    for name in (*named, *asked.others):
        full = len(near) >= (MOST_NEIGHBORS if name in named else TWICE)
        if not full and all(is_other(name, one) for one in (subject, *near)):
            near.append(name)
    return near


def _of_statements(ask: Ask, subject: str) -> list[Question]:
    """Questions from the model's own lists of facts: each with a blank, and where it can be, as the model asks it."""
    asked = parts.find_wordings()
    lists = _lists(ask, [wording.format(subject=subject) for wording in asked.facts])
    found: dict[str, str] = {}
    seen: list[set[str]] = []
    for sentence in (sentence for text in lists for sentence in parts.statements(text, subject)):
        blank, content = parts.with_blank(sentence, subject), {*words(sentence)}
        if blank and len(found) < MOST_STATEMENTS and not any(content <= other or other <= content for other in seen):
            found[blank] = sentence
            seen.append(content)
    if not found:
        return []
    made = ask([asked.question.format(sentence=sentence) for sentence in found.values()])
    questions: list[Question] = []
    for (blank, sentence), text in zip(found.items(), made, strict=True):
        wordings = [wording.format(sentence=blank) for wording in asked.blanks]
        question = text.strip().split("\n")[0].strip('"* ')
        tells = plain(sentence) in plain(question) or BLANK in question
        usable = question.endswith("?") and subject.casefold() in question.casefold() and not tells
        questions.append([question, *wordings] if usable else wordings)
    return questions


def _nothing(subject: str, dropped: Counter[str]) -> str:
    why = ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common() if count)
    return (
        f"the model says nothing twice alike about {subject!r} (answers that were not taken: {why}); name a subject "
        "that it knows, another kind, or a larger model"
    )
