"""Metrics: pure functions of the scored table; what cannot be computed is absent, never guessed.

All are in `METRICS`, with their label, meaning and good direction (`registry.py`): numbers of one set (`answers.py`,
`likelihood.py`, `memorization.py`, `gates.py`), of the whole evaluation (`overall.py`, `membership.py`), and against a
retain-only model (`reference.py`). `words.py` has what answers are made of in each script.
Their arithmetic is plain functions over lists, which `tofu_log.py` shares. `docs/metrics.md` has the formulas.
"""

from grun.evaluation.metrics.answers import is_degenerate, unread
from grun.evaluation.metrics.averages import auc
from grun.evaluation.metrics.gates import OPEN
from grun.evaluation.metrics.likelihood import truth_ratios
from grun.evaluation.metrics.memorization import extraction_strength
from grun.evaluation.metrics.overall import overall_metrics
from grun.evaluation.metrics.reference import reference_metrics
from grun.evaluation.metrics.registry import METRICS, Metric, metrics_of, set_metrics

__all__ = [
    "METRICS",
    "OPEN",
    "Metric",
    "auc",
    "extraction_strength",
    "is_degenerate",
    "metrics_of",
    "overall_metrics",
    "reference_metrics",
    "set_metrics",
    "truth_ratios",
    "unread",
]
