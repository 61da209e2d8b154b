"""The models of an experiment: fine-tuned here or named by the user; their files are their identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from grun.config.options import FinetuneConfig, UnlearnConfig
from grun.data.corpus import BENCHMARKS
from grun.errors import ModelError
from grun.loading.fetching import hashes_of
from grun.loading.named import MODELS
from grun.runtime.files import remove

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def nothing_to_teach(config: UnlearnConfig) -> bool:
    """Whether the corpus is what the model knows already."""
    return BENCHMARKS.get(config.data.name).asks is not None


def taught(config: FinetuneConfig, subset: str) -> str:
    """Folder of a model that is fine-tuned on a subset of the corpus; one that is there is found again."""
    from grun.commands.finetune import finetune

    return str(finetune(replace(config, data=replace(config.data, subset=subset))))


def both_models(
    model: str | None, retain_model: str | None, config: UnlearnConfig, finetune: FinetuneConfig, *, compared: bool
) -> tuple[str, str | None]:
    """The model that knows everything, and the one that was never taught what is to go; None: there is none.

    Args:
        model: as the user gives it; None: it is taught, where there is anything to teach.
        retain_model: the same of the other one.
        config: of an unlearning.
        finetune: how they are taught; those taught before are found again.
        compared: teach the other one even where `model` is given.
    """
    if model is None and nothing_to_teach(config):
        return str(config.model.path), retain_model
    if model is not None and retain_model is None and not compared:
        return model, None
    return model or taught(finetune, "all"), retain_model or taught(finetune, "without_forget")


def base_identity(path: str, revision: str | None) -> dict[str, Any]:
    """Path, names, sizes and modification times of a folder's weights, hub id and revision, or name and hashes.

    Raises:
        ModelError: it looks like a folder, and there is none, or it holds no weights; a named model cannot be had.
    """
    if path in MODELS:
        return {"path": path, "files": hashes_of(path)}
    folder = Path(path).expanduser()
    if folder.is_dir():
        stats = [(file.name, file.stat()) for file in sorted(weights_in(folder))]
        if not stats:
            raise ModelError(f"{path} holds no weights ({', '.join(WEIGHTS[:2])}); name a folder with a model")
        return {"path": path, "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"{path}: no such folder")
    return {"hub": path, "revision": revision}


def weights_in(folder: Path) -> list[Path]:
    """Files of weights, whole models' and adapters'."""
    return [file for pattern in WEIGHTS for file in folder.glob(pattern)]


def remove_weights(folder: Path) -> None:
    """Remove the weights of a run; run.json and log stay."""
    for file in weights_in(folder):
        remove(file)
