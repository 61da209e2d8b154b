"""What benchmarks share: a random Llama, TOFU's real text for it, counted operations, threads, tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as files, not installed

from grun.data import templates
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import Batch, EncodedRow
from grun.data.tokenizer import train_tokenizer
from grun.loading.resolve import resolve
from grun.training.unlearning import UnlearnRows, encode_unlearn_rows
from pyvene_custom import find_blocks

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

    from grun.config.options import UnlearnConfig

CONTEXT = 512
"""Longest row, tokens; no row of TOFU is as long."""


def set_threads(count: int) -> int:
    """Use `count` threads (0: torch's default, the physical cores) and return how many are used."""
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def unlearn_config(*arguments: str) -> UnlearnConfig:
    """The published settings on TOFU forget05, changed by `key=value` arguments; nothing is cached on disk."""
    config: UnlearnConfig = resolve("unlearn", ["profile=grun_tofu", "cache.dir=null", *arguments])
    return config


@dataclass
class Text:
    """TOFU forget05 and retain95, with a byte-level BPE tokenizer trained on both."""

    tokenizer: PreTrainedTokenizerFast
    template: templates.Template

    @property
    def pad_id(self) -> int:
        """Token id at padding."""
        return int(self.tokenizer.pad_token_id)

    def rows(self, config: UnlearnConfig) -> UnlearnRows:
        """Rows that `unlearn` would use, as token ids."""
        corpus = load_corpus(config.data)
        return encode_unlearn_rows(corpus, self.tokenizer, self.template, CONTEXT, config.data, seed=config.seed)


def load_text(vocabulary: int) -> Text:
    """Read TOFU (GRUN_TOFU_DIR, else the hub) and train the tokenizer; DataError where it is not there."""
    config = unlearn_config()
    corpus: Corpus = load_corpus(config.data)
    texts = [text for row in corpus.forget + corpus.retain for text in (row.prompt or "", row.completion)]
    tokenizer = train_tokenizer([*texts, *corpus.refusals], vocabulary)
    tokenizer.model_max_length = CONTEXT
    data = config.data
    return Text(tokenizer, templates.resolve(data.template, None, tokenizer, data.system_prompt, data.date))


def small_llama_config(vocabulary: int, blocks: int = 16) -> LlamaConfig:
    """Shape of the CPU benchmarks: hidden 512, intermediate 1408, 8 heads."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
    )


def random_llama(
    config: LlamaConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A Llama with random weights, made in its type on its device: nothing wider exists on the way."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


class MultiplyAdds:
    """Multiply-adds of the linear layers, head included; attention's own products are not counted.

    A backward pass is one more time the layers that it goes through: gradients of inputs, none of frozen weights.
    """

    def __init__(self, base: PreTrainedModel, first: int) -> None:
        """Of a model whose first edited block is `first`."""
        _, blocks = find_blocks(base)
        head: Any = base.get_output_embeddings()
        self.block = sum(part.weight.numel() for part in blocks[0].modules() if isinstance(part, nn.Linear))
        """Of one token in one block."""
        self.head = int(head.weight.numel())
        """Of one token in the head."""
        self._depth = len(blocks)
        self._first = first
        self._above = self._depth - 1 - first

    def plain(self, batches: Mapping[str, Batch], reference: Collection[str] = ()) -> int:
        """A step of the published procedure: whole padded rows, the head at every position, the reference anew."""
        total = 0
        for name, batch in batches.items():
            forward = self._depth * self.block + self.head
            backward = self._above * self.block + self.head
            passes = forward + backward + (forward if name in reference else 0)
            total += batch.input_ids.numel() * passes
        return total

    def cached(self, batches: Mapping[str, Batch]) -> int:
        """A step from the cache: the last prompt token and the answer in the blocks above, without padding."""
        answers = [len(row.answer_ids) for batch in batches.values() for row in batch.encoded]
        columns = sum(answers) if self._above else len(answers)
        return 2 * columns * (self._above * self.block + self.head)

    def build(self, rows: Collection[EncodedRow], reference: Collection[EncodedRow]) -> int:
        """Filling the cache with `rows`: prompts in all blocks, answers up to the first edited one."""
        distinct, referred = set(rows), set(reference)
        prompts = sum(len(prompt) for prompt in {row.prompt_ids for row in distinct})
        answers = sum(len(row.answer_ids) - 1 for row in distinct)
        scored = sum(len(row.answer_ids) for row in distinct if row in referred or not self._above)
        blocks = prompts * self._depth + answers * (self._first + 1) + scored * self._above
        return blocks * self.block + scored * self.head


def matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Multiply-adds a second of a square product of matrices on `device`: the median of several."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - started)
    return size**3 / sorted(times[2:])[5]


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def say(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A title and a plain-text table on stdout, as wide as it needs to be; all columns but the last to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "right"
    table.columns[-1].justify = "left"
    for row in rows:
        table.add_row(*row)
    print(f"\n{title}\n")
    Console(width=240, color_system=None, highlight=False, markup=False).print(table)


def write_rows(path: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` as a JSON list where a path is given."""
    if path is not None:
        Path(path).write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
