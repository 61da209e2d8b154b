"""What GRUN needs beyond stock pyvene, by subclassing: README.md lists each override and why.

`find_blocks` finds the decoder stack of any model by its shape; `IntervenableModel` edits a model through hooks that
can stay on it, so that `base.generate` is edited too.
"""

import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):  # pyvene prints a line about an optional package when it is imported
    import pyvene as _  # noqa: F401

from pyvene_custom.blocks import find_blocks
from pyvene_custom.model import IntervenableModel
from pyvene_custom.sites import GatedOutput, Intervention, Sites

__all__ = ["GatedOutput", "IntervenableModel", "Intervention", "Sites", "find_blocks"]
