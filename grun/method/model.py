"""GrunModel: a frozen base model that carries gated edits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grun.data.forget_text import refuse_forget_text, rows_of_records, rows_of_run
from grun.data.rows import Row
from grun.data.templates import Template
from grun.errors import ConfigError
from grun.method.actions import ACTIONS, EDIT, Act
from grun.method.adapter import AdapterConfig, find_adapter
from grun.method.fingerprint import fingerprint
from grun.method.host import (
    EditedModel,
    blocks_to_edit,
    edit_dtype,
    hidden_size_of,
    is_quantized,
    output_embeddings,
)
from grun.method.intervention import GatedIntervention, draw_noise_from, gated_intervention, pooled_gate
from grun.method.pooled_sites import PooledSites
from grun.method.position import PositionRule
from grun.method.precision import float32_by_default
from grun.method.rules import check_shares
from grun.method.saving import Sharing, adapter_files, own_texts, shared_config, stored, write_adapter
from grun.method.stack.stack import GrunStack
from grun.method.stack.stacked import InForce
from grun.method.validation import shape_of, validate
from grun.runtime.devices import device_of
from grun.runtime.hub import check_name, push
from pyvene_custom import find_blocks
from pyvene_custom.context import Calls


class GrunModel(EditedModel):
    """One adapter: gated edits on a frozen base model. What wrapping does to the base: see `EditedModel`."""

    forget_rows: Sequence[Row] | None = None
    """What it was made to forget, where `grun.unlearn` made it; never saved. `push_to_hub` looks for it in files."""
    folder: Path | None = None
    """Where it was loaded from."""
    _act: Act | None
    _on_head: Any = None

    def __init__(
        self,
        base: PreTrainedModel,
        config: AdapterConfig,
        template: Template | None = None,
        beside: GrunStack | None = None,
        *,
        turns: Calls | None = None,
    ) -> None:
        """Use `wrap` or `from_pretrained`. `turns`: see `EditedModel`."""
        config.check()
        blocks = find_blocks(base)[1]
        with float32_by_default():
            edits: dict[int, GatedIntervention | InForce] = {
                index: gated_intervention(config).to(device=device_of(blocks[index]), dtype=edit_dtype(blocks))
                for index in config.blocks
            }
            pooled = pooled_gate(config)
        if pooled is not None:
            pooled = pooled.to(device=device_of(blocks[pooled.block]), dtype=edit_dtype(blocks))
        rule = PositionRule(
            config.gate_read,
            config.edit_write,
            tuple(config.reset_ids),
            pooled=pooled is not None,
            counts=config.action != EDIT,
            keywords=tuple(map(tuple, config.keyword_ids)),
        )
        if beside is not None:
            if pooled is not None or beside.pooled is not None:
                raise ConfigError(
                    "a request with one gate for all edits (gate_blocks) is trained on the bare base: leave "
                    "method.beside out (requests add: independent=true)"
                )
            if beside.configs and beside.rule != rule:
                raise ConfigError(
                    "a request that is trained with others in force must read and write where they do: the same "
                    "method.gate_read, gate_accumulate, edit_write and template; or train it on the bare base"
                )
            for index, earlier in beside.edit_at().items():
                own = edits.setdefault(index, InForce(earlier))
                if isinstance(own, GatedIntervention):
                    own.earlier = earlier
        act = ACTIONS.get(config.action)(config.answer_ids)
        if act is not None:
            output_embeddings(base)
        object.__setattr__(self, "_act", act)  # not a sub-module, and known when `_take_hold` is called
        super().__init__(base, edits, rule, template, pooled, turns=turns)
        self.config = config
        self.gate_threshold = config.gate_threshold

    # -- making, saving, loading ------------------------------------------------------------------------------------

    @classmethod
    def wrap(
        cls,
        base: PreTrainedModel,
        *,
        blocks: Sequence[int] | None = None,
        rank: int = 4,
        gate: str = "linear",
        edit: str = "loreft",
        gate_bias: float | None = None,
        dropout: float = 0.0,
        dropout_on_hidden: bool = False,
        activation: str | None = None,
        gate_read: str = "last_prompt",
        gate_accumulate: str = "none",
        edit_write: str = "last_prompt",
        gate_blocks: Sequence[int | float] | None = None,
        gate_pool: str = "last",
        action: str = EDIT,
        answer_ids: Sequence[int] = (),
        keyword_ids: Sequence[Sequence[int]] = (),
        reset_ids: Sequence[int] = (),
        template: Template | None = None,
        beside: GrunStack | None = None,
    ) -> GrunModel:
        """Put new, randomly initialized edits on `base`.

        Args:
            base: any transformers causal language model with a stack of decoder blocks.
            blocks: edited blocks, 0-based; negative counts from the last; None: as deep as the published ones.
            rank: rank of the edit.
            gate: name in `grun.method.gate.GATES`.
            edit: name in `grun.method.edits.EDITS`.
            gate_bias: initial logit bias of the gate; None: torch's default initialization.
            dropout: probability of dropping entries of the change in training.
            dropout_on_hidden: drop entries of the whole edited state instead (published quirk).
            activation: name in transformers' ACT2FN applied to Wh + b; None: identity.
            gate_read: positions the gate reads, or is asked at where states are pooled: last_prompt or every_token.
            gate_accumulate: how gate values combine over positions: none or running_max.
            edit_write: positions the edit is written to: last_prompt, sticky, every_token, or of noise prompt.
            gate_blocks: blocks that one gate for all edits reads, none above an edited one, as numbers or as shares of
                the depth between 0 and 1; None: a gate for each edit.
            gate_pool: how that gate pools states over the tokens so far: last, max, maxmin, mean or windows.
            action: name in `grun.method.actions.ACTIONS`; another one than edit has no edits, so `blocks` do not count.
            answer_ids: token ids of the refusal that it gives, its end included.
            keyword_ids: sequences of token ids that open the gate `keywords`.
            reset_ids: token ids that begin a user's turn, where a running maximum or a pool starts again.
            template: prompt template to store with the adapter.
            beside: other requests on this base, unwrapped, whose edits stay in force; they are not saved with this one.

        Raises:
            ConfigError: an option is out of range, or the base is wrapped already.
        """
        blocks_to_edit(base)
        config = AdapterConfig(
            **of_base(base, action, blocks, gate_blocks), action=action, rank=rank, gate=gate, edit=edit,
            gate_bias=gate_bias, dropout=dropout, dropout_on_hidden=dropout_on_hidden, activation=activation,
            gate_read=gate_read, gate_accumulate=gate_accumulate, edit_write=edit_write, gate_pool=gate_pool,
            answer_ids=list(answer_ids), keyword_ids=[*map(list, keyword_ids)], reset_ids=list(reset_ids),
        )  # fmt: skip
        return cls(base, config, template, beside)

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        folder_or_hub_id: str | Path,
        *,
        strict: bool = False,
        revision: str | None = None,
    ) -> GrunModel:
        """Put a saved adapter on `base_model`, in evaluation mode (no dropout; `gate_threshold` acts).

        Args:
            base_model: the model the adapter was trained on.
            folder_or_hub_id: folder of the adapter, or a hub id (found in the local hub cache when offline).
            strict: refuse a base whose weights differ from those of training; otherwise a warning.
            revision: branch, tag or commit of a hub id; None: main.

        Raises:
            AdapterError: the adapter is missing, damaged, or made for a model of another shape.
        """
        blocks_to_edit(base_model)
        folder = find_adapter(folder_or_hub_id, revision)
        adapter = validate(folder, shape_of(base_model))
        adapter.config.check_fingerprint(fingerprint(base_model), strict=strict, quantized=is_quantized(base_model))
        model = cls(base_model, adapter.config, adapter.template)
        model.load_state_dict(adapter.weights)
        model.folder = folder
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and a model card; each file is whole or absent."""
        write_adapter(Path(folder), self.config, self.state_dict(), self.template)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload adapter",
        revision: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        forget: Iterable[Row | Mapping[str, Any]] | None = None,
        unchecked: bool = False,
    ) -> str:
        """Send the adapter to the Hugging Face hub, unless text of what was to be forgotten is in it; the commit's URL.

        Nothing is written to disk. `python -m grun push` sends the numbers of its evaluations too.

        Args:
            repo_id: OWNER/NAME; the repository is made if it is not there.
            private: of a new repository; None: as its owner's are by default.
            token: None: the one of `HF_TOKEN`, or of `hf auth login`.
            commit_message: what the commit says.
            revision: branch, made if it is not there; None: main.
            license: of the adapter, as the hub spells it, such as apache-2.0.
            base_model: hub id of the base, where the adapter has another name of it, such as a folder.
            forget: the rows that it was made to forget, or dicts; None: those that `grun.unlearn` was given, else
                those that the run.json of its folder leads to.
            unchecked: send even where these cannot be had.

        Raises:
            ConfigError: the name cannot be one, there is no token, or the rows cannot be had.
            DataError: a file that was to be sent holds text of a row; the message names both and quotes nothing.
            HubError: the hub refuses, or cannot be reached.
        """
        check_name(repo_id)
        config, sharing = shared_config(self.config, base_model), Sharing(repo_id, license, base_model)
        files = adapter_files(config, stored(self.state_dict()), self.template, sharing)
        if (given := self.forget_rows if forget is None else forget) is not None:
            rows = rows_of_records(given)
        else:
            rows = rows_of_run(self.folder, unchecked=unchecked)
        own = [*own_texts(config), "Upload adapter"]
        refuse_forget_text({**files, "the commit message": commit_message.encode()}, rows, own)
        return push(files, repo_id, private=private, token=token, commit_message=commit_message, revision=revision)

    # -- edits ------------------------------------------------------------------------------------------------------

    def own_edits(self) -> dict[int, GatedIntervention]:
        """The adapter's edits by block, without those of other requests that are in force with it."""
        return {int(block): edit for block, edit in self.edits.items() if isinstance(edit, GatedIntervention)}

    def keep_threshold(
        self,
        value: float,
        bound: float | None = None,
        calibration: int | None = None,
        recall: float | None = None,
    ) -> None:
        """Set `gate_threshold`, and store it with the adapter; for the others see `AdapterConfig`."""
        self.gate_threshold = value
        config = self.config
        config.gate_threshold, config.gate_bound = value, bound
        config.gate_calibration, config.gate_recall = calibration, recall

    def _take_hold(self) -> None:
        super()._take_hold()
        if self._act is not None:
            self._on_head = output_embeddings(self.base).register_forward_hook(self._act_on_logits)

    def _let_go(self) -> None:
        super()._let_go()
        if self._on_head is not None:
            self._on_head.remove()

    @torch.compiler.disable
    def _act_on_logits(self, head: nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        """Hook of the output embeddings: within an edited pass its logits are those that the action gives."""
        running = self.intervenable.running
        if running is None or self._act is None or not isinstance(running.sites, PooledSites):
            return None
        opening = running.openings[self.pooled.block]
        threshold = 0.5 if self.gate_threshold is None else self.gate_threshold
        return running.sites.acted(logits, opening, threshold, self._act)

    @contextlib.contextmanager
    def drawing(self, seeds: Sequence[int] | None) -> Iterator[None]:
        """Within the block dropout and a gate's noise are a function of `seeds` and of the block.

        One number for each row of a pass; None: they are drawn from torch's generator.
        """

        def draw(seeds: Sequence[int] | None) -> None:
            for block, edit in self.own_edits().items():
                edit.draw_from(None if seeds is None else [crc32(f"{seed} {block}".encode()) for seed in seeds])
            if self.pooled is not None:
                draw_noise_from(self.pooled, seeds)

        draw(seeds)
        try:
            yield
        finally:
            draw(None)


def of_base(
    base: PreTrainedModel,
    action: str,
    blocks: Sequence[int | float] | None,
    gate_blocks: Sequence[int | float] | None,
) -> dict[str, Any]:
    """What the `AdapterConfig` of a new adapter has of its base; arguments as `GrunModel.wrap` takes them.

    ConfigError: blocks are outside, or named twice.
    """
    depth = len(find_blocks(base)[1])
    return {
        "blocks": resolve_blocks(blocks, depth) if action == EDIT else [],
        "gate_blocks": None if gate_blocks is None else resolve_blocks(gate_blocks, depth, "gate_blocks"),
        "hidden_size": hidden_size_of(base),
        "depth": depth,
        "base_model_name_or_path": getattr(base.config, "_name_or_path", "") or None,
        "base_revision": getattr(base.config, "_commit_hash", None),
        "base_fingerprint": fingerprint(base),
        "base_dtype": None if is_quantized(base) else str(base.dtype).removeprefix("torch."),
    }


PUBLISHED_BLOCKS = (20, 25, 31)
"""Of models with 32."""


def resolve_blocks(blocks: Sequence[int | float] | None, depth: int, name: str = "blocks") -> list[int]:
    """Blocks as sorted 0-based indices of a model with `depth` blocks; ConfigError if outside or named twice.

    None stands for those as deep as the published ones, each once; a model of fewer than three has fewer. A number with
    a point is a share of the depth, between 0 and 1: block int(share * depth), once if several shares are that one.
    """
    if blocks is None:
        found = [depth]
        for block in reversed(PUBLISHED_BLOCKS):
            found.insert(0, min(block * depth // 32, found[0] - 1))
        return [block for block in found[:-1] if block >= 0]
    shares = {int(share * depth + 1e-9) for share in check_shares(blocks, name)}  # 0.29 * 100 is less than 29
    numbers = [*(block for block in blocks if isinstance(block, int)), *shares]
    outside = [block for block in numbers if not -depth <= block < depth]
    if outside or not numbers:
        raise ConfigError(
            f"{name} {list(blocks)}: name at least one of the model's {depth} blocks, 0..{depth - 1} or -{depth}..-1"
        )
    resolved = sorted(block % depth for block in numbers)
    twice = sorted({block for block in resolved if resolved.count(block) > 1})
    if twice:
        raise ConfigError(f"{name} {list(blocks)}: block {twice[0]} is named twice; name each block once")
    return resolved
