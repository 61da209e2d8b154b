"""The matrix in words: for each objective, GRUN beside the other parametrizations, computed from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grun.report.labels import PARAMETRIZATIONS
from grun.report.matrix import Matrix, Row
from grun.report.measures import Measure, Spread
from grun.report.results import main_metric, target_of

FORGOTTEN = 0.05
"""How far above the target's main metric a mean on forget may lie and still count as forgotten."""
RULE = (
    f"Forgotten as far as the target: the mean on forget is at most {FORGOTTEN} above the target's. A difference "
    "between two means counts where it is larger than their two standard deviations together, which a few seeds give "
    "roughly."
)
KEPT = ("heldout.", "retain.", "overall.model_utility")
"""What should stay, by the beginning of its key."""
LEFT = ("forget_paraphrase.",)
"""What should be gone though nothing was trained on it, by the beginning of its key."""
COSTS = ("cost.parameters", "cost.seconds", "cost.saved_bytes")
SAME_FOR_ALL_SEEDS = ("cost.parameters", "cost.saved_bytes")
"""What a seed does not change, so that one run is enough."""
EQUAL = 1e-9
"""Means closer than this differ by rounding alone."""

Standing = Literal["ahead", "behind", "equal", "within the spread", "one seed, no spread known"]


def compare(ours: Spread, theirs: Spread, measure: Measure) -> Standing | None:
    """How GRUN stands to another cell in one measure; None where either has no number."""
    if ours.mean is None or theirs.mean is None:
        return None
    difference = ours.mean - theirs.mean
    if abs(difference) <= EQUAL:
        return "equal"
    if measure.key not in SAME_FOR_ALL_SEEDS:
        if ours.deviation is None or theirs.deviation is None:
            return "one seed, no spread known"
        if abs(difference) <= ours.deviation + theirs.deviation + EQUAL:
            return "within the spread"
    return "ahead" if (difference < 0) == _low_is_good(measure) else "behind"


def words(matrix: Matrix) -> list[tuple[str, list[str]]]:
    """For each objective that was run with GRUN and something else: its name and the sentences."""
    cells = [row for row in matrix.cells if row.objective is not None and row.results]
    found = []
    for objective in dict.fromkeys(str(row.objective) for row in cells):
        of_objective = [row for row in cells if row.objective == objective]
        kinds = dict.fromkeys(row.parametrization for row in of_objective)
        rows = [next(row for row in of_objective if row.parametrization == kind) for kind in kinds]
        if "grun" not in kinds or len(rows) < 2:
            continue
        ours = rows[list(kinds).index("grun")]
        others = [row for row in rows if row is not ours]
        lines = [_forgetting(matrix, rows)]
        lines += [_beside(matrix, measure, ours, others) for measure in _by_beginning(matrix, LEFT + KEPT)]
        lines += [*_cost(matrix, rows), *_summary(matrix, ours, others)]
        if len(rows) < len(of_objective):
            lines.append(f"Of several settings the first is compared: {', '.join(row.label for row in rows)}.")
        found.append((objective.upper(), [line for line in lines if line]))
    return found


def _name(row: Row) -> str:
    return PARAMETRIZATIONS.get(row.parametrization, row.parametrization)


def _told(row: Row, measure: Measure) -> str:
    return f"{_name(row)} {row.spread(measure).text(measure.kind)}"


def _measure(matrix: Matrix, key: str) -> Measure | None:
    return next((measure for measure in matrix.measures if measure.key == key), None)


def _by_beginning(matrix: Matrix, starts: Sequence[str]) -> list[Measure]:
    return [measure for start in starts for measure in matrix.measures if measure.key.startswith(start)]


def _low_is_good(measure: Measure) -> bool:
    return measure.good.startswith("low")


# -- forgetting -------------------------------------------------------------------------------------------------------


def goal_of(matrix: Matrix, row: Row) -> float | None:
    """The target's main metric on forget; None where there is no target."""
    target = target_of(row.results[0], matrix.results)
    return None if target is None else target.metric("forget", main_metric(matrix.results)[0])


def has_forgotten(matrix: Matrix, row: Row) -> bool | None:
    """Whether the cell's mean on forget is at most `FORGOTTEN` above the target's; None where either is missing."""
    measure, goal = _measure(matrix, f"forget.{main_metric(matrix.results)[0]}"), goal_of(matrix, row)
    mean = row.spread(measure).mean if measure else None
    return None if mean is None or goal is None else mean <= goal + FORGOTTEN + EQUAL


def _unforgotten(matrix: Matrix, row: Row) -> str:
    """What a reader must know where a cell keeps much because it forgot little."""
    return " (which did not forget as far)" if has_forgotten(matrix, row) is False else ""


def _forgetting(matrix: Matrix, rows: Sequence[Row]) -> str:
    metric, name = main_metric(matrix.results)
    measure = _measure(matrix, f"forget.{metric}")
    if measure is None:
        return ""
    goal = goal_of(matrix, rows[0])
    if goal is None:
        return f"No target to compare with; {name} on forget: {', '.join(_told(row, measure) for row in rows)}."
    far = [_told(row, measure) for row in rows if has_forgotten(matrix, row)]
    less = [_told(row, measure) for row in rows if has_forgotten(matrix, row) is False]
    text = f"Forgets as far as the target ({name} on forget {goal:.2f}): {', '.join(far) or 'none'}"
    return text + (f"; not as far: {', '.join(less)}." if less else ".")


# -- what is left and kept, and what it costs -------------------------------------------------------------------------


def _best(rows: Sequence[Row], measure: Measure) -> tuple[list[Row], list[Row]]:
    """The rows whose mean is the best, and the others that have a number, better ones first."""
    known = [(mean, row) for row in rows if (mean := row.spread(measure).mean) is not None]
    known.sort(key=lambda pair: pair[0] if _low_is_good(measure) else -pair[0])
    best = [row for mean, row in known if abs(mean - known[0][0]) <= EQUAL]
    return best, [row for _, row in known[len(best) :]]


def _beside(matrix: Matrix, measure: Measure, ours: Row, others: Sequence[Row]) -> str:
    best, _ = _best([*others, ours], measure)
    if not best or ours.spread(measure).mean is None:
        return ""
    verb, better, worse = ("leaves", "less", "more") if _low_is_good(measure) else ("keeps", "more", "less")
    verbs = {"ahead": f"{verb} {better} than", "behind": f"{verb} {worse} than", "equal": f"{verb} as much as"}
    groups: dict[str, list[str]] = {}
    for row in others:
        standing = compare(ours.spread(measure), row.spread(measure), measure)
        if standing is not None:
            forgot = "" if _low_is_good(measure) else _unforgotten(matrix, row)
            groups.setdefault(standing, []).append(_told(row, measure) + forgot)
    parts = [
        f"{verbs[standing]} {', '.join(names)}" if standing in verbs else f"against {', '.join(names)}: {standing}"
        for standing, names in groups.items()
    ]
    first = f"{'least' if _low_is_good(measure) else 'most'} with {' and '.join(_name(row) for row in best)}"
    return f"{measure.header[0].upper()}{measure.header[1:]}: {first}. {_told(ours, measure)} {'; '.join(parts)}."


def _cost(matrix: Matrix, rows: Sequence[Row]) -> list[str]:
    parts = []
    for measure in _by_beginning(matrix, COSTS):
        best, others = _best(rows, measure)
        if best and others:
            least, rest = (", ".join(_told(row, measure) for row in group) for group in (best, others))
            parts.append(f"{measure.header}: {least} (then {rest})")
    return [f"Least in {'; '.join(parts)}."] if parts else []


# -- where GRUN wins, and where not -----------------------------------------------------------------------------------


def _summary(matrix: Matrix, ours: Row, others: Sequence[Row]) -> list[str]:
    """Each measure stands in one sentence: GRUN is behind some other, ahead of all others, or neither."""
    behind, ahead, neither = [], [], []
    if has_forgotten(matrix, ours) is False:
        behind.append("forgetting: not as far as the target")
    for measure in _by_beginning(matrix, LEFT + KEPT + COSTS):
        name = measure.header.partition(" (")[0]  # without the unit
        groups: dict[str, list[str]] = {}
        for row in others:
            standing = compare(ours.spread(measure), row.spread(measure), measure)
            if standing is not None:
                forgot = "" if _low_is_good(measure) else _unforgotten(matrix, row)
                groups.setdefault(standing, []).append(_name(row) + forgot)
        if "behind" in groups:
            behind.append(f"{name}: behind {', '.join(groups['behind'])}")
        elif list(groups) == ["ahead"]:
            ahead.append(name)
        elif groups:
            reasons = (f"{', '.join(names)} {standing}" for standing, names in groups.items() if standing != "ahead")
            neither.append(f"{name}: {', '.join(reasons)}")
    return [
        f"GRUN does not win in {'; '.join(behind)}." if behind else "GRUN is behind in nothing beyond the spread.",
        f"GRUN is ahead of all others in {', '.join(ahead)}." if ahead else "GRUN is ahead of all others in nothing.",
        f"Neither ahead nor behind in {'; '.join(neither)}." if neither else "",
    ]
