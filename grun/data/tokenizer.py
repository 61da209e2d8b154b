"""A small byte-level BPE tokenizer, trained on the corpus, for the Llama that `model.path=tiny` builds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from grun.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD, USER, ANSWER = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|answer|>"
CONTROL_TOKENS = (BEGIN, END, PAD, USER, ANSWER)
"""In the order of their ids, from 0: start of a text, end of an answer, padding, a user's turn, an answer."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ANSWER + "{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this model knows no ' + message['role'] + ' message') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ANSWER + "{% endif %}"
)
"""Several turns render as <|begin|><|user|>q<|answer|>a<|end|><|user|>q2<|answer|>."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on texts; the same texts in the same order give the same tokenizer.

    It puts <|begin|> before every text, pads on the left, and loses no byte: decoding gives the text back. The caller
    sets `model_max_length` to the model's context.

    Raises:
        ConfigError: `vocabulary`, the most tokens, has no room for the 256 bytes and the control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(CONTROL_TOKENS)
    if vocabulary < smallest:
        raise ConfigError(
            f"model.tiny.vocabulary must be at least {smallest} (bytes and control tokens), not {vocabulary}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, CONTROL_TOKENS.index(BEGIN))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ANSWER],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
