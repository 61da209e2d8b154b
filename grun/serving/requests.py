"""The requests to forget that are in force, as the owner sees and changes them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from grun.config.options import RequestsConfig
from grun.errors import AdapterError, ConfigError, DataError, GrunError, RunError
from grun.method.adapter import AdapterConfig
from grun.requests.adding import add, opened, remove
from grun.requests.rates import adapter_config
from grun.requests.store import RequestStore
from grun.runtime.reading import in_one_line
from grun.serving.refusal import Refused

if TYPE_CHECKING:
    from grun.serving.edition import Served


class Requests:
    """Those of the store, or the one of an adapter. Methods that read or write files take a while."""

    def __init__(self, served: Served, key: str | None) -> None:
        """`key`: file of the key that signs a store's head."""
        self._served = served
        self._key = key
        self._writing = threading.Lock()

    def listed(self) -> dict[str, Any]:
        """All of them; of a store with the head of its history."""
        served = self._served
        found = {"model": served.model_name, "adapter": str(served.folder)}
        if not served.is_store:
            entries = [_entry(name, True, None, one) for name, one in served.edition.configs.items()]
            return {**found, "kind": "adapter", "requests": entries}
        store = RequestStore.open(served.folder)
        entries = []
        for request in store.manifest.requests:
            config = adapter_config(store, request.id)
            entries.append(_entry(request.id, request.state == "active", request.time, config))
        return {**found, "kind": "store", "head": store.manifest.head, "requests": entries}

    def add(self, name: str, adapter: str) -> dict[str, Any]:
        """Put an adapter into the store and in force; what `listed` says of it.

        Refused: 409 for a single adapter, a name that is taken, or a store that another process writes; 400 for an
        adapter that does not fit.
        """
        options = self._options(name, adapter=adapter)
        with self._writing:
            if name in RequestStore.open(self._served.folder).manifest.ids():
                raise Refused(409, f"request {name!r} is there already; choose another name", "name", "name_taken")
            try:
                add(options, [])
            except (ConfigError, AdapterError, DataError) as error:
                raise Refused(400, in_one_line(error), "adapter") from error
            except RunError as error:
                raise Refused(409, in_one_line(error)) from error
        self._served.reload()
        return next(entry for entry in self.listed()["requests"] if entry["name"] == name)

    def remove(self, name: str) -> dict[str, Any]:
        """Withdraw a request; names of those that were trained with it in force.

        Refused: 409 for a single adapter or a store that another process writes, 404 for a name that is not there.
        """
        options = self._options(name)
        with self._writing:
            if name not in RequestStore.open(self._served.folder).manifest.ids():
                raise Refused(404, f"there is no request {name!r}", "name", "unknown_request")
            try:
                dependents = remove(opened(options), name, retrain=False)
            except GrunError as error:
                raise Refused(409, in_one_line(error)) from error
        self._served.reload()
        return {"name": name, "withdrawn": True, "trained_beside": dependents}

    def _options(self, name: str, adapter: str | None = None) -> RequestsConfig:
        if not self._served.is_store:
            raise Refused(409, "one adapter is served; requests are added to and withdrawn from a store alone")
        return RequestsConfig(store=str(self._served.folder), id=name, adapter=adapter, key=self._key)


def _entry(name: str, active: bool, added: str | None, config: AdapterConfig | None) -> dict[str, Any]:
    figures = {"recall": getattr(config, "gate_recall", None), "false_positives": getattr(config, "gate_bound", None)}
    return {"name": name, "active": active, "added": added, **figures}
