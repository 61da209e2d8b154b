"""Activation patching: how much of a fact is left in the states of an unlearned model, read by the model before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.data.rows import Row, evenly_spaced
from grun.data.templates import encode, encode_prompt
from grun.evaluation.attacks.base import ATTACKS, Advance, Asked, Material, Outcome, Place, WithMaterial, attack
from grun.evaluation.attacks.facts import gives_away, name_in
from grun.evaluation.attacks.read_outs import before_fact

if TYPE_CHECKING:
    from torch import Tensor

    from grun.config.options import EvaluateConfig
    from grun.loading.adapters import Loaded

    At = Mapping[int, Callable[[int, Tensor], Tensor | None]]

NAMES = 3
"""Other names that are asked about."""
HOLDS = 0.05
"""Loss of log-probability, nats a token, above which a block holds some of the fact; the source's threshold."""


class Span(NamedTuple):
    """A prompt, the right answer up to the end of its fact, and the fact's place."""

    ids: tuple[int, ...]
    """Token ids of both."""
    prompt: int
    """Tokens of the prompt."""
    start: int
    """Index of the fact's first token in `ids`; it lasts to their end."""


@attack(
    "activation_patching",
    access="weights",
    floor=True,
    needs="rows whose questions name their subject (a field such as country or person), on two subjects or more",
)
class Patching(WithMaterial):
    """Share of a fact that the model before finds in the unlearned model's hidden states: 1 - unlearning depth score.

    The model before reads the question and the right answer up to the end of its fact, and at one block its states at
    the tokens that predict the fact are replaced by the unlearned model's. What the fact's mean log-probability loses
    by that is d_l, nats a token; m_l is the same, a mean over three names, for states of the model before that was
    asked about another name. Over the blocks with m_l > 0.05 the leak is 1 - sum_l min(max(d_l, 0), m_l) / sum_l m_l.
    It is 0 where there is no such block, or where a token of the fact is not the model before's most probable one: what
    was not there cannot be left. It needs that model, so an adapter that can be taken off. Of a row without a fact the
    answer is the fact.

    Source: Lee et al. 2026, arXiv 2605.24614 (unlearning depth score). There the loss that counts as everything is that
    of states of a model that never saw the forget set, which is not at hand here.
    """

    def unfit(self, loaded: Loaded) -> str | None:
        """Without an adapter there is no model before."""
        return ATTACKS.get("adapter_removed").unfit(loaded)

    def asked(self, row: Row, material: Material) -> list[Asked]:
        """The plain question; nothing for a question that names nobody, or where nobody else is named."""
        return [material.ask(row)] if elsewhere(row, material) else []

    def read(
        self, model: Any, places: Sequence[Place], loaded: Loaded, config: EvaluateConfig, advance: Advance
    ) -> Iterable[Outcome]:
        """The share of each row's fact; the text of an outcome names the blocks that hold it in the model before."""
        from grun.evaluation.scoring import evaluating

        spans = [span_of(place.asked.row, model) for place in places]
        with evaluating(loaded.model):
            unlearned = [fact_states(loaded.model, span) for span in spans]
            with ATTACKS.get("adapter_removed").model(loaded, config, model) as before:
                for place, span, states in zip(places, spans, unlearned, strict=True):
                    others = [span_of(row, model) for row in elsewhere(place.asked.row, model)]
                    lost = [losses(before, span, fact_states(before, other)[:, : len(states[0])]) for other in others]
                    most = [sum(one) / len(one) for one in zip(*lost, strict=True)] if says(before, span) else []
                    share, holding = left(losses(before, span, states), most)
                    text = "held at blocks " + ", ".join(map(str, holding)) if holding else "held at no block"
                    yield self.outcome(place, text, share, variant="1 - depth score")
                    advance(1)


def elsewhere(row: Row, material: Material) -> list[Row]:
    """The row with the names of others in place of its own; none where it names nobody, or nobody else is named."""
    own = name_in(row)
    names = dict.fromkeys(name for other in (*material.retain, *material.others) if (name := name_in(other)) != own)
    chosen = evenly_spaced([name for name in names if name], NAMES) if own else []
    return [replace(row, prompt=str(row.prompt).replace(str(own), name)) for name in chosen]


def span_of(row: Row, material: Material) -> Span:
    """Where the row's fact stands, or its answer, where that holds no fact."""
    tokenizer = material.tokenizer
    answer = encode(material.template, tokenizer, row.prompt, row.completion, row.earlier).answer_ids[:-1]
    start, stop = before_fact(row, material).given, len(answer)
    if row.fact:
        ends = range(start + 1, len(answer) + 1)
        stop = next((end for end in ends if gives_away(tokenizer.decode(answer[:end]), row)), stop)
    prompt = encode_prompt(material.template, tokenizer, row.prompt, row.earlier)
    return Span((*prompt, *answer[:stop]), len(prompt), len(prompt) + start)


def fact_states(model: Any, span: Span) -> Tensor:
    """hidden(block) of all blocks at the tokens that predict the fact: [blocks, tokens, hidden size]."""
    import torch

    from grun.evaluation.reading import blocks_of

    kept: dict[int, Tensor] = {}

    def keep(block: int, hidden: Tensor) -> None:
        kept[block] = hidden[0, span.start - 1 : -1]

    _pass(model, span, dict.fromkeys(range(len(blocks_of(model))), keep))
    return torch.stack([kept[block].to(kept[0].device) for block in sorted(kept)])


def losses(before: Any, span: Span, states: Tensor) -> list[float]:
    """By block, what the fact's mean log-probability loses with `states` of that block alone in their place, nats."""

    def put(block: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, span.start - 1 : -1] = states[block].to(hidden.device, hidden.dtype)
        return hidden

    whole = _score(before, span, {})
    return [whole - _score(before, span, {block: put}) for block in range(len(states))]


def says(model: Any, span: Span) -> bool:
    """Whether every token of the fact is the most probable one."""
    return _pass(model, span, {}).argmax(-1).tolist() == list(span.ids[span.start :])


def left(lost: Sequence[float], most: Sequence[float]) -> tuple[float, list[int]]:
    """1 - the depth score, of what is lost and could be lost by block; and the blocks that count."""
    holding = [block for block, loss in enumerate(most) if loss > HOLDS]
    if not holding:
        return 0.0, []
    gone = sum(min(max(lost[block], 0.0), most[block]) for block in holding)
    return 1 - gone / sum(most[block] for block in holding), holding


def _score(model: Any, span: Span, at: At) -> float:
    """Mean log-probability of the fact's tokens, nats; `at` as in `_pass`."""
    import torch

    logits = _pass(model, span, at)
    tokens = torch.tensor(span.ids[span.start :], device=logits.device)
    return float(logits.log_softmax(-1).gather(-1, tokens[:, None]).mean())


def _pass(model: Any, span: Span, at: At) -> Tensor:
    """Logits of the fact's tokens, float32 [tokens, vocabulary]; hidden states of blocks go through `at`."""
    import torch

    from grun.evaluation.reading import at_blocks
    from grun.evaluation.scoring import forward

    ids = torch.tensor([span.ids], device=model.device)
    with torch.no_grad(), at_blocks(model, at):
        logits: Tensor = forward(model, ids, prompt_lengths=torch.tensor([span.prompt])).logits
    return logits[0, span.start - 1 : -1].float()
