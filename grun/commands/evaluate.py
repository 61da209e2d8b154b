"""`python -m grun evaluate`: the folders of its results, and which evaluation fills them."""

from __future__ import annotations

from pathlib import Path

from grun.config.checks import adapter_name
from grun.config.options import EvaluateConfig


def evaluate(config: EvaluateConfig) -> list[Path | str]:
    """Run the suite that `config` names; folders of the evaluations."""
    from grun.evaluation import evaluate as answers
    from grun.evaluation.suites.base import evaluate_suite

    folder = Path(f"results/{config.label()}/evaluation")
    if config.suite != "answers":
        folder = folder.with_name(config.suite)
    if not config.adapters:
        folder /= adapter_name(config.adapter) if config.adapter else "base"
    folder = Path(config.output_dir or folder).expanduser()
    if config.suite != "answers":
        return [*evaluate_suite(config, folder)]
    if config.adapters:
        return [*answers.evaluate_adapters(config, folder)]
    answers.evaluate(config, folder)
    return [folder]
