"""The plain engine: one forward pass through the model as it is, hooks included, as a StepOutput."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grun.data.encoding import Batch
from grun.errors import DataError
from grun.method.parametrization import EMBEDDINGS, Parametrization, StepOutput, at_answers
from pyvene_custom.blocks import find_blocks


def run_plain(base: PreTrainedModel, batch: Batch, hidden: Collection[int] = (), **kwargs: Any) -> StepOutput:
    """One forward pass of `base` as a StepOutput; hooks that sit on it act."""
    captured: dict[int, Tensor] = {}
    with capture(base, hidden, captured):
        logits = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **kwargs).logits
    answer = batch.labels != -100
    if bool(answer[:, 0].any()):
        raise DataError("a row has an answer but no token before it; the tokenizer needs a beginning-of-text token")
    before = answer.roll(-1, dims=1)  # column of the token that predicts each answer token
    chosen = answer_logprobs(logits[before], batch.labels[answer])
    return StepOutput(
        input_ids=batch.input_ids,
        attended=batch.attention_mask != 0,
        answer=answer,
        token_logprobs=at_answers(answer, chosen),
        logits_at=lambda positions: logits[positions],
        hidden_states={block: states.to(logits.device) for block, states in captured.items()},
    )


class PlainEngine:
    """Runs whole rows through the model as it is, hooks included: the reference of every other engine."""

    name = "plain"

    def __init__(self, parametrization: Parametrization) -> None:
        self._parametrization = parametrization

    def lay_out(self, batches: Sequence[Mapping[str, Batch]]) -> None:
        """Nothing to prepare."""

    def run(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """One pass for each batch."""
        return {name: self._parametrization.run(batch, hidden) for name, batch in batches.items()}

    def reference(self, batches: Mapping[str, Batch], hidden: Collection[int] = ()) -> dict[str, StepOutput]:
        """One pass for each batch, under the untouched model."""
        if not batches:
            return {}
        with self._parametrization.reference():
            return self.run(batches, hidden)


def answer_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of `tokens` [count] under `logits` [count, vocabulary], in at least float32: [count]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(1, tokens.unsqueeze(1)).squeeze(1) - wide.logsumexp(dim=1)


@contextlib.contextmanager
def capture(base: PreTrainedModel, blocks: Collection[int], into: dict[int, Tensor]) -> Iterator[None]:
    """Within the block, the output of each of `blocks` (0-based, edit included; EMBEDDINGS) is put in `into`."""
    handles = []
    for index in blocks:

        def keep(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
            into[index] = output[0] if isinstance(output, tuple) else output

        module = base.get_input_embeddings() if index == EMBEDDINGS else find_blocks(base)[1][index]
        handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
