"""What the numbers of a knowledge report mean, in words, for each method.

Of what is to be forgotten, all within 0.05:

- removes: multiple choice is at chance (1 / options, neither above nor below), or no higher than the retain-only
  model's, after every suffix too; and cloze, the share of sentences completed by the key fact, is no higher than the
  retain-only model's (without one: than 0).
- hides: multiple choice is at chance, but after a suffix it is not, or cloze is higher. The knowledge is there,
  and the token that is asked does not show it.
- partly forgets: multiple choice fell by 15 points or more, but not to chance.
- does not forget: anything else.

Where no multiple choice was asked cloze alone decides, in the same words; removing is then left open.

Of everything else (role general):

- keeps the rest: at least 95 % of what the model before had, of multiple choice and of cloze.
- damages the rest: less of either.

What lies near (role neighbor) is given and not judged. There is no verdict where the model before was at chance, and no
removing where cloze was not asked: multiple choice alone cannot distinguish it from hiding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grun.report.knowledge_results import Way, after_suffixes, chance, choice, cloze, main_way
from grun.report.result import EXACT, Judgement, Outcome, Result, before_of, target_of
from grun.report.tables import Number, shown

NEAR = 0.05
LOWERED = 0.15
KEEPS = 0.95
STATEMENT = (
    "Measured are these questions and sentences. A model that fails them may still hold the knowledge: other words, "
    "other prompts or some training may bring it back. A GRUN adapter leaves the base weights as they are; its effect "
    "exists where it is loaded."
)


class Case(NamedTuple):
    """What a verdict goes by: a method, what it is compared with, how questions were put and what guessing gives."""

    result: Result
    before: Result | None
    target: Result | None
    way: Way | None
    level: float


def judge_knowledge(result: Result, results: Sequence[Result]) -> Judgement:
    """The verdict on one method by the rule above; reached is only what removes and keeps the rest."""
    way = main_way(results)
    case = Case(result, before_of(result, results), target_of(result, results), way, chance(results, way))
    forgets, removed = _forgets(case)
    general = _shares(case, "general")
    lost = [f"{name} {share:.0%}" for name, share in general.items() if share < KEEPS - EXACT]
    keeps = f"damages the rest: {' and '.join(lost)} of before" if lost else "keeps the rest"
    found = {removed, not lost if general else None}
    outcome: Outcome = "reached" if found == {True} else "missed" if False in found else "open"
    words = f"{forgets}; {keeps if general else 'what it keeps was not asked'}"
    return Judgement(result.label, outcome, words, f". {_facts(case)}.")


def _forgets(case: Case) -> tuple[str, bool | None]:
    """What happened to the forget questions, and whether the knowledge is removed; None: that is open."""
    result, before, target, way, level = case
    now, known = choice(result, way, "forget"), choice(before, way, "forget")
    if now is None:
        return _completes(case)
    if known is not None and known.value <= level + NEAR + EXACT:
        return "no verdict: the model before was at chance on forget itself", None
    if not _at_chance(now, level, choice(target, way, "forget")):
        below = " to below chance, so it still knows which option is right" if now.value < level else ""
        return _lowered("multiple choice", known, now, below), False
    never = after_suffixes(target, way)
    still = [
        f'multiple choice {shown(suffixed.value)} after "{suffix.strip()}"'
        for suffix, suffixed in after_suffixes(result, way).items()
        if not _at_chance(suffixed, level, never.get(suffix))
    ]
    completed = cloze(result, "forget")
    if completed is not None and completed.value > _allowed(case):
        still.append(f"cloze {shown(completed.value)}")
    if still:
        return f"hides: {', '.join(still)}", False
    if completed is None:
        return "multiple choice at chance; whether removed or hidden is open, cloze was not asked", None
    return "removes", True


def _completes(case: Case) -> tuple[str, bool | None]:
    """The same where no multiple choice was asked, by sentences to complete."""
    completed, known = cloze(case.result, "forget"), cloze(case.before, "forget")
    if completed is None:
        return "no verdict: of forget, neither multiple choice nor cloze was asked", None
    if completed.value <= _allowed(case):
        return "completes as if never taught; whether removed or hidden is open, multiple choice was not asked", None
    return _lowered("cloze", known, completed), False


def _lowered(what: str, known: Number | None, now: Number, more: str = "") -> str:
    """What is said of a measure that is still too high, by how far it fell."""
    fell = known.value - now.value if known else 0.0
    if fell < LOWERED - EXACT:
        return "does not forget"
    return f"partly forgets: {what} lowered by {100 * fell:.0f} points{more}"


def _allowed(case: Case) -> float:
    """The highest cloze that counts as removed."""
    of_target = cloze(case.target, "forget")
    return (of_target.value if of_target else 0.0) + NEAR + EXACT


def _at_chance(found: Number, level: float, never_taught: Number | None) -> bool:
    """Whether a share of right options is as if guessed, or between that and a model's that was never taught."""
    highest = max(level + NEAR, never_taught.value if never_taught else 0.0)
    return level - NEAR - EXACT <= found.value <= highest + EXACT


def _shares(case: Case, role: str) -> dict[str, float]:
    """Multiple choice and cloze of a role as shares of before."""
    pairs = {
        "multiple choice": [choice(one, case.way, role) for one in (case.result, case.before)],
        "cloze": [cloze(one, role) for one in (case.result, case.before)],
    }
    return {name: now.value / known.value for name, (now, known) in pairs.items() if now and known and known.value}


def _facts(case: Case) -> str:
    """The numbers that a verdict goes by."""
    result, before, target, way, level = case
    texts = []
    now = choice(result, way, "forget")
    if now is not None:
        known = choice(before, way, "forget")
        text = f"Forget multiple choice {shown(known)} -> {shown(now)} (chance {shown(level)})"
        suffixed = after_suffixes(result, way).values()
        texts.append(text + (f", after a suffix {', '.join(map(shown, suffixed))}" if suffixed else ""))
    completed = cloze(result, "forget")
    if completed is not None:
        known, goal = cloze(before, "forget"), cloze(target, "forget")
        aim = f"retain only {shown(goal)}" if goal else f"no retain-only model, so {NEAR} is allowed"
        texts.append(f"forget cloze {shown(known)} -> {shown(completed)} ({aim})")
    for role in ("general", "neighbor"):
        shares = [f"{name} {share:.0%}" for name, share in _shares(case, role).items()]
        texts += [f"{role} {' and '.join(shares)} of before"] if shares else []
    return "; ".join(texts)
