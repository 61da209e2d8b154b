"""Answer questions greedily, in batches, as the model would answer them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from grun.data.encoding import collate_prompts
from grun.errors import DataError
from grun.evaluation.journal import Journal
from grun.evaluation.scoring import evaluating, prompt_gates
from grun.loading import context_length


class Answer(NamedTuple):
    """What the model answers to one prompt."""

    text: str
    """Decoded without special tokens, white space at both ends removed."""
    gates: dict[int, float] | None
    """Gate probability at the prompt by block; None for a model without gates."""

    @classmethod
    def from_json(cls, fields: Any) -> Answer:
        """The answer that JSON made a list of."""
        text, gates = fields
        return cls(text, None if gates is None else {int(block): gate for block, gate in gates.items()})


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
    advance: Callable[[int], None] = lambda count: None,
    *,
    masked_id: int | None = None,
    journal: Journal[Answer] | None = None,
) -> list[Answer]:
    """Answer each prompt, every distinct one once, longest first, padded on the left.

    An answer ends at an end token, at max_new_tokens, or where the model's context is full.

    Args:
        model: a transformers causal model, or a gated one that keeps the prompts' gates in `last_gates`.
        tokenizer: decodes the answers.
        prompts: token ids; DataError if one is empty or fills the context.
        batch_size: prompts per call of `generate`.
        max_new_tokens: longest answer, tokens.
        pad_id: id that fills up short prompts and ended answers.
        advance: called with the number of `prompts` done since the last call.
        masked_id: further id that is masked wherever it stands in a prompt; None: none.
        journal: keeps the answers to the distinct prompts, and knows those of an earlier, interrupted call.
    """
    repeats: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        repeats[tuple(prompt)] = repeats.get(tuple(prompt), 0) + 1
    ends = end_tokens(model, tokenizer)
    limit = context_length(base_of(model))
    distinct = sorted(repeats, key=len, reverse=True)
    answers = {distinct[number]: answer for number, answer in (journal.known.items() if journal else ())}
    advance(sum(repeats[prompt] for prompt in answers))
    numbers = {prompt: number for number, prompt in enumerate(distinct)}
    remaining = [prompt for prompt in distinct if prompt not in answers]
    with evaluating(model):
        for chunk, room in _batches(remaining, batch_size, max_new_tokens, limit):
            batch = collate_prompts(chunk, pad_id)
            if masked_id is not None:
                batch.attention_mask[batch.input_ids == masked_id] = 0
            batch = batch.to(model.device)
            ids = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # some models ship another, which is not plain greedy decoding
                pad_token_id=pad_id,
                eos_token_id=ends or None,
            )
            gates = prompt_gates(getattr(model, "last_gates", None), len(chunk))
            found = [
                Answer(tokenizer.decode(_until(row, ends), skip_special_tokens=True).strip(), gate)
                for row, gate in zip(ids[:, batch.input_ids.shape[1] :].tolist(), gates, strict=True)
            ]
            if journal is not None:
                journal.add([numbers[prompt] for prompt in chunk], found)
            answers.update(zip(chunk, found, strict=True))
            advance(sum(repeats[prompt] for prompt in chunk))
    return [answers[tuple(prompt)] for prompt in prompts]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's own."""
    configured = getattr(base_of(model).generation_config, "eos_token_id", None)
    ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return sorted({int(token) for token in ids if token is not None})


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a wrapped one, or the model itself."""
    base: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.base
    return base


def _batches(
    prompts: Sequence[tuple[int, ...]], batch_size: int, max_new_tokens: int, limit: int
) -> Iterator[tuple[list[tuple[int, ...]], int]]:
    """Batches of prompts that have the same room for an answer, so that no prompt's answer depends on another."""
    rooms = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    start = 0
    while start < len(prompts):
        if not prompts[start]:
            raise DataError("an empty prompt cannot be answered: the template and the question give no token")
        if rooms[start] < 1:
            raise DataError(
                f"a prompt of {len(prompts[start])} tokens leaves no room for an answer in a context of {limit}; "
                "shorten it or use a model with a longer context"
            )
        end = start
        while end < len(prompts) and end - start < batch_size and rooms[end] == rooms[start]:
            end += 1
        yield list(prompts[start:end]), rooms[start]
        start = end


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Cut at the first end token: what follows is padding, which a tokenizer may not know as special."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[:position]
    return ids
