"""The teacher of `counterfactual`: what the untouched model says where a row is asked about others, averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from grun.data.encoding import Batch, EncodedRow, collate
from grun.method.parametrization import Engine, StepOutput, at_answers

PREDICTED = 0.1
"""Probability above which a teacher is taken to name who it is asked about."""


@dataclass(frozen=True)
class Counterfactual:
    """How a forget row is asked about K others, and which of their answer tokens stand for each of its own n."""

    rows: tuple[EncodedRow, ...]
    """What the untouched model is asked."""
    places: Tensor
    """The answer token of `rows`, one row after another, that predicts in the place of each token of the row, int64
    [K, n]; -1: none does, it is within a name that has begun, and the token itself is sure."""
    first: Tensor
    """The first token of the other's name where the row has that of its own, -1 elsewhere, int64 [K, n]."""
    names: Tensor
    """First token of the subject's name and those of the others' in its place, as rows write them, int64
    [ways to write, 1 + K]."""

    def target(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of the answer tokens averaged over the others, whose names are the subject's again.

        Args:
            logits: that predict the answer tokens of `rows`, [tokens of rows, vocabulary].
            tokens: the row's own answer, int64 [n].

        Returns:
            [n, vocabulary].
        """
        device = logits.device
        places, first, names = (part.to(device) for part in (self.places, self.first, self.names))
        found = logits.softmax(dim=-1)[places.clamp(min=0)]  # [K, n, vocabulary]
        sure = places < 0
        found[sure] = torch.nn.functional.one_hot(tokens, found.shape[2]).to(found)[None].expand_as(found)[sure]
        _move(found, first, tokens.expand_as(first))
        for own, *others in names.tolist():
            theirs = torch.tensor(others, device=device)[:, None].expand_as(first)  # [K, n]
            named = found.gather(2, theirs.unsqueeze(2)).squeeze(2) > PREDICTED
            most = named.sum(dim=0) * 2 > len(found)  # [n]
            _move(found, theirs.where(most, -1), torch.full_like(theirs, own))
        return found.mean(dim=0).clamp(min=torch.finfo(found.dtype).tiny).log()


def _move(found: Tensor, source: Tensor, onto: Tensor) -> None:
    """Give what `found` [K, n, vocabulary] has at tokens `source` to `onto`, both [K, n], where source is not -1."""
    where = (source >= 0).to(found).unsqueeze(2)
    taken = found.gather(2, source.clamp(min=0).unsqueeze(2)) * where
    found.scatter_add_(2, source.clamp(min=0).unsqueeze(2), -taken)
    found.scatter_add_(2, onto.unsqueeze(2), taken)


def matched(own: Sequence[int], other: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Where tokens of one text stand in another that differs from it in names alone.

    A token that is the same by itself, between two that are not, is taken for a part of a name, but the last one.

    Returns:
        For each token of `own` its place in `other`; the first token of a stretch that differs has the place where the
        other's begins (-1 at the end), the rest -1. And the stretches that differ, as (start, end) in `own`.
    """
    places: list[int] = []
    stretches = []
    at = 0
    blocks = SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    for start, there, size in blocks:  # the last one is empty
        if size == 1 and start + 1 < len(own):
            continue
        if start > len(places):
            stretches.append((len(places), start))
            places += [at if at < len(other) else -1, *[-1] * (start - len(places) - 1)]
        places += range(there, there + size)
        at = there + size
    return places, stretches


class Teacher:
    """Gives the targets of forget rows; those of a row are kept while all that are kept fit `budget` bytes."""

    def __init__(
        self, of: Mapping[EncodedRow, Counterfactual], engine: Engine, *, pad_id: int, budget: int = 0
    ) -> None:
        """`of`: by forget row; one without is taught what the untouched model says of it. `engine` runs that model."""
        self.engine = engine
        self._of = of
        self._pad_id = pad_id
        self._left = budget
        self._kept: dict[EncodedRow, Tensor] = {}

    def kept(self, engine: Engine, budget: int) -> Teacher:
        """The same with another engine and budget; nothing is kept yet."""
        return Teacher(self._of, engine, pad_id=self._pad_id, budget=budget)

    def rows(self, forget: Sequence[EncodedRow]) -> list[EncodedRow]:
        """What the untouched model is asked in the place of forget rows."""
        return [row for one in forget for row in (self._of[one].rows if one in self._of else (one,))]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> StepOutput:
        """The targets of a batch of forget rows, as the output of a model on them; logits at answer tokens alone."""
        answer = batch.labels != -100
        targets = torch.cat([self._target(row, answer.device) for row in batch.encoded])
        before = answer.roll(-1, dims=1)
        chosen = targets.gather(1, batch.labels[answer].unsqueeze(1)).squeeze(1)
        return StepOutput(
            input_ids=batch.input_ids,
            attended=batch.attention_mask != 0,
            answer=answer,
            token_logprobs=at_answers(answer, chosen),
            logits_at=lambda positions: targets[positions[before]],
        )

    def _target(self, row: EncodedRow, device: torch.device) -> Tensor:
        if row in self._kept:
            return self._kept[row].to(device)
        asked = {"answer": collate(self.rows([row]), self._pad_id).to(device)}
        logits = self.engine.reference(asked)["answer"].answer_logits()
        if row in self._of:
            target = self._of[row].target(logits, torch.tensor(row.answer_ids, device=logits.device))
        else:
            target = logits.log_softmax(dim=-1)
        if target.nbytes <= self._left:
            self._left -= target.nbytes
            self._kept[row] = target.cpu()
        return target.to(device)
