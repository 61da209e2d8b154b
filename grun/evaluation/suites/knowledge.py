"""`evaluate suite=knowledge`: multiple choice, sentences to complete, perplexity, and the gates meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grun.config.options import EvaluateConfig
from grun.data.choices import ChoiceRow
from grun.data.corpus import load_knowledge
from grun.data.encoding import PLAIN
from grun.data.rows import evenly_spaced, hash_rows
from grun.data.templates import encode_prompt
from grun.errors import TooLowError
from grun.evaluation.multiple_choice import accuracy, orders_of, score_choices, share
from grun.evaluation.suites.base import Measured, Suite
from grun.evaluation.table import GateRecord, Table
from grun.runtime.files import content_hash
from grun.runtime.progress import progress

if TYPE_CHECKING:
    from grun.loading.adapters import Loaded

QUESTIONS_FILE = "questions.jsonl"


class KnowledgeSuite(Suite):
    """What a model knows of each role (forget, neighbor, general).

    Results: `choices`, a list with one entry for each format, order and suffix, which holds `roles` (see `accuracy` in
    `multiple_choice.py`; `chance` is the mean of 1 / options) and, for a model with gates, `gate` (see `gate_table` in
    `measure.py`: auc_general, auc_neighbor, mean, open); `cloze` with `roles` and `gate`; `perplexity` by the name of
    the corpus. Each question is a line of questions.jsonl; its text and options stand in that of its first order.
    """

    in_template = False

    def __init__(self, config: EvaluateConfig) -> None:
        """Load what `data.*` names; config.data.limit questions of each role, evenly spaced."""
        super().__init__(config)
        knowledge, limit = load_knowledge(config.data), config.data.limit
        self.choices = {role: evenly_spaced(rows, limit) for role, rows in knowledge.choices.items()}
        self.cloze = {role: evenly_spaced(rows, limit) for role, rows in knowledge.cloze.items()}
        self.texts = {name: evenly_spaced(texts, limit) for name, texts in knowledge.texts.items()}

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """Hashes of the questions, and how they are asked."""
        config = self.config
        choices = {role: [vars(row) for row in rows] for role, rows in self.choices.items()}
        settings: dict[str, Any] = {
            "choices": {role: content_hash(rows) for role, rows in choices.items()},
            "cloze": {role: hash_rows(rows) for role, rows in self.cloze.items()},
            "texts": {name: content_hash(texts) for name, texts in self.texts.items()},
        }
        if self.choices:
            settings |= {"formats": config.formats, "orders": config.orders, "suffixes": config.suffixes}
            settings["seed"] = config.seed if "seeded" in config.orders else None
        if self.cloze:
            settings["max_new_tokens"] = config.max_new_tokens
        if self.texts:
            settings |= {"window": config.window, "stride": config.stride}
        return settings

    def measure(self, loaded: Loaded) -> Measured:
        """Ask everything."""
        results: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        with self.enough_memory("evaluating"):
            if self.choices:
                config = self.config
                ways = itertools.product(config.formats, config.orders, ["", *config.suffixes])
                results["choices"] = [self._choices(loaded, *way, lines) for way in ways]
            if self.cloze:
                results["cloze"] = self._cloze(loaded, lines)
            if self.texts:
                results["perplexity"] = self._perplexity(loaded)
        return Measured(results, {QUESTIONS_FILE: lines})

    def accept(self, result: dict[str, Any]) -> None:
        """TooLowError where less is known than `choices_at_least` and `cloze_at_least` ask for."""
        config = self.config
        known = (
            ("choices_at_least", config.choices_at_least, "multiple choice", result.get("choices"), "accuracy"),
            ("cloze_at_least", config.cloze_at_least, "cloze", result.get("cloze"), "fact_recall"),
        )
        for option, least, what, found, measure in known:
            if least is None:
                continue
            roles = (found[0] if isinstance(found, list) else found or {}).get("roles", {})
            value = roles.get("forget", {}).get(measure)
            if value is None or value < least:
                shown = "not measured" if value is None else f"{value:.2f}"
                raise TooLowError(
                    f"{result['model']} does not know what is to be forgotten: {what} is {shown}, {option}={least} is "
                    "asked for; teach it longer, or lower that"
                )

    def _choices(
        self, loaded: Loaded, format: str, order: str, suffix: str, lines: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """All questions in one way; a line for each order of each."""
        asked: list[tuple[str, int, int, ChoiceRow]] = [
            (role, index, number, shown)
            for role, rows in self.choices.items()
            for index, row in enumerate(rows)
            for number, shown in enumerate(orders_of(row, order, self.config.seed))
        ]
        rows = [shown for *_, shown in asked]
        with progress(f"{format}, {order}", sum(len(row.choices) for row in rows)) as advance:
            scores = score_choices(
                loaded.model,
                loaded.tokenizer,
                rows,
                format=format,
                batch_size=self.config.batch_size,
                suffix=suffix,
                advance=advance,
            )
        right: dict[tuple[str, int], list[float]] = {}
        gates = []
        way = {"format": format, "order": order, "suffix": suffix}
        for (role, index, number, shown), score in zip(asked, scores, strict=True):
            hit = score.chosen == shown.answer
            right.setdefault((role, index), []).append(float(hit))
            gates.append((role, index, score.gates))
            lines.append(
                {
                    "kind": "choice",
                    "role": role,
                    "index": index,
                    "subject": shown.subject,
                    **way,
                    "rotation": number,
                    "logp": score.logp,
                    "chosen": score.chosen,
                    "answer": shown.answer,
                    "right": hit,
                    "gates": score.gates,
                    **({"question": shown.question, "choices": list(shown.choices)} if number == 0 else {}),
                }
            )
        roles = {}
        for role, of_role in self.choices.items():
            means = [sum(right[role, index]) / len(right[role, index]) for index in range(len(of_role))]
            chance = sum(1 / len(row.choices) for row in of_role) / len(of_role)
            roles[role] = {**accuracy(means, [row.subject for row in of_role]), "chance": chance}
        return {**way, "roles": roles, **_gate(gates)}

    def _cloze(self, loaded: Loaded, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Greedy completions, and whether they say the key fact (the whole completion where a row names none)."""
        from grun.evaluation.metrics.answers import says

        asked = [(role, index, row) for role, rows in self.cloze.items() for index, row in enumerate(rows)]
        prompts = [encode_prompt(PLAIN, loaded.tokenizer, row.prompt) for _, _, row in asked]
        answers = self.answers(loaded, prompts, "completing")
        right: dict[str, list[float]] = {role: [] for role in self.cloze}
        gates = []
        for (role, index, row), answer in zip(asked, answers, strict=True):
            fact = row.fact or row.completion.strip()
            hit = says(answer.text, fact, whole_words=bool(row.extra.get("whole_words")))
            right[role].append(float(hit))
            gates.append((role, index, answer.gates))
            lines.append(
                {
                    "kind": "cloze",
                    "role": role,
                    "index": index,
                    "prompt": row.prompt,
                    "fact": fact,
                    "text": answer.text,
                    "right": hit,
                    "gates": answer.gates,
                }
            )
        return {"roles": {role: share(hits, "fact_recall") for role, hits in right.items()}, **_gate(gates)}

    def _perplexity(self, loaded: Loaded) -> dict[str, Any]:
        """Of each corpus of texts."""
        from grun.evaluation.perplexity import sliding_perplexity
        from grun.evaluation.scoring import base_of
        from grun.loading.models import context_length

        config = self.config
        window = min(context_length(base_of(loaded.model)), config.window)
        results: dict[str, Any] = {}
        for name, texts in self.texts.items():
            found = sliding_perplexity(
                loaded.model,
                loaded.tokenizer,
                texts,
                window=window,
                stride=config.stride,
                batch_size=config.batch_size,
            )
            results[name] = {**found._asdict(), "window": window, "texts": len(texts)}
        return results


def _gate(gates: Sequence[tuple[str, int, dict[int, float] | None]]) -> dict[str, Any]:
    """Gates by role, under the key `gate`; nothing for a model without gates."""
    from grun.evaluation.measure import gate_table

    records = [GateRecord(role, index, opened) for role, index, opened in gates if opened is not None]
    table = gate_table(Table(gates=records))
    return {"gate": table} if table else {}
