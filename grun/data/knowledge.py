"""What `evaluate suite=knowledge` asks: multiple-choice questions, sentences to complete, texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grun.data.choices import ChoiceRow, load_choices
from grun.data.jsonl import load_rows
from grun.data.rows import Row
from grun.data.texts import load_texts
from grun.errors import ConfigError, DataError

if TYPE_CHECKING:
    from grun.config.options import DataConfig

ROLES = ("forget", "neighbor", "general")
"""What a set is about: what is to be forgotten, what lies near it, everything else."""


@dataclass
class Knowledge:
    """Questions by role, texts by name; a role without questions is absent."""

    choices: dict[str, list[ChoiceRow]] = field(default_factory=dict)
    """Multiple-choice questions."""
    cloze: dict[str, list[Row]] = field(default_factory=dict)
    """Beginnings of sentences (prompt), what follows (completion) and the key fact in it (`Row.fact`)."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Texts whose perplexity is measured, by the name of their corpus; empty ones are kept, as published."""


def load_knowledge(config: DataConfig) -> Knowledge:
    """What the `data.*` options name: lore's own questions, or the sets and files of `data.questions.*`.

    Files are looked for in `data.path`. `data.limit` is left to the caller.

    Raises:
        ConfigError: the options name nothing to ask, or name sets beside lore's own.
        DataError: a set cannot be had or is malformed.
    """
    questions = config.questions
    named = any(vars(questions).values())
    if config.name == "lore":
        from grun.data.generated.lore import knowledge as lore_knowledge

        if named:
            raise ConfigError("data.questions.* is for other data: data.name=lore brings questions of its own")
        return lore_knowledge(config.lore)
    if not named:
        raise ConfigError(
            "nothing to ask: name sets in data.questions.forget, neighbor, general, cloze_forget, cloze_neighbor, "
            "cloze_general or perplexity, or take data.name=lore"
        )
    knowledge = Knowledge()
    for role in ROLES:
        choices = [row for name in getattr(questions, role) for row in load_choices(name, config.path)]
        cloze = [row for name in getattr(questions, f"cloze_{role}") for row in _read_cloze(name, config)]
        if choices:
            knowledge.choices[role] = choices
        if cloze:
            knowledge.cloze[role] = cloze
    field = config.columns.get("text", "text")
    for name in questions.perplexity:
        knowledge.texts[name] = load_texts(
            name, folder=config.path, jsonl=config.text.jsonl, min_characters=-1, field=field
        )
    return knowledge


def _read_cloze(name: str, config: DataConfig) -> list[Row]:
    """Rows of {prompt, completion, fact}."""
    rows = load_rows(name, config.path, config.columns)
    for number, row in enumerate(rows, start=1):
        if row.prompt is None or not row.fact:
            raise DataError(f"{name} row {number}: a sentence to complete needs the fields prompt, completion and fact")
    return rows
