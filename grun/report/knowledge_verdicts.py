"""What the numbers of a knowledge report mean, in words, for each method.

Of what is to be forgotten, all within 0.05:

- removes: multiple choice is at chance (1 / options, neither above nor below), or no higher than the retain-only
  model's, behind every suffix too; and cloze, the share of sentences completed by the key fact, is no higher than the
  retain-only model's (without one: than 0).
- hides: multiple choice is at chance, but behind a suffix it is not, or cloze is higher. The knowledge is there,
  and the token that is asked does not show it.
- partly forgets: multiple choice fell by 15 points or more, but not to chance.
- does not forget: anything else.

Of everything else (role general):

- keeps the rest: at least 95 % of what the model before had, of multiple choice and of cloze.
- damages the rest: less of either.

What lies near (role neighbor) is told and not judged. There is no verdict where the model before was at chance, and no
removing where cloze was not asked: multiple choice alone cannot tell it from hiding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grun.report.knowledge import Number, behind_suffixes, chance, choice, cloze, main_way
from grun.report.results import Result, before_of, target_of
from grun.report.tables import number
from grun.report.verdicts import Judgement

NEAR = 0.05
LOWERED = 0.15
KEEPS = 0.95
EXACT = 1e-9
"""Allowance for rounding at each limit."""
STATEMENT = (
    "Measured are these questions and sentences. A model that fails them may still hold the knowledge: other words, "
    "other prompts or some training may bring it back. A GRUN adapter leaves the base weights as they are; its effect "
    "exists where it is loaded."
)

Outcome = Literal["reached", "missed", "open"]


def judge_knowledge(result: Result, results: Sequence[Result]) -> Judgement:
    """The verdict on one method by the rule above; reached is only what removes and keeps the rest."""
    forgets, removed = _forgets(result, results)
    keeps, kept = _keeps(result, results)
    outcome: Outcome = "missed"
    if None in (removed, kept) and False not in (removed, kept):
        outcome = "open"
    elif removed and kept:
        outcome = "reached"
    words = f"{forgets}; {keeps}"
    return Judgement(outcome, words, f"{result.label}: {words}. {_facts(result, results)}.")


def _forgets(result: Result, results: Sequence[Result]) -> tuple[str, bool | None]:
    """What is said of the forget questions, and whether the knowledge is removed; None: it cannot be told."""
    way, before = main_way(results), before_of(result, results)
    level, now = chance(results, way), choice(result, way, "forget")
    known = choice(before, way, "forget") if before else None
    if now is None:
        return "no verdict: forget multiple choice was not asked", None
    if known is not None and known.value <= level + NEAR + EXACT:
        return "no verdict: the model before was at chance on forget itself", None
    target = target_of(result, results)
    if not _at_chance(now, level, choice(target, way, "forget") if target else None):
        fell = known.value - now.value if known else 0.0
        below = " to below chance, so the right option is still told apart" if now.value < level else ""
        if fell >= LOWERED - EXACT:
            return f"partly forgets: multiple choice lowered by {100 * fell:.0f} points{below}", False
        return "does not forget", False
    never = behind_suffixes(target, way) if target else {}
    shown = [
        f'multiple choice {number(behind.value)} behind "{suffix.strip()}"'
        for suffix, behind in behind_suffixes(result, way).items()
        if not _at_chance(behind, level, never.get(suffix))
    ]
    said, goal = cloze(result, "forget"), _goal(result, results)
    if said is not None and said.value > goal + EXACT:
        shown.append(f"cloze {number(said.value)}")
    if shown:
        return f"hides: {', '.join(shown)}", False
    if said is None:
        return "multiple choice at chance; whether removed or hidden is open, cloze was not asked", None
    return "removes", True


def _at_chance(found: Number, level: float, never_taught: Number | None) -> bool:
    """Whether a share of right options is as if guessed, or between that and a model's that was never taught."""
    highest = max(level + NEAR, never_taught.value if never_taught else 0.0)
    return level - NEAR - EXACT <= found.value <= highest + EXACT


def _goal(result: Result, results: Sequence[Result]) -> float:
    """Highest cloze on forget of a model without the knowledge."""
    target = target_of(result, results)
    known = cloze(target, "forget") if target else None
    return (known.value if known else 0.0) + NEAR


def _keeps(result: Result, results: Sequence[Result]) -> tuple[str, bool | None]:
    """What is said of general questions, and whether they are kept; None: they were not asked."""
    shares = _shares(result, results, "general")
    lost = [f"{name} {share:.0%}" for name, share in shares.items() if share < KEEPS - EXACT]
    if not shares:
        return "what it keeps was not asked", None
    return (f"damages the rest: {' and '.join(lost)} of before", False) if lost else ("keeps the rest", True)


def _shares(result: Result, results: Sequence[Result], role: str) -> dict[str, float]:
    """Multiple choice and cloze of a role as shares of before."""
    before, way = before_of(result, results), main_way(results)
    if before is None:
        return {}
    pairs = {
        "multiple choice": (choice(result, way, role), choice(before, way, role)),
        "cloze": (cloze(result, role), cloze(before, role)),
    }
    return {name: now.value / known.value for name, (now, known) in pairs.items() if now and known and known.value}


def _facts(result: Result, results: Sequence[Result]) -> str:
    """The numbers behind a verdict."""
    before, target, way = before_of(result, results), target_of(result, results), main_way(results)
    texts = []
    now = choice(result, way, "forget")
    if now is not None:
        known = choice(before, way, "forget") if before else None
        text = f"Forget multiple choice {_value(known)} -> {_value(now)} (chance {number(chance(results, way))})"
        behind = behind_suffixes(result, way)
        if behind:
            text += f", behind a suffix {', '.join(map(_value, behind.values()))}"
        texts.append(text)
    said = cloze(result, "forget")
    if said is not None:
        known, goal = cloze(before, "forget") if before else None, cloze(target, "forget") if target else None
        told = f"retain only {_value(goal)}" if goal else f"no retain-only model, so {NEAR} is allowed"
        texts.append(f"forget cloze {_value(known)} -> {_value(said)} ({told})")
    for role in ("general", "neighbor"):
        shares = _shares(result, results, role)
        if shares:
            listed = " and ".join(f"{name} {share:.0%}" for name, share in shares.items())
            texts.append(f"{role} {listed} of before")
    return "; ".join(texts)


def _value(found: Number | None) -> str:
    return number(found.value if found else None)
