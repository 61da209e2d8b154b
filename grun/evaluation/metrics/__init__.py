"""Metrics: pure functions of the scored table; what cannot be computed is absent, never guessed.

One number for one set is registered in `METRICS` (`answers.py`, `likelihood.py`, `memorization.py`, `gates.py`);
`words.py` says what answers are made of in each script; numbers over several sets are in `overall.py` and
`membership.py`, those against a retain-only model in `reference.py`.
Their arithmetic is plain functions over lists, which `tofu_log.py` shares. `docs/metrics.md` has the formulas.
"""

from grun.evaluation.metrics.answers import is_degenerate, unread
from grun.evaluation.metrics.gates import OPEN
from grun.evaluation.metrics.likelihood import truth_ratios
from grun.evaluation.metrics.memorization import extraction_strength
from grun.evaluation.metrics.overall import overall_metrics
from grun.evaluation.metrics.ranking import auc
from grun.evaluation.metrics.reference import reference_metrics
from grun.evaluation.metrics.registry import METRICS, Metric, set_metrics

__all__ = [
    "METRICS",
    "OPEN",
    "Metric",
    "auc",
    "extraction_strength",
    "is_degenerate",
    "overall_metrics",
    "reference_metrics",
    "set_metrics",
    "truth_ratios",
    "unread",
]
