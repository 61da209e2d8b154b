"""Which row comes when: pure functions of seed, epoch and index, so that a resumed run goes on with the same rows."""

from __future__ import annotations

import functools
import random


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Order in which `count` rows are visited in an epoch: a permutation of 0 ... count - 1."""
    return list(_permutation("order", count, seed, epoch, 0))


def retain_index(seed: int, epoch: int, index: int, pool: int) -> int:
    """Retain row of a pool of `pool` rows that is drawn for the forget row `index` in an epoch; all count from 0.

    Each epoch has draws of its own, without replacement: no row comes twice before every row of the pool came once.
    """
    pass_, position = divmod(index, pool)
    return _permutation("retain", pool, seed, epoch, pass_)[position]


def fixed_retain_index(index: int, pool: int) -> int:
    """Retain row that upstream pairs with the forget row `index`, the same in every epoch.

    (index + u) mod pool with u = torch.randint(0, pool) seeded by `index` (GRUN `pyreft/dataset.py:570`), without
    touching torch's global generator. 200 forget rows meet only 195 of 3,800 retain rows, in any number of epochs.
    """
    import torch

    generator = torch.Generator().manual_seed(index)
    return (index + int(torch.randint(0, pool, (1,), generator=generator).item())) % pool


@functools.lru_cache(maxsize=8)
def _permutation(purpose: str, count: int, *key: int) -> tuple[int, ...]:
    """A permutation that depends on nothing but the arguments (a text seed is hashed by SHA-512)."""
    order = list(range(count))
    random.Random(":".join(map(str, (purpose, count, *key)))).shuffle(order)
    return tuple(order)
