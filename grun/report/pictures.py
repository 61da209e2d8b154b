"""Every picture of evaluated answers, in the order of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grun.report import distributions
from grun.report.before_after import PICTURE as SETS_PICTURE
from grun.report.before_after import sets_figure
from grun.report.figures import Drawn, Picture, draw
from grun.report.left_and_kept import left_and_kept
from grun.report.matrix import first_seeds
from grun.report.result import Result

KEPT_PICTURE = "left_and_kept.png"
PICTURES = (
    Picture(
        SETS_PICTURE,
        "What is left, set by set",
        "Share of right answers before and after. What is to be forgotten should go; everything else should stay as "
        "it was before.",
        sets_figure,
    ),
    Picture(
        KEPT_PICTURE,
        "What is left and what is kept",
        "A row for each model, or for each objective and parametrization (means over seeds; bars are one standard "
        "deviation), a panel for each number: what is left of the forget set, what is kept of the rest, of TOFU its "
        "model utility and log10 of forget quality's p too (right of the dotted line, p = 0.05, a model cannot be "
        "told from the target). The gray line is the model before, the dashed one the target.",
        left_and_kept,
        every_seed=True,
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
