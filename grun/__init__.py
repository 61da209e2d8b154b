"""GRUN: make a language model forget with a gated low-rank edit of a few hidden states.

Importing `grun` is light: torch, transformers and pyvene are imported when a name that needs them is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grun.version import __version__ as __version__

if TYPE_CHECKING:
    from grun.api import attack as attack
    from grun.api import calibrate as calibrate
    from grun.api import evaluate as evaluate
    from grun.api import load as load
    from grun.api import unlearn as unlearn
    from grun.method.host import GrunOutput as GrunOutput
    from grun.method.model import GrunModel as GrunModel
    from grun.method.stack.stack import GrunStack as GrunStack

_MODULES = {
    "GrunModel": "grun.method.model",
    "GrunOutput": "grun.method.host",
    "GrunStack": "grun.method.stack.stack",
    "attack": "grun.api",
    "calibrate": "grun.api",
    "evaluate": "grun.api",
    "load": "grun.api",
    "unlearn": "grun.api",
}

__all__ = ["GrunModel", "GrunOutput", "GrunStack", "__version__", "attack", "calibrate", "evaluate", "load", "unlearn"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'grun' has no attribute {name!r}")
