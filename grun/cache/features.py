"""What a pooled gate reads of prompts, kept: neither an objective nor an edit nor the gate's own weights change it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grun.cache.folder import Use
from grun.cache.packed import PackedModel
from grun.cache.passage import Passage
from grun.cache.prefix import by_tokens
from grun.cache.shard import SHARD_BYTES, Shard
from grun.cache.store import PrefixStore, Share, fill, store_of
from grun.cache.suffix import sites_of_prompts
from grun.config.checks import bytes_of
from grun.config.options import UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.method.model import GrunModel
from grun.method.rules import WINDOWS
from grun.runtime.devices import lies_elsewhere
from grun.runtime.files import content_hash
from grun.training.gate_fit import FeaturesOf, Keep, passes_with, prompt_features, unpadded
from pyvene_custom import find_blocks

CODE = (
    *("features.py", "shard.py", "../training/gate_fit.py"),
    *("../method/pooling.py", "../method/pooled_sites.py", "../method/position.py"),
)
"""Sources that decide what is in the cache."""
FIT_CODE = (*CODE, "../method/logistic.py", "../method/means.py")
"""The same of gates that were fitted to it."""


def kept_features(model: GrunModel, config: UnlearnConfig, use: Use | None = None) -> FeaturesOf:
    """`prompt_features` of `model`, taken from `cache.dir` where they are there, and put there otherwise.

    They are the same to the bit for the same prompts. A prompt that was read before, beside others, has the values of
    then, which differ by rounding from what it would have beside these. A pooled gate reads the bare base
    (`GrunModel` takes it with no other request's edits in force), so the base's weights decide them.
    """
    assert model.pooled is not None
    budget, of_windows = bytes_of("cache.memory_budget", config.cache.memory_budget), model.pooled.pool == WINDOWS
    store = _store(model, config, CODE, use)

    def features(rows: Sequence[EncodedRow]) -> list[Tensor]:
        prompts = [EncodedRow(row.prompt_ids, ()) for row in rows]
        distinct = list(dict.fromkeys(prompts))
        fill(store, "gate features", prompts, lambda missing, share: _shards(model, distinct, missing, share, budget))
        return [found if of_windows else found[0] for found in (store[prompt].states for prompt in prompts)]

    return features


def kept_fits(model: GrunModel, config: UnlearnConfig, use: Use | None = None) -> Keep:
    """Keeps the gate that was fitted to features of the same prompts, beside them; `use` is noted as theirs is."""
    store = _store(model, config, FIT_CODE, use, fitted=True)

    def keep(told: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = EncodedRow(tuple(bytes.fromhex(content_hash(told))), ())

        def build(missing: Sequence[EncodedRow], share: Share) -> Iterator[Shard]:
            for row in share(missing):
                text = torch.tensor(list(json.dumps(make()).encode()), dtype=torch.uint8)
                yield Shard.without_prompts([row], text, text.new_zeros(0), [len(text)])

        store.complete([key], build)
        record: dict[str, Any] = json.loads(bytes(store[key].states.tolist()))
        return record

    return keep


def _store(model: GrunModel, config: UnlearnConfig, code: Sequence[str], use: Use | None, **more: Any) -> PrefixStore:
    """Of what the gate of `model` reads: values that follow from that and from `code`."""
    pooled = model.pooled
    assert pooled is not None
    more |= {"gate_blocks": list(pooled.blocks), "gate_pool": pooled.pool, "reset_ids": list(model.config.reset_ids)}
    if model.rule.keywords:
        more["keyword_ids"] = model.config.keyword_ids
    return store_of(model.base, config, code, use, **more)


def _shards(
    model: GrunModel, prompts: Sequence[EncodedRow], missing: Sequence[EncodedRow], share: Share, budget: int
) -> Iterator[Shard]:
    """Features of the missing ones of `prompts`, whole passes to a shard: who goes on after a kill finds the same."""
    passes = share(passes_with(prompts, set(missing), model.device))
    if not passes:
        return
    streams = any(lies_elsewhere(block) for block in find_blocks(model.base)[1])
    computed_in = torch.promote_types(model.base.dtype, torch.float32)  # what is stored is what was computed
    each = (values for piece in passes for values in prompt_features(model, piece, pad_id=0))
    read = _streamed(model, passes, budget) if streams else each
    found = [one.to("cpu", computed_in).view(-1, one.shape[-1]) for one in read]
    start = 0
    for pieces in by_tokens(passes, len, SHARD_BYTES // max(one.numel() * one.element_size() for one in found)):
        rows = [row for piece in pieces for row in piece]
        states = found[start : start + len(rows)]
        yield Shard.without_prompts(rows, torch.cat(states), states[0].new_zeros(0), [len(one) for one in states])
        start += len(rows)


@torch.no_grad()
def _streamed(model: GrunModel, passes: Sequence[Sequence[EncodedRow]], budget: int) -> list[Tensor]:
    """`prompt_features` of a model whose blocks lie in files, each read once for as many passes as `budget` allows."""
    packed, pooled = PackedModel(model.base), model.pooled
    assert pooled is not None
    each = packed.bytes_of_token(0)
    found: list[Tensor] = []
    for wave in by_tokens(passes, lambda piece: each * sum(map(len, piece)), budget):
        passages = [Passage(packed, [row.prompt_ids for row in piece]) for piece in wave]
        places = [sites_of_prompts(model.rule, [row.prompt_ids for row in piece], packed.device) for piece in wave]
        for blocks in packed.stretches(max(pooled.blocks), ends=pooled.blocks):
            with packed.loaded(blocks):
                for passage, (layout, sites) in zip(passages, places, strict=True):
                    passage.run_prompts(blocks)
                    if blocks[-1] in pooled.blocks:
                        sites.take(blocks[-1], layout.padded(passage.prompts), pooled.pool)
        for _, sites in places:
            found += map(unpadded, sites.joined(pooled.blocks, pooled.pool)[:, 0])
    return found
