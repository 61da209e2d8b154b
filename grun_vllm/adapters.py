"""What a server is to have in force: one adapter, or the active requests of a store; read, checked, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grun.errors import AdapterError
from grun.method.actions import EDIT
from grun.method.adapter import STACK, find_adapter, peft_type
from grun.method.stack.folder import StoredRequests
from grun.method.stack.group import grouped
from grun.method.stack.manifest import Manifest
from grun.method.validation import Adapter, validate

Shape = tuple[int, int, int]
"""Hidden size, number of decoder blocks and of token ids of a base."""


@dataclass(frozen=True)
class InForce:
    """Adapters in force."""

    folder: Path
    adapters: dict[str, Adapter]
    """By request; one adapter goes by its folder's name."""
    store: Manifest | None = None
    """Manifest of the store that they are of; None: there is one adapter alone."""

    @property
    def kind(self) -> str:
        """adapter or store."""
        return "adapter" if self.store is None else "store"

    @property
    def rule(self) -> str:
        """How edits are combined."""
        return "sum" if self.store is None else self.store.rule

    @property
    def threshold(self) -> float | None:
        """Probability below which a gate of any request counts as shut."""
        return None if self.store is None else self.store.gate_threshold

    @property
    def digest(self) -> str:
        """Tells apart what a store held at different times."""
        return "" if self.store is None else self.store.digest

    @property
    def depends_on_end(self) -> bool:
        """Whether states of a text depend on where in it the prompt ends; of a store, which changes, they may."""
        configs = [one.config for one in self.adapters.values()]
        every = all((one.gate_read, one.edit_write) == ("every_token", "every_token") for one in configs)
        return self.store is not None or not every

    def told(self) -> list[dict[str, Any]]:
        """What the owner is told of each request, those of a store that are not in force included."""
        requests: list[tuple[str, bool, str | None]] = [(name, True, None) for name in self.adapters]
        if self.store is not None:
            requests = [(one.id, one.state == "active", one.time) for one in self.store.requests]
        return [
            {
                "name": name,
                "active": active,
                "added": added,
                "recall": self.adapters[name].config.gate_recall if active else None,
                "false_positives": self.adapters[name].config.gate_bound if active else None,
            }
            for name, active, added in requests
        ]


def read_in_force(adapter: str, shape: Shape) -> InForce:
    """What is in force now in the folder, or under the hub id, `adapter`, for a base of that shape.

    Raises:
        AdapterError: something is missing, damaged, made for another model, or of a design that is not served.
        RunError: the store's manifest cannot be read.
    """
    folder = find_adapter(adapter)
    kind = peft_type(folder)
    if kind == STACK:
        stored = StoredRequests(folder, Manifest.read(folder))
        adapters = stored.in_force(shape)
        found = InForce(folder, adapters, stored.manifest)
    elif kind == "GRUN":
        found = InForce(folder, {folder.resolve().name: validate(folder, shape)})
    else:
        raise AdapterError(f"{folder} is an adapter of {kind}, which vLLM loads itself (--enable-lora); give GRUN's")
    if found.store is not None or all(one.config.action == EDIT for one in found.adapters.values()):
        grouped({name: (one.config, one.weights) for name, one in found.adapters.items()}, {})
    return found
