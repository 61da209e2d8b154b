"""What never changes while an edit is trained, computed once: states below it, keys and values of the prompt above it.

Below and at the first edited block nothing depends on the edit; above it, keys and values of the tokens before the
edited one do not either. So a training step runs the blocks above the first edited one alone, on the last prompt token
and the answer (`grun.cache.suffix`), from what is computed here. Where gates read every token, or edits are written at
earlier ones, whole rows are run there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from grun.cache.packed import Pack, PackedModel
from grun.cache.shard import Shard
from grun.cache.suffix import SuffixRunner
from grun.data.encoding import EncodedRow
from grun.errors import DataError
from grun.method.position import Changes

SHARD_BYTES = 2**26
"""Size at which a shard is closed."""

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
        """For edits as of a position rule.

        Args:
            packed: the model.
            first_block: the first edited one.
            last_answer_token: keep the states of the answer's last token too, which predicts nothing.
            changes: as of `PositionRule`; every_token keeps states of all tokens, and no keys and values.
        """
        self._packed = packed
        self._first = first_block
        self._changes = changes
        self._whole_rows = changes == "every_token"
        self._last_answer_token = last_answer_token or self._whole_rows

    @property
    def reaches_one_token(self) -> bool:
        """Whether the last block alone is edited, and log-probabilities alone are read: only the first can change."""
        ends_there = self._changes == "last_prompt" and not self._last_answer_token
        return self._first == self._packed.depth - 1 and ends_there

    def shards(
        self,
        rows: Sequence[EncodedRow],
        reference: Collection[EncodedRow] = (),
        missing: Collection[EncodedRow] | None = None,
    ) -> Iterator[Shard]:
        """Freeze distinct `rows`, those of similar length together, in shards of about SHARD_BYTES.

        Args:
            rows: what is wanted.
            reference: rows whose log-probabilities under the untouched model are computed; all are where the edit
                reaches one token, elsewhere they are NaN.
            missing: rows that are not there yet; None: all. Passes without such a row are left out, the others hold
                the same rows as if nothing were there, so that one that was cut off goes on with the same rounding.
        """
        ordered = sorted(rows, key=lambda row: (len(row.prompt_ids), row.prompt_ids, len(row.answer_ids)))
        pieces: list[Shard] = []
        size = 0
        for piece in by_tokens(ordered, len, tokens_per_pass(self._packed.device)):
            if missing is not None and not any(row in missing for row in piece):
                continue
            shard = self.freeze(piece)
            self._fill_reference(shard, reference)
            pieces.append(self._kept(shard))
            size += sum(part.nbytes for part in (pieces[-1].states, pieces[-1].prompts))
            if size >= SHARD_BYTES:
                yield _joined(pieces)
                pieces, size = [], 0
        if pieces:
            yield _joined(pieces)

    @torch.no_grad()
    def freeze(self, rows: Sequence[EncodedRow]) -> Shard:
        """One pass over each distinct prompt and one over each answer; references are NaN."""
        packed, first, device = self._packed, self._first, self._packed.device
        if any(not row.prompt_ids or not row.answer_ids for row in rows):
            raise DataError("a row has no prompt token or no answer token; both are needed to unlearn it")
        if self._whole_rows:
            return self._freeze_whole(rows)
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        number = {prompt: index for index, prompt in enumerate(prompts)}
        prompt_of = [number[row.prompt_ids] for row in rows]
        lengths = [len(prompt) for prompt in prompts]
        recorded: dict[int, tuple[Tensor, Tensor]] = {}
        pack = Pack(lengths, [0] * len(prompts), {}, device, record=recorded)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        of_prompts = packed.states(pack, ids, last=packed.depth - 1, capture=[first])[first]
        ends = pack.starts + torch.tensor(lengths, device=device) - 1
        last_states = of_prompts[ends][prompt_of]  # [rows, width]

        parts = [[last_states[index : index + 1]] for index in range(len(rows))]
        kept = [len(row.answer_ids) if self._last_answer_token else len(row.answer_ids) - 1 for row in rows]
        longer = [index for index, count in enumerate(kept) if count]
        if longer:
            below = {block: recorded[block] for block in range(first + 1)}
            answers = Pack(
                [kept[index] for index in longer],
                [lengths[prompt_of[index]] for index in longer],
                _left_padded(below, pack, lengths, [prompt_of[index] for index in longer]),
                device,
            )
            ids = torch.tensor([t for index in longer for t in rows[index].answer_ids[: kept[index]]], device=device)
            of_answers = packed.states(answers, ids, last=first, capture=[first])[first]
            for index, part in zip(longer, of_answers.split([kept[index] for index in longer]), strict=True):
                parts[index].append(part)
        states = [torch.cat(part) for part in parts]

        above = range(first + 1, packed.depth)
        inner = torch.ones(sum(lengths), dtype=torch.bool, device=device)
        inner[ends] = False  # the last prompt token's keys and values change with the edit
        if above:
            pairs = [torch.stack((recorded[block][0], recorded[block][1])) for block in above]
            keys_values = torch.stack(pairs).permute(3, 0, 1, 2, 4)[inner]  # [tokens, blocks, 2, heads, head size]
        else:
            keys_values = states[0].new_zeros(int(inner.sum()), 0, 2, 1, 1)
        wide = torch.promote_types(last_states.dtype, torch.float32)
        answer_tokens = sum(len(row.answer_ids) for row in rows)
        shard = Shard(
            rows=list(rows),
            states=torch.cat(states),
            prompts=keys_values.contiguous(),
            reference=last_states.new_full((answer_tokens,), torch.nan, dtype=wide),
            columns=[len(part) for part in states],
            prompt_of=prompt_of,
            prompt_tokens=[length - 1 for length in lengths],
        )
        return shard

    def _freeze_whole(self, rows: Sequence[EncodedRow]) -> Shard:
        packed, first, device = self._packed, self._first, self._packed.device
        lengths = [len(row) for row in rows]
        pack = Pack(lengths, [0] * len(rows), {}, device)
        ids = torch.tensor([token for row in rows for token in row.prompt_ids + row.answer_ids], device=device)
        states = packed.states(pack, ids, last=first, capture=[first])[first]
        wide = torch.promote_types(states.dtype, torch.float32)
        answer_tokens = sum(len(row.answer_ids) for row in rows)
        return Shard(
            rows=list(rows),
            states=states,
            prompts=states.new_zeros(0, 0, 2, 1, 1),
            reference=states.new_full((answer_tokens,), torch.nan, dtype=wide),
            columns=lengths,
            prompt_of=[0] * len(rows),
            prompt_tokens=[0],
        )

    def _kept(self, shard: Shard) -> Shard:
        """What training needs of it, in main memory."""
        if self.reaches_one_token:
            starts = torch.tensor([0, *shard.columns]).cumsum(0)[:-1].to(shard.states.device)
            shard = replace(shard, states=shard.states[starts], columns=[1] * len(shard.rows))
        return replace(shard, states=shard.states.cpu(), prompts=shard.prompts.cpu(), reference=shard.reference.cpu())

    @torch.no_grad()
    def _fill_reference(self, shard: Shard, reference: Collection[EncodedRow]) -> None:
        wanted = [i for i, row in enumerate(shard.rows) if self.reaches_one_token or row in reference]
        if not wanted:
            return
        runner = SuffixRunner(self._packed, self._first, whole_rows=self._whole_rows)
        rows, frozen = [shard.rows[i] for i in wanted], [shard.row(i) for i in wanted]
        logprobs = runner.logprobs(rows, frozen, runner.states(frozen, {}))
        starts = torch.tensor([0, *(len(row.answer_ids) for row in shard.rows)]).cumsum(0).tolist()
        found = logprobs.split([len(row.answer_ids) for row in rows])
        for index, values in zip(wanted, found, strict=True):
            shard.reference[starts[index] : starts[index + 1]] = values


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


def _left_padded(
    recorded: Mapping[int, tuple[Tensor, Tensor]], pack: Pack, lengths: Sequence[int], rows: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of the rows numbered in `rows` of a pack, as the prefix of another: padded on the left."""
    count = torch.tensor(lengths, device=pack.device)
    longest = max(lengths[row] for row in rows)
    column = pack.starts.unsqueeze(1) + count.unsqueeze(1) - longest + torch.arange(longest, device=pack.device)
    where = column.maximum(pack.starts.unsqueeze(1))[rows]  # [rows, longest]; padding repeats the first token, masked
    return {
        block: (keys[:, where].transpose(0, 1), values[:, where].transpose(0, 1))
        for block, (keys, values) in recorded.items()
    }


def _joined(shards: Sequence[Shard]) -> Shard:
    """Several shards as one; a prompt that stands in two stays there twice."""
    before, prompts = [], 0
    for shard in shards:
        before.append(prompts)
        prompts += len(shard.prompt_tokens)
    return Shard(
        rows=[row for shard in shards for row in shard.rows],
        states=torch.cat([shard.states for shard in shards]),
        prompts=torch.cat([shard.prompts for shard in shards]),
        reference=torch.cat([shard.reference for shard in shards]),
        columns=[count for shard in shards for count in shard.columns],
        prompt_of=[start + index for start, shard in zip(before, shards, strict=True) for index in shard.prompt_of],
        prompt_tokens=[count for shard in shards for count in shard.prompt_tokens],
    )
