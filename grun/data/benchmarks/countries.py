"""Countries that a model really knows: nothing is taught, the model is asked first.

A fact that the model gives in at least two of its wordings is known; rows are the questions on known facts that it
answers rightly, with its own answer. `grun.evaluation.probe` asks, and keeps the answers in the folder `data.path`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from grun.config.options import CountriesConfig, DataConfig
from grun.data.answers import Answered, read_answers
from grun.data.corpus import Corpus, Subject, benchmark, refusals
from grun.data.everyday import everyday_prompts, prompts_about, prompts_around
from grun.data.facts import Country, countries, country, general_questions, invented_countries, sentences
from grun.data.packaged import packaged
from grun.data.rows import ALTERNATIVES, Row
from grun.data.sets import EvaluationSet
from grun.errors import ConfigError, DataError

KNOWN = 2
"""In so many wordings a fact must be answered rightly to count as known."""
GENERAL = 100
"""Most questions on anything else."""
NAMED = 36
"""So many countries at least are named in prompts on what stays, of those not asked about if fewer are: a gate that was
shown few names opens on others."""
FORMS = ("questions", "reworded", "indirect")
"""Used in unlearning; the same in other words; questions that do not name the country."""
COUNTRY = "country"
"""What is asked for where the country itself is the answer."""
NEIGHBOR = "neighbor"
"""The same for a country with a common border."""

SETS = (
    EvaluationSet(
        "forget_reworded",
        "reworded",
        "what is to be forgotten, in wordings that unlearning never used",
        "low",
        color="#B87A00",
    ),
    EvaluationSet(
        "forget_indirect",
        "indirect",
        "what is to be forgotten, asked without the country's name",
        "low",
        color="#A0522D",
    ),
    EvaluationSet(
        "neighbor",
        "neighbors",
        "countries next to forgotten ones, or in their part of the world; never used in unlearning",
        "high",
        color="#56B4E9",
    ),
    EvaluationSet(
        "general",
        "anything else",
        "questions on elements, animals, numbers, everyday things; never used in unlearning",
        "high",
        color="#117733",
    ),
    EvaluationSet("sentences", "sentences", "neutral sentences, as plain text", "same", ("perplexity",), ()),
)


@dataclass(frozen=True)
class Asked:
    """One question on a country."""

    country: str
    kind: str
    form: str
    """Of `FORMS`."""
    question: str
    fact: str
    """What a right answer holds; alternatives are separated by `ALTERNATIVES`."""


def wordings() -> Mapping[str, Any]:
    """How countries are asked about."""
    read: Mapping[str, Any] = packaged("generated/countries.yaml")
    return read


def asked_of(about: Country, forms: Collection[str] = FORMS) -> Iterator[Asked]:
    """Every question on a country whose parts are known, in the order of kinds."""
    parts = parts_of(about)
    for kind, found in wordings()["kinds"].items():
        for form in FORMS[:2]:
            if form in forms:
                yield from _filled(about, parts, form, [(kind, found["answer"], text) for text in found[form]])
    if FORMS[2] in forms:
        yield from _filled(about, parts, FORMS[2], [(answer, answer, text) for answer, text in wordings()["indirect"]])


def parts_of(about: Country) -> dict[str, str]:
    """What is filled into wordings."""
    return {"country": about.in_text} | {kind: answers[0] for kind, answers in about.facts.items()}


def _filled(
    about: Country, parts: Mapping[str, str], form: str, texts: Sequence[tuple[str, str, str]]
) -> Iterator[Asked]:
    """Questions of a form, made of kinds, what they ask for, and wordings."""
    for kind, wanted, text in texts:
        answers = answers_of(about, wanted)
        try:
            question = text.format_map(parts)
        except KeyError:
            continue
        if answers and not any(answer.casefold() in question.casefold() for answer in answers):
            yield Asked(about.name, kind, form, question, ALTERNATIVES.join(answers))


def answers_of(about: Country, wanted: str) -> tuple[str, ...]:
    """What counts as right where `wanted` is asked for: a kind of facts, the country itself or a neighbor."""
    if wanted == COUNTRY:
        return (about.name, *about.aliases)
    return about.neighbors if wanted == NEIGHBOR else about.facts.get(wanted, ())


def to_ask(config: DataConfig) -> dict[str, str]:
    """What the model has to be asked first: the fact that a right answer holds, by question."""
    chosen = config.countries
    forget = _named(chosen)
    found: dict[str, str] = {}
    for about in _considered(chosen):
        forms = FORMS if about.name in forget else FORMS[:1]
        found |= {one.question: one.fact for one in asked_of(about, forms)}
    return found | {one.question: ALTERNATIVES.join(one.answers) for one in general_questions()}


@benchmark(
    "countries",
    sets=SETS,
    refuses={
        "retain_rows": "data.retain_rows is for rows of files; use data.countries.count instead",
        "heldout": "countries have a held-out set of their own; use data.countries.heldout instead of data.heldout",
    },
    asks=to_ask,
)
def load(config: DataConfig) -> Corpus:
    """Facts on countries that the model really knows: it is asked first, and nothing is taught."""
    if config.path is None:
        raise ConfigError(
            "data.name=countries needs data.path, the folder of what the model knows, where no model is named; "
            "python -m grun corpora source=countries model.path=MODEL output_dir=FOLDER makes one"
        )
    answers = read_answers(Path(config.path).expanduser(), to_ask(config))
    chosen = config.countries
    rows = {about.name: _known_rows(about, answers) for about in _considered(chosen)}
    forget = _named(chosen)
    for name in forget:
        if not rows[name]:
            raise DataError(
                f"the model knows nothing of {name} (no fact in {KNOWN} wordings); name others in data.countries.forget"
            )
    groups = _groups(chosen, [name for name in rows if rows[name] and name not in forget])

    def of(names: Sequence[str]) -> list[Row]:
        return [row for name in names for row in rows[name]]

    retain, heldout = of(groups["retain"]), of(groups["heldout"])
    not_asked = [name for name in countries() if name not in rows]
    named = [*groups["retain"], *not_asked[: max(NAMED - len(groups["retain"]), 0)]]
    return Corpus(
        name="countries",
        forget=of(forget),
        subjects=[
            Subject(countries()[name].named, "place", answers_of(countries()[name], COUNTRY))
            for name in forget
            for _ in rows[name]
        ],
        retain=retain,
        heldout=heldout,
        unknown=list(_guessed(chosen)),
        refusals=refusals(config.refusals),
        forget_prompts=[
            *(row for name in forget for row in _everyday(name)),
            *prompts_around(of(forget), count=2),
        ],
        retain_prompts=[
            *(row for start, name in enumerate(named) for row in _everyday(name, every=6, start=start)),
            *prompts_around(retain[::3], count=1),
            *(Row(prompt, "", {"country": prompt}) for prompt in everyday_prompts()["other"]),
        ],
        general={
            "forget_reworded": _other_rows(forget, FORMS[1], answers),
            "forget_indirect": _other_rows(forget, FORMS[2], answers),
            "neighbor": of(groups["neighbor"]),
            "sentences": [Row(None, sentence) for sentence in sentences()],
            "general": _general_rows(answers),
        },
    )


def known_facts(chosen: CountriesConfig, answers: Mapping[str, Answered]) -> dict[str, tuple[int, int]]:
    """By kind, of how many countries the model knows the fact, and of how many it was asked."""
    found: dict[str, list[bool]] = {kind: [] for kind in wordings()["kinds"]}
    for about in _considered(chosen):
        for kind, count in _right_by_kind(about, answers).items():
            found[kind].append(count >= KNOWN)
    return {kind: (sum(known), len(known)) for kind, known in found.items()}


def _right_by_kind(about: Country, answers: Mapping[str, Answered]) -> Counter[str]:
    """In how many wordings each kind of fact that was asked for is answered rightly, 0 for one in none."""
    right: Counter[str] = Counter()
    for one in asked_of(about, FORMS[:1]):
        right[one.kind] += answers[one.question].right
    return right


def _named(chosen: CountriesConfig) -> list[str]:
    """Countries to forget, by the names of the list."""
    names = [country(name).name for name in chosen.forget]
    if not names or len({*names}) < len(names):
        raise ConfigError("data.countries.forget must name at least one country, each once")
    return names


def _considered(chosen: CountriesConfig) -> list[Country]:
    """The countries that are asked about: those to forget, their neighbors, then others as drawn."""
    forget = _named(chosen)
    rest = [name for name in countries() if name not in forget]
    Random(f"{chosen.seed}/countries").shuffle(rest)
    rest.sort(key=lambda name: -_nearness(name, forget))  # stable, so drawn among the equally near
    near, others = rest[: 2 * chosen.neighbors], rest[2 * chosen.neighbors :]
    Random(f"{chosen.seed}/others").shuffle(others)
    return [countries()[name] for name in [*forget, *near, *others][: max(chosen.count, len(forget) + 2)]]


def _nearness(name: str, forget: Sequence[str]) -> int:
    """2: shares a border with a forgotten country; 1: lies in the same part of the world; 0: neither."""
    about = countries()[name]
    others = [countries()[other] for other in forget]
    borders = any(name in other.neighbors or other.name in about.neighbors for other in others)
    return 2 if borders else int(any(other.region == about.region for other in others))


def _groups(chosen: CountriesConfig, names: Sequence[str]) -> dict[str, list[str]]:
    """Known countries that stay, by what they are used for; those set aside are drawn, neighbors the nearest first."""
    forget = _named(chosen)
    drawn = list(names)
    Random(f"{chosen.seed}/groups").shuffle(drawn)
    near = sorted((name for name in drawn if _nearness(name, forget)), key=lambda name: -_nearness(name, forget))
    neighbors = near[: chosen.neighbors]
    rest = [name for name in drawn if name not in neighbors]
    if len(rest) <= chosen.heldout:
        raise ConfigError(
            f"the model knows {len(names)} of the countries that stay, too few for data.countries.neighbors="
            f"{chosen.neighbors}, data.countries.heldout={chosen.heldout} and a retain set; lower these, or raise "
            "data.countries.count"
        )
    return {"neighbor": neighbors, "heldout": rest[: chosen.heldout], "retain": rest[chosen.heldout :]}


def _everyday(name: str, *, every: int = 1, start: int = 0) -> Iterator[Row]:
    """Prompts about a country, its capital and its people: everyday ones, and what is asked in further words."""
    about, asked = countries()[name], [*everyday_prompts()["any"], *everyday_prompts()["place"]]
    yield from prompts_about(about.named, asked, every=every, start=start, country=name)
    parts = parts_of(about)
    texts = [text for found in wordings()["kinds"].values() for text in found["prompts"]]
    for text in texts[start % every :: every]:
        if "{capital}" not in text or "capital" in parts:
            yield Row(text.format_map(parts), "", {"country": name})


def _known_rows(about: Country, answers: Mapping[str, Answered]) -> list[Row]:
    """Questions of unlearning on the country's known facts that the model answers rightly."""
    right = _right_by_kind(about, answers)
    known = [one for one in asked_of(about, FORMS[:1]) if right[one.kind] >= KNOWN]
    return [_row(one, answers) for one in known if answers[one.question].right]


def _other_rows(names: Sequence[str], form: str, answers: Mapping[str, Answered]) -> list[Row]:
    """Questions of another form on forgotten countries that the model answers rightly."""
    asked = [one for name in names for one in asked_of(countries()[name], (form,))]
    return [_row(one, answers) for one in asked if answers[one.question].right]


def _general_rows(answers: Mapping[str, Answered]) -> list[Row]:
    """The first questions on anything else that the model answers rightly."""
    right = [one for one in general_questions() if answers[one.question].right][:GENERAL]
    return [_row(Asked("", one.kind, FORMS[0], one.question, answers[one.question].fact), answers) for one in right]


def _row(one: Asked, answers: Mapping[str, Answered]) -> Row:
    said = whole_sentences(answers[one.question].answer, one.fact)
    about = {"country": one.country} if one.country else {}
    return Row(one.question, said, {"fact": one.fact, "kind": one.kind, **about})


def whole_sentences(answer: str, fact: str) -> str:
    """An answer without its last sentence where that was cut off, if what is left still holds the fact."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    whole = answer[: ends[-1]] if ends else answer
    held = any(part.casefold() in whole.casefold() for part in fact.split(ALTERNATIVES))
    return whole if held else answer


def _guessed(chosen: CountriesConfig) -> Iterator[Row]:
    """Questions on countries that do not exist, with the facts of a real one: what guessing gives.

    One wording of each kind, another one for each country.
    """
    for number, invented in enumerate(invented_countries()[: chosen.unknown]):
        about = replace(countries()[invented.stands_for], name=invented.name, the=False, aliases=())
        for kind, found in wordings()["kinds"].items():
            texts = found["questions"]
            answers = answers_of(about, found["answer"])
            if answers and "{country}" in texts[0]:
                question = texts[number % len(texts)].format(country=invented.name)
                fact = ALTERNATIVES.join(answers)
                yield Row(question, f"{answers[0]}.", {"fact": fact, "country": invented.name, "kind": kind})
