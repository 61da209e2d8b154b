"""`python -m grun corpora`: files of what is to be forgotten and what is to be kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grun.config.options import CorporaConfig
from grun.config.values import to_dict
from grun.data.benchmarks import safe_rlhf
from grun.data.benchmarks.safe_rlhf import Pair
from grun.data.templates import PLACE, TEMPLATES
from grun.errors import ConfigError
from grun.runtime.files import content_hash, holding, staged, target, write_json, write_text, writing
from grun.runtime.runs import IDENTITY_FILE, finish_run, hold, identity, open_run

log = logging.getLogger(__name__)

SOURCES = ("safe_rlhf", "lore")


def write_corpora(config: CorporaConfig) -> Path:
    """Write the corpora that the options name and return their folder.

    Raises:
        ConfigError: an option is missing or unknown.
        DataError: the source cannot be read.
        RunError: the output folder holds something else.
    """
    for option in ("source", "output_dir"):
        if not getattr(config, option):
            raise ConfigError(f"{option} is not set; the command is: corpora source={'|'.join(SOURCES)} output_dir=DIR")
    return _write_lore(config) if config.source == "lore" else _write_safe_rlhf(config)


def _write_lore(config: CorporaConfig) -> Path:
    from grun.data.benchmarks import lore

    def write(folder: Path) -> dict[str, Any]:
        lore.write(config.lore, folder)
        return {"files": {path.name: _lines(path) for path in sorted(folder.iterdir()) if path.suffix == ".jsonl"}}

    return _write(config, write)


def _write_safe_rlhf(config: CorporaConfig) -> Path:
    records = safe_rlhf.read_preferences(config.path)
    corpora = safe_rlhf.build(records, config.category, config.split)
    leaks = safe_rlhf.leaks(corpora)
    contents: dict[str, list[Pair]] = {
        name: getattr(corpora, part) for part, name in _file_names(config.category, config.format).items()
    }
    line = published_line if config.format == "published" else _row_line

    def write(folder: Path) -> dict[str, Any]:
        for name, pairs in contents.items():
            write_text(folder / name, "".join(map(line, pairs)))
        return {"files": {name: len(pairs) for name, pairs in contents.items()}, "leaks": leaks}

    folder = _write(config, write, rows=content_hash([dict(row) for row in records]))
    width = max(map(len, leaks))
    log.info("%s, split %s:", config.category, config.split)
    for name, count in leaks.items():
        log.info("  %-*s  %d", width, name, count)
    return folder


@holding()
def _write(config: CorporaConfig, write: Callable[[Path], dict[str, Any]], **inputs: Any) -> Path:
    """Have the files and a run.json written into output_dir, whole or not at all."""
    folder = target(str(config.output_dir))
    run_identity = identity(to_dict(config), **inputs)
    if open_run(folder, run_identity, overwrite=config.overwrite) == "finished":
        log.info("%s holds these very corpora: nothing to do (overwrite=true writes them again)", folder)
        return folder
    hold(folder, run_identity, overwrite=config.overwrite)
    with writing(folder), staged(folder, whole=True) as new:
        about = write(new)
        write_json(new / IDENTITY_FILE, run_identity)
        finish_run(new, {"command": "corpora", "config": asdict(config), **about})
    for name, count in about["files"].items():
        log.info("  %s: %d rows", folder / name, count)
    return folder


def _file_names(category: str, form: str) -> dict[str, str]:
    """Name of the file of each part of `SafeRlhf`; in the published form those of the published files."""
    if form == "rows":
        return {part: f"{part}.jsonl" for part in ("forget", "forget_test", "retain", "retain_pool", "retain_test")}
    stem = category.replace(" ", "_")
    return {
        "forget": f"{stem}_train.jsonl",
        "forget_test": f"{stem}_test.jsonl",
        "retain": "safe_train_sampled.jsonl",
        "retain_pool": "safe_train.jsonl",
        "retain_test": "safe_test.jsonl",
    }


def published_line(pair: Pair) -> str:
    """A line of the published files: prompt and response in the template pku_alpaca, as an ASCII JSON string."""
    template = TEMPLATES.get("pku_alpaca")
    text = str(template.text).replace(PLACE, pair.prompt) + template.answer_prefix + pair.response
    return json.dumps(text) + "\n"


def _row_line(pair: Pair) -> str:
    return json.dumps({"prompt": pair.prompt, "completion": pair.response}, ensure_ascii=False) + "\n"


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
