"""Parts of the server by themselves: the text of an answer while it comes, and draws."""

from __future__ import annotations

import random

import pytest
import torch
from chat_model import TOKENIZER
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grun.errors import ModelError
from grun.serving.sampling import NUCLEUS, Sampling, choose
from grun.serving.text import AnswerText, piece, pieces

TEXT = "Grüße aus 東京 🙂🙂, where the <b>river</b> is\n\nwide."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def parts_of(tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str]) -> tuple[list[tuple[str, int]], bool]:
    """What is handed on after each token of a text, and whether a stop text came."""
    answer, parts = AnswerText(tokenizer, stops), []
    for token in tokenizer(text)["input_ids"]:
        answer.add(token)
        if answer.stopped:
            break
        parts.append(answer.take(last=False))
    return [*parts, answer.take(last=True)], answer.stopped


def test_a_text_comes_in_whole_characters_and_every_token_once(tokenizer: PreTrainedTokenizerBase) -> None:
    parts, stopped = parts_of(tokenizer, TEXT, [])
    assert "".join(text for text, _ in parts) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text, _ in parts)
    assert sum(count for _, count in parts) == len(tokenizer(TEXT)["input_ids"])
    assert any(not text for text, _ in parts[:-1]) and not stopped  # half a character


def test_no_part_of_a_stop_text_is_ever_handed_on(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(1, len(TEXT))
        stop = TEXT[start : start + draw.randint(1, 9)]
        parts, stopped = parts_of(tokenizer, TEXT, ["never there", stop])
        assert stopped
        assert "".join(text for text, _ in parts) == TEXT[: TEXT.index(stop)]


def test_what_only_looks_like_a_stop_text_is_handed_on_later(tokenizer: PreTrainedTokenizerBase) -> None:
    parts, stopped = parts_of(tokenizer, TEXT, ["river</b> was"])
    assert not stopped
    assert "".join(text for text, _ in parts) == TEXT
    assert sum(count for _, count in parts) == len(tokenizer(TEXT)["input_ids"])


def test_pieces_make_up_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("Where is the river?")["input_ids"]
    assert "".join(piece(tokenizer, token) for token in ids) == "Where is the river?"
    texts = pieces(tokenizer, tokenizer(TEXT)["input_ids"])
    assert "".join(texts) == TEXT
    assert "" in texts and not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def drawn(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """Share of each token among draws."""
    generator = sampling.generator()
    tokens = [choose(logits, sampling, generator).token for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_draws_have_the_probabilities_that_are_asked_for(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20) * 2
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = next(count for count in range(1, 21) if float(probabilities[order[:count]].sum()) >= top_p - 1e-6)
    expected = torch.zeros(20)
    expected[order[:kept]] = probabilities[order[:kept]] / probabilities[order[:kept]].sum()
    found = drawn(logits, Sampling(temperature, top_p, seed=1), 4000)
    assert (found - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard errors
    assert not bool(found[expected == 0].any())


def test_a_nucleus_wider_than_what_is_looked_at_first_is_found() -> None:
    logits = torch.zeros(4 * NUCLEUS)
    found = drawn(logits, Sampling(1.0, 0.9, seed=1), 300)
    assert int((found > 0).sum()) > 250
    assert float(found.max()) < 0.05


def test_temperatures_next_to_0_and_0_give_the_most_probable_token() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    for temperature in (0, 1e-30, 1e-3):
        choice = choose(logits, Sampling(temperature, seed=5, top_logprobs=2), Sampling().generator())
        assert choice.token == 1
        assert [token for token, _ in choice.top] == [1, 2]
        assert choice.logprob == pytest.approx(float(logits.log_softmax(-1)[1]))


def test_seed_and_number_alone_decide_the_draws() -> None:
    logits = torch.zeros(1000)
    tokens = {
        (seed, number): [choose(logits, one, generator).token for _ in range(5)]
        for seed in (1, 2)
        for number in (0, 1)
        for one in [Sampling(seed=seed, number=number)]
        for generator in [one.generator()]
    }
    assert len({tuple(row) for row in tokens.values()}) == 4
    again = Sampling(seed=2, number=1)
    generator = again.generator()
    assert [choose(logits, again, generator).token for _ in range(5)] == tokens[2, 1]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(ModelError, match="not finite"):
        choose(torch.tensor([0.0, torch.nan]), Sampling(), Sampling().generator())
