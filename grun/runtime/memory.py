"""Memory: how much a process took, and one line of advice where there was not enough."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from grun.errors import RunError

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
"""Parts of the message of a plain RuntimeError of torch where an allocation failed."""


def peak_memory_bytes() -> int:
    """Peak memory of the GPU if one is used, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def enough_memory(what: str, advice: Sequence[str]) -> Iterator[None]:
    """A failed allocation within the block, on a GPU or not, is a RunError of one line with what to change.

    Args:
        what: what the block does, such as training.
        advice: what would take less memory, the best first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch

        of_its_kind = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (of_its_kind or any(sign in str(error) for sign in SIGNS)):
            raise
        raise RunError(f"{what} ran out of memory; what takes less: {', or '.join(advice)}") from error
