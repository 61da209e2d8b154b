"""Score given answers: for every answer token what the model thought of it, and the gates at the prompt."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grun.data.encoding import EncodedRow, collate
from grun.errors import ModelError
from grun.runtime import processes

LARGEST_SLICE = 2**26
"""Elements of the largest log-softmax taken at once (256 MiB in float32)."""
NOT_FINITE = (
    "the model gives log-probabilities that are not finite; its weights, or its adapter's, are damaged, or model.dtype "
    "is too narrow for it: try model.dtype=float32"
)


class ScoredRow(NamedTuple):
    """One answer under the model; the lists have one entry for each scored token."""

    logp: list[float]
    """log p of the token, nats."""
    hit: list[bool]
    """Whether the token is the most probable one."""
    vocabulary_mean: list[float]
    """E_v[log p_v] with v ~ p, nats."""
    vocabulary_variance: list[float]
    """Var_v[log p_v] with v ~ p, nats squared."""
    gates: dict[int, float] | None
    """Gate probability at the prompt by block; None for a model without gates."""

    @classmethod
    def from_json(cls, fields: Any) -> ScoredRow:
        """The row that JSON made a list of."""
        logp, hit, mean, variance, gates = fields
        return cls(logp, hit, mean, variance, None if gates is None else {int(b): gate for b, gate in gates.items()})


class TokenScores(NamedTuple):
    """The first four fields of ScoredRow as tensors of shape [tokens]."""

    logp: Tensor
    hit: Tensor
    vocabulary_mean: Tensor
    vocabulary_variance: Tensor


def score_tokens(logits: Tensor, targets: Tensor) -> TokenScores:
    """Compare logits [tokens, vocabulary] with the tokens that stand there, `targets` [tokens].

    mu = sum_v p_v log p_v and sigma^2 = sum_v p_v (log p_v - mu)^2, in float32, or in float64 if the logits are.

    Source of mu and sigma^2: Zhang et al. 2024, Min-K%++, arXiv 2404.02936.
    """
    size = max(1, LARGEST_SLICE // logits.shape[-1])
    parts = [_score_slice(part, target) for part, target in zip(logits.split(size), targets.split(size), strict=True)]
    return TokenScores(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _score_slice(logits: Tensor, targets: Tensor) -> TokenScores:
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    p = logp.exp()
    finite = logp.clamp(min=-1e4)  # p is 0 there, and so is p log p, also where log p is -inf
    mean = torch.linalg.vecdot(p, finite)
    variance = torch.linalg.vecdot(p, finite.sub_(mean[:, None]).square_())
    at_target = logp.gather(-1, targets[:, None])[:, 0]
    return TokenScores(at_target, logp.argmax(-1) == targets, mean, variance)


@torch.no_grad()
def score(
    model: Any,
    rows: Sequence[EncodedRow],
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
    *,
    whole: bool = True,
    masked_id: int | None = None,
    record: Callable[[Sequence[EncodedRow], Sequence[ScoredRow]], None] = lambda rows, results: None,
) -> list[ScoredRow]:
    """Score each row's answer, every distinct (prompt, answer) once, longest rows first; processes share the rows.

    This works for every model; `grun.evaluation.shared_scoring` is faster where it works, and is checked against it.
    Padding is masked, so batch_size and order change nothing but speed. Where a row has no prompt token at
    all, its first answer token has nothing before it and is left out.

    Args:
        model: a transformers causal model, or one whose forward also takes `prompt_lengths` and returns `gates`.
        rows: prompt and answer ids.
        batch_size: rows per forward pass.
        pad_id: id that fills up short rows; it is masked.
        advance: called with the number of `rows` done since the last call.
        whole: False: the last token of a row is not run, since nothing comes after it. Rows that differ in it alone
            (the letters of a multiple-choice question) then share a pass, and count once in `batch_size`; a row may be
            one token longer than the model's context. Each has a prompt and an answer token at least.
        masked_id: further id that is masked wherever it stands (published quirk eos_masked_attention); None: none.
        record: called with each batch of distinct rows and its results, once they are there.
    """
    repeats = Counter(rows)
    sharing: dict[EncodedRow, list[EncodedRow]] = {}  # what is run, and the rows whose scores it gives
    for row in repeats:
        sharing.setdefault(row if whole else EncodedRow(row.prompt_ids, row.answer_ids[:-1]), []).append(row)
    inputs = sorted(sharing, key=len, reverse=True)
    scored: dict[EncodedRow, ScoredRow] = {}
    with evaluating(model):
        for start in processes.own(range(0, len(inputs), batch_size)):
            chunk = inputs[start : start + batch_size]
            ending = [(number, row) for number, run in enumerate(chunk) for row in sharing[run]]
            results = _score_pass(model, chunk, ending, pad_id, masked_id)
            done = [row for _, row in ending]
            record(done, results)
            scored.update(zip(done, results, strict=True))
            advance(sum(repeats[row] for row in done))
    scored = processes.merged(scored)
    return [scored[row] for row in rows]


def _score_pass(
    model: Any,
    inputs: Sequence[EncodedRow],
    ending: Sequence[tuple[int, EncodedRow]],
    pad_id: int,
    masked_id: int | None,
) -> list[ScoredRow]:
    """Scores of rows, each with the number of the one of `inputs` that is run for it."""
    batch = collate(inputs, pad_id)
    columns, lengths = torch.arange(batch.input_ids.shape[1]), batch.prompt_lengths
    from_prompt_on = (batch.attention_mask != 0) & (columns >= lengths.unsqueeze(1) - 1)
    if masked_id is not None:
        batch.attention_mask[batch.input_ids == masked_id] = 0
        lengths = torch.tensor([sum(token != masked_id for token in row.prompt_ids) for row in inputs])
    batch = batch.to(model.device)
    kept = len(columns) - max(0, int(batch.prompt_lengths.min()) - 1)  # logits that are read, the last ones
    out = forward(model, batch.input_ids, batch.attention_mask, lengths, logits_to_keep=kept)
    logits = out.logits[:, -kept:]  # also where the model gives all of them
    wanted = [
        (number, column + kept - len(columns), token)
        for number, row in ending
        for column, token in enumerate(row.answer_ids, len(row.prompt_ids) - 1)
        if column >= 0
    ]
    row_of, column_of, targets = torch.tensor(wanted, dtype=torch.long, device=logits.device).reshape(-1, 3).T
    tokens = score_tokens(logits[row_of, column_of], targets)
    gates = {
        block: gate.masked_fill(~from_prompt_on.to(gate.device), 0) if gate.shape == from_prompt_on.shape else gate
        for block, gate in (getattr(out, "gates", None) or {}).items()
    }
    of_inputs = prompt_gates(gates, len(inputs))
    counts = [len(row.answer_ids if row.prompt_ids else row.answer_ids[1:]) for _, row in ending]
    return scored_rows(tokens, counts, [of_inputs[number] for number, _ in ending])


def forward(
    model: Any, ids: Tensor, mask: Tensor | None = None, prompt_lengths: Tensor | None = None, **options: Any
) -> Any:
    """One pass of the model over `ids` [batch, length] without a cache; `mask` None: all tokens count.

    Of `options` the base is given those that it takes; `prompt_lengths` a model that `takes_prompt_lengths`.
    """
    takes = inspect.signature(base_of(model).forward).parameters
    given = {name: value for name, value in {"use_cache": False, **options}.items() if name in takes}
    if prompt_lengths is not None and takes_prompt_lengths(model):
        given["prompt_lengths"] = prompt_lengths.to(ids.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **given)


def scored_rows(
    tokens: TokenScores, counts: Sequence[int], gates: Sequence[dict[int, float] | None]
) -> list[ScoredRow]:
    """The scores of rows that have `counts` tokens each, one after another; ModelError if one is not finite."""
    if not torch.isfinite(tokens.logp).all():
        raise ModelError(NOT_FINITE)
    logp, hit, mean, variance = ([part.tolist() for part in field.cpu().split(list(counts))] for field in tokens)
    return [ScoredRow(*fields) for fields in zip(logp, hit, mean, variance, gates, strict=True)]


def prompt_gates(gates: dict[int, Tensor] | None, count: int) -> list[dict[int, float] | None]:
    """Gate probabilities by row, from tensors [batch, positions] by block: the widest open gate counts.

    Positions are the last prompt token and, where gates read them, the tokens after it.
    """
    if not gates:
        return [None] * count
    widest = {int(block): value.double().reshape(count, -1).amax(1).tolist() for block, value in gates.items()}
    return [{block: widest[block][number] for block in sorted(widest)} for number in range(count)]


def takes_prompt_lengths(model: Any) -> bool:
    """Whether the model wants to know where prompts end, as a gated model does."""
    return "prompt_lengths" in inspect.signature(getattr(model, "forward", model.__call__)).parameters


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode (no dropout), and back into its own mode afterwards."""
    training = bool(model.training)
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a wrapped one, or the model itself."""
    base: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.base
    return base
