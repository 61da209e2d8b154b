"""Score models that share a base together, on packed rows: each prompt once, and what no edit changes once for all.

Rows of one prompt (a question's answer, its paraphrase, its wrong answers) stand together and share its keys and
values; the blocks up to the first one that any of the models edits are run once. What is left for each model is the
part of the blocks above that its edits can change, and the head, on the tokens that are scored; where a gate that is
decided once stays shut, nothing is left (`grun.evaluation.packed_scoring`). A result equals that of
`grun.evaluation.scoring.score` but for rounding, which depends on that first block. Whether it does for a model is
tried on its longest row first; where not, `score` does it all.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grun.cache.prefix import by_tokens
from grun.cache.trial import largest, tried
from grun.data.encoding import EncodedRow
from grun.errors import ModelError
from grun.evaluation.journal import Journal
from grun.evaluation.packed_scoring import PackedScorer
from grun.evaluation.scoring import ScoredRow, evaluating, score
from grun.method.host import EditedModel
from grun.method.intervention import GatedIntervention
from grun.method.model import GrunModel
from grun.method.stack.stacked import StackedIntervention
from grun.runtime import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Edits = Mapping[int, GatedIntervention | StackedIntervention]


class Subject:
    """A base model as it is, or with a GRUN adapter that lies on it or is put on it when it is needed.

    So several that share a base are scored together and asked one after another.
    """

    base: PreTrainedModel
    edits: Edits | None
    """By block, none for a base as it is; None: they act before the last prompt token too, or their places differ, or
    there is another action, on logits."""

    def __init__(self, model: Any) -> None:
        """`model` as it stands: a transformers model, one with edits, or a GrunModel that was unwrapped."""
        self._model = model
        self._on_base = not isinstance(model, EditedModel) or model.active
        if isinstance(model, EditedModel):
            self.base = model.base
            later = isinstance(model, GrunModel) and model.rule.changes == "from_last_prompt" and not model.rule.counts
            self.edits = model.edit_at() if later or model.rule.changes == "last_prompt" else None
        else:
            self.base, self.edits = model, {}

    @property
    def edited(self) -> EditedModel | None:
        """The model with edits, which need not lie on the base; None: the base as it is."""
        return self._model if isinstance(self._model, EditedModel) else None

    @property
    def threshold(self) -> float | None:
        """Gate at the end of the prompt below which nothing is edited, then or later; None: there is no such."""
        model = self._model
        decided = isinstance(model, GrunModel) and model.rule.read == "last_prompt"
        return model.gate_threshold if decided else None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block base and edits are in evaluation mode (no dropout, the gate threshold acts)."""
        with evaluating(self.base), evaluating(self._model):
            yield

    @contextlib.contextmanager
    def put_on(self) -> Iterator[Any]:
        """The whole model within the block; an adapter that was not on its base is taken off again."""
        if self._on_base:
            yield self._model
            return
        model = GrunModel(self.base, self._model.config, self._model.template)
        try:
            model.load_state_dict(self._model.state_dict())
            model.gate_threshold = self._model.gate_threshold
            yield model.eval()
        finally:
            model.unwrap()


def score_together(
    subjects: Sequence[Subject],
    rows: Sequence[EncodedRow],
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
    *,
    masked_id: int | None = None,
    journals: Sequence[Journal[ScoredRow]] | None = None,
    first: int | None = None,
) -> list[list[ScoredRow]]:
    """Score each row's answer, every distinct one once for each model; a list of results for each of `subjects`.

    The subjects share a base. Other arguments as in `score`, which does it all where an id is masked.

    Args:
        advance: called with the number of rows done since the last call, all models counted.
        journals: one for each model, which keeps the results of the distinct rows, numbered in the order in which they
            come first, and knows those of an earlier, interrupted call.
        first: block up to which passes are shared, if not the first that one of `subjects` edits.
    """
    repeats = Counter(rows)
    numbers = {row: number for number, row in enumerate(repeats)}
    distinct = list(repeats)
    found: list[dict[EncodedRow, ScoredRow]] = [
        {distinct[number]: result for number, result in (journals[which].known.items() if journals else ())}
        for which in range(len(subjects))
    ]
    found = _shared(found)  # also where processes do not see each other's journals
    advance(sum(repeats[row] for known in found for row in known))

    def record(which: int, scored: Sequence[EncodedRow], results: Sequence[ScoredRow]) -> None:
        new = {row: result for row, result in zip(scored, results, strict=True) if row not in found[which]}
        if journals is not None:
            journals[which].add([numbers[row] for row in new], list(new.values()))
        found[which].update(new)
        advance(sum(repeats[row] for row in new))

    with contextlib.ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(subject.evaluating())
        packable = [row for row in distinct if row.prompt_ids and row.answer_ids]
        if masked_id is None and any(row not in known for known in found for row in packable):
            if scorer := packed_scorer(subjects, max(packable, key=len), pad_id, first):
                for piece in processes.own(list(pieces(packable, batch_size))):
                    missing = [which for which, known in enumerate(found) if any(row not in known for row in piece)]
                    results = scorer.score(piece, [subjects[which].edited for which in missing]) if missing else []
                    for which, of_one in zip(missing, results, strict=True):
                        record(which, piece, of_one)
        found = _shared(found)
        for which, subject in enumerate(subjects):  # whatever is left
            if rest := [row for row in distinct if row not in found[which]]:
                with subject.put_on() as model:
                    recorder = functools.partial(record, which)
                    score(model, rest, batch_size, pad_id, masked_id=masked_id, record=recorder)
    return [[known[row] for row in rows] for known in _shared(found)]


def _shared(found: list[dict[EncodedRow, ScoredRow]]) -> list[dict[EncodedRow, ScoredRow]]:
    """What all processes have found together, by model."""
    return [processes.merged(known) for known in found]


def pieces(rows: Sequence[EncodedRow], batch_size: int) -> Iterator[list[EncodedRow]]:
    """At most `batch_size` rows at a time, those of a prompt together where they fit, longest first."""
    by_prompt: dict[tuple[int, ...], list[EncodedRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_ids, []).append(row)
    prompts = sorted(by_prompt.values(), key=lambda group: max(map(len, group)), reverse=True)
    for groups in by_tokens(prompts, len, batch_size):
        # Rows of similar length side by side: they are attended together.
        piece = sorted(itertools.chain(*groups), key=lambda row: len(row.answer_ids), reverse=True)
        for start in range(0, len(piece), batch_size):
            yield piece[start : start + batch_size]


def packed_scorer(
    subjects: Sequence[Subject], longest: EncodedRow, pad_id: int, first: int | None = None
) -> PackedScorer | None:
    """A scorer of `subjects` (in evaluation mode); None, and a line with the reason, where it fails on one row."""
    if first is None:
        first = first_edited(subjects)
    with subjects[0].put_on() as model:
        (plain,) = score(model, [longest], 1, pad_id)

    def make() -> PackedScorer:
        if any(subject.edits is None for subject in subjects):
            raise ModelError("the adapter acts before the last token of the prompt, or on logits")
        return PackedScorer(subjects[0].base, first)

    def compared(scorer: PackedScorer) -> dict[str, tuple[Tensor, Tensor]]:
        ((packed,),) = scorer.score([longest], [subjects[0].edited])
        return {"log-probabilities": (torch.tensor(packed.logp), torch.tensor(plain.logp))}

    trial = tried(make, compared, tolerance(subjects[0].base), largest)
    if trial.fast is None:
        log.info("rows are scored one whole pass each; packed: %s", trial.problem)
    return trial.fast


def first_edited(subjects: Sequence[Subject]) -> int | None:
    """Lowest block that one of `subjects` edits; None: none edits any."""
    return min((block for subject in subjects for block in subject.edits or ()), default=None)


def tolerance(base: PreTrainedModel) -> float:
    """Largest difference between log-probabilities, nats, that rounding alone makes in a model of this type."""
    if getattr(base, "quantization_method", None) is not None:
        return 0.5
    # Attention with soft-capped scores takes its softmax in float32 in every model.
    return {torch.float64: 1e-5, torch.float32: 1e-3}.get(base.dtype, 0.3)
