"""Rows as token ids, and batches of them as tensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grun.data.rows import Row
from grun.data.templates import TEMPLATES, Template, encode
from grun.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that no loss counts."""
PLAIN = TEMPLATES.get("text")
"""Template of plain texts."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row."""

    prompt_ids: tuple[int, ...]
    """Start tokens and prompt."""
    answer_ids: tuple[int, ...]
    """Answer and end token (cut where the row is longer than the limit)."""

    def __len__(self) -> int:
        """Tokens of the whole row."""
        return len(self.prompt_ids) + len(self.answer_ids)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int | None,
    strict: bool,
) -> list[EncodedRow]:
    """Encode rows as generation will see them, and log one line if some are special.

    Of a row longer than `max_length` tokens (None: no limit) the answer is cut, end token included. `strict` makes it
    an error if tokenizing prompt and answer together gives other ids. A plain text that no start token begins has its
    first token as its prompt.

    Raises:
        DataError: a prompt leaves no room for an answer, or `strict` and a row's joint ids differ.
    """
    encoded, differing, cut = [], [], 0
    for number, row in enumerate(rows, start=1):
        prompt_ids, answer_ids, joint_differs = encode(template, tokenizer, row.prompt, row.completion, row.earlier)
        if row.prompt is None and not prompt_ids and len(answer_ids) > 1:  # of a tokenizer without a start token
            prompt_ids, answer_ids = answer_ids[:1], answer_ids[1:]
        if joint_differs:
            differing.append(number)
        if max_length is not None:
            room = max_length - len(prompt_ids)
            if room < 1:
                raise DataError(
                    f"row {number} of {len(rows)}: its prompt has {len(prompt_ids)} tokens, which leaves no room for "
                    f"an answer within {max_length}; shorten it or raise data.max_length up to the model's context"
                )
            cut += len(answer_ids) > room
            answer_ids = answer_ids[:room]
        encoded.append(EncodedRow(tuple(prompt_ids), tuple(answer_ids)))
    if differing:
        message = (
            f"{len(differing)} of {len(rows)} rows have other tokens when prompt and answer are tokenized together "
            f"(the first is row {differing[0]})"
        )
        if strict:
            raise DataError(f"{message}; use a template whose prompt ends at a token's end, or unset data.strict")
        logger.warning(message)
    if cut:
        logger.warning(f"{cut} of {len(rows)} answers were cut to make rows of {max_length} tokens")
    return encoded


def encode_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    cuts: Sequence[float] | None = None,
) -> list[EncodedRow]:
    """Encode plain texts, without an end token: the start of each as its prompt, the rest as its answer.

    Args:
        texts: what is tokenized, the tokenizer's start token in front.
        tokenizer: of the model.
        max_length: longest row, tokens, start token included; None: no limit.
        cuts: for each text the share of its tokens that is its prompt, in (0, 1), rounded down; None: what starts every
            text, or else the first token. Prompt and answer have at least one token each.

    Raises:
        DataError: a text has fewer than two tokens, start token included.
    """
    rows = []
    for number, text in enumerate(texts):
        prompt_ids, answer_ids, _ = encode(PLAIN, tokenizer, None, text)
        ids = [*prompt_ids, *answer_ids[:-1]][:max_length]
        if len(ids) < 2:
            raise DataError(f"text {number + 1} of {len(texts)} has {len(ids)} tokens; at least 2 are needed")
        length = max(1, len(prompt_ids)) if cuts is None else min(max(1, int(cuts[number] * len(ids))), len(ids) - 1)
        rows.append(EncodedRow(tuple(ids[:length]), tuple(ids[length:])))
    return rows


TENSORS = ("input_ids", "attention_mask", "labels", "prompt_lengths")


@dataclass
class Batch:
    """Rows of one forward pass, padded to one length."""

    input_ids: Tensor
    """Token ids, int64 [batch, length]."""
    attention_mask: Tensor
    """1 at tokens, 0 at padding, int64 [batch, length]."""
    labels: Tensor
    """Token ids of the answer, -100 elsewhere, int64 [batch, length]."""
    prompt_lengths: Tensor
    """Attended tokens of each prompt, int64 [batch]."""
    encoded: tuple[EncodedRow, ...] = ()
    """The rows themselves."""
    seeds: tuple[int, ...] | None = None
    """For each row the number that its random draws are made from; None: torch's generator."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Number of tokens that are attended."""
        return int(self.attention_mask.sum())


class RowsAlone(Batch):
    """Rows that become tensors, as by `collate`, once one of these is asked for.

    An engine that keeps rows itself asks for none: nothing is padded or copied then.
    """

    def __init__(
        self, rows: Sequence[EncodedRow], pad_id: int, seeds: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """Arguments as for `collate`; `device`: of the tensors."""
        self.encoded, self.seeds = tuple(rows), tuple(seeds)
        self._pad_id, self._device = pad_id, device

    def __getattr__(self, name: str) -> Tensor:
        if name not in TENSORS:
            raise AttributeError(name)
        made = collate(self.encoded, self._pad_id).to(self._device)
        self.__dict__.update(vars(made), encoded=self.encoded, seeds=self.seeds)
        found: Tensor = self.__dict__[name]
        return found

    def to(self, device: torch.device | str) -> Batch:
        """The rows; tensors will be made for `device`."""
        return RowsAlone(self.encoded, self._pad_id, self.seeds or (), device)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.encoded)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.encoded))


def collate(rows: Sequence[EncodedRow], pad_id: int, side: str = "right", seeds: Sequence[int] | None = None) -> Batch:
    """Pad rows, at least one, on the right or left `side` with `pad_id`, which is never attended; seeds as in Batch."""
    if side not in ("right", "left"):
        raise ValueError(f"side must be right or left, not {side!r}")
    if not rows:
        raise ValueError("a batch needs at least one row")
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else length - len(row)
        end = start + len(row)
        input_ids[index, start:end] = torch.tensor(row.prompt_ids + row.answer_ids, dtype=torch.long)
        attention_mask[index, start:end] = 1
        labels[index, start + len(row.prompt_ids) : end] = torch.tensor(row.answer_ids, dtype=torch.long)
    prompt_lengths = torch.tensor([len(row.prompt_ids) for row in rows], dtype=torch.long)
    return Batch(
        input_ids, attention_mask, labels, prompt_lengths, tuple(rows), None if seeds is None else tuple(seeds)
    )


def collate_prompts(rows: Sequence[EncodedRow | Sequence[int]], pad_id: int) -> Batch:
    """Pad prompts alone, of encoded rows or as ids, on the left, for generation; all labels are -100."""
    prompts = [row.prompt_ids if isinstance(row, EncodedRow) else tuple(row) for row in rows]
    return collate([EncodedRow(prompt, ()) for prompt in prompts], pad_id, side="left")
