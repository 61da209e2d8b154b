"""Rows on their way through the blocks, a stretch of blocks at a time, so that many can wait for the same weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from grun.cache.attention import KeysValues, Pack
from grun.cache.packed import PackedModel


class Passage:
    """Distinct prompts, and answers that go on from them, in the blocks; without gradients."""

    def __init__(
        self,
        packed: PackedModel,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        """`prompts` are token ids; each of `answers` has the number of its prompt and at least one id."""
        self._packed = packed
        self.recorded: dict[int, KeysValues] = {}
        """Keys and values of the prompts by block, of the blocks run last, each [heads, tokens, head size]."""
        self.pack = Pack([len(ids) for ids in prompts], [0] * len(prompts), {}, packed.device, record=self.recorded)
        self.prompts = self._ids(prompts)
        """Output of the block run last, of the prompts one after another, [tokens, width]; ids before the first."""
        self.lengths = [len(ids) for _, ids in answers]
        self.answers = self._ids(ids for _, ids in answers)
        """The same of the answers."""
        self._prompt_of = [prompt for prompt, _ in answers]
        self._prefix: dict[int, KeysValues] = {}
        before = [len(prompts[prompt]) for prompt in self._prompt_of]
        self._after = Pack(self.lengths, before, self._prefix, packed.device) if answers else None

    def run_prompts(self, blocks: range, capture: Collection[int] = ()) -> dict[int, Tensor]:
        """Run the prompts through `blocks`, the next ones; outputs of those in `capture`, [tokens, width]."""
        self.recorded.clear()
        first, last = blocks[0], blocks[-1]
        _, found = self._packed.run(self.pack, self.prompts, first=first, last=last, capture={*capture, last})
        self.prompts = found[last]
        return found

    def run_answers(self, blocks: range) -> None:
        """Run the answers through the blocks that the prompts have just been run through."""
        if self._after is None:
            return
        self._prefix.clear()
        self._prefix.update(_left_padded(self.recorded, self.pack, self._prompt_of))
        first, last = blocks[0], blocks[-1]
        _, found = self._packed.run(self._after, self.answers, first=first, last=last, capture=[last])
        self.answers = found[last]
        self._prefix.clear()

    def _ids(self, parts: Iterable[Sequence[int]]) -> Tensor:
        return torch.tensor([token for part in parts for token in part], dtype=torch.long, device=self._packed.device)


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
