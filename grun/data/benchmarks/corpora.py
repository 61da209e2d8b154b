"""Plain texts: corpora by name, such as WMDP's, or files of the user."""

from __future__ import annotations

from grun.config.options import DataConfig
from grun.data.corpus import Corpus, benchmark, corpus_of_rows
from grun.data.rows import Row
from grun.data.texts import load_texts
from grun.errors import ConfigError


@benchmark("corpora")
def load(config: DataConfig) -> Corpus:
    """Plain texts by name (WMDP's corpora, WikiText), or files of texts.

    `Row.extra` names the corpus of each.
    """
    if not config.retain:
        raise ConfigError("data.name=corpora needs data.retain, the corpora to keep, such as wikitext")
    return corpus_of_rows("corpora", _texts(config.forget, config), _texts(config.retain, config), config)


def _texts(names: str, config: DataConfig) -> list[Row]:
    how, field = config.text, config.columns.get("text", "text")
    return [
        Row(None, text, {"corpus": name})
        for name in filter(None, map(str.strip, names.split(",")))
        for text in load_texts(
            name, folder=config.path, jsonl=how.jsonl, min_characters=how.min_characters, field=field
        )
    ]
