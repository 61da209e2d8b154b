"""What opens a gate by keywords: names of what is to be forgotten, in the ways that a tokenizer spells them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from grun.config.options import UnlearnConfig
from grun.data.corpus import Corpus
from grun.errors import ConfigError
from grun.training.gate_prompts import read_subjects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = "("
"""A keyword behind it begins within a text, without a blank, as some tokenizers write no other beginning."""


def keywords(config: UnlearnConfig, corpus: Corpus) -> list[str]:
    """`method.gate_keywords`, else `data.subjects` with their aliases, else the names that the benchmark brings.

    ConfigError: there are none, or an empty one.
    """
    subjects = [name for names in read_subjects(config.data.subjects) for name in names]
    found = [name.strip() for name in config.method.gate_keywords or subjects or corpus.keywords]
    if not found or not all(found):
        raise ConfigError(
            "method.gate=keywords needs keywords, none of them empty, and the data bring none: set "
            "method.gate_keywords=[NAME,NAME], or data.subjects"
        )
    return list(dict.fromkeys(found))


def spelled(names: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Sequences of token ids for names as they are written, in lower case, as titles and in capitals, each once.

    Each at the beginning of a text, behind a blank, and behind a mark without one. What is in capitals anyway, such as
    an abbreviation, is looked for in no other form.
    """
    mark = _ids(BEFORE, tokenizer)

    def spellings() -> Iterator[tuple[int, ...]]:
        for name in names:
            for text in (name, name.upper(), *([] if name.isupper() else [name.lower(), name.title()])):
                yield from (_ids(text, tokenizer), _ids(f" {text}", tokenizer))
                behind = _ids(BEFORE + text, tokenizer)
                if behind[: len(mark)] == mark:
                    yield behind[len(mark) :]

    return [ids for ids in dict.fromkeys(spellings()) if ids]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
