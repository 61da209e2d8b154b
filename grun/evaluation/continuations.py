"""Score what may follow a prompt: each prompt is run once, whatever number of single tokens is tried behind it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from grun.data.encoding import EncodedRow, collate
from grun.evaluation.generation import base_of
from grun.evaluation.scoring import (
    ScoredRow,
    evaluating,
    prompt_gates,
    score_tokens,
    scored_rows,
    takes_prompt_lengths,
)
from grun.runtime import processes


@torch.no_grad()
def score_continuations(
    model: Any,
    rows: Sequence[EncodedRow],
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[ScoredRow]:
    """Score each row's answer as `grun.evaluation.scoring.score` does, but for rounding.

    The last token of a row is never run, since nothing comes after it: rows that differ in it alone (the letters of a
    multiple-choice question) share a pass, and a row may be one token longer than the model's context. Gates and edits
    are at the last prompt token.

    Args:
        model: a transformers causal model, or one whose forward also takes `prompt_lengths` and returns `gates`.
        rows: prompt and answer ids, at least one of each.
        batch_size: rows per forward pass, those that share one counted once; it changes nothing but rounding.
        pad_id: id that fills up short rows; it is masked.
        advance: called with the number of `rows` done since the last call.
    """
    repeats = Counter(rows)
    sharing: dict[EncodedRow, list[EncodedRow]] = {}  # what is run, and the rows it tells about
    for row in repeats:
        sharing.setdefault(EncodedRow(row.prompt_ids, row.answer_ids[:-1]), []).append(row)
    inputs = sorted(sharing, key=len, reverse=True)
    chunks = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    scored: dict[EncodedRow, ScoredRow] = {}
    with evaluating(model):
        for chunk in processes.own(chunks):
            ends = [sharing[row] for row in chunk]
            found = _score_pass(model, chunk, ends, pad_id)
            scored |= found
            advance(sum(repeats[row] for row in found))
    scored = processes.merged(scored)
    return [scored[row] for row in rows]


def _score_pass(
    model: Any, inputs: Sequence[EncodedRow], rows: Sequence[Sequence[EncodedRow]], pad_id: int
) -> dict[EncodedRow, ScoredRow]:
    """Scores of `rows`, which for each of `inputs` are the rows that end behind it."""
    batch = collate(inputs, pad_id).to(model.device)
    takes = inspect.signature(base_of(model).forward).parameters
    first = min(len(row.prompt_ids) for row in inputs) - 1  # column of the first logits that are read
    more: dict[str, Any] = {}
    if takes_prompt_lengths(model):
        more["prompt_lengths"] = batch.prompt_lengths
    if "use_cache" in takes:
        more["use_cache"] = False
    if "logits_to_keep" in takes:
        more["logits_to_keep"] = batch.input_ids.shape[1] - first
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    logits = out.logits[:, -(batch.input_ids.shape[1] - first) :]  # also where the model gives all of them
    gates = prompt_gates(getattr(out, "gates", None), len(inputs))
    told = [(number, row) for number, ends in enumerate(rows) for row in ends]
    row_of = [number for number, row in told for _ in row.answer_ids]
    column = [len(row.prompt_ids) - 1 - first + place for _, row in told for place in range(len(row.answer_ids))]
    targets = torch.tensor([token for _, row in told for token in row.answer_ids], device=logits.device)
    tokens = score_tokens(logits[row_of, column], targets)
    results = scored_rows(tokens, [len(row.answer_ids) for _, row in told], [gates[number] for number, _ in told])
    return {row: result for (_, row), result in zip(told, results, strict=True)}
