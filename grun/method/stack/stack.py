"""GrunStack: any number of unlearning requests on one base model, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grun.data.templates import Template
from grun.errors import ConfigError, unknown_name
from grun.method.adapter import AdapterConfig, find_adapter
from grun.method.fingerprint import fingerprint
from grun.method.host import EditedModel, blocks_to_edit, edit_dtype, hidden_size_of, is_quantized
from grun.method.position import Call, PositionRule, attended
from grun.method.stack.combination import RULES
from grun.method.stack.folder import StoredRequests
from grun.method.stack.group import Kind, grouped
from grun.method.stack.manifest import Manifest
from grun.method.stack.pooled import StackedGates
from grun.method.stack.stacked import StackedIntervention, StackSites
from grun.method.validation import Adapter, shape_of, validate
from grun.runtime.devices import device_of
from pyvene_custom import Sites


class GrunStack(EditedModel):
    """The adapters of several unlearning requests on a frozen base model; see `EditedModel` for what that means.

    All of them read the same hidden states, so their order changes nothing beyond rounding. Nothing here is trained.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        template: Template | None = None,
        *,
        rule: str = "sum",
        gate_threshold: float | None = None,
    ) -> None:
        """A stack of no request on `base`.

        Args:
            base: any transformers causal language model with a stack of decoder blocks.
            template: prompt template; None: that of the first request that has one.
            rule: how edits are put together, a name in `grun.method.stack.combination.RULES`.
            gate_threshold: probability below which a gate counts as shut; None: every gate counts as it is.

        Raises:
            ConfigError: the rule is unknown, the threshold no probability, or the base wrapped already.
        """
        blocks_to_edit(base)
        if rule not in RULES:
            raise ConfigError(unknown_name("rule", rule, list(RULES)))
        super().__init__(base, {}, PositionRule(), template)
        self._rule_name = rule
        self.gate_threshold = gate_threshold
        self.configs: dict[str, AdapterConfig] = {}
        """What each request's adapter is, by name, in the order of adding."""

    @classmethod
    def from_folder(cls, base: PreTrainedModel, folder: str | Path, *, strict: bool = False) -> GrunStack:
        """The active requests of a store (`grun.requests`) on `base`, in evaluation mode.

        Args:
            base: the model that the requests were trained on.
            folder: of the store.
            strict: refuse a base whose weights differ from those of training; otherwise a warning.

        Raises:
            RunError: the store's manifest cannot be read.
            AdapterError: the manifest or an adapter was changed, is missing or damaged, or made for another model.
        """
        folder = Path(folder).expanduser()
        store = StoredRequests(folder, Manifest.read(folder))
        adapters = store.in_force(shape_of(base))
        stack = cls(base, rule=store.manifest.rule, gate_threshold=store.manifest.gate_threshold)
        try:
            stack._add_read(adapters, strict=strict)
        except BaseException:
            stack.unwrap()
            raise
        return stack.eval()

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the requests, in the order of adding."""
        return list(self.configs)

    def add(self, name: str, folder: str | Path, *, strict: bool = False) -> None:
        """Put the adapter in `folder` (or of a hub id) on the model as the request `name`.

        `strict` refuses one that was trained on other weights; otherwise there is a warning.

        Raises:
            ConfigError: the name is taken.
            AdapterError: the adapter is missing, damaged, without gate, or made for another model.
        """
        self.add_all({name: folder}, strict=strict)

    def add_all(self, folders: Mapping[str, str | Path], *, strict: bool = False) -> None:
        """Put many requests on the model at once, faster than one after another; all of them or none. See `add`."""
        shape = shape_of(self.base)
        read = {name: validate(find_adapter(folder), shape) for name, folder in folders.items()}
        self._add_read(read, strict=strict)

    def _add_read(self, read: Mapping[str, Adapter], *, strict: bool) -> None:
        of_base = fingerprint(self.base)
        quantized = is_quantized(self.base)
        for adapter in read.values():
            adapter.config.check_fingerprint(of_base, strict=strict, quantized=quantized)
        self.add_weights({name: (adapter.config, adapter.weights) for name, adapter in read.items()})
        self.template = self.template or next((one.template for one in read.values() if one.template), None)

    def add_weights(self, requests: Mapping[str, tuple[AdapterConfig, Mapping[str, Tensor]]]) -> None:
        """Put requests on the model that are in memory: of each its config and the state of a `GrunModel`.

        This and `remove` wait for calls in progress in other threads, and later calls for them.
        """
        with self._calls.changing():
            if taken := [name for name in requests if name in self.configs]:
                raise ConfigError(
                    f"request {taken[0]!r} is on the model already; remove it first, or choose another name"
                )
            found = grouped(requests, self.configs)
            edits = self.edit_at()
            for (block, kind), members in found.edits.items():
                if block not in edits:
                    edits[block] = StackedIntervention(*self._at(block), self._rule_name, self._threshold)
                edits[block].append(kind, list(members), list(members.values()))
            if found.gates and self.pooled is None:
                self.pooled = StackedGates(*self._at(0))
            for kind, members in found.gates.items():
                self.pooled.append(kind, list(members), list(members.values()))
            self.configs.update({name: config for name, (config, _) in requests.items()})
            self._settle(edits)

    def remove(self, name: str) -> None:
        """Take a request off the model, which is then as if it had never been there; ConfigError: there is none."""
        if name not in self.configs:
            raise ConfigError(unknown_name("request", name, self.names))
        with self._calls.changing():
            edits = self.edit_at()
            for edit in edits.values():
                edit.remove(name)
            if self.pooled is not None:
                self.pooled.remove(name)
            del self.configs[name]
            self._settle({block: edit for block, edit in edits.items() if edit.names})

    # -- gates --------------------------------------------------------------------------------------------------------

    @property
    def last_gates(self) -> dict[int, Tensor]:
        """Probabilities by block of the last edited pass, of each place the widest gate's, [batch, positions read]."""
        return {block: gates.amax(dim=2) for block, gates in self._gates().items()}

    @property
    def request_gates(self) -> dict[str, dict[int, Tensor]]:
        """By request and block the probabilities of the last edited pass, each [batch, positions read]."""
        found: dict[str, dict[int, Tensor]] = {name: {} for name in self.names}
        edits = self.edit_at()
        for block, gates in self._gates().items():
            for name, values in zip(edits[block].names, gates.unbind(dim=2), strict=True):
                found[name][block] = values
        return found

    # -- inside -------------------------------------------------------------------------------------------------------

    def _at(self, block: int) -> tuple[int, Tensor]:
        """Hidden size, and a tensor of the type and on the device that edits at a block are of."""
        blocks = self.intervenable.blocks
        return hidden_size_of(self.base), torch.empty(0, dtype=edit_dtype(blocks), device=device_of(blocks[block]))

    def _settle(self, edits: Mapping[int, StackedIntervention]) -> None:
        """Carry `edits` at the places where the requests read and write."""
        rules = {
            kind.position: PositionRule(kind.gate_read, kind.edit_write, kind.reset_ids, bool(kind.gate_blocks))
            for kind in sorted(map(Kind.of, self.configs.values()))
        }
        rule = _Several(rules) if len(rules) > 1 else next(iter(rules.values()), PositionRule())
        gates = self.pooled if self.pooled is not None and self.pooled.blocks else None
        for edit in edits.values():
            for kind, group in edit.by_kind.items():
                if gates is not None and kind in gates.by_kind:
                    group.places = gates.by_kind[kind].places(group.names)
        self._put(edits, rule, gates)


class _Several(PositionRule):
    """The rules of requests that differ in where they read and write, side by side."""

    def __init__(self, rules: Mapping[tuple[Any, ...], PositionRule]) -> None:
        super().__init__("every_token", "every_token")
        self._rules = rules

    def locate(self, call: Call) -> Sites | None:
        """All columns, each rule's own sites beside them; None where no rule acts."""
        found = {position: rule.locate(call) for position, rule in self._rules.items()}
        there = [sites for sites in found.values() if sites is not None]
        if not there:
            return None
        columns = torch.arange(call.columns, device=call.device).expand(call.rows, -1)
        counts = attended(call)
        return StackSites(columns, counts, columns, counts, call.carry, None, everywhere=True, by_position=found)
