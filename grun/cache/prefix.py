"""What never changes while an edit is trained, computed once: states below it, keys and values of the prompt above it.

Below and at the first edited block nothing depends on the edit; above it, keys and values of the tokens before the
edited one do not either. So a training step runs the blocks above the first edited one alone, on the last prompt token
and the answer (`grun.cache.suffix`), from what is computed here. Where gates read every token, or edits are written at
earlier ones, whole rows are run there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from grun.cache.attention import move
from grun.cache.packed import PackedModel
from grun.cache.passage import Passage
from grun.cache.shard import Shard, grouped
from grun.cache.store import Share
from grun.cache.suffix import Asked, SuffixRunner
from grun.data.encoding import EncodedRow
from grun.errors import DataError
from grun.method.position import Changes

T = TypeVar("T")
MEMORY_BUDGET = 2**32
"""Bytes, as `cache.memory_budget` has it by default."""


def tokens_per_pass(device: torch.device) -> int:
    """Tokens of one pass without gradients: enough to fill the device, few enough to stay small."""
    return 1024 if device.type == "cpu" else 8192


class Freezer:
    """Computes what of rows is frozen, for edits at `first_block` or above."""

    def __init__(
        self,
        packed: PackedModel,
        first_block: int,
        *,
        last_answer_token: bool = False,
        changes: Changes = "last_prompt",
        budget: int = MEMORY_BUDGET,
    ) -> None:
        """`last_answer_token`: keep the states of the answer's last token too, which predicts nothing.

        For `changes` see `PositionRule`; with every_token states of all tokens are kept, and no keys and values.
        `budget`: bytes of the rows that go through the model together where its blocks are read from files.
        """
        self._budget = budget
        self._packed = packed
        self._first = first_block
        self._whole_rows = changes == "every_token"
        self._last_answer_token = last_answer_token or self._whole_rows
        ends_there = changes == "last_prompt" and not self._last_answer_token
        self.reaches_one_token = first_block == packed.depth - 1 and ends_there
        """Whether the last block alone is edited, and log-probabilities alone are read: only the first can change."""

    def shards(
        self,
        rows: Sequence[EncodedRow],
        reference: Collection[EncodedRow] = (),
        missing: Collection[EncodedRow] | None = None,
        share: Share = list,
    ) -> Iterator[Shard]:
        """Freeze distinct `rows`, those of similar length together.

        Args:
            rows: what is wanted.
            reference: rows whose log-probabilities under the untouched model are computed; all are where the edit
                reaches one token, elsewhere they are NaN.
            missing: rows that are not there yet; None: all. Passes without such a row are left out, the others hold
                the same rows as if nothing were there, so that one that was cut off goes on with the same rounding.
            share: which of the passes are made here.
        """
        ordered = sorted(rows, key=lambda row: (len(row.prompt_ids), row.prompt_ids, len(row.answer_ids)))
        passes = by_tokens(ordered, len, tokens_per_pass(self._packed.device))
        wanted = share([piece for piece in passes if missing is None or any(row in missing for row in piece)])
        made = (shard for together in self._waves(wanted) for shard in self._freeze(together, {}))
        return grouped(self._with_reference(shard, reference) for shard in made)

    def freeze(self, rows: Sequence[EncodedRow], of_prompts: dict[int, Tensor]) -> Shard:
        """One pass over each distinct prompt and one over each answer; references are NaN.

        Outputs of the blocks that are keys of `of_prompts` are put there too, un-edited, of distinct prompts one after
        another, [tokens, width]; not where whole rows are frozen.
        """
        (shard,) = self._freeze([rows], of_prompts)
        return shard

    def _waves(self, passes: Sequence[list[EncodedRow]]) -> Iterator[Sequence[list[EncodedRow]]]:
        """Passes that go through the model together: one, or as many as the budget allows where blocks are streamed."""
        if not self._packed.streams:
            return ([piece] for piece in passes)
        each = self._packed.bytes_of_token(0 if self._whole_rows else self._packed.depth - 1 - self._first)
        return by_tokens(passes, lambda piece: each * sum(map(len, piece)), self._budget)

    @torch.no_grad()
    def _freeze(self, pieces: Sequence[Sequence[EncodedRow]], of_prompts: dict[int, Tensor]) -> Iterator[Shard]:
        """A shard of each of `pieces`; a block that lies in files is read once for all of them."""
        packed, first = self._packed, self._first
        home = torch.device("cpu") if len(pieces) > 1 else packed.device
        waiting = deque(self._unfinished(rows) for rows in pieces)
        for blocks in packed.stretches(first if self._whole_rows else packed.depth - 1, ends=[first]):
            with packed.loaded(blocks):
                for one in waiting:
                    one.advance(blocks, of_prompts, home)
        while waiting:
            yield waiting.popleft().shard()

    def _unfinished(self, rows: Sequence[EncodedRow]) -> _Unfinished:
        if any(not row.prompt_ids or not row.answer_ids for row in rows):
            raise DataError("a row has no prompt token or no answer token; both are needed to unlearn it")
        if self._whole_rows:
            return _Unfinished(self._packed, self._first, rows, None)
        end = None if self._last_answer_token else -1
        return _Unfinished(self._packed, self._first, rows, [row.answer_ids[:end] for row in rows])

    @torch.no_grad()
    def _with_reference(self, shard: Shard, reference: Collection[EncodedRow]) -> Shard:
        """What training needs of a shard, in main memory, with the log-probabilities that are wanted."""
        wanted = [i for i, row in enumerate(shard.rows) if self.reaches_one_token or row in reference]
        if wanted:
            runner = SuffixRunner(self._packed, self._first)
            rows, frozen = [shard.rows[i] for i in wanted], [shard.row(i) for i in wanted]
            asked = Asked(rows, [len(one.states) for one in frozen], whole_rows=self._whole_rows)
            move(asked.parts, self._packed.device)
            known = torch.cat([one.reference for one in frozen]).to(self._packed.device)
            logprobs = runner.logprobs(asked, runner.states(frozen, {}), lambda: known)
            found = logprobs.split([len(row.answer_ids) for row in rows])
            for row, values in zip(frozen, found, strict=True):
                row.reference.copy_(values)  # a view of the shard's
        if self.reaches_one_token:
            starts = torch.tensor([0, *shard.columns[:-1]]).cumsum(0).to(shard.states.device)
            shard = replace(shard, states=shard.states[starts], columns=[1] * len(shard.rows))
        return replace(shard, states=shard.states.cpu(), prompts=shard.prompts.cpu(), reference=shard.reference.cpu())


def by_tokens(items: Sequence[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Consecutive pieces of `items` whose sizes add up to at most `most`, or that hold one item."""
    piece: list[T] = []
    total = 0
    for item in items:
        if piece and total + size(item) > most:
            yield piece
            piece, total = [], 0
        piece.append(item)
        total += size(item)
    if piece:
        yield piece


class _Unfinished:
    """A shard whose rows are on their way through the blocks."""

    def __init__(
        self,
        packed: PackedModel,
        first: int,
        rows: Sequence[EncodedRow],
        answers: Sequence[tuple[int, ...]] | None,
    ) -> None:
        """`first`: block after which states are kept; `answers`: what is run of them, None: of whole rows."""
        self._rows, self._first, self._answers = list(rows), first, answers
        if answers is None:
            self._passage = Passage(packed, [row.prompt_ids + row.answer_ids for row in rows])
            return
        number = {prompt: index for index, prompt in enumerate(dict.fromkeys(row.prompt_ids for row in rows))}
        self._prompt_of = [number[row.prompt_ids] for row in rows]
        self._prompt_tokens = [len(prompt) - 1 for prompt in number]
        given = [(prompt, ids) for prompt, ids in zip(self._prompt_of, answers, strict=True) if ids]
        self._passage = Passage(packed, list(number), given)
        self._ends = self._passage.pack.starts + self._passage.pack.lengths - 1
        self._inner = torch.ones(len(self._passage.prompts), dtype=torch.bool, device=packed.device)
        self._inner[self._ends] = False  # the last prompt token's keys and values change with the edit
        self._last_states = torch.empty(0)
        self._keys_values: list[Tensor] = []

    def advance(self, blocks: range, of_prompts: dict[int, Tensor], home: torch.device) -> None:
        """Run the next `blocks`; see `Freezer.freeze` for `of_prompts`; keys and values are kept on `home`."""
        passage = self._passage
        wanted = [block for block in of_prompts if block in blocks]
        found = passage.run_prompts(blocks, wanted)
        of_prompts.update({block: found[block] for block in wanted})
        if self._answers is None:
            return
        if blocks[-1] <= self._first:
            passage.run_answers(blocks)
        if blocks[-1] == self._first:
            self._last_states = passage.prompts[self._ends][self._prompt_of]  # [rows, width]
        if blocks[0] > self._first:
            pairs = torch.stack([torch.stack(passage.recorded[block]) for block in blocks])
            kept = pairs.permute(3, 0, 1, 2, 4)[self._inner]  # [tokens, blocks, 2, heads, head size]
            self._keys_values.append(kept.to(home))
        passage.recorded.clear()

    def shard(self) -> Shard:
        """What has been made."""
        passage, rows = self._passage, self._rows
        if self._answers is None:
            return Shard.without_prompts(rows, passage.prompts, _unknown(rows, passage.prompts), list(map(len, rows)))
        answers = iter(passage.answers.split(passage.lengths)) if passage.lengths else iter(())
        parts: list[Tensor] = []
        for index, ids in enumerate(self._answers):
            parts += [self._last_states[index : index + 1], *([next(answers)] if ids else [])]
        states = torch.cat(parts)
        nothing = states.new_zeros(sum(self._prompt_tokens), 0, 2, 1, 1)
        kept = self._keys_values
        return Shard(
            rows=rows,
            states=states,
            prompts=(torch.cat(kept, dim=1) if len(kept) > 1 else kept[0] if kept else nothing).contiguous(),
            reference=_unknown(rows, states),
            columns=[1 + len(answer) for answer in self._answers],
            prompt_of=self._prompt_of,
            prompt_tokens=self._prompt_tokens,
        )


def _unknown(rows: Sequence[EncodedRow], states: Tensor) -> Tensor:
    """References of rows that were not computed: NaN, in at least float32."""
    wide = torch.promote_types(states.dtype, torch.float32)
    return states.new_full((sum(len(row.answer_ids) for row in rows),), torch.nan, dtype=wide)
