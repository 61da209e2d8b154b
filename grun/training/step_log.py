"""log.jsonl and monitor.jsonl of a run: one line a step or a look."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from grun.runtime import processes
from grun.runtime.files import adopt, append, make_folder, write_text, writing

LOG_FILE, MONITOR_FILE = "log.jsonl", "monitor.jsonl"
TRACKED = "logs"
"""Folder of a run that TensorBoard writes into."""
LOGS = (LOG_FILE, MONITOR_FILE)
"""Files of a run, and of its checkpoints, which hold them as they were then."""


@dataclass
class Look:
    """A look at the model from time to time while it is trained."""

    at: Callable[[], dict[str, Any]]
    """What is written down; it must leave the model and the random state as they are."""
    every: int
    """Steps from one look to the next; the last step is looked at too."""


class StepLog:
    """One JSON line a step or look, whole lines only, without steps that a resumed run does again.

    Of several processes the first one writes.
    """

    def __init__(self, path: Path, checkpoint: Path | None) -> None:
        """Open `path` for appending to what `checkpoint`, from which the run goes on, holds of it; None: to nothing."""
        self._path = path
        self._file = None
        if not processes.is_first():
            return
        kept = None if checkpoint is None else checkpoint / path.name
        write_text(path, kept.read_text(encoding="utf-8") if kept is not None and kept.is_file() else "")
        self._file = append(path)

    def write(self, values: dict[str, Any]) -> None:
        """Append one step."""
        if self._file is not None:
            with writing(self._path.parent):
                self._file.write((json.dumps(values) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been reported by `write`
                self._file.close()


@dataclass
class Taken:
    """A step that was taken, before its line is written."""

    step: int
    """1-based."""
    values: dict[str, Any]
    """What the line holds; what is still on the device as tensors without dimensions."""
    schedule: dict[str, Any]
    """State of the schedule before it; empty where no step is taken back."""


class LogSteps(TrainerCallback):
    """Writes steps, and hands them to `trackers`."""

    read: Callable[[], None]
    """Called at the end of each step: writes what is due."""

    def __init__(self, step_log: StepLog, trackers: Sequence[TrainerCallback] = ()) -> None:
        self.step_log = step_log
        self.trackers = trackers
        self._at: tuple[Any, ...] = ()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the steps that are due."""
        self._at = args, state, control, kwargs.get("model")
        self.read()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one step."""
        self.step_log.write({"step": step, **values})
        if self.trackers:
            args, state, control, model = self._at
            then = copy.copy(state)
            then.global_step = step
            for tracker in self.trackers:
                tracker.on_log(args, then, control, logs=dict(values), model=model)


def trackers_of(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """transformers' callbacks of the trackers; TensorBoard's writes into `folder`, others where they are set to."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers: list[Any] = [INTEGRATION_TO_CALLBACK[name]() for name in dict.fromkeys(names)]
    for tracker in trackers:
        if hasattr(tracker, "tb_writer") and processes.is_first():
            make_folder(folder)
            before = {*folder.iterdir()}
            tracker.tb_writer = tracker._SummaryWriter(log_dir=str(folder))
            adopt({*folder.iterdir()} - before)
    return trackers


class Looks(TrainerCallback):
    """Looks at the model every so many steps; all processes look, since they share the work."""

    def __init__(self, look: Look, step_log: StepLog) -> None:
        self.look = look
        self.step_log = step_log
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, and write what is seen."""
        if state.global_step % self.look.every == 0 or state.global_step == state.max_steps:
            started = time.monotonic()
            self.step_log.write({"step": state.global_step, **self.look.at()})
            self.seconds += time.monotonic() - started


@contextlib.contextmanager
def logs(folder: Path, checkpoint: Path | None, look: Look | None) -> Iterator[tuple[StepLog, Looks | None]]:
    """Within the block, the logs of a run in `folder` that goes on from `checkpoint`; see `StepLog`."""
    with processes.agreed(), writing(folder):
        step_log = StepLog(folder / LOG_FILE, checkpoint)
        looks = None if look is None else Looks(look, StepLog(folder / MONITOR_FILE, checkpoint))
    try:
        yield step_log, looks
    finally:
        step_log.close()
        if looks is not None:
            looks.step_log.close()
