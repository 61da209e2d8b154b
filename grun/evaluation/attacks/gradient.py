"""A suffix by gradient: the attacker who searches, with the weights in hand instead of a stock of rewritings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grun.evaluation.attacks.base import ATTACKS, Access, Asked, Material, Place
from grun.evaluation.attacks.search import ROUND, Adaptive, Genes, Search

if TYPE_CHECKING:
    from torch import Tensor

    from grun.loading.adapters import Loaded

LENGTH = 10
"""Tokens of the suffix."""
FIRST = " !"
"""What every one of them is at first."""
BEST = 64
"""Tokens with the steepest gradient, of each place, that a swap is drawn from."""
AWAY = 12
"""Tokens of the plain answer, at most, that the suffix is to make improbable."""


class GradientSearch(Search):
    """A search for one row's answer, by swaps of single tokens in a suffix."""

    def __init__(self, place: Place, material: Material, queries: int, longest: int, loaded: Loaded) -> None:
        """See `Search`; the attacker does not see the leak. `loaded` is the model that gradients are taken of."""
        super().__init__(place, material, False, queries, longest)
        self.loaded = loaded
        self.start, self.end = split(place.asked, material)
        self.refused: list[int] = []
        self.parent: tuple[int, ...] = ()
        self.least = math.inf
        self.waiting: list[tuple[int, ...]] = []
        """Suffixes that were asked since the last gradient."""

    def round(self, count: int) -> list[tuple[Genes, Asked]]:
        """Swaps in the best suffix so far."""
        if not self.parent:
            self.refused = answer_ids(self.tries[0].answer.text, self.loaded)[:AWAY]
            (token, *_) = self.loaded.tokenizer(FIRST, add_special_tokens=False)["input_ids"]
            self.waiting = [(token,) * LENGTH]
        for suffix in self.waiting:
            loss = float(loss_of(self.loaded, self.prompt(suffix), self.refused))
            if loss < self.least or not self.parent:
                self.parent, self.least = suffix, loss
        first = [] if len(self.tries) > 1 else [self.parent]
        found: list[tuple[tuple[int, ...], Asked]] = []
        for suffix in [*first, *self._swaps(10 * ROUND)]:
            text = str(self.material.tokenizer.decode(suffix))
            asked = Asked(self.prompt(suffix), self.place.asked.row, variant=text)
            if len(found) < count and self.may_ask(asked, text):
                found.append((suffix, asked))
        self.waiting = [suffix for suffix, _ in found]
        return [({}, asked) for _, asked in found]

    def prompt(self, suffix: Sequence[int]) -> tuple[int, ...]:
        """Token ids of the question with a suffix."""
        return (*self.start, *suffix, *self.end)

    def _swaps(self, count: int) -> list[tuple[int, ...]]:
        """Suffixes that differ from the best in one token, drawn from those with the steepest gradient."""
        slopes = slopes_of(self.loaded, self.prompt(self.parent), len(self.start), LENGTH, self.refused)
        best = slopes.topk(min(BEST, slopes.shape[1]), largest=False).indices.tolist()
        found = []
        for _ in range(count):
            at = self.random.randrange(LENGTH)
            found.append((*self.parent[:at], self.random.choice(best[at]), *self.parent[at + 1 :]))
        return found


def split(asked: Asked, material: Material) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt's ids up to the end of the question, and what the template puts after it."""
    longer = material.ask(asked.row, f"{asked.row.prompt}{FIRST}").ids
    alike = 0
    while alike < min(len(asked.ids), len(longer)) and asked.ids[-1 - alike] == longer[-1 - alike]:
        alike += 1
    return asked.ids[: len(asked.ids) - alike], asked.ids[len(asked.ids) - alike :]


def answer_ids(text: str, loaded: Loaded) -> list[int]:
    """Token ids of an answer that the model gave; its end token, where it gave none."""
    found: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found or [int(loaded.tokenizer.eos_token_id)]


def loss_of(loaded: Loaded, prompt: Sequence[int], answer: Sequence[int], more: Tensor | None = None) -> Tensor:
    """Mean log-probability of an answer's tokens after a prompt, nats; `more` is added to the embeddings of all.

    Edits are in force, without the gate threshold below which they are skipped.
    """
    import torch

    from grun.evaluation.relearning import no_threshold
    from grun.evaluation.scoring import evaluating, forward

    model = loaded.model
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.set_grad_enabled(more is not None), evaluating(model), no_threshold(model), adding(loaded, more):
        logits = forward(model, ids, prompt_lengths=torch.tensor([len(prompt)])).logits
    scores = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return scores.gather(-1, ids[0, len(prompt) :, None].to(scores.device)).mean()


@contextlib.contextmanager
def adding(loaded: Loaded, more: Tensor | None) -> Iterator[None]:
    """Within the block `more` [tokens, width] is added to the embeddings of passes of as many tokens; None: nothing."""
    from grun.evaluation.scoring import base_of

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        if more is None or output.shape[1] != len(more):
            return output
        return output + more.to(output.device, output.dtype)

    handle = base_of(loaded.model).get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def slopes_of(loaded: Loaded, prompt: Sequence[int], start: int, count: int, answer: Sequence[int]) -> Tensor:
    """Slope of the loss by the token at each of `count` places from `start` on, infinite for control tokens.

    The product of the gradient by the embedding and each token's embedding: float32 on the CPU, [places, vocabulary].
    """
    import torch

    from grun.evaluation.scoring import base_of

    embeddings: Any = base_of(loaded.model).get_input_embeddings()
    weight: Tensor = embeddings.weight
    width = int(weight.shape[1])
    more = torch.zeros(len(prompt) + len(answer), width, device=weight.device, requires_grad=True)
    loss = loss_of(loaded, prompt, answer, more)
    gradient = torch.autograd.grad(loss, more)[0] if loss.requires_grad else torch.zeros_like(more)
    slopes = (gradient[start : start + count].to(weight.dtype) @ weight.detach().mT).float().cpu()
    control = {*loaded.tokenizer.all_special_ids, *loaded.tokenizer.get_added_vocab().values()}
    slopes[:, [token for token in control if token < slopes.shape[1]]] = torch.inf
    slopes[:, len(loaded.tokenizer) :] = torch.inf  # rows of the embedding that are no tokens
    return slopes


class AdaptiveWeights(Adaptive):
    """A suffix of tokens, changed along the gradient away from the answer that the plain question gets.

    Each round takes the gradient of the mean log-probability of that answer's first 12 tokens by the suffix's tokens at
    the best suffix so far, and asks with ten swaps of single tokens, drawn from the 64 of each place with the lowest
    slope; the best suffix is the one after which that answer is least probable. Which answer is handed in is decided as
    `adaptive` decides, who does not know the right one either; each answer read is a query. Tokens are given as ids,
    none of them a control token.

    In the manner of Zou et al. 2023, arXiv 2307.15043 (greedy coordinate gradient), with a target that needs no answer.
    A suffix can make a model say anything (Chen et al. 2025, arXiv 2502.15836): compare with the floor.
    """

    access: Access = "weights"

    def __init__(self) -> None:
        """It does not see when the answer has leaked."""
        super().__init__("adaptive_weights", False)
        self.turn = None

    def search(self, place: Place, material: Material, queries: int, longest: int, loaded: Loaded) -> Search:
        """By gradient."""
        return GradientSearch(place, material, queries, longest, loaded)


ATTACKS.add(
    "adaptive_weights",
    AdaptiveWeights(),
    "a suffix searched for by gradient, away from the answer of the plain question, without knowing the right one",
)
