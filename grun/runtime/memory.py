"""Memory: how much a process took, and one line of advice where there was not enough."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grun.errors import RunError

if TYPE_CHECKING:
    import torch

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


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can be had of a GPU, or of main memory: what the machine has left, the job's cgroup and ulimit allow.

    None where that is unknown (main memory outside Linux).
    """
    if device is not None and device.type == "cuda":
        import torch

        # What torch holds for tensors to come is free as well.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    of_machine = _number(Path("/proc/meminfo"), "MemAvailable:", 1024)
    found = [value for value in (of_machine, _left_of_cgroup(), _left_of_addresses()) if value is not None]
    return min(found, default=None)


def _left_of_cgroup() -> int | None:
    """Of the group that this process sees as its root, as in a container or a job; pages of files count as free."""
    root = Path("/sys/fs/cgroup")
    for limit, used, about in (
        (root / "memory.max", root / "memory.current", root / "memory.stat"),
        tuple(root / "memory" / f"memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
    ):
        most, now = _number(limit, "", 1), _number(used, "", 1)
        if most is not None and now is not None:
            return most - now + sum(_number(about, f"{kind}_file", 1) or 0 for kind in ("active", "inactive"))
    return None


def _left_of_addresses() -> int | None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _number(Path("/proc/self/status"), "VmSize:", 1024)
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def _number(file: Path, key: str, unit: int) -> int | None:
    """The number that follows `key` in a file of the kernel, times `unit`; None where there is none."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{key}\s*(\d+)", file.read_text(), re.M)
        return int(found[1]) * unit if found else None
    return None
