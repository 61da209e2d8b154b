"""From what came back of each row, asked in each way, to the numbers of an attack: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import comb
from typing import Any

from grun.evaluation.attacks.base import Outcome
from grun.evaluation.metrics import OPEN
from grun.evaluation.metrics.averages import mean, wilson

MARKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Queries after which a curve has a point; its last query is one too."""


def by_attack(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by the name of their attack."""
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.attack.name, []).append(one)
    return found


def leak_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Numbers of one attack on the forget set; keys as in `AttackSuite`."""
    rows, attack = _by_row(outcomes), outcomes[0].attack
    variants: dict[str, list[float]] = {}
    for one in outcomes:
        if not one.curve:  # of a search each row ends at a way of its own
            variants.setdefault(one.place.asked.variant, []).append(one.leak)
    return {
        "access": attack.access,
        **(worst_cell(variants) if attack.grid else average([sum(leaks) / len(leaks) for leaks in rows], "leak")),
        "worst": mean([max(leaks) for leaks in rows]),
        **({"variants": {name: mean(leaks) for name, leaks in variants.items()}} if len(variants) > 1 else {}),
        **curve_of([one.curve for one in outcomes]),
        **best_of_k([one for one in outcomes if len(one.leaks) > 1]),
        **_gate(outcomes),
    }


def worst_cell(leaks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Leak, interval and rows of the cell of a grid that gives most back (the first of equals), its name, and all."""
    cells = {name: average(own, "leak") for name, own in leaks.items()}
    worst = max(cells, key=lambda name: float(cells[name]["leak"]))
    return {**cells[worst], "worst_cell": worst, "cells": cells}


def curve_of(curves: Sequence[Sequence[float]]) -> dict[str, Any]:
    """By number of queries the mean leak over rows, with its interval; nothing without curves.

    A row whose search ended early keeps what it had.
    """
    last = max(map(len, curves)) - 1
    if last < 0:
        return {}
    marks = [*(mark for mark in MARKS if mark < last), last]
    at = {mark: [curve[min(mark, len(curve) - 1)] for curve in curves] for mark in marks}
    return {"curve": {str(mark): average(leaks, "leak") for mark, leaks in at.items()}}


def best_of_k(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """By variant ("all" where there is one) and k = 1, 2, 4, ... the leak of the best of k drawn answers (leak@k)."""
    ways: dict[str, list[list[float]]] = {}
    for one in outcomes:
        ways.setdefault(one.place.asked.variant or "all", []).append(one.leaks)
    found = {}
    for way, rows in ways.items():
        most = min(map(len, rows))
        counts = [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
        found[way] = {str(k): average([best_of(leaks, k) for leaks in rows], "leak") for k in counts}
    return {"at_k": found} if found else {}


def best_of(leaks: Sequence[float], k: int) -> float:
    """Expected largest of `k` of the drawn `leaks`, without bias: the mean over all choices of k of them.

    With leaks of 0 and 1, c of n being 1, it is 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021, arXiv 2107.03374, eq. 1, for numbers that need not be 0 or 1.
    """
    return sum(leak * comb(below, k - 1) for below, leak in enumerate(sorted(leaks))) / comb(len(leaks), k)


def worst_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean over rows of the largest leak of each: over all, `worst`, and with the prompt alone, `worst_of_prompts`.

    Attacks that need more than the prompt and decoding are left out; a prefilled answer does not count as a prompt.
    """
    asking = [one for one in outcomes if one.attack.access in ("prompt", "decoding")]
    prompts = [one for one in asking if one.attack.access == "prompt" and not one.attack.begins]
    return {
        name: average([max(leaks) for leaks in _by_row(some)], "leak")
        for name, some in (("worst_of_prompts", prompts), ("worst", asking))
        if some
    }


def kept_of(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """By set, what comes back of rows that are to be kept; keys as in `AttackSuite`."""
    sets: dict[str, list[Outcome]] = {}
    for one in outcomes:
        sets.setdefault(one.place.set, []).append(one)
    return {
        name: {**average([sum(kept) / len(kept) for kept in _by_row(some)], "kept"), **_gate(some)}
        for name, some in sets.items()
    }


def average(values: Sequence[float], name: str) -> dict[str, Any]:
    """Mean of one value a row under `name`, its 95 % interval, and the number of rows.

    The interval is Wilson's for shares; where values lie between 0 and 1 (ROUGE-L) it is wider than it need be.
    """
    found = mean(values) or 0.0
    return {name: found, "interval": wilson(found, len(values)), "rows": len(values)}


def _by_row(outcomes: Iterable[Outcome]) -> list[list[float]]:
    """Leaks of one set, a list a row, with an entry for each way in which it was asked for."""
    leaks: dict[int, list[float]] = {}
    for one in outcomes:
        leaks.setdefault(one.place.number, []).append(one.leak)
    return list(leaks.values())


def any_open(gates: Mapping[int, float] | None) -> bool:
    """Whether the gate of at least one block is open; False for a model without gates."""
    return any(gate > OPEN for gate in (gates or {}).values())


def _gate(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Gates at the last token of what was asked, by the mean over blocks; nothing for a model without gates."""
    found = [one.answers[0].gates for one in outcomes if one.answers[0].gates is not None]
    if not found:
        return {}
    means = [sum(gates.values()) / len(gates) for gates in found]
    return {
        "gate": {
            "mean": mean(means),
            "open": mean([float(value > OPEN) for value in means]),
            "open_any": mean([float(any_open(gates)) for gates in found]),
        }
    }
