"""Scores of packed rows under several edited models of one base; what no edit changes is run once for all of them.

Where one gate for all edits is decided at the end of the prompt and is shut there, a row's scores are the base's: they
are computed once, and a model runs the rows that its gate is open on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import compress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grun.cache.attention import Pack
from grun.cache.packed import PackedModel
from grun.cache.prefix import Freezer
from grun.cache.shard import FrozenRow
from grun.cache.suffix import SuffixRunner, sites_of_prompts, sites_of_rows
from grun.data.encoding import EncodedRow
from grun.evaluation import scoring
from grun.evaluation.scoring import ScoredRow, TokenScores, prompt_gates, score_tokens, scored_rows
from grun.method.host import EditedModel
from grun.method.model import GrunModel
from grun.method.position import PositionRule
from pyvene_custom import Sites


class PackedScorer:
    """Scores rows under several edited models of one base, which need not lie on it."""

    def __init__(self, base: PreTrainedModel, first: int | None) -> None:
        """Share passes up to block `first` (None: all); ModelError where the base's structure does not allow it."""
        self._packed = PackedModel(base)
        at = self._packed.depth - 1 if first is None else first
        self._freezer = Freezer(self._packed, at)
        self._runner = SuffixRunner(self._packed, at)

    @torch.no_grad()
    def score(self, rows: Sequence[EncodedRow], models: Sequence[EditedModel | None]) -> Iterator[list[ScoredRow]]:
        """Results of `rows`, each with prompt and answer, under each of `models` (None: the base), one after another.

        None of them depends on what other models there are.
        """
        states = dict.fromkeys((block for model in models for block in _blocks_read(model)), torch.empty(0))
        shard = self._freezer.freeze(rows, states)
        frozen = [shard.row(number) for number in range(len(rows))]
        untouched: list[ScoredRow] = []
        for model in models:
            logits = self._gate_logits(model, rows, states)
            is_open = [model is not None] * len(rows)
            if isinstance(model, GrunModel) and logits is not None and model.gate_threshold is not None:
                is_open = (torch.sigmoid(logits) >= model.gate_threshold).flatten().tolist()
            if not untouched and not all(is_open):
                untouched = self._scored(rows, frozen)  # all of them, so that rounding is the same for any model
            opened: Iterator[ScoredRow] = iter(())
            if any(is_open):
                chosen = list(compress(rows, is_open)), list(compress(frozen, is_open))
                opened = iter(self._scored(*chosen, model, None if logits is None else logits[is_open]))
            gates = prompt_gates(_by_block(model, None if logits is None else torch.sigmoid(logits)), len(rows))
            yield [
                next(opened) if one else untouched[number]._replace(gates=gates[number])
                for number, one in enumerate(is_open)
            ]

    def _gate_logits(
        self, model: EditedModel | None, rows: Sequence[EncodedRow], states: Mapping[int, Tensor]
    ) -> Tensor | None:
        """Logits of a gate for all edits at the end of each row's prompt, [rows, 1]; None where there is no such gate.

        `states`: outputs of the blocks that it reads, of distinct prompts one after another, [tokens, width].
        """
        if not _blocks_read(model):
            return None
        assert model is not None
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        layout, sites = sites_of_prompts(model.rule, prompts, self._packed.device)
        for block in model.pooled.blocks:
            sites.take(block, layout.padded(states[block]), model.pooled.pool)
        logits: Tensor = model.pooled(sites.joined(model.pooled.blocks, model.pooled.pool))  # [prompts, 1]
        number = {prompt: index for index, prompt in enumerate(prompts)}
        return logits[[number[row.prompt_ids] for row in rows]]

    def _scored(
        self,
        rows: Sequence[EncodedRow],
        frozen: Sequence[FrozenRow],
        model: EditedModel | None = None,
        logits: Tensor | None = None,
    ) -> list[ScoredRow]:
        """Results under one model; `logits` of its gate for all edits, [rows, 1], if it has one."""
        rule = None if model is None or model.rule.changes == "last_prompt" else model.rule
        locate = None if rule is None else partial(_sites_of_pack, rule)
        edits = {} if model is None else model.edit_at()
        states = self._runner.states(frozen, edits, locate=locate, pooled=_by_block(model, logits))
        targets = torch.tensor([token for row in rows for token in row.answer_ids], device=self._packed.device)
        size = max(1, scoring.LARGEST_SLICE // self._packed.vocabulary)
        parts = [
            score_tokens(self._packed.logits(hidden), tokens)
            for hidden, tokens in zip(states.final.split(size), targets.split(size), strict=True)
        ]
        scores = TokenScores(*(torch.cat(field) for field in zip(*parts, strict=True)))
        gates = {block: torch.sigmoid(found) for block, found in states.gates.items()}
        return scored_rows(scores, [len(row.answer_ids) for row in rows], prompt_gates(gates, len(rows)))


def _sites_of_pack(rule: PositionRule, pack: Pack) -> Sites:
    """Where a rule reads and writes what is run of rows, which begins with the last prompt token."""
    return sites_of_rows(rule, pack.layout.inside, torch.ones(len(pack.lengths), dtype=torch.long))


def _blocks_read(model: EditedModel | None) -> Sequence[int]:
    """Blocks that a gate for all edits reads."""
    blocks: Sequence[int] = model.pooled.blocks if isinstance(model, GrunModel) and model.pooled is not None else ()
    return blocks


def _by_block(model: EditedModel | None, values: Tensor | None) -> dict[int, Tensor]:
    """Values of a gate for all edits by the block that it goes by; empty where there is none."""
    return {} if model is None or values is None else {model.pooled.block: values}
