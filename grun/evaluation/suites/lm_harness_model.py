"""A loaded model as lm-evaluation-harness sees one; imported where the harness is installed."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from grun.data.chat import render
from grun.data.encoding import EncodedRow
from grun.data.templates import Template
from grun.evaluation.multiple_choice import fitted
from grun.evaluation.scoring import base_of, score
from grun.loading.models import context_length
from grun.runtime.progress import progress


class HarnessModel(HFLM):
    """The harness' model for transformers, with our scores: the context is the prompt, what follows it the answer."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, template: Template | None = None) -> None:
        """`model` is a transformers causal model, or a GrunModel on one, whose hooks then act in generation too.

        `template` is the chat template in which the harness asks.
        """
        base = base_of(model)
        limit = context_length(base)
        super().__init__(
            pretrained=base,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=limit if limit < 2**30 else None,
        )
        self.asked = model
        self.template = template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The harness' messages in the template as training had it, with its date and arguments."""
        assert self.template is not None
        generation = add_generation_prompt
        return render(self.template, self.tokenizer, chat_history, begin_answer=generation, go_on=not generation)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sum of the answer's log-probabilities, nats, and whether it is the greedy answer, for each request.

        Where a request is longer than the context, the beginning of its context is left out, as the harness does.
        """
        rows = [fitted(EncodedRow(tuple(context), tuple(answer)), self.max_length) for _, context, answer in requests]
        size = override_bs or int(self.batch_size)
        with progress("log-likelihoods", len(rows), shown=not disable_tqdm) as advance:
            scored = score(self.asked, rows, size, int(self.tokenizer.pad_token_id or 0), advance, whole=False)
        results = [(sum(row.logp), all(row.hit)) for row in scored]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:  # None: windows of one long text
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results
