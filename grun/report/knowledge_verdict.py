"""What the numbers of a knowledge report mean, in words, for each method.

Of what is to be forgotten, all within 0.05:

- removes: multiple choice is at chance (1 / options, neither above nor below), or no higher than the retain-only
  model's, after every suffix too; and cloze, the share of sentences completed by the key fact, is no higher than the
  retain-only model's (without one: than 0).
- hides: multiple choice is at chance, but after a suffix it is not, or cloze is higher. The knowledge is there,
  and the token that is asked does not show it.
- partly forgets: multiple choice fell by 15 points or more, but not to chance.
- does not forget: anything else.

Of everything else (role general):

- keeps the rest: at least 95 % of what the model before had, of multiple choice and of cloze.
- damages the rest: less of either.

What lies near (role neighbor) is given and not judged. There is no verdict where the model before was at chance, and no
removing where cloze was not asked: multiple choice alone cannot distinguish it from hiding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grun.report.knowledge_results import Way, after_suffixes, chance, choice, cloze, main_way
from grun.report.result import Judgement, Result, before_of, target_of
from grun.report.tables import Number, shown

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


def judge_knowledge(result: Result, results: Sequence[Result]) -> Judgement:
    """The verdict on one method by the rule above; reached is only what removes and keeps the rest."""
    before, target = before_of(result, results), target_of(result, results)
    forgets, removed = _forgets(result, before, target, results)
    general = _shares(result, before, results, "general")
    lost = [f"{name} {share:.0%}" for name, share in general.items() if share < KEEPS - EXACT]
    keeps = f"damages the rest: {' and '.join(lost)} of before" if lost else "keeps the rest"
    found = {removed, not lost if general else None}
    outcome: Literal["reached", "missed", "open"] = "reached"
    if found != {True}:
        outcome = "missed" if False in found else "open"
    words = f"{forgets}; {keeps if general else 'what it keeps was not asked'}"
    return Judgement(result.label, outcome, words, f". {_facts(result, before, target, results)}.")


def _forgets(
    result: Result, before: Result | None, target: Result | None, results: Sequence[Result]
) -> tuple[str, bool | None]:
    """What happened to the forget questions, and whether the knowledge is removed; None: that is open."""
    way = main_way(results)
    level, now, known = chance(results, way), choice(result, way, "forget"), _of(before, way)
    if now is None:
        return "no verdict: forget multiple choice was not asked", None
    if known is not None and known.value <= level + NEAR + EXACT:
        return "no verdict: the model before was at chance on forget itself", None
    if not _at_chance(now, level, _of(target, way)):
        fell = known.value - now.value if known else 0.0
        below = " to below chance, so it still knows which option is right" if now.value < level else ""
        if fell >= LOWERED - EXACT:
            return f"partly forgets: multiple choice lowered by {100 * fell:.0f} points{below}", False
        return "does not forget", False
    never = after_suffixes(target, way) if target else {}
    still = [
        f'multiple choice {shown(suffixed.value)} after "{suffix.strip()}"'
        for suffix, suffixed in after_suffixes(result, way).items()
        if not _at_chance(suffixed, level, never.get(suffix))
    ]
    completed = cloze(result, "forget")
    of_target = cloze(target, "forget") if target else None
    if completed is not None and completed.value > (of_target.value if of_target else 0.0) + NEAR + EXACT:
        still.append(f"cloze {shown(completed.value)}")
    if still:
        return f"hides: {', '.join(still)}", False
    if completed is None:
        return "multiple choice at chance; whether removed or hidden is open, cloze was not asked", None
    return "removes", True


def _of(result: Result | None, way: Way | None) -> Number | None:
    return choice(result, way, "forget") if result else None


def _at_chance(found: Number, level: float, never_taught: Number | None) -> bool:
    """Whether a share of right options is as if guessed, or between that and a model's that was never taught."""
    highest = max(level + NEAR, never_taught.value if never_taught else 0.0)
    return level - NEAR - EXACT <= found.value <= highest + EXACT


def _shares(result: Result, before: Result | None, results: Sequence[Result], role: str) -> dict[str, float]:
    """Multiple choice and cloze of a role as shares of before."""
    if before is None:
        return {}
    way = main_way(results)
    pairs = {
        "multiple choice": (choice(result, way, role), choice(before, way, role)),
        "cloze": (cloze(result, role), cloze(before, role)),
    }
    return {name: now.value / known.value for name, (now, known) in pairs.items() if now and known and known.value}


def _facts(result: Result, before: Result | None, target: Result | None, results: Sequence[Result]) -> str:
    """The numbers that a verdict goes by."""
    way, texts = main_way(results), []
    now = choice(result, way, "forget")
    if now is not None:
        level = shown(chance(results, way))
        text = f"Forget multiple choice {_value(_of(before, way))} -> {_value(now)} (chance {level})"
        suffixed = after_suffixes(result, way).values()
        texts.append(text + (f", after a suffix {', '.join(map(_value, suffixed))}" if suffixed else ""))
    completed = cloze(result, "forget")
    if completed is not None:
        known, goal = (cloze(one, "forget") if one else None for one in (before, target))
        aim = f"retain only {_value(goal)}" if goal else f"no retain-only model, so {NEAR} is allowed"
        texts.append(f"forget cloze {_value(known)} -> {_value(completed)} ({aim})")
    for role in ("general", "neighbor"):
        shares = [f"{name} {share:.0%}" for name, share in _shares(result, before, results, role).items()]
        texts += [f"{role} {' and '.join(shares)} of before"] if shares else []
    return "; ".join(texts)


def _value(found: Number | None) -> str:
    return shown(found.value if found else None)
