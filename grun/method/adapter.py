"""The description of an adapter on disk: adapter_config.json, what it may hold, and what it fits on."""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from grun.config.checks import one_of
from grun.config.options import DTYPES
from grun.data.templates import FILE_NAME as TEMPLATE_FILE
from grun.data.templates import Template
from grun.errors import AdapterError, ConfigError
from grun.method.actions import ACTIONS, EDIT
from grun.method.edits import CORRUPT, EDITS, LOREFT
from grun.method.gate import GATES, KEYWORDS
from grun.method.rules import POOLS, PROMPT, check_gate_blocks, check_pool, check_rule
from grun.runtime.files import read_json
from grun.runtime.reading import decode, parse_json, typed
from grun.runtime.records import STACK_FILE

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
GRUN = "GRUN"
"""The `peft_type` of an adapter."""
STACK = "STACK"
"""That of a store of requests."""
LARGEST = 2**24
"""Of a width or a depth."""
LARGEST_ID = 2**31
"""Above every token id."""
LARGEST_BIAS = 1e30
"""Of a gate's initial bias, well within float32."""


@dataclass
class AdapterConfig:
    """What an adapter is, and what it fits on; written as adapter_config.json."""

    blocks: list[int]
    """Edited blocks, 0-based, ascending."""
    rank: int
    """Rank of the edit."""
    gate: str
    """Name in `grun.method.gate.GATES`."""
    hidden_size: int
    """Width of the base's residual stream."""
    depth: int
    """Number of the base's decoder blocks."""
    edit: str = LOREFT
    """Name in `grun.method.edits.EDITS`; not written where it is the published one."""
    gate_bias: float | None = None
    """Initial logit bias of the gate."""
    dropout: float = 0.0
    """Dropout in training, a probability."""
    dropout_on_hidden: bool = False
    """Dropout acts on the whole edited state."""
    activation: str | None = None
    """Function applied to Wh + b."""
    gate_read: str = "last_prompt"
    """Position the gate reads."""
    gate_accumulate: str = "none"
    """How gate values combine over positions."""
    edit_write: str = "last_prompt"
    """Positions the edit is written to."""
    gate_blocks: list[int] | None = None
    """Blocks that one gate for all edits reads, 0-based, ascending; None: each edit has its own, which reads its block.
    Not written where it is None."""
    gate_pool: str = "last"
    """How such a gate pools states over tokens, a name in `grun.method.rules.POOLS`; not written without it."""
    gate_threshold: float | None = None
    """Gate probability below which the edit is skipped; this and the next three are not written where they are None."""
    gate_bound: float | None = None
    """Largest share of rows that were to stay which passes it, in expectation, as was calibrated."""
    gate_calibration: int | None = None
    """Prompts, or groups of them, that it was calibrated on."""
    gate_recall: float | None = None
    """Share of forget prompts that passes it: of those left out of a fit, or where it was calibrated later, of all."""
    action: str = EDIT
    """What is done where the gate is open, a name in `grun.method.actions.ACTIONS`; this and the next one are not
    written where it is the published one."""
    answer_ids: list[int] = field(default_factory=list)
    """Token ids of the refusal that another action gives, its end included."""
    keyword_ids: list[list[int]] = field(default_factory=list)
    """Sequences of token ids that open a gate by keywords; not written where there are none."""
    reset_ids: list[int] = field(default_factory=list)
    """Token ids that begin a user's turn, where what gates accumulate or pool starts again; empty: nowhere."""
    base_model_name_or_path: str | None = None
    """Name or folder of the base model."""
    base_revision: str | None = None
    """Commit of the base on the hub."""
    base_fingerprint: str | None = None
    """`grun.method.fingerprint` of the base's weights."""
    base_dtype: str | None = None
    """Type of the base's weights in training, such as bfloat16; None: not known, or they were quantized."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["gate_logits", "gates", "base_output"]
    """Of a `GrunOutput`, what transformers' Trainer does not gather when it evaluates."""

    def get_text_config(self) -> AdapterConfig:
        """Itself, where Trainer notes a tokenizer's special tokens; nothing of that is saved."""
        return self

    @property
    def gate_size(self) -> int:
        """Numbers that a gate reads."""
        if self.gate == KEYWORDS:
            return 1
        if self.gate_blocks is None:
            return self.hidden_size
        return len(self.gate_blocks) * POOLS[self.gate_pool] * self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """What is saved; trackers that Trainer reports to ask."""
        later = "edit gate_blocks gate_threshold gate_bound gate_calibration gate_recall action answer_ids keyword_ids"
        bare = AdapterConfig([], 0, "", 0, 0)
        values = {one.name: getattr(self, one.name) for one in fields(AdapterConfig)}
        for name in later.split():
            if values[name] == getattr(bare, name):
                del values[name]
        if self.gate_blocks is None:
            del values["gate_pool"]
        return {"peft_type": GRUN, "format_version": FORMAT_VERSION, **values}

    def to_json_string(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict())

    @staticmethod
    def read(folder: Path, data: bytes | None = None) -> tuple[AdapterConfig, Template | None]:
        """Config, every field of its type and with a known value, and prompt template stored in `folder`.

        `data` is the content of their file where that was read before. AdapterError if they cannot be used.
        """
        path = folder / CONFIG_FILE
        data = data or _content(path, f"{folder} is no GRUN adapter: {CONFIG_FILE} is missing")
        values = parse_json(decode(data, str(path), AdapterError), str(path), AdapterError)
        if not isinstance(values, dict) or values.pop("peft_type", None) != GRUN:
            raise AdapterError(f"{path}: peft_type is not {GRUN}; load it with the library that wrote it")
        return AdapterConfig.parse(values, str(path))

    @staticmethod
    def parse(values: dict[str, Any], path: str) -> tuple[AdapterConfig, Template | None]:
        """What `read` gives, of the JSON of the file at `path`, without its `peft_type`."""
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise AdapterError(f"{path}: format version {version}, not {FORMAT_VERSION}; use the GRUN that wrote it")
        try:
            template = typed(Template | None, values.pop("template", None), f"{path}: template", AdapterError)
            config: AdapterConfig = typed(AdapterConfig, values, path, AdapterError)
            config.check()
        except ConfigError as error:
            raise AdapterError(f"{path}: {error}; save the adapter again, with the GRUN that wrote it") from error
        return config, template

    def check(self) -> None:
        """ConfigError names a field whose value cannot be, and what could."""
        for name, most in (("hidden_size", LARGEST), ("depth", LARGEST), ("rank", self.hidden_size)):
            limit = f"the hidden size {most}" if name == "rank" else most
            _require(1 <= getattr(self, name) <= most, f"{name} {getattr(self, name)} must lie between 1 and {limit}")
        ACTIONS.get(self.action)
        if self.action == EDIT:
            self._check_blocks("blocks", self.blocks)
            _require(not self.answer_ids, "answer_ids are for another action than edit; there must be none")
        else:
            self._check_action()
        _require(0 <= self.dropout < 1, f"dropout {self.dropout} must lie in [0, 1)")
        bias = abs(self.gate_bias or 0.0)
        _require(
            bias < LARGEST_BIAS, f"gate_bias {self.gate_bias} must lie between -{LARGEST_BIAS:g} and {LARGEST_BIAS:g}"
        )
        for name in ("gate_threshold", "gate_bound", "gate_recall"):
            share = getattr(self, name)
            _require(share is None or 0 <= share <= 1, f"{name} {share} must lie between 0 and 1")
        ids = all(0 <= token < LARGEST_ID for token in self.reset_ids)
        _require(ids, f"reset_ids {self.reset_ids} must be token ids, 0 or more")
        if self.base_dtype is not None:
            one_of("base_dtype", self.base_dtype, DTYPES)
        GATES.get(self.gate)
        EDITS.get(self.edit)
        check_rule(self.gate_read, self.gate_accumulate, self.edit_write)
        check_pool(self.gate_blocks, self.gate_pool, self.gate_accumulate, self.gate, self.gate_read)
        if self.gate_blocks is not None:
            self._check_blocks("gate_blocks", self.gate_blocks)
            if self.blocks:
                check_gate_blocks(self.gate_blocks, self.blocks)
        self._check_keywords()
        noise = (self.edit == CORRUPT) == (self.edit_write == PROMPT) and (
            self.edit != CORRUPT or self.gate_blocks is not None
        )
        _require(
            noise, f"edit={CORRUPT} goes with edit_write={PROMPT}, gate_read=last_prompt and gate_blocks, or none of it"
        )
        if self.activation is not None:
            from transformers.activations import ACT2FN

            if self.activation not in ACT2FN:
                raise ConfigError(f"unknown activation {self.activation!r}; known: {', '.join(sorted(ACT2FN))}")

    def _check_action(self) -> None:
        """What acts on logits edits no block, and acts by one gate that is asked at the end of the prompt."""
        _require(not self.blocks, f"action={self.action} edits no blocks, not {self.blocks}")
        once = self.gate_blocks is not None and (self.gate_read, self.edit_write) == ("last_prompt", "sticky")
        _require(
            once,
            f"action={self.action} needs one gate, asked once, and holds from there on: set gate_blocks, "
            "gate_read=last_prompt and edit_write=sticky",
        )
        ids = bool(self.answer_ids) and all(0 <= token < LARGEST_ID for token in self.answer_ids)
        _require(ids, f"action={self.action} needs answer_ids, the token ids of a refusal; they are {self.answer_ids}")

    def _check_keywords(self) -> None:
        """A gate by keywords has some, and is one for all edits that remembers whether there was one."""
        if self.gate != KEYWORDS:
            _require(not self.keyword_ids, f"keyword_ids are for gate={KEYWORDS}; there must be none")
            return
        pooled = (self.gate_blocks, self.gate_pool) == ([0], "max")
        _require(pooled, f"gate={KEYWORDS} reads no states, and is asked once: set gate_blocks=[0] and gate_pool=max")
        ids = [token for one in self.keyword_ids for token in one]
        fine = bool(self.keyword_ids) and all(self.keyword_ids) and all(0 <= token < LARGEST_ID for token in ids)
        _require(fine, f"gate={KEYWORDS} needs keyword_ids, the token ids of each keyword, 0 or more, at least one")

    def _check_blocks(self, name: str, blocks: list[int]) -> None:
        inside = bool(blocks) and all(0 <= block < self.depth for block in blocks)
        _require(inside, f"{name} {blocks} must lie within 0..{self.depth - 1}, at least one of them")
        _require(blocks == sorted(set(blocks)), f"{name} {blocks} must be distinct and ascend")

    def check_fingerprint(self, of_base: str, *, strict: bool, quantized: bool = False) -> None:
        """See `check_base`. A quantized base has other numbers than the one it was made from: nothing is compared."""
        if self.base_fingerprint not in (None, of_base) and quantized and not strict:
            log.info("the base is quantized: whether the adapter was trained on these weights cannot be checked")
            return
        check_base(self.base_fingerprint, self.base_model_name_or_path, of_base, strict=strict)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def check_base(trained_on: str | None, name: str | None, of_base: str, *, strict: bool) -> None:
    """Compare the fingerprints of the base that an adapter was trained on, if known, and of the one it is put on.

    A difference is an AdapterError where `strict`, else a warning.
    """
    if trained_on in (None, of_base):
        return
    message = (
        f"the adapter was trained on other weights of the same shape (fingerprint {trained_on}, this base {of_base}; "
        f"trained on {name}); it may not forget the same here"
    )
    if strict:
        raise AdapterError(message + "; strict=true refuses it")
    log.warning(message)


def find_adapter(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Folder of an adapter given as a folder or as a hub id; AdapterError if there is neither.

    `revision`: branch, tag or commit of a hub id; None: main.
    """
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        if (folder / "training_args.bin").is_file() and not (folder / CONFIG_FILE).is_file():
            raise AdapterError(
                f"{folder} is a checkpoint of transformers' Trainer, which has an adapter's numbers alone: put them "
                "back by train(resume_from_checkpoint=...) or load_state_dict, then save_pretrained"
            )
        return folder
    from huggingface_hub import snapshot_download

    files = [CONFIG_FILE, WEIGHTS_FILE, TEMPLATE_FILE, "README.md"]
    try:
        return Path(snapshot_download(str(folder_or_hub_id), revision=revision, allow_patterns=files))
    except Exception as error:
        raise AdapterError(
            f"no adapter at {str(folder_or_hub_id)!r}: not a folder, and not to be had from the hub or its local cache "
            f"({type(error).__name__})"
        ) from error


def peft_type(folder: Path) -> str:
    """Kind of adapter in `folder`: GRUN, STACK, or a method of PEFT such as LORA; AdapterError if there is none."""
    if (folder / STACK_FILE).is_file():
        return STACK
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        hint = "; it is a whole model: give it as model.path" if (folder / "config.json").is_file() else ""
        raise AdapterError(f"{folder} is no adapter: {CONFIG_FILE} is missing{hint}") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}); save the adapter again") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise AdapterError(f"{path} names no peft_type; expected GRUN, or a method of PEFT such as LORA")
    return kind


def check_fits(config: AdapterConfig, hidden_size: int, depth: int, vocabulary: int, folder: Path | str) -> None:
    """AdapterError if the adapter was made for a model of another width, depth or vocabulary."""
    if (config.hidden_size, config.depth) != (hidden_size, depth):
        raise AdapterError(
            f"{folder}: made for hidden size {config.hidden_size} and {config.depth} blocks, this base has hidden size "
            f"{hidden_size} and {depth} blocks; it was trained on {config.base_model_name_or_path}"
        )
    for name, ids, made in (
        ("answer_ids", config.answer_ids, "; it was made for"),
        ("keyword_ids", itertools.chain(*config.keyword_ids), "; it was made for"),
        ("reset_ids", config.reset_ids, ", so turns would not be told apart; it was trained on"),
    ):
        if beyond := [token for token in ids if token >= vocabulary]:
            raise AdapterError(
                f"{folder}: {name} {beyond} are beyond the {vocabulary} token ids of this base{made} "
                f"{config.base_model_name_or_path}"
            )


def read_weights(folder: Path, data: bytes | None = None) -> dict[str, Tensor]:
    """Tensors of an adapter, whatever its kind; `data` is the content of their file where that was read before.

    AdapterError: the file is missing, damaged, or holds NaN or infinite numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / WEIGHTS_FILE
    try:
        weights: dict[str, Tensor] = load(data or _content(path, f"{path} is missing; copy the whole adapter folder"))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterError(f"{path} is damaged or truncated ({error}); copy or save the adapter again") from error
    check_finite(weights, path)
    return weights


def read_regular(path: Path, *, follow: bool = False) -> bytes:
    """Bytes of a file: no pipe is waited for, and no link followed unless `follow`.

    Raises:
        FileNotFoundError: nothing is there.
        AdapterError: something else than a file is, or it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a symbolic link" if path.is_symlink() and not follow else f"cannot be read ({error.strerror})"
        raise AdapterError(f"{path} {what}; put the file itself there") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise AdapterError(f"{path} is no regular file; put the file itself there")
    with open(handle, "rb") as file:
        return file.read()


def _content(path: Path, missing: str) -> bytes:
    """Bytes of a file, through links; AdapterError with the text `missing` if it is not there."""
    try:
        return read_regular(path, follow=True)
    except FileNotFoundError as error:
        raise AdapterError(missing) from error


def check_finite(weights: Mapping[str, Tensor], where: str | Path) -> None:
    """AdapterError names the first tensor with a number that is not finite, or not once it is a float32."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise AdapterError(f"{where}: tensor {name!r} holds NaN or infinite numbers; train or copy it again")
