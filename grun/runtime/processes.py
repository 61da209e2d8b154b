"""One run on several processes, as torchrun or `accelerate launch` start them; everything here is free with one.

The first process (rank 0) reads first, and it alone writes results and messages. All processes of a run execute the
same code in the same order, so that what they exchange here matches. torch is imported only where there are
several processes.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from grun.errors import ConfigError, GrunError, RunError
from grun.runtime.reading import first_line

T = TypeVar("T")
K = TypeVar("K")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a launcher numbers its processes."""
PATIENCE = timedelta(minutes=30)
"""How long a process waits for one that is alive but silent; one that ended is noticed at once (gloo)."""
LOST = re.compile(r"gloo|NCCL|ProcessGroup|Connection (reset|closed|refused)|Timed out waiting|socketP|TCPStore", re.I)
"""What stands in the errors of torch where another process cannot be reached any more."""


class Elsewhere(GrunError):
    """Another process failed and reports why; this one ends without a message."""


def count() -> int:
    """Processes of this run."""
    numbers = all(os.environ.get(name, "").isdecimal() for name in LAUNCHED[:2])
    return int(os.environ["WORLD_SIZE"]) if numbers and all(name in os.environ for name in LAUNCHED) else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def local_rank() -> int:
    """Number of this process on its machine, from 0: that of its GPU."""
    here = os.environ.get("LOCAL_RANK", "")
    return int(here if here.isdecimal() else os.environ["RANK"]) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def started() -> bool:
    """Whether the processes are connected."""
    if count() == 1:
        return False
    import torch.distributed

    return torch.distributed.is_initialized()


def speaks_for(error: GrunError) -> bool:
    """Whether this process prints `error`: what fails before the processes are connected fails in all of them."""
    return not isinstance(error, Elsewhere) and (is_first() or started())


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the processes (NCCL where there are GPUs, else gloo) and keep all but the first quiet.

    They stay connected until the program ends. A process that is lost within the block is a RunError in the others.
    """
    if count() > 1 and not started():
        _connect()
    try:
        yield
    except RuntimeError as error:
        if count() == 1:
            raise
        import torch.distributed

        if not (LOST.search(str(error)) or isinstance(error, torch.distributed.DistError)):
            raise
        raise RunError(
            "another process of this run ended or cannot be reached (its own message says why, if it left one); the "
            "same command goes on from the newest checkpoint, if there is one"
        ) from error


def _connect() -> None:
    import torch
    import torch.distributed

    several_gpus = torch.cuda.is_available()
    if several_gpus:
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"process {rank()} has no GPU: this machine shows {torch.cuda.device_count()}; start as many processes "
                "on it (--nproc_per_node)"
            )
        torch.cuda.set_device(local_rank())
    if not is_first():
        logging.getLogger("grun").setLevel(logging.WARNING)
        from transformers.utils import logging as of_transformers

        of_transformers.disable_progress_bar()
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if several_gpus else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"the {count()} processes of this run do not find each other: {first_line(error)}") from error
    atexit.register(_disconnect)


def _disconnect() -> None:
    import torch.distributed

    with contextlib.suppress(Exception):  # the program ends anyway
        torch.distributed.destroy_process_group()


def gathered(value: T) -> list[T]:
    """What every process gives, in the order of their numbers."""
    if not started():
        return [value]
    import torch.distributed

    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def merged(mapping: Mapping[K, T]) -> dict[K, T]:
    """The entries that all processes have together."""
    return {key: value for part in gathered(dict(mapping)) for key, value in part.items()}


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Sum of each value over all processes, added in the order of their numbers, so the same everywhere."""
    total: dict[str, float] = {}
    for part in gathered(dict(values)):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def own(items: Sequence[T]) -> Sequence[T]:
    """This process's share of `items`: every count()-th, so that items sorted by length are dealt out evenly."""
    return items[rank() :: count()] if started() else items


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A block that every process runs by itself: where it fails in one, it fails in all; the first such reports why."""
    if not started():
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    _settle(failure)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """A block that the first process runs before the others, such as a download that they then find done."""
    if not is_first():
        _settle(None)  # of the first process
    with agreed():
        yield
    if is_first():
        _settle(None)  # of the others


def _settle(failure: Exception | None) -> None:
    """Exchange how a block went; raises where it failed anywhere."""
    failed = [number for number, bad in enumerate(gathered(failure is not None)) if bad]
    if not failed:
        return
    if failure is not None and failed[0] == rank():
        raise failure
    raise Elsewhere(f"process {failed[0]} of this run failed")


def of_first(function: Callable[[], T]) -> T:
    """Run `function` on the first process alone; all get its value, and where it fails all end."""
    if not started():
        return function()
    value: list[T] = []
    with agreed():
        if is_first():
            value.append(function())
    (found,) = gathered(value)[0]
    return found
