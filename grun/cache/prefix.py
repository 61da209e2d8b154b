"""What never changes while an edit is trained, computed once: states below it, keys and values of the prompt above it.

Below and at the first edited block nothing depends on the edit; above it, keys and values of the tokens before the
edited one do not either. So a training step runs the blocks above the first edited one alone, on the last prompt token
and the answer (`grun.cache.suffix`), from what is computed here. Where gates read every token, or edits are written at
earlier ones, whole rows are run there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from grun.cache.attention import KeysValues, Pack
from grun.cache.packed import PackedModel
from grun.cache.shard import Shard, grouped
from grun.cache.suffix import SuffixRunner
from grun.data.encoding import EncodedRow
from grun.errors import DataError
from grun.method.position import Changes

T = TypeVar("T")


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
    ) -> None:
        """`last_answer_token`: keep the states of the answer's last token too, which predicts nothing.

        For `changes` see `PositionRule`; with every_token states of all tokens are kept, and no keys and values.
        """
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
    ) -> Iterator[Shard]:
        """Freeze distinct `rows`, those of similar length together.

        Args:
            rows: what is wanted.
            reference: rows whose log-probabilities under the untouched model are computed; all are where the edit
                reaches one token, elsewhere they are NaN.
            missing: rows that are not there yet; None: all. Passes without such a row are left out, the others hold
                the same rows as if nothing were there, so that one that was cut off goes on with the same rounding.
        """
        ordered = sorted(rows, key=lambda row: (len(row.prompt_ids), row.prompt_ids, len(row.answer_ids)))
        passes = by_tokens(ordered, len, tokens_per_pass(self._packed.device))
        wanted = (piece for piece in passes if missing is None or any(row in missing for row in piece))
        return grouped(self._with_reference(self.freeze(piece), reference) for piece in wanted)

    @torch.no_grad()
    def freeze(self, rows: Sequence[EncodedRow], of_prompts: dict[int, Tensor] | None = None) -> Shard:
        """One pass over each distinct prompt and one over each answer; references are NaN.

        Outputs of the blocks that are keys of `of_prompts` are put there too, un-edited, of distinct prompts one after
        another, [tokens, width]; not where whole rows are frozen.
        """
        packed, first, device = self._packed, self._first, self._packed.device
        if any(not row.prompt_ids or not row.answer_ids for row in rows):
            raise DataError("a row has no prompt token or no answer token; both are needed to unlearn it")
        if self._whole_rows:
            return self._freeze_whole(rows)
        number = {prompt: index for index, prompt in enumerate(dict.fromkeys(row.prompt_ids for row in rows))}
        prompt_of = [number[row.prompt_ids] for row in rows]
        recorded: dict[int, KeysValues] = {}
        pack = Pack([len(prompt) for prompt in number], [0] * len(number), {}, device, record=recorded)
        wanted = [first, *(of_prompts or ())]
        found = packed.states(pack, self._ids(number), last=packed.depth - 1, capture=wanted)
        if of_prompts is not None:
            of_prompts.update({block: found[block] for block in of_prompts})
        ends = pack.starts + pack.lengths - 1
        last_states = found[first][ends][prompt_of]  # [rows, width]

        parts = [[last_states[index : index + 1]] for index in range(len(rows))]
        answers = [row.answer_ids if self._last_answer_token else row.answer_ids[:-1] for row in rows]
        if longer := [index for index, answer in enumerate(answers) if answer]:
            below = {block: recorded[block] for block in range(first + 1)}
            lengths = [len(answers[index]) for index in longer]
            prefix = _left_padded(below, pack, [prompt_of[index] for index in longer])
            after = Pack(lengths, [len(rows[index].prompt_ids) for index in longer], prefix, device)
            ids = self._ids(answers[index] for index in longer)
            of_answers = packed.states(after, ids, last=first, capture=[first])[first]
            for index, part in zip(longer, of_answers.split(lengths), strict=True):
                parts[index].append(part)
        states = torch.cat([part for of_row in parts for part in of_row])

        above = range(first + 1, packed.depth)
        inner = torch.ones(len(found[first]), dtype=torch.bool, device=device)
        inner[ends] = False  # the last prompt token's keys and values change with the edit
        if above:
            pairs = [torch.stack(recorded[block]) for block in above]
            keys_values = torch.stack(pairs).permute(3, 0, 1, 2, 4)[inner]  # [tokens, blocks, 2, heads, head size]
        else:
            keys_values = states.new_zeros(int(inner.sum()), 0, 2, 1, 1)
        return Shard(
            rows=list(rows),
            states=states,
            prompts=keys_values.contiguous(),
            reference=_unknown(rows, states),
            columns=[1 + len(answer) for answer in answers],
            prompt_of=prompt_of,
            prompt_tokens=[len(prompt) - 1 for prompt in number],
        )

    def _freeze_whole(self, rows: Sequence[EncodedRow]) -> Shard:
        lengths = [len(row) for row in rows]
        pack = Pack(lengths, [0] * len(rows), {}, self._packed.device)
        ids = self._ids(row.prompt_ids + row.answer_ids for row in rows)
        states = self._packed.states(pack, ids, last=self._first, capture=[self._first])[self._first]
        return Shard.without_prompts(list(rows), states, _unknown(rows, states), lengths)

    def _ids(self, parts: Iterable[Sequence[int]]) -> Tensor:
        return torch.tensor([token for part in parts for token in part], device=self._packed.device)

    @torch.no_grad()
    def _with_reference(self, shard: Shard, reference: Collection[EncodedRow]) -> Shard:
        """What training needs of a shard, in main memory, with the log-probabilities that are wanted."""
        wanted = [i for i, row in enumerate(shard.rows) if self.reaches_one_token or row in reference]
        if wanted:
            runner = SuffixRunner(self._packed, self._first, whole_rows=self._whole_rows)
            rows, frozen = [shard.rows[i] for i in wanted], [shard.row(i) for i in wanted]
            logprobs = runner.logprobs(rows, frozen, runner.states(frozen, {}))
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


def _unknown(rows: Sequence[EncodedRow], states: Tensor) -> Tensor:
    """References of rows that were not computed: NaN, in at least float32."""
    wide = torch.promote_types(states.dtype, torch.float32)
    return states.new_full((sum(len(row.answer_ids) for row in rows),), torch.nan, dtype=wide)


def _left_padded(recorded: Mapping[int, KeysValues], pack: Pack, rows: Sequence[int]) -> dict[int, KeysValues]:
    """Keys and values of the rows numbered in `rows` of a pack, as the prefix of another: padded on the left."""
    starts, lengths = pack.starts[rows].unsqueeze(1), pack.lengths[rows].unsqueeze(1)
    longest = int(lengths.max())
    column = starts + lengths - longest + torch.arange(longest, device=pack.device)
    where = column.maximum(starts)  # [rows, longest]; padding repeats the first token, masked
    return {
        block: (keys[:, where].transpose(0, 1), values[:, where].transpose(0, 1))
        for block, (keys, values) in recorded.items()
    }
