"""GRUN: make a language model forget with a gated low-rank edit of a few hidden states.

Importing `grun` is light: torch, transformers and pyvene are imported when a model is wrapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from grun.method.model import GrunModel as GrunModel
    from grun.method.model import GrunOutput as GrunOutput

__all__ = ["GrunModel", "GrunOutput", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("GrunModel", "GrunOutput"):
        from grun.method import model

        return getattr(model, name)
    raise AttributeError(f"module 'grun' has no attribute {name!r}")
