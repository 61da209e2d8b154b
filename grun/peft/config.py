"""GrunPeftConfig: an adapter's config as PEFT takes it, on disk the same as that of a GrunModel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.peft_types import PeftType
from transformers import PreTrainedModel

from grun.data.templates import Template
from grun.errors import ConfigError
from grun.method.adapter import CONFIG_FILE, GRUN, AdapterConfig, check_fits
from grun.method.fingerprint import fingerprint
from grun.method.host import is_quantized
from grun.method.model import of_base
from grun.method.saving import write_adapter
from grun.method.validation import shape_of

if GRUN not in PeftType.__members__:  # PEFT registers no other methods than those of its enumeration
    _member = str.__new__(PeftType, GRUN)
    _member._name_ = _member._value_ = GRUN
    type.__setattr__(PeftType, GRUN, _member)
    PeftType._member_names_.append(GRUN)
    PeftType._member_map_[GRUN] = PeftType._value2member_map_[GRUN] = _member
PEFT_TYPE = PeftType(GRUN)


@dataclass
class GrunPeftConfig(AdapterConfig, PeftConfig):
    """What a GRUN adapter is; for `peft.get_peft_model`, and what `PeftConfig.from_pretrained` gives for its folder.

    Options of a new adapter are those of `grun.GrunModel.wrap`, under the same names. What depends on the base
    (`hidden_size`, `depth`, blocks as numbers, `base_...`) is filled in where the adapter is put on one, in a copy.
    """

    blocks: Any = None
    """Edited blocks, 0-based; negative counts from the last; None: as deep as the published ones."""
    rank: int = 4
    """Rank of the edit."""
    gate: str = "linear"
    """Name in `grun.method.gate.GATES`."""
    gate_blocks: Any = None
    """Blocks that one gate for all edits reads, as numbers or as shares of the depth; None: a gate for each edit."""
    hidden_size: int = 0
    """Width of the base's residual stream; 0: not on a base yet."""
    depth: int = 0
    """Number of the base's decoder blocks; 0: not on a base yet."""
    task_type: Any = "CAUSAL_LM"
    """The only one."""
    template: Any = None
    """`grun.data.templates.Template` to store with the adapter."""
    format_version: int | None = None
    """Of the file that this was read from."""

    def __post_init__(self) -> None:
        """AdapterError: it comes from a file with a value that cannot be."""
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.format_version is not None:
            values = {one.name: getattr(self, one.name) for one in dataclasses.fields(AdapterConfig)}
            given = {"format_version": self.format_version, "template": self.template}
            self.template = AdapterConfig.parse({**values, **given}, CONFIG_FILE)[1]
            self.format_version = None

    def on(self, base: PreTrainedModel) -> GrunPeftConfig:
        """A copy for `base`, complete.

        Raises:
            ConfigError: an option of a new adapter is out of range, or contradicts another.
            AdapterError: it is that of an adapter made for a model of another shape; for other weights of the same
                shape there is a warning.
        """
        if self.task_type != "CAUSAL_LM":
            raise ConfigError(f"task_type={self.task_type}: GRUN edits language models; leave it out")
        if not isinstance(self.template, Template | None):
            raise ConfigError(
                f"template: expected a grun.data.templates.Template, not a {type(self.template).__name__}"
            )
        if self.depth:
            check_fits(self, *shape_of(base), "this adapter")
            self.check_fingerprint(fingerprint(base), strict=False, quantized=is_quantized(base))
            return dataclasses.replace(self)
        found = of_base(base, self.action, self.blocks, self.gate_blocks)
        config = dataclasses.replace(self, answer_ids=list(self.answer_ids), reset_ids=list(self.reset_ids), **found)
        config.check()
        return config

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
        """Write adapter_config.json and the model card, as `GrunModel.save_pretrained` does.

        ConfigError: it was never on a base.
        """
        if not self.depth:
            raise ConfigError("this config lacks what it has of a base; save the model of get_peft_model(base, config)")
        write_adapter(Path(save_directory), self, None, self.template)
