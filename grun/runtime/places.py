"""Where GRUN keeps what is made once and belongs to no run."""

from __future__ import annotations

import os
from pathlib import Path

from grun.errors import ConfigError


def user_cache() -> Path:
    """Folder of what every later command of the user finds again, wherever it is started; not made here.

    $GRUN_CACHE, else $XDG_CACHE_HOME/grun, else ~/.cache/grun. ConfigError where none of them is set and there is no
    home folder.
    """
    if own := os.environ.get("GRUN_CACHE"):
        return Path(own).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):  # others are to be ignored, by the specification
        return Path(caches) / "grun"
    try:
        return Path.home() / ".cache" / "grun"
    except RuntimeError as error:
        raise ConfigError("there is no home folder to keep models in; set GRUN_CACHE to a folder") from error
