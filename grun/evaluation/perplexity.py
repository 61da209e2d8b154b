"""Perplexity of long texts by a window that slides over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.data.encoding import PLAIN, EncodedRow
from grun.data.templates import encode
from grun.errors import DataError
from grun.evaluation.metrics.averages import exp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = "\n\n"
"""Stands between one text and the next."""


class Perplexity(NamedTuple):
    """Perplexity of a corpus."""

    perplexity: float
    """exp of the mean negative log-likelihood of all tokens."""
    window_mean: float
    """exp of the mean over windows of their means, as is often published: a last, short window counts as the others."""
    tokens: int
    """Tokens that were scored."""
    windows: int
    """Passes of the window."""


class Window(NamedTuple):
    """One place of the window."""

    row: EncodedRow
    """Its first token as the prompt, the rest as the answer."""
    new: int
    """Tokens at its end that no window before it scored."""


def sliding_perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int,
    stride: int = 512,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> Perplexity:
    """Perplexity of `texts`, joined by blank lines, each token scored once with as much before it as the window gives.

    Every window begins with the tokenizer's start token, if it has one, which is not scored. That token, else the
    window's first one, is the prompt: where a GRUN adapter reads its gates and writes its edits. So this measures plain
    text after an empty prompt, not text after a prompt.

    Args:
        model: a transformers causal model, or one with an adapter.
        tokenizer: of the model.
        texts: at least two tokens in all, else DataError.
        window: tokens of the window, start token included, at least 2 and at most the model's context.
        stride: tokens by which it moves on, at least 1; at most what the window can score.
        batch_size: rows per forward pass, of which a window counts as window / stride; nothing but rounding depends
            on it.
        advance: called with the number of windows done since the last call.
    """
    from grun.evaluation.scoring import score

    places = windows(texts, tokenizer, window, stride)
    together = max(1, batch_size * stride // window)
    rows = [place.row for place in places]
    scored = score(model, rows, together, int(tokenizer.pad_token_id or 0), advance, whole=False)
    losses = [-math.fsum(row.logp[-place.new :]) for place, row in zip(places, scored, strict=True)]
    tokens = sum(place.new for place in places)
    means = [loss / place.new for place, loss in zip(places, losses, strict=True)]
    return Perplexity(exp(math.fsum(losses) / tokens), exp(math.fsum(means) / len(means)), tokens, len(places))


def windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, window: int, stride: int) -> list[Window]:
    """Places of the window over the joined texts; arguments as in `sliding_perplexity`."""
    start, ids, _ = encode(PLAIN, tokenizer, None, BETWEEN.join(texts))
    ids = ids[:-1]  # without the end token
    if len(start) + len(ids) < 2:
        raise DataError("perplexity needs texts of two tokens or more")
    size = window - len(start)
    unscored = 0 if start else 1  # a window's first token, which has nothing before it
    step = min(stride, size - unscored)
    found, done = [], unscored
    for begin in range(0, len(ids), step):
        end = min(begin + size, len(ids))
        shown = [*start, *ids[begin:end]]
        if end > done:
            found.append(Window(EncodedRow(tuple(shown[:1]), tuple(shown[1:])), end - done))
            done = end
        if end == len(ids):
            break
    return found
