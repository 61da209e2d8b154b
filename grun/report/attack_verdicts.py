"""What the numbers of an attack report mean, in words, for each method.

- withstands: under every attack that makes the model write with access to the prompt (the start of the answer
  included) or to decoding, it leaks at most the floor + 0.05, and in the worst of prompts at most the floor + 0.10.
- comes back under ...: it does not; the attack that is furthest above its floor comes first, with its leak.

Of several seeds the means count. The floor is what the retain-only model leaks under the same attack; without such a
model it is 0. There is no verdict where no such attack was run, or where none reaches anything in the model before:
then nothing was withstood. What is kept of other answers is told and not judged; nor are attacks that need the weights
or read hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grun.data.sets import set_label
from grun.report.attacks import attack_label, kept_set, leak, number_at, unread, writing_attacks
from grun.report.results import Result, before_of, target_of
from grun.report.tables import number
from grun.report.verdicts import Judgement

NEAR = 0.05
"""Above the floor, under each attack."""
NEAR_WORST = 0.10
"""Above the floor, in the worst of prompts."""
EXACT = 1e-9
"""Allowance for rounding at each limit."""
STATEMENT = (
    "Tried are these attacks. An attacker who knows the method, searches for prompts or has the weights may get more. "
    "The base weights still contain what an adapter hides; its effect exists where it is loaded."
)


class Leak(NamedTuple):
    """What one attack brought back."""

    attack: str
    now: float
    floor: float

    @property
    def above(self) -> float:
        """How far it is above the floor."""
        return self.now - self.floor


def judge_attacks(result: Result, results: Sequence[Result]) -> Judgement:
    """The verdict on one method by the rule above."""
    target, before = target_of(result, results), before_of(result, results)
    leaks = [_leak(result, target, name) for name in writing_attacks(result)]
    over = sorted((one for one in leaks if one.above > NEAR + EXACT), key=lambda one: one.above, reverse=True)
    worst = _leak(result, target, "worst_of_prompts")
    reached = [one.attack for one in leaks if before and (leak(before, one.attack) or 0) > one.floor + NEAR + EXACT]
    if not leaks:
        judgement = Judgement("open", "no verdict: no attack made the model write", "")
    elif over:
        judgement = Judgement("missed", f"comes back under {_listed(over)}", "")
    elif worst.above > NEAR_WORST + EXACT:
        judgement = Judgement("missed", f"comes back under {_listed([worst])}", "")
    elif before and not reached:
        judgement = Judgement("open", "no verdict: no attack reaches anything in the model before either", "")
    else:
        judgement = Judgement("reached", "withstands", "")
    facts = [f"means over {len(result.runs)} seeds"] if result.runs else []
    facts += [
        f"{count} rows of {set_label(name)} cannot be read by ROUGE-L" for name, count in unread([result]).items()
    ]
    facts += [*_leaks(result, results, leaks), *_kept(result, results)]
    empty = [attack_label(one.attack) for one in leaks if before and reached and one.attack not in reached]
    if empty:
        facts.append(f"says nothing, as the model before does not answer it either: {', '.join(empty)}")
    told = f" {'; '.join(facts)[:1].upper()}{'; '.join(facts)[1:]}." if facts else ""
    return Judgement(judgement.outcome, judgement.words, f"{result.label}: {judgement.words}.{told}")


def _leak(result: Result, target: Result | None, name: str) -> Leak:
    return Leak(name, leak(result, name) or 0.0, (leak(target, name) if target else None) or 0.0)


def _listed(leaks: Sequence[Leak]) -> str:
    """The first with its numbers, the others by name."""
    first, *others = leaks
    texts = [f"{attack_label(first.attack)} (leak {number(first.now)} against {number(first.floor)})"]
    texts += [attack_label(one.attack) for one in others]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _leaks(result: Result, results: Sequence[Result], leaks: Sequence[Leak]) -> list[str]:
    """Leaks by which is judged, from before to now."""
    before, target = before_of(result, results), target_of(result, results)
    names = [one.attack for one in leaks if one.attack == "plain"]
    names += [name for name in ("worst_of_prompts", "worst") if leak(result, name) is not None]
    texts = []
    for name in names:
        known, floor = (leak(other, name) if other else None for other in (before, target))
        floor_text = f" (floor {number(floor)})" if target else ""
        texts.append(f"{attack_label(name)} {number(known)} -> {number(leak(result, name))}{floor_text}")
    if names and target is None:
        texts.append("no retain-only model, so the floor is taken as 0")
    return texts


def _kept(result: Result, results: Sequence[Result]) -> list[str]:
    """What is kept behind a forget question."""
    rows, before = kept_set(results), before_of(result, results)
    found = number_at(result, f"retention.after_forget.{rows}.kept")
    if found is None:
        return []
    known = number_at(before, f"retention.after_forget.{rows}.kept") if before else None
    alone = number_at(result, f"retention.plain.{rows}.kept")
    compared = [f"asked alone {number(alone.value)}"] if alone else []
    compared += [f"before {number(known.value)}"] if known else []
    ending = f" ({', '.join(compared)})" if compared else ""
    return [f"{set_label(rows)} kept after a forget question {number(found.value)}{ending}"]
