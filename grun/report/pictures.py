"""Every picture of evaluated answers, in the order of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grun.report import distributions, scatter
from grun.report.before_after import PICTURE as SETS_PICTURE
from grun.report.before_after import sets_figure
from grun.report.figures import Drawn, Picture, draw
from grun.report.matrix import first_seeds
from grun.report.matrix_figure import forget_against_utility
from grun.report.result import Result

MATRIX_PICTURE = "matrix.png"
MANY_TEXT = "With many runs shapes are objectives, colors parametrizations."
PICTURES = (
    Picture(
        SETS_PICTURE,
        "What is left, set by set",
        "Share of right answers before and after. What is to be forgotten should go; everything else should stay as "
        "it was before.",
        sets_figure,
    ),
    Picture(
        MATRIX_PICTURE,
        "Matrix: forgotten against kept",
        "Each objective and parametrization is a point: what is left of the forget set to the right, what is kept "
        "upwards (means over seeds; bars are one standard deviation). Shapes are objectives, colors "
        "parametrizations; the dashed line and the star are the target. Where many points lie close, that part is "
        "drawn again larger; markers that would cover each other are moved apart, a line leading to their place.",
        forget_against_utility,
        every_seed=True,
    ),
    Picture(
        "forget_quality_vs_utility.png",
        "Forget quality against model utility",
        "Each model is a point: TOFU's model utility to the right, log10 of forget quality's p upwards. Good is "
        "top right, near the retain-only target; above the dotted line (p = 0.05) a model cannot be distinguished from "
        f"it. {MANY_TEXT}",
        scatter.forget_quality_vs_utility,
    ),
    Picture(
        "forget_vs_retain.png",
        "Forget set against the rest",
        "Each model is a point for the retain and one for the held-out set: what is left of the forget set to the "
        "right, what is left of the rest upwards. Good is top left. "
        f"{MANY_TEXT} Then the retain set alone is drawn; the matrix has held-out or model utility.",
        scatter.forget_vs_retain,
    ),
    Picture(
        "gate_histograms.png",
        "Gates by set",
        "Histograms of how far the gate opens, mean over blocks: a row for each set, a column for each run. Good "
        "is open (right) on forget questions and shut (left) on all others.",
        distributions.gate_histograms,
    ),
    Picture(
        "gate_histograms_blocks.png",
        "Gates by block",
        "The same for each edited block: a row for each run and block, a column for each set.",
        distributions.gate_histograms_blocks,
    ),
    Picture(
        "truth_ratios.png",
        "Truth ratios of the forget set",
        "Share of forget rows whose truth ratio is below each value, every model against the retain-only one. The "
        "red bar is their largest distance D, which the KS test of forget quality judges; small is good.",
        distributions.truth_ratio_curves,
    ),
    Picture(
        "training_curves.png",
        "Training",
        "Loss terms by training step, a panel for each run. Each should fall, the gate's towards 0.",
        distributions.training_curves,
    ),
    Picture(
        "monitor_curves.png",
        "While training",
        "What each run answered to a few questions of each set, looked at again and again while it was trained "
        "(train.monitor_epochs). Forget should fall, all others stay.",
        distributions.monitor_curves,
    ),
)


def draw_all(results: Sequence[Result], folder: Path) -> Drawn:
    """Draw what the results allow into `folder`, and return it with its files."""
    first = first_seeds(results)
    return draw([(picture, results if picture.every_seed else first) for picture in PICTURES], folder)
