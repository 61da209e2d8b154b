"""What hidden states hold: at the last token of prompts, through the model's own head, and by a fitted linear map."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from grun.data.encoding import EncodedRow, collate
from grun.evaluation.generation import needs_generate, run_prompts
from grun.evaluation.scoring import base_of, evaluating, forward, prompt_gates
from grun.runtime import processes
from pyvene_custom import find_blocks

EARLY = 0.9
"""Share of the best block's success with known rows that is enough for an earlier block."""
TOP = 1
"""Tokens that may be guessed. One, as in other attacks: the first tokens of facts of a kind (towns, colors) are few, so
a larger set, as the source takes, holds the right one by chance and lifts the floor."""
STRENGTHS = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3)
"""Ridge strengths that are tried, in units of a centered state's mean squared length; of equals the first is taken."""


class ReadPrompt(NamedTuple):
    """What a model computes at the last token of a prompt."""

    states: Tensor
    """hidden(block), edits included, of the blocks that were asked for, float32 on the CPU, [blocks, hidden size]."""
    gates: dict[int, float] | None
    """Gate probability by block; None for a model without gates."""


@torch.no_grad()
def read_prompts(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    blocks: Sequence[int],
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[ReadPrompt]:
    """Read hidden states of `blocks` (0-based; none: gates alone) and gates at the last token of each prompt.

    Every distinct prompt is read once. All of a prompt counts as one, so gates and edits are where they are when the
    model goes on from there. Other arguments as in `score`, with prompts, a token each at least, in the place of rows.
    """
    repeats = Counter(prompts)
    distinct = sorted(repeats, key=len, reverse=True)
    chunks = [distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size)]
    read: dict[tuple[int, ...], ReadPrompt] = {}
    with evaluating(model):
        for chunk in processes.own(chunks):
            read.update(zip(chunk, _read(model, chunk, blocks, pad_id), strict=True))
            advance(sum(repeats[prompt] for prompt in chunk))
    read = processes.merged(read)
    return [read[prompt] for prompt in prompts]


def _read(model: Any, prompts: Sequence[tuple[int, ...]], blocks: Sequence[int], pad_id: int) -> list[ReadPrompt]:
    shares = needs_generate(base_of(model)) is None  # what prompts begin with is run once, as where they are answered
    rows = [EncodedRow(prompt, ()) for prompt in prompts]
    batch = collate(rows, pad_id, "left" if shares else "right").to(model.device)
    last = batch.prompt_lengths - 1  # column of each prompt's last token, where padding is on the right
    read: dict[int, Tensor] = {}

    def keep(block: int, hidden: Tensor) -> None:
        at = torch.full_like(last, hidden.shape[1] - 1) if shares else last
        numbers = torch.arange(len(hidden), device=hidden.device)  # one alone, of what all prompts begin with
        read[block] = hidden[numbers, at[: len(hidden)].to(hidden.device)].float().cpu()

    with at_blocks(model, dict.fromkeys(blocks, keep)):
        if shares:
            out = run_prompts(model, batch, pad_id).out
        else:
            out = forward(model, batch.input_ids, batch.attention_mask, batch.prompt_lengths)
    gates = {
        block: gate[:, -1:] if shares or gate.shape[1] == 1 else gate.gather(1, last.unsqueeze(1).to(gate.device))
        for block, gate in (getattr(out, "gates", None) or {}).items()
    }
    states = torch.stack([read[block] for block in blocks], dim=1) if blocks else torch.empty(len(prompts), 0, 0)
    return [ReadPrompt(*found) for found in zip(states, prompt_gates(gates, len(prompts)), strict=True)]


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a model or of the base inside."""
    return find_blocks(base_of(model))[1]


@contextlib.contextmanager
def at_blocks(model: Any, functions: Mapping[int, Callable[[int, Tensor], Tensor | None]]) -> Iterator[None]:
    """Within the block each of these decoder blocks (0-based) hands hidden(block) to its function, with its number.

    States are [batch, length, hidden size], edits included; what a function returns, if not None, takes their place.
    """

    def hook(block: int) -> Any:
        def call(_: Any, __: Any, output: Any) -> Any:
            whole = isinstance(output, tuple)
            changed = functions[block](block, output[0] if whole else output)
            return (changed, *output[1:]) if whole and changed is not None else changed

        return call

    # An edit's hook stands in front of any other of its block, so these see what the next block sees.
    handles = [blocks_of(model)[block].register_forward_hook(hook(block)) for block in functions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chosen_block(successes: Sequence[float]) -> int:
    """The earliest block that reads known rows at least `EARLY` times as well as the best one; `successes` are shares.

    What hides an answer acts late, and an attacker knows that too.
    """
    return next(block for block, share in enumerate(successes) if share >= EARLY * max(successes))


@torch.no_grad()
def tokens_said(model: Any, states: Tensor, batch_size: int, pad_id: int, top: int = TOP) -> list[list[int]]:
    """The `top` most probable next tokens if the model's last block gave `states` [states, hidden size], best first.

    The model itself reads them: it runs one token (any `pad_id`), and the output of its last block is replaced. So
    whatever it has after that block (norm, projection, head, caps) is in force, in any architecture.
    """
    base, said = base_of(model), list[list[int]]()
    with evaluating(model):
        for part in states.split(batch_size):

            def put(_: int, hidden: Tensor, part: Tensor = part) -> Tensor:
                return part.unsqueeze(1).to(hidden)  # [states, 1, width]

            with at_blocks(base, {len(blocks_of(base)) - 1: put}):
                logits = forward(base, torch.full((len(part), 1), pad_id, device=model.device)).logits[:, -1]
            said += logits.float().topk(top, dim=-1).indices.tolist()
    return said


class LinearMap(NamedTuple):
    """An affine map from hidden states to output embeddings, float64."""

    weight: Tensor
    """[hidden size, embedding size]"""
    center: Tensor
    """Mean of the states it was fitted on, [hidden size]."""
    target: Tensor
    """Mean of the embeddings it was fitted on, [embedding size]."""

    def guess(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Number of the candidate whose embedding, [candidates, size], is nearest by angle: [rows] for [rows, hidden].

        The angle is between differences from `target`: the shrinkage of ridge shortens what the map gives.
        """
        mapped = (states - self.center) @ self.weight
        return (normalize(mapped, dim=1) @ normalize(embedded - self.target, dim=1).T).argmax(dim=1)


class Chosen(NamedTuple):
    """A map, and the share of held-out rows that it reads rightly."""

    map: LinearMap
    success: float


def choose_map(states: Tensor, right: Tensor, held: Tensor, held_right: Tensor, embedded: Tensor) -> Chosen:
    """The ridge regression of `STRENGTHS` that reads held-out rows best.

    Minimizes |X W - Y|^2 + strength * s |W|^2 with centered states X and embeddings Y, s the mean squared length of
    a row of X; W = X' (X X' + strength * s)^-1 Y, by one decomposition of X X' for all strengths.

    Args:
        states: to fit on, float64, [rows, hidden size].
        right: number of each row's candidate, [rows].
        held: states to choose by, [held rows, hidden size].
        held_right: number of their candidates, [held rows].
        embedded: output embeddings of the candidates, [candidates, embedding size].
    """
    center, target = states.mean(dim=0), embedded[right].mean(dim=0)
    x, y = states - center, embedded[right] - target
    values, vectors = torch.linalg.eigh(x @ x.T)
    unit = x.square().sum(dim=1).mean().clamp_min(torch.finfo(x.dtype).tiny)
    turned = vectors.T @ y
    chosen = []
    for strength in STRENGTHS:
        weight = x.T @ (vectors @ (turned / (values.clamp_min(0) + strength * unit).unsqueeze(1)))
        found = LinearMap(weight, center, target)
        chosen.append(Chosen(found, float((found.guess(held, embedded) == held_right).double().mean())))
    return max(chosen, key=lambda one: one.success)
