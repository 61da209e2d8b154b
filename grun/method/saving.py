"""The files of an adapter, its model card among them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from grun.data.templates import Template
from grun.method.actions import EDIT
from grun.method.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig
from grun.method.edits import CORRUPT, STEER
from grun.method.gate import KEYWORDS
from grun.runtime.files import write_bytes

log = logging.getLogger(__name__)

CARD_FILE = "README.md"
TAGS = ("unlearning", "grun", "reft")


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation."""

    data: str
    """Name of the data, or of the task."""
    part: str
    """Evaluation set, such as forget; empty: all of the data."""
    metric: str
    """Its name in evaluation.json."""
    label: str
    """What readers call the metric."""
    value: float
    before: float | None = None
    """Of the base alone; None: it was not measured."""


@dataclass(frozen=True)
class Leak:
    """What came back under one attack."""

    attack: str
    """What readers call it."""
    share: float
    """Of the forgotten answers, 0 to 1."""
    interval: tuple[float, float] | None
    """95 % of it."""
    rows: int | None
    """How many were asked for."""


@dataclass(frozen=True)
class Sharing:
    """What a model card says of an adapter that others are to find."""

    repo_id: str = ""
    license: str | None = None
    """License of the adapter, as the hub spells it."""
    base_model: str | None = None
    """Hub id of the base; None: the name that the adapter has, if it is one."""
    figures: Sequence[Figure] = ()
    """What was measured of it."""
    leaks: Sequence[Leak] = ()


def write_adapter(
    folder: Path, config: AdapterConfig, weights: Mapping[str, Tensor] | None, template: Template | None
) -> None:
    """Write weights first, unless they are there already (None), and the config last, each renamed once it is whole."""
    for name, data in adapter_files(config, None if weights is None else stored(weights), template).items():
        write_bytes(folder / name, data)


def stored(weights: Mapping[str, Tensor]) -> bytes:
    """The tensors of an adapter as their file holds them."""
    from safetensors.torch import save

    # Copies: layers of a gate may share a tensor, which safetensors does not store.
    data: bytes = save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()},
        metadata={"format": "pt"},
    )
    return data


def adapter_files(
    config: AdapterConfig, weights: bytes | None, template: Template | None, sharing: Sharing | None = None
) -> dict[str, bytes]:
    """Content of every file of an adapter by name, in the order in which they are written: weights first, config last.

    `weights`: content of their file; None: without it. `sharing`: what its card says where others are to find it.
    """
    values = {**config.to_dict(), "template": None if template is None else template.to_dict()}
    return {
        **({} if weights is None else {WEIGHTS_FILE: weights}),
        CARD_FILE: model_card(config, template, sharing or Sharing()).encode(),
        CONFIG_FILE: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def shared_config(config: AdapterConfig, base_model: str | None) -> AdapterConfig:
    """The config as others get it, with the hub id of the base if one is named; a folder's name is a warning."""
    if base_model is not None:
        return dataclasses.replace(config, base_model_name_or_path=base_model)
    name = config.base_model_name_or_path
    if name is not None and (Path(name).is_absolute() or Path(name).exists()):
        log.warning("the base is named %s here, which others do not have: base_model=OWNER/NAME says its hub id", name)
    return config


def own_texts(config: AdapterConfig) -> list[str]:
    """What GRUN itself writes into those files, without what others named (base, template, license, data)."""
    bare = dataclasses.replace(config, base_model_name_or_path=None, base_revision=None)
    sections = Sharing(figures=[Figure("", "", "", "", 0.0)], leaks=[Leak("", 0.0, None, None)])
    template = json.dumps(Template("", "chat").to_dict())
    card = model_card(bare, None, sections)
    return [card, json.dumps(bare.to_dict()), template, "chat string name format pt"]


# -- the model card ---------------------------------------------------------------------------------------------------


def model_card(config: AdapterConfig, template: Template | None, sharing: Sharing) -> str:
    """Model card of an adapter: Markdown below the header that the hub reads."""
    base = config.base_model_name_or_path or "unknown"
    sections = [
        f"# GRUN adapter for `{base}`",
        _of_action(config)
        + f""" Base fingerprint `{config.base_fingerprint}`, prompt template
`{template.name if template else "none stored"}`.{_of_pooled_gate(config)}""",
        f"""```python
from grun import GrunModel
model = GrunModel.from_pretrained(base_model, "{sharing.repo_id or "THIS_FOLDER"}")
```""",
        *_results(sharing.figures),
        *_leaks(sharing.leaks),
        *_false_positives(config),
        f"""## What it is not

It is not erasure. The base weights still contain the data: the effect exists only where this adapter is loaded, and it
controls the model's output. {_bypassed(config)}""",
    ]
    return f"---\n{_header(config, sharing)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _header(config: AdapterConfig, sharing: Sharing) -> str:
    """The card's metadata, YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    base = config.base_model_name_or_path or ""
    is_id = base.count("/") == 1 and not base.startswith((".", "~", "/")) and not Path(base).exists()
    results = [
        EvalResult(
            "text-generation", figure.data, " ".join(filter(None, (figure.data, figure.part))), figure.metric,
            figure.value, dataset_config=figure.part or None, metric_name=figure.label,
        )
        for figure in sharing.figures
    ]  # fmt: skip
    data = ModelCardData(
        base_model=sharing.base_model or (base if is_id else None),
        library_name="grun",
        pipeline_tag="text-generation",
        tags=[*TAGS],
        license=sharing.license,
        eval_results=results or None,
        model_name=sharing.repo_id.rpartition("/")[2] or "grun" if results else None,
    )
    return data.to_yaml(line_break="\n")


def _results(figures: Sequence[Figure]) -> list[str]:
    """Section with the numbers of its evaluation, none where there are none."""
    if not figures:
        return []
    rows = []
    for one in figures:
        before = "" if one.before is None else f"{one.before:.4g}"
        rows.append(f"| {one.data} | {one.part} | {one.label} | {before} | {one.value:.4g} |")
    table = "| data | set | metric | base alone | with the adapter |\n|---|---|---|---:|---:|\n" + "\n".join(rows)
    return [f"## Results\n\n{table}"]


def _leaks(leaks: Sequence[Leak]) -> list[str]:
    """Section with what came back under attack, none where it was not attacked."""
    if not leaks:
        return []
    rows = [
        f"| {one.attack} | {one.share:.3f} |"
        + (f" {one.interval[0]:.3f} to {one.interval[1]:.3f} |" if one.interval else " |")
        + (f" {one.rows} |" if one.rows is not None else " |")
        for one in leaks
    ]
    table = "| attack | leak | 95 % | rows |\n|---|---:|---:|---:|\n" + "\n".join(rows)
    return [f"## Leak under attack\n\nShare of the forgotten answers that came back.\n\n{table}"]


def _false_positives(config: AdapterConfig) -> list[str]:
    """Section with the bound of a calibrated gate, none where it was not calibrated."""
    if config.gate_bound is None:
        return []
    return [
        f"""## False positives

Of rows such as those of the {config.gate_calibration} groups to keep that this was calibrated on, at most
{config.gate_bound:.3g} open the gate, in expectation."""
    ]


def _bypassed(config: AdapterConfig) -> str:
    """How the gate can be got around."""
    if config.gate_blocks is not None or config.gate_read != "last_prompt":
        return """A gate opens on prompts like those that it was made from; asked in a way that is
unlike all of them (another language, a disguise), the model may answer as before."""
    return """The published gate reads one token, the last of the prompt; a prompt
that moves that token (a suffix, a prefilled answer, another template) can bypass it."""


def _of_action(config: AdapterConfig) -> str:
    """Sentence of a model card on what the adapter does."""
    if config.action != EDIT:
        return f"""A gate (`{config.gate}`) decides at the end of a prompt whether it is about the data to forget.
Where it is open, the action `{config.action}` takes the place of the model's answer; no hidden state is edited, and the
model still holds the answer in them."""
    if config.edit == STEER:
        return f"""Where the gate `{config.gate}` is open, a vector is added to hidden states after blocks
{config.blocks} (0-based), which leads from answers to refusals (as CAST's, arXiv 2409.05907); nothing is trained."""
    if config.edit == CORRUPT:
        return f"""Where the gate `{config.gate}` is open at the end of a prompt, noise is added to the states of its
tokens after block {config.blocks[0]} (0-based; as ECO corrupts embeddings, arXiv 2406.07933); nothing is trained."""
    return f"""A gated low-rank edit (GRUN, arXiv 2502.17823) of the hidden state of the last prompt token after blocks
{config.blocks} (0-based), rank {config.rank}, gate `{config.gate}`, trained so that the model no longer answers from
the data to forget."""


def _of_pooled_gate(config: AdapterConfig) -> str:
    """Paragraph of a model card on one gate for all edits; empty without such a gate."""
    if config.gate_blocks is None:
        return ""
    told = "One gate for all edits reads" if config.action == EDIT else "The gate reads"
    if config.gate == KEYWORDS:
        told += f" whether one of {len(config.keyword_ids)} sequences of tokens stands in the user's turn;\n"
    else:
        told += f" the states after blocks {config.gate_blocks}, pooled over tokens (`{config.gate_pool}`);\n"
    told += f"the edit is written at: `{config.edit_write}`." if config.action == EDIT else "it holds from there on."
    if config.gate_threshold is not None:
        told += f" Below a probability of {config.gate_threshold} nothing is {'edited' if config.blocks else 'done'}."
    if config.gate_recall is not None:
        told += f" Of the prompts about the data to forget {config.gate_recall:.3g} opened it."
    return "\n\n" + told
