"""A bar on stderr for work that takes more than a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from grun.runtime import processes


@contextlib.contextmanager
def progress(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of rows done since the last call; of several processes the first shows it."""
    if not shown or not processes.is_first():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
