"""What an evaluation asks of a model, and how its answers become a table."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grun.config.checks import quirks_in_force
from grun.config.options import EvaluateConfig
from grun.data.rows import Row
from grun.data.sets import EvaluationSet, find_set
from grun.data.templates import Template
from grun.evaluation.table import GateRecord, GenerationRecord, ScoreRecord, Table
from grun.runtime.memory import enough_memory
from grun.runtime.progress import progress

if TYPE_CHECKING:
    from grun.data.encoding import EncodedRow
    from grun.evaluation.generation import Answer
    from grun.evaluation.scoring import ScoredRow
    from grun.evaluation.shared_scoring import Subject

log = logging.getLogger(__name__)

ANSWER_ONLY = ("forget_paraphrase",)
"""Sets of which only the answers are scored: their paraphrases and wrong answers belong to other questions."""


@dataclass(frozen=True)
class Item:
    """One continuation to score."""

    set: str
    index: int
    kind: str
    variant: int
    row: EncodedRow
    text: str
    """The continuation itself."""
    ended: bool
    """Whether its end token is there."""


class Question(NamedTuple):
    """One prompt to answer."""

    set: str
    number: int
    """Position of the row in its set, from 0."""
    row: Row
    prompt_ids: tuple[int, ...]


def encode_items(
    sets: Mapping[str, list[Row]], tokenizer: Any, template: Template, context: int, config: EvaluateConfig
) -> list[Item]:
    """Everything to score: of each row its answer and, where it has them, its paraphrased and its wrong answers.

    `context` is the longest row that the model takes, tokens.
    """
    from grun.data.encoding import encode_rows

    longest = min(config.data.max_length or context, context)
    end = tokenizer.eos_token_id
    items = []
    for name, rows in sets.items():
        places, texts = [], []
        incomplete = [index for index, row in enumerate(rows) if not row.extra.get("perturbed_answer")]
        if 0 < len(incomplete) < len(rows):
            count = f"{len(incomplete)} of {len(rows)} rows (the first is row {incomplete[0] + 1})"
            log.warning("%s: %s have no perturbed_answer, so the set gets no truth ratio", name, count)
        for index, row in enumerate(rows):
            for kind, variant, text in _continuations(name, row):
                if not config.continuations or kind in config.continuations:
                    places.append((name, index, kind, variant))
                    texts.append(replace(row, completion=text))
        encoded = encode_rows(texts, tokenizer, template, longest, config.data.strict)
        for place, row, ids in zip(places, texts, encoded, strict=True):
            items.append(Item(*place, ids, row.completion, bool(ids.answer_ids) and ids.answer_ids[-1] == end))
    return items


def _continuations(set_name: str, row: Row) -> Iterator[tuple[str, int, str]]:
    """Kind, variant and text of what is scored of a row."""
    yield "answer", 0, row.completion
    if set_name in ANSWER_ONLY:
        return
    if row.extra.get("paraphrased_answer"):
        yield "paraphrase", 0, str(row.extra["paraphrased_answer"])
    for variant, text in enumerate(row.extra.get("perturbed_answer") or ()):
        yield "perturbed", variant, text


def questions(sets: Mapping[str, list[Row]], items: Sequence[Item]) -> list[Question]:
    """Every row that asks something; plain text (no prompt) asks nothing."""
    prompts = {(item.set, item.index): item.row.prompt_ids for item in items}
    return [
        Question(name, index, row, prompts[name, index])
        for name, rows in sets.items()
        for index, row in enumerate(rows)
        if row.prompt is not None and (name, index) in prompts
    ]


def score_items(
    subjects: Sequence[Subject],
    tokenizer: Any,
    items: Sequence[Item],
    config: EvaluateConfig,
    journals: Sequence[Path] | None = None,
    first: int | None = None,
) -> list[Table]:
    """Scores and gates of all sets, a table for each of `subjects`; sets go together, so no row is scored twice.

    `journals` are folders, one for each model; `first` is as in `score_together`.
    """
    from grun.evaluation.journal import Journal
    from grun.evaluation.scoring import ScoredRow
    from grun.evaluation.shared_scoring import score_together

    rows = [item.row for item in items]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Journal(one, "scores", ScoredRow.from_json)) for one in journals or ()]
        advance = stack.enter_context(progress("scoring", len(rows) * len(subjects), shown=journals is not None))
        masked, pad_id = _masked_id(tokenizer, config), tokenizer.pad_token_id
        stack.enter_context(enough_memory("scoring", memory_advice(config)))
        scored = score_together(
            subjects, rows, config.batch_size, pad_id, advance, masked_id=masked, journals=opened or None, first=first
        )
    return [_table_of_scores(items, results) for results in scored]


def _table_of_scores(items: Sequence[Item], results: Sequence[ScoredRow]) -> Table:
    table = Table()
    gated = set()
    for item, result in zip(items, results, strict=True):
        table.scores.append(
            ScoreRecord(
                set=item.set,
                index=item.index,
                kind=item.kind,
                variant=item.variant,
                prompt_tokens=len(item.row.prompt_ids),
                answer_tokens=len(item.row.answer_ids),
                ended=item.ended,
                compressed_bytes=len(zlib.compress(item.text.encode())),
                logp=result.logp,
                hit=result.hit,
                vocabulary_mean=result.vocabulary_mean,
                vocabulary_variance=result.vocabulary_variance,
            )
        )
        if result.gates is not None and (item.set, item.index) not in gated:  # the same at every continuation
            gated.add((item.set, item.index))
            table.gates.append(GateRecord(item.set, item.index, result.gates))
    return table


def answer_questions(
    table: Table,
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, list[Row]],
    items: Sequence[Item],
    config: EvaluateConfig,
    journals: Path | None = None,
    known: Mapping[tuple[int, ...], Answer] | None = None,
) -> dict[tuple[int, ...], Answer]:
    """Add an answer to every question of all sets to the table; `known` gives those of some prompts.

    Returns the answers by prompt.
    """
    from grun.evaluation.generation import Answer, generate_answers
    from grun.evaluation.journal import Journal

    asked = questions(sets, items)
    lengths = {(item.set, item.index): len(item.row.answer_ids) for item in items if item.kind == "answer"}
    with contextlib.ExitStack() as stack:
        journal: Journal[Answer] | None = None
        if journals is not None:
            journal = stack.enter_context(Journal(journals, "generations", Answer.from_json))
        stack.enter_context(enough_memory("answering", memory_advice(config)))
        answers = generate_answers(
            model,
            tokenizer,
            [question.prompt_ids for question in asked],
            config.batch_size,
            config.max_new_tokens,
            tokenizer.pad_token_id,
            stack.enter_context(progress("answering", len(asked), shown=journals is not None)),
            masked_id=_masked_id(tokenizer, config),
            journal=journal,
            known=known,
            expected=[lengths.get(question[:2], 0) for question in asked],
        )
    for (name, index, row, _), answer in zip(asked, answers, strict=True):
        reference, text = as_compared(find_set(name), row.completion, answer.text, tokenizer)
        table.generations.append(GenerationRecord(name, index, row.prompt or "", reference, row.fact, text))
    return {question.prompt_ids: answer for question, answer in zip(asked, answers, strict=True)}


def as_compared(one: EvaluationSet, reference: str, text: str, tokenizer: Any) -> tuple[str, str]:
    """A row's reference and its answer as the set compares them: their first tokens, and no answer beyond a stop."""
    text = _first_tokens(text, tokenizer, one.longest_answer, start=False)
    for stop in one.stops:
        text = text.split(stop)[0]
    return _first_tokens(reference, tokenizer, one.longest_reference, start=True), text


def _first_tokens(text: str, tokenizer: Any, count: int | None, start: bool) -> str:
    if count is None:
        return text
    ids = tokenizer(text, add_special_tokens=start)["input_ids"]
    return text if len(ids) <= count else str(tokenizer.decode(ids[:count], skip_special_tokens=True))


def memory_advice(config: EvaluateConfig) -> list[str]:
    """What takes less memory in evaluation."""
    size = config.batch_size
    advice = [f"batch_size={size // 2} (it is {size} now)"] if size > 1 else []
    if config.model.quantization is None:
        advice.append("model.quantization=8bit")
    return [*advice, "model.device_map=auto on several GPUs"]


def _masked_id(tokenizer: Any, config: EvaluateConfig) -> int | None:
    quirky = "eos_masked_attention" in quirks_in_force(config)
    return int(tokenizer.pad_token_id) if quirky else None
