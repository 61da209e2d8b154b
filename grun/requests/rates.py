"""What a store promises of all of its requests together: how many rows that must stay open a gate."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from grun.config.options import UnlearnConfig, is_users
from grun.config.values import from_dict, to_dict
from grun.errors import AdapterError, ConfigError
from grun.method.adapter import AdapterConfig
from grun.method.logistic import groups_needed
from grun.requests.store import RequestStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promise:
    """Bounds of the requests in force."""

    bounds: Mapping[str, float]
    """By id, of those that were calibrated."""
    without: tuple[str, ...]
    """Ids of the others."""
    rate: float | None
    """Of the store; None: it was made without one."""
    capacity: int | None
    """Requests that it is promised for."""

    @property
    def total(self) -> float:
        """Largest share of rows that opens some gate of those calibrated: bounds add up, whatever gates share."""
        return min(1.0, math.fsum(self.bounds.values()))

    def __str__(self) -> str:
        wanted = "" if self.rate is None else f"; the store's rate is {self.rate:g} for {self.capacity} requests"
        text = f"at most {self.total:.3g} of rows such as those calibrated on open a gate, in expectation{wanted}"
        if self.without:
            text += f"; nothing is promised of {', '.join(self.without)}"
        return text


def share(rate: float, capacity: int) -> float:
    """Rate of false positives of one request: rate / capacity.

    A row that must stay opens some gate of a store no more often than all gates taken together, so the rates of
    requests add up, whatever their gates have in common (union bound). Each request has the same share, and how many
    there may be is said when the store is made. A series such as rate / (k (k + 1)) for the k-th request would hold
    for any number of them, but n groups of rows set aside promise no less than 1 / (n + 1), so that what decides is the
    smallest share: for a rate of 0.01 and 20 requests each needs 1,999 groups, where the series needs 199 for the
    first and 41,999 for the twentieth. A request whose rows are too few has 1 / (n + 1), and a line says so.
    """
    return rate / capacity


def adapter_config(store: RequestStore, request_id: str) -> AdapterConfig | None:
    """What the adapter of a request is; None where it cannot be read, which `requests verify` says."""
    with contextlib.suppress(AdapterError):
        return AdapterConfig.read(store.adapter_folder(request_id))[0]
    return None


def promise(store: RequestStore) -> Promise:
    """What the requests in force promise together; an adapter that cannot be read promises nothing."""
    bounds, without = {}, []
    for request_id in store.manifest.ids(active=True):
        config = adapter_config(store, request_id)
        if config is None or config.gate_bound is None:
            without.append(request_id)
        else:
            bounds[request_id] = config.gate_bound
    return Promise(bounds, tuple(without), store.manifest.false_positives, store.manifest.capacity)


def with_share(config: UnlearnConfig, rate: float | None, capacity: int | None) -> UnlearnConfig:
    """The options of a training whose request goes into a store of that rate: its share, or less if the user wants.

    ConfigError where the gate cannot keep a rate, or is to have more than its share.
    """
    if rate is None or capacity is None:
        return config
    method, own = config.method, share(rate, capacity)
    if method.gate_fit != "logistic":
        raise ConfigError(
            f"the store promises a rate of false positives ({rate:g} for {capacity} requests), which a gate that is "
            "fitted can keep: set method.gate_fit=logistic (design=pooled has it), or keep another store"
        )
    if method.false_positives is not None and is_users(config, "method.false_positives"):
        if method.false_positives > own + 1e-12:
            raise ConfigError(
                f"method.false_positives={method.false_positives:g} is more than a request's share of the store's "
                f"rate, {own:g} ({rate:g} / {capacity}); leave it out, or set less"
            )
        return config
    changed: UnlearnConfig = from_dict("unlearn", to_dict(config), [f"method.false_positives={own!r}"])
    return replace(changed, sources=config.sources)


def report(store: RequestStore, request_id: str) -> None:
    """Log what a request that was just put in promises, and whether it is what the store wants."""
    found = promise(store)
    if found.rate is None or found.capacity is None:
        if request_id in found.bounds:
            log.info("requests in force: %s", found)
        return
    own = share(found.rate, found.capacity)
    bound = found.bounds.get(request_id)
    if bound is None:
        log.warning("request %s promises nothing of false positives, so the store as a whole does not", request_id)
    elif bound > own + 1e-12:
        groups = AdapterConfig.read(store.adapter_folder(request_id))[0].gate_calibration
        log.warning(
            "request %s promises %.3g and not its share of the store's rate, %.3g: it was calibrated on %s rows, or "
            "groups of them, and %d are needed", request_id, bound, own, groups, groups_needed(own),
        )  # fmt: skip
    if (count := len(found.bounds) + len(found.without)) > found.capacity:
        log.warning("%d requests are in force, and the store's rate was for %d", count, found.capacity)
    log.info("requests in force: %s", found)
