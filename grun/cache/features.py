"""What a pooled gate reads of prompts, kept: neither an objective nor an edit nor the gate's own weights change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from grun.cache.folder import Use
from grun.cache.shard import SHARD_BYTES, Shard
from grun.cache.store import fill, store_of
from grun.config.options import UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.method.model import GrunModel
from grun.training.gate_fit import passes_with, prompt_features

CODE = (
    *("features.py", "shard.py", "../training/gate_fit.py"),
    *("../method/pooling.py", "../method/pooled_sites.py", "../method/position.py"),
)
"""Sources that decide what is in the cache."""


def kept_features(
    model: GrunModel, config: UnlearnConfig, use: Use | None = None
) -> Callable[[Sequence[EncodedRow]], Tensor]:
    """`prompt_features` of `model`, taken from `cache.dir` where they are there, and put there otherwise.

    They are the same to the bit for the same prompts. A prompt that was read before, beside others, has the values of
    then, which differ by rounding from what it would have beside these. A pooled gate reads the bare base
    (`GrunModel` takes it with no other request's edits in force), so the base's weights decide them.
    """
    pooled = model.pooled
    assert pooled is not None
    reset_ids = list(model.config.reset_ids)
    store = store_of(
        model.base, config, CODE, use, gate_blocks=list(pooled.blocks), gate_pool=pooled.pool, reset_ids=reset_ids
    )

    def features(rows: Sequence[EncodedRow]) -> Tensor:
        prompts = [EncodedRow(row.prompt_ids, ()) for row in rows]
        fill(store, "gate features", prompts, lambda missing: _shards(model, list(dict.fromkeys(prompts)), missing))
        return torch.cat([store[prompt].states for prompt in prompts]).double()

    return features


def _shards(model: GrunModel, prompts: Sequence[EncodedRow], missing: Sequence[EncodedRow]) -> Iterator[Shard]:
    """Features of the passes over `prompts` that hold a missing one; the rounding of each is that of all."""
    wanted = passes_with(prompts, set(missing), model.device)
    computed_in = torch.promote_types(model.base.dtype, torch.float32)  # what is stored is what was computed
    found = prompt_features(model, wanted, pad_id=0).to("cpu", computed_in)
    size = max(1, SHARD_BYTES // (found.shape[1] * found.element_size()))
    for start in range(0, len(wanted), size):
        rows, states = wanted[start : start + size], found[start : start + size]
        yield Shard.without_prompts(rows, states, states.new_zeros(0), [1] * len(rows))
