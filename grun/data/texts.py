"""Plain texts: corpora by name, from local files or the hub, and files of the user.

No corpus comes with GRUN: each is read from where its owners publish it, or from a folder of the user.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.data.jsonl import ENDINGS, hub_rows, read_lines, read_records
from grun.errors import ConfigError, DataError, unknown_name
from grun.runtime.reading import read_fields

JSONL_MODES = ("field", "raw")
SUFFIXES = (*ENDINGS, ".txt", ".txt.gz")
HUB_PREFIX = "hub:"
DEFAULT_FOLDER = "data"
"""Folder that is looked into where none is named, and after the one that is, as the published tools do."""


@dataclass(frozen=True)
class HubTexts:
    """Where a corpus lies on the hub."""

    repository: str
    """owner/name of the data set."""
    config: str | None = None
    """Its configuration."""
    split: str = "train"
    """Its split."""
    field: str = "text"
    """Field of a row that holds the text."""
    files: tuple[str, ...] = ()
    """Further names of a local file, without ending, that is read instead."""


_WIKITEXT = HubTexts("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
CORPORA: dict[str, HubTexts] = {
    "wikitext": _WIKITEXT,
    "wikitext-test": _WIKITEXT,
    "bio-forget-corpus": HubTexts("cais/wmdp-bio-forget-corpus", files=("bio_forget",)),
    "bio-forget": HubTexts("cais/wmdp-bio-forget-corpus", files=("bio_forget", "bio-forget-corpus")),
    "bio-retain-corpus": HubTexts("cais/wmdp-corpora", "bio-retain-corpus"),
    "bio-retain": HubTexts("cais/wmdp-corpora", "bio-retain-corpus", files=("bio-retain-corpus",)),
    "cyber-forget-corpus": HubTexts("cais/wmdp-corpora", "cyber-forget-corpus"),
    "cyber-retain-corpus": HubTexts("cais/wmdp-corpora", "cyber-retain-corpus"),
}
"""Corpora that are known by name; the published tools call them so."""
LOCAL_ONLY = ("merge_forget_data_sum_gpt", "cyber_forget_data_sum_gpt", "merge_retain_data_sum_gpt")
"""GRUN's files of summaries, which are on no hub."""


def load_texts(
    name: str, *, folder: str | None = None, jsonl: str = "field", min_characters: int = 0, field: str = "text"
) -> list[str]:
    r"""Texts of one corpus, in order.

    Args:
        name: a name in `CORPORA`; a file with one of `SUFFIXES` (.txt: paragraphs, blank lines between them); `NAME`
            for such a file in the folder, which also wins over the hub; or
            `hub:owner/name[:config[:split[:field]]]`, with split train and field text where they are left out.
        folder: where files are looked for; names without ending are looked for in `data` too.
        field: field of a record, or column, that is the text; of the hub the name gives it.
        jsonl: what of a line of a .jsonl file is the text: field (its `field`; or the line, if it is a JSON
            string) or raw (the line as it stands, its \n included). Texts of the hub are a field in both.
        min_characters: texts of this many characters or fewer are left out; -1 keeps empty ones.

    Raises:
        ConfigError: `jsonl` is unknown.
        DataError: the name is unknown, the corpus cannot be had or is malformed, or no text is long enough.
    """
    if jsonl not in JSONL_MODES:
        raise ConfigError(unknown_name("data.text.jsonl", jsonl, list(JSONL_MODES)))
    texts = _read(name, folder, jsonl, field)
    kept = [text for text in texts if len(text) > min_characters]
    if not kept:
        raise DataError(
            f"nothing is left of {name}: all {len(texts)} texts have {min_characters} characters or fewer; lower "
            "data.text.min_characters (min_len)"
        )
    return kept


def _read(name: str, folder: str | None, jsonl: str, field: str) -> list[str]:
    if name.startswith(HUB_PREFIX):
        return _fetch(_hub_name(name), instead=f"a file ending in {_or(SUFFIXES)}")
    path = find_file(name, folder, CORPORA[name].files if name in CORPORA else (), SUFFIXES)
    if path is not None:
        return _read_file(path, jsonl, field)
    if name in CORPORA:
        return _fetch(CORPORA[name], instead=f"a folder (data.path) that holds {name}.jsonl")
    where = Path(folder or DEFAULT_FOLDER).expanduser()
    if name in LOCAL_ONLY:
        raise DataError(f"no {name}.jsonl in {where}; it is in wmdp_data of GRUN's published code: name its folder")
    known = unknown_name("corpus", name, [*CORPORA, *LOCAL_ONLY])
    raise DataError(f"{known}; or a file ending in {_or(SUFFIXES)} (in {where}), or hub:OWNER/NAME")


def find_file(name: str, folder: str | None, further: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    """The local file that `name` means: one that ends in a suffix and must be there, or a name without, if it is there.

    A file lies in `folder`, or in the current one; a name, or one of the `further` names of the same, in `folder` or in
    `DEFAULT_FOLDER`.

    Raises:
        DataError: the file that was named, or the folder, is not there.
    """
    base = Path(folder or "").expanduser()
    if folder and not base.is_dir():
        raise DataError(f"no folder {base}; set data.path to the folder of the files")
    if name.endswith(suffixes):
        path = base / Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"no data file {path}; check the file's name and data.path")
        return path
    for place in [base] * bool(folder) + [Path(DEFAULT_FOLDER)]:
        for stem in (name, *further):
            for suffix in suffixes:
                path = place / f"{stem}{suffix}"
                if path.is_file():
                    return path
    return None


def _read_file(path: Path, jsonl: str, field: str) -> list[str]:
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".txt"):
        whole = "".join(line for _, line in read_lines(path))
        texts = [paragraph.strip() for paragraph in re.split(r"\n[^\S\n]*\n", whole) if paragraph.strip()]
    elif jsonl == "raw" and kind.endswith(".jsonl"):
        texts = [line for _, line in read_lines(path)]
    else:
        texts = [_text_of(value, where, field) for where, value in read_records(path)]
    if not texts:
        raise DataError(f"{path} holds no texts")
    return texts


def _text_of(value: Any, where: str, field: str = "text") -> str:
    """The text that a JSON value is, or holds."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with the field {field!r}, or a JSON string")
    (text,) = read_fields(value, where, {field: str})
    return str(text)


def _hub_name(name: str) -> HubTexts:
    parts = name.removeprefix(HUB_PREFIX).split(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", parts[0]) or len(parts) > 4:
        raise DataError(f"{name!r} is no data set of the hub; expected hub:OWNER/NAME[:CONFIG[:SPLIT[:FIELD]]]")
    repository, config, split, field = [*parts, "", "", ""][:4]
    return HubTexts(repository, config or None, split or "train", field or "text")


def _fetch(source: HubTexts, instead: str) -> list[str]:
    rows = hub_rows(source.repository, source.config, source.split, called=source.repository, instead=instead)
    return [_text_of(row, where, source.field) for where, row in rows]


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
