"""One thread that runs the model for all answers in progress; whoever asks waits for pieces of an answer."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from grun.errors import GrunError
from grun.method.adapter import AdapterConfig
from grun.serving.batch import Batch
from grun.serving.gates import Gates, gates_at, reads_along
from grun.serving.refusal import Refused
from grun.serving.sampling import Choice, Sampling, choose
from grun.serving.text import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grun.serving.bodies import Grun
    from grun.serving.edition import Served
    from grun.serving.metrics import Metrics

log = logging.getLogger(__name__)

PREFILL = 4096
"""Tokens of prompts, padding included, that are run in one pass; a longer prompt has one of its own."""


class Told(NamedTuple):
    """A token of an answer."""

    choice: Choice
    gates: Gates


class Piece(NamedTuple):
    """What is new of an answer."""

    text: str = ""
    tokens: Sequence[Told] = ()
    """Those whose text ends in `text`, or in nothing."""
    prompt: Sequence[Gates] | None = None
    """In the first piece, where gates are asked for: those at each token of the prompt."""
    finish: str | None = None
    """In the last piece: stop (an end token or a stop text) or length (a limit)."""
    reads: Sequence[Gates] | None = None
    """Beside `prompt`: what pooled gates would say at each of its tokens, were they asked there."""
    error: GrunError | None = None
    """In the last piece, in place of all the rest: why there is no answer."""


@dataclass
class Ask:
    """One answer that is wanted."""

    prompt: tuple[int, ...]
    """Token ids."""
    room: int
    """Longest answer, tokens."""
    sampling: Sampling
    stops: tuple[str, ...]
    tell: Callable[[Piece], None]
    """Called by the engine's thread."""
    until: float
    """When the answer must be over, `time.monotonic`."""
    grun: Grun
    since: float = field(default_factory=time.monotonic)
    gone: bool = False
    """Set by whoever asked and does not want the answer any more."""


class Answering:
    """An answer in progress, a `Row` of a batch."""

    def __init__(self, ask: Ask, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ask = ask
        self.prompt = ask.prompt
        self.ids: list[int] = []
        self.ended = False
        self._text = AnswerText(tokenizer, ask.stops)
        self._told: list[Told] = []
        self._generator = ask.sampling.generator()
        self.reads: Sequence[Gates] | None = None
        """See `Piece`; set before the first token is taken."""
        self._prompt_gates: Sequence[Gates] | None = None

    def go_on(self, logits: Tensor, ends: Collection[int], gates: Sequence[Gates] | None) -> None:
        """Take the next token of `logits` [vocabulary], and tell what is new.

        `gates`: those of the pass that gave them, at the prompt's tokens or at the newest token of the answer. The last
        token of an answer is never run, so it has none.
        """
        if self.ask.gone:
            self.ended = True
            return
        first = not self.ids
        if gates is not None and first:
            self._prompt_gates = gates
        elif gates is not None:
            self._told[-1].gates.update(gates[-1])
            self._tell()
        choice = choose(logits, self.ask.sampling, self._generator)
        if choice.token in ends:
            self.end("stop")
            return
        self.ids.append(choice.token)
        self._told.append(Told(choice, {}))
        self._text.add(choice.token)
        if self._text.stopped:
            self.end("stop")
        elif len(self.ids) == self.ask.room or time.monotonic() > self.ask.until:
            self.end("length")
        elif not self.ask.grun.gates:
            self._tell()

    def end(self, finish: str) -> None:
        """Tell all that is left."""
        self.ended = True
        self._tell(finish)

    def fail(self, error: GrunError) -> None:
        """Tell that there is no answer."""
        self.ended = True
        self.ask.tell(Piece(error=error))

    def _tell(self, finish: str | None = None) -> None:
        text, count = self._text.take(last=finish is not None)
        if text or count or finish or self._prompt_gates is not None:
            self.ask.tell(Piece(text, self._told[:count], self._prompt_gates, finish, self.reads))
            self._told, self._prompt_gates, self.reads = self._told[count:], None, None


class Engine:
    """Answers what is asked, many answers at once."""

    def __init__(self, served: Served, metrics: Metrics, *, batch_size: int, waiting: int) -> None:
        """`batch_size` answers are computed at once, and `waiting` may wait."""
        self._served, self._metrics = served, metrics
        self._batch_size, self._most_waiting = batch_size, waiting
        self._waiting: deque[Ask] = deque()
        self._batches: dict[Any, tuple[Batch, Mapping[str, AdapterConfig]]] = {}
        """By model, with its requests."""
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="grun-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread once every answer is finished."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def ask(self, asks: Sequence[Ask]) -> None:
        """Have these answers begun as soon as there is a place; Refused with status 503 where too many wait."""
        with self._changed:
            if len(self._waiting) + len(asks) > self._most_waiting + max(0, self._batch_size - self._running()):
                raise Refused(503, "too many answers are waiting; try again in a second", code="overloaded")
            self._waiting.extend(asks)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _running(self) -> int:
        return sum(not row.ended for batch, _ in list(self._batches.values()) for row in batch.rows)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._batches or self._stopping)
                if self._stopping and not self._waiting and not self._batches:
                    return
                asks = self._admitted()
            self._begin(asks)
            for batch, configs in list(self._batches.values()):
                if any(not row.ended for row in batch.rows):
                    self._pass(batch, configs)
            self._batches = {
                key: found for key, found in self._batches.items() if any(not row.ended for row in found[0].rows)
            }
            self._metrics.running.set(self._running())

    def _admitted(self) -> list[Ask]:
        """Those of the waiting that begin now; who waited too long is told so."""
        now = time.monotonic()
        for ask in [ask for ask in self._waiting if ask.gone or now > ask.until]:
            self._waiting.remove(ask)
            ask.tell(Piece(error=Refused(503, "no place became free in time; try again", code="overloaded")))
        asks: list[Ask] = []
        places = self._batch_size - self._running()
        while self._waiting and len(asks) < places:
            longest = max(len(ask.prompt) for ask in (*asks, self._waiting[0]))
            if asks and longest * (len(asks) + 1) > PREFILL:
                break
            asks.append(self._waiting.popleft())
        self._metrics.waiting.set(len(self._waiting))
        return asks

    def _begin(self, asks: Sequence[Ask]) -> None:
        """Run the prompts of `asks`, those for one model together."""
        by_model: dict[Any, list[Answering]] = {}
        edition = self._served.edition
        for ask in asks:
            row = Answering(ask, self._served.tokenizer)
            try:
                model, configs = edition.variant(ask.grun.edits, ask.grun.off)
            except Exception as error:
                row.fail(_told(error))
                continue
            key = id(model)
            self._batches.setdefault(key, (Batch(model, self._served.pad_id), configs))
            by_model.setdefault(key, []).append(row)
            self._metrics.prompt_tokens.inc(len(ask.prompt))
        for key, rows in by_model.items():
            batch, configs = self._batches[key]
            self._pass(batch, configs, rows)

    def _pass(self, batch: Batch, configs: Mapping[str, AdapterConfig], new: Sequence[Answering] = ()) -> None:
        """Run the prompts of `new` rows, or a step of all; then the next token of each. If it fails, so do all rows."""
        try:
            logits = batch.begin(new) if new else batch.step()
            rows: Sequence[Answering] = new or batch.rows
            gates: Sequence[Sequence[Gates] | None] = [None] * len(rows)
            if any(row.ask.grun.gates for row in rows):
                counts = [len(row.prompt) if new else 1 for row in rows]
                gates = gates_at(batch.model, configs, counts, prompt=bool(new))
            for place, row in enumerate(new, len(batch.rows) - len(new)):
                if row.ask.grun.gates:
                    row.reads = reads_along(batch.model, configs, batch.gate_state, place)[-len(row.prompt) :]
            for row, of_row, told in zip(rows, logits, gates, strict=True):
                if not row.ended:
                    row.go_on(of_row, self._served.ends, told if row.ask.grun.gates else None)
                    self._note(row)
        except Exception as error:  # torch raises many kinds; the server goes on
            told_instead = _told(error)
            for row in {id(row): row for row in (*batch.rows, *new)}.values():
                if not row.ended:
                    row.fail(told_instead)

    def _note(self, row: Answering) -> None:
        now = time.monotonic()
        self._metrics.answer_tokens.inc()
        if len(row.ids) == 1:
            self._metrics.first.observe(now - row.ask.since)
        if row.ended:
            self._metrics.whole.observe(now - row.ask.since)


def _told(error: Exception) -> GrunError:
    """What is told to whoever asked. The message of an error that is none of ours may quote him, and is not logged."""
    if isinstance(error, GrunError):
        return error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    log.error("an answer failed: %s in %s, line %s", type(error).__name__, frame.filename, frame.lineno)
    return Refused(500, "the model failed; see the server's log")
