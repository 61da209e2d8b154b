"""Checks of a resolved config that read the names of attacks too."""

from __future__ import annotations

from typing import Any

from grun.config.checks import one_of
from grun.evaluation.attacks.base import ATTACKS, KINDS
from grun.loading.checks import check


def check_evaluation(config: Any) -> None:
    """`grun.loading.checks.check`, and ConfigError for an unknown attack."""
    check(config)
    for name in getattr(config, "attacks", ()):
        one_of("attack", name, (*ATTACKS.names(), *KINDS))
