"""What is attacked: rows with questions; multiple-choice questions are asked without their options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grun.data.choices import ChoiceRow
from grun.data.corpus import load_corpus, load_knowledge
from grun.data.rows import Row
from grun.errors import ConfigError
from grun.evaluation.metrics.words import plain

if TYPE_CHECKING:
    from grun.config.options import DataConfig

ROLES = {"forget": "forget", "retain": "neighbor", "heldout": "general"}
"""What multiple-choice questions of a set are about. General ones stand where held-out rows do, since they have nothing
to do with what is forgotten; unlearning reads neither them nor their neighbors."""
TEXTS = ("lore", "corpora")
"""Data whose forget set is texts."""


def attacked_sets(config: DataConfig) -> dict[str, list[Row]]:
    """Rows with questions by set (forget, retain, heldout); only forget has rows for certain.

    They are the corpus's own, or, where its forget set asks nothing, multiple-choice questions, asked openly.

    Raises:
        ConfigError: there is nothing to ask.
        DataError: rows or questions cannot be had or are malformed.
    """
    if config.name not in TEXTS:
        sets = load_corpus(config).sets()
        asking = {name: [row for row in sets.get(name, []) if row.prompt is not None] for name in ROLES}
        if asking["forget"]:
            return asking
    if config.name != "lore" and not config.questions.forget:
        raise ConfigError(
            f"suite=attacks asks questions, and the forget set of data.name={config.name} has none; name "
            "multiple-choice questions in data.questions.forget, take data with questions, or suite=knowledge"
        )
    # Corpora for perplexity may be large, and no attack reads them.
    knowledge = load_knowledge(replace(config, questions=replace(config.questions, perplexity=[])))
    return {
        name: open_questions(knowledge.choices.get(role, []), knowledge.cloze.get(role, []))
        for name, role in ROLES.items()
    }


def open_questions(choices: Sequence[ChoiceRow], cloze: Sequence[Row] = ()) -> list[Row]:
    """Multiple-choice questions as rows with the question alone, which the right option answers.

    The fact is the right option without a full stop after it, the wrong options are `perturbed_answer`.

    Args:
        choices: the questions.
        cloze: sentences to complete. The one at a question's place becomes its row's `cloze`, if its fact is the
            question's too; others belong to no question and are left out.
    """
    rows = []
    for number, choice in enumerate(choices):
        right = choice.choices[choice.answer]
        fact = re.sub("[.。｡．।۔]$", "", right.strip())
        extra: dict[str, Any] = {
            "fact": fact,
            "perturbed_answer": [wrong for wrong in choice.choices if wrong != right],
            "subject": choice.subject,
        }
        if number < len(cloze) and plain(cloze[number].fact or "") == plain(fact):
            extra["cloze"] = cloze[number].prompt
        rows.append(Row(choice.question, right, extra))
    return rows
