"""A made-up vLLM: passes over tokens of several sequences side by side, whose keys and values lie on pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from edited_models import Member
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from grun.method.stack.manifest import Manifest
from grun.method.validation import Adapter
from grun_vllm.adapters import InForce
from grun_vllm.edits import Edits
from grun_vllm.held import Held
from grun_vllm.step import Step

PAGE = 4
PAGES = 64


def in_force(
    members: dict[str, Member], *, store: bool = False, rule: str = "sum", threshold: float | None = None
) -> InForce:
    """What would be read of a folder with these adapters."""
    manifest = Manifest(2, "", None, rule, threshold, (), (), "digest") if store else None
    adapters = {name: Adapter(config, None, weights) for name, (config, weights) in members.items()}
    return InForce(Path("folder"), adapters, manifest)


@dataclass
class Sequence_:
    """Tokens of one request, and how far it has come."""

    ids: list[int]
    prompt: int
    pages: list[int] = field(default_factory=list)
    past: int = 0
    cache: DynamicCache = field(default_factory=DynamicCache)
    source: DynamicCache | None = None
    """Keys and values that its first pass begins with."""


class PagedEngine:
    """Runs a tiny Llama with edits as vLLM would: what to run of which sequence is the caller's to say."""

    def __init__(self, base: LlamaForCausalLM, found: InForce) -> None:
        self.base = base
        self.held = Held(Edits(found, torch.device("cpu")), "", (0, 0, 0))
        self.held.open(PAGES, PAGE)
        self.sequences: dict[str, Sequence_] = {}
        self._free = list(range(1, PAGES))
        np.random.default_rng(0).shuffle(self._free)

    def add(self, name: str, prompt: Sequence[int], *, shares: tuple[str, int] | None = None) -> None:
        """A new request; of `shares`, another one, the first pages are taken, perhaps in the pass that fills them."""
        new = Sequence_(list(prompt), len(prompt))
        if shares is not None:
            other, pages = self.sequences[shares[0]], shares[1]
            assert other.ids[: pages * PAGE] == new.ids[: pages * PAGE]
            while len(other.pages) < pages:
                other.pages.append(self._free.pop())
            new.pages, new.past, new.source = other.pages[:pages], pages * PAGE, other.cache
        self.sequences[name] = new

    def preempt(self, name: str) -> None:
        """Take a request's pages away; what it has generated stays."""
        one = self.sequences[name]
        self._free += one.pages
        one.pages, one.past, one.cache = [], 0, DynamicCache()

    @torch.no_grad()
    def run(self, **counts: int) -> dict[str, Tensor]:
        """One pass over so many tokens of each sequence named, in that order: of each its last token's logits.

        Of a sequence of which all tokens were run, the most likely token is added to it.
        """
        chosen = [self.sequences[name] for name in counts]
        for one, count in zip(chosen, counts.values(), strict=True):
            while len(one.pages) * PAGE < one.past + count:
                one.pages.append(self._free.pop())
        ids = [one.ids[one.past : one.past + count] for one, count in zip(chosen, counts.values(), strict=True)]
        assert [len(part) for part in ids] == list(counts.values()), "more tokens than there are"
        step = Step.of(runner(chosen, list(counts.values())), torch.tensor(sum(ids, []) + [0, 0]))  # padding behind
        with self.held.edits.passing(step):
            states = self._blocks(chosen, ids)
        logits = self.base.lm_head(self.base.model.norm(torch.stack([part[0, -1] for part in states])))
        logits = self.held.edits.acted(logits)
        for one, count, row in zip(chosen, counts.values(), logits, strict=True):
            one.past, one.source = one.past + count, None
            if one.past == len(one.ids):
                one.ids.append(int(row.argmax()))
        return dict(zip(counts, logits, strict=True))

    def _blocks(self, chosen: list[Sequence_], ids: list[list[int]]) -> list[Tensor]:
        model = self.base.model
        states = [model.embed_tokens(torch.tensor([part])) for part in ids]
        for number, block in enumerate(model.layers):
            for place, (one, hidden) in enumerate(zip(chosen, states, strict=True)):
                count = hidden.shape[1]
                if one.source is not None:
                    earlier = one.source.layers[number]
                    one.cache.update(earlier.keys[:, :, : one.past], earlier.values[:, :, : one.past], number)
                positions = torch.arange(one.past, one.past + count).unsqueeze(0)
                seen = torch.arange(one.past + count) <= positions[0].unsqueeze(1)
                states[place] = block(
                    hidden,
                    attention_mask=torch.where(seen, 0.0, -torch.inf)[None, None],
                    position_ids=positions,
                    past_key_values=one.cache,
                    position_embeddings=model.rotary_emb(hidden, positions),
                )
            flat = torch.cat([part[0] for part in states])
            whole = torch.cat([flat, torch.full((2, flat.shape[1]), torch.nan)])  # and padding
            hidden, residual = whole / 4, whole * 0.75
            self.held.apply(hidden, residual, number)
            states = [part.unsqueeze(0) for part in (hidden + residual)[: len(flat)].split([len(part) for part in ids])]
        return states


def runner(chosen: list[Sequence_], counts: list[int]) -> SimpleNamespace:
    """What `Step.of` reads of vLLM's model runner; buffers are longer than what they hold."""
    table = np.zeros((len(chosen) + 2, PAGES), dtype=np.int32)
    for row, one in zip(table, chosen, strict=False):
        row[: len(one.pages)] = one.pages
    batch = SimpleNamespace(
        num_reqs=len(chosen),
        num_computed_tokens_cpu=np.array([*(one.past for one in chosen), 9, 9], dtype=np.int32),
        num_prompt_tokens=np.array([*(one.prompt for one in chosen), 9, 9], dtype=np.int32),
        block_table=[SimpleNamespace(block_table=SimpleNamespace(np=table), block_size=PAGE)],
    )
    starts = np.array([0, *np.cumsum(counts), 0, 0], dtype=np.int32)
    return SimpleNamespace(input_batch=batch, query_start_loc=SimpleNamespace(np=starts), device=torch.device("cpu"))
