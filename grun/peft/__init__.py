"""GRUN as a method of PEFT: after `import grun.peft` PEFT's own calls make, load and save adapters.

`config.py` says what an adapter is, `tuner.py` puts it on a model.
"""

from __future__ import annotations

from peft.utils.peft_types import register_peft_method

from grun.method.adapter import GRUN
from grun.peft.config import GrunPeftConfig as GrunPeftConfig
from grun.peft.tuner import GrunTuner as GrunTuner

__all__ = ["GrunPeftConfig", "GrunTuner"]

register_peft_method(name=GRUN.lower(), config_cls=GrunPeftConfig, model_cls=GrunTuner)
