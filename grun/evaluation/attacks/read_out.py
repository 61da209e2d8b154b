"""What attacks that read a model share: what the attacker has, where a fact begins, the hidden states there."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from grun.data.encoding import EncodedRow, collate
from grun.data.rows import Row
from grun.data.templates import encode
from grun.evaluation.attacks.base import Access, Advance, Attack, Material
from grun.evaluation.attacks.outcomes import Outcome, Place
from grun.evaluation.generation import Answer, base_of
from grun.evaluation.scoring import evaluating, prompt_gates, takes_prompt_lengths
from grun.runtime import processes
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from grun.config.options import EvaluateConfig
    from grun.loading.models import Loaded

EARLY = 0.9
"""Share of the best block's success with known rows that is enough for an earlier block."""


class Attacked(NamedTuple):
    """A model that is read, and what its attacker has beside it."""

    model: Any
    material: Material

    @property
    def blocks(self) -> range:
        """Numbers of the model's blocks."""
        return range(len(find_blocks(base_of(self.model))[1]))


class ReadOut(Attack):
    """An attack that has more of the model than its text: scores of given answers, or hidden states."""

    access: Access = "read_out"

    @contextlib.contextmanager
    def model(self, loaded: Loaded, config: EvaluateConfig, material: Material) -> Iterator[Any]:
        """The loaded model and the material, from which the attacker learns how to read; see `Attacked`."""
        yield Attacked(loaded.model, material)

    def told_by(self, block: int, place: Place, text: str, gates: dict[int, float] | None, right: bool) -> Outcome:
        """What came back at `place`, whose variant is the block that was read.

        Args:
            block: its number.
            place: where it was read.
            text: what it says.
            gates: at the last token that was given.
            right: whether that is what comes next in the row's answer.
        """
        asked = dataclasses.replace(place.asked, variant=f"block {block}")
        return Outcome(self, place._replace(asked=asked), [Answer(text, gates)], [float(right)])


class FactPlace(NamedTuple):
    """Where a row's fact is about to begin."""

    ids: tuple[int, ...]
    """Token ids of the prompt and of the answer up to the fact."""
    given: int
    """Number of answer tokens among them."""
    next_id: int
    """The fact's first token."""


def before_fact(row: Row, material: Material) -> FactPlace:
    """Where the fact of `row`, which has a question, begins; without a fact that its answer holds, the answer."""
    encoded = encode(material.template, material.tokenizer, row.prompt, row.completion, row.earlier)
    given = _tokens_before(row, encoded.answer_ids, material.tokenizer)
    return FactPlace((*encoded.prompt_ids, *encoded.answer_ids[:given]), given, encoded.answer_ids[given])


def _tokens_before(row: Row, answer_ids: Sequence[int], tokenizer: Any) -> int:
    """How many of the answer's tokens end before its fact begins."""
    words = r"\s+".join(map(re.escape, (row.fact or "").split()))
    found = re.search(words, row.completion, re.IGNORECASE) if words else None
    characters = len(row.completion[: found.start()].strip()) if found else 0
    given = 0
    for count in range(1, len(answer_ids) - 1 if found else 0):  # the last one is the end token
        if len(tokenizer.decode(answer_ids[:count], skip_special_tokens=True).strip()) > characters:
            break
        given = count
    return given


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
    advance: Advance = lambda count: None,
) -> list[ReadPrompt]:
    """Read hidden states and gates at the last token of each prompt, every distinct prompt once.

    All of a prompt counts as one, so gates and edits are where they are when the model goes on from there.

    Args:
        model: a transformers causal model, or a gated one.
        prompts: token ids, at least one each.
        blocks: whose states are read, 0-based; none: gates alone.
        batch_size: prompts per forward pass; it changes nothing but rounding.
        pad_id: id that fills up short prompts; it is masked.
        advance: called with the number of `prompts` done since the last call.
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
    batch = collate([EncodedRow(prompt, ()) for prompt in prompts], pad_id).to(model.device)
    base = base_of(model)
    stack = find_blocks(base)[1]
    last = batch.prompt_lengths - 1  # column of each prompt's last token: padding is on the right
    read: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # [prompts, length, hidden size]
            rows = torch.arange(len(prompts), device=hidden.device)
            read[block] = hidden[rows, last.to(hidden.device)].float().cpu()

        return hook

    more: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    if takes_prompt_lengths(model):
        more["prompt_lengths"] = batch.prompt_lengths
    # An edit's hook stands in front of any other of its block, so these see what the next block sees.
    handles = [stack[block].register_forward_hook(keep(block)) for block in blocks]
    try:
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    finally:
        for handle in handles:
            handle.remove()
    gates = {
        block: gate.gather(1, last.unsqueeze(1).to(gate.device)) if gate.shape == batch.input_ids.shape else gate
        for block, gate in (getattr(out, "gates", None) or {}).items()
    }
    states = torch.stack([read[block] for block in blocks], dim=1) if blocks else torch.empty(len(prompts), 0, 0)
    return [ReadPrompt(*found) for found in zip(states, prompt_gates(gates, len(prompts)), strict=True)]


def chosen_block(successes: Sequence[float]) -> int:
    """The earliest block that reads known rows at least `EARLY` times as well as the best one.

    What hides an answer acts late, and an attacker knows that too.

    Args:
        successes: by block, the share of known rows that it reads rightly.
    """
    return next(block for block, share in enumerate(successes) if share >= EARLY * max(successes))
