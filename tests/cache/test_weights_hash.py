"""The identity of a model's weights: any change of them gives another one, and files are read whole once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from made_shards import flip
from tiny import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from grun.cache import weights
from grun.cache.weights import weights_hash


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder of a small model."""
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed whole."""
    names: list[str] = []
    real = weights.file_hash

    def counting(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(weights, "file_hash", counting)
    return names


def test_two_loads_of_one_folder_have_one_hash_and_its_files_are_read_whole_once(
    saved: Path, tmp_path: Path, hashed: list[str]
) -> None:
    first = weights_hash(load(saved), saved, tmp_path / "memory")
    assert weights_hash(load(saved), str(saved), tmp_path / "memory") == first
    assert hashed == ["model.safetensors"]
    assert weights_hash(load(saved), saved, None) == first
    shutil.copytree(saved, tmp_path / "moved")
    assert weights_hash(load(saved), tmp_path / "moved", tmp_path / "memory") == first
    assert len(hashed) == 3


@pytest.mark.parametrize("put_back", [False, True])
def test_a_file_changed_under_the_same_name_has_another_hash(
    put_back: bool, saved: Path, tmp_path: Path, hashed: list[str]
) -> None:
    base, file = load(saved), saved / "model.safetensors"
    before, status = weights_hash(base, saved, tmp_path / "memory"), file.stat()
    flip(file, status.st_size - 1)
    if put_back:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert weights_hash(base, saved, tmp_path / "memory") != before
    assert len(hashed) == 2
    flip(file, status.st_size - 1)
    assert weights_hash(base, saved, tmp_path / "memory") == before


def test_a_memory_that_is_damaged_or_cannot_be_written_costs_time_alone(
    saved: Path, tmp_path: Path, hashed: list[str]
) -> None:
    base = load(saved)
    right = weights_hash(base, saved, tmp_path)
    for text in ("no JSON", "[]", json.dumps({str(saved / "model.safetensors"): {"sha256": "0"}})):
        (tmp_path / "weights.json").write_text(text)
        assert weights_hash(base, saved, tmp_path) == right
    (tmp_path / "file").touch()
    assert weights_hash(base, saved, tmp_path / "file") == right
    assert len(hashed) == 5


def test_files_of_a_hub_id_are_those_of_its_snapshot_in_the_local_cache(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    repository = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(saved, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load(saved)
    of_folder = weights_hash(base, saved, None)
    assert weights_hash(base, "someone/small", None) == of_folder
    base.config._commit_hash = "a" * 40
    (repository / "refs" / "main").unlink()
    assert weights_hash(base, "someone/small", None) == of_folder
    assert len(hashed) == 3
    assert weights_hash(base, "someone/else", None) == weights_hash(base, None, None) != of_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_in_memory_is_known_by_every_value(dtype: torch.dtype) -> None:
    first, same = tiny(dtype=dtype), tiny(dtype=dtype)
    assert weights_hash(first, None, None) == weights_hash(same, None, None)
    flat = same.get_input_embeddings().weight.data.reshape(-1)
    assert flat.numel() // weights.PIECES > 1
    flat[1] += 1  # between the values that the fingerprint samples
    assert weights.fingerprint(first) == weights.fingerprint(same)
    assert weights_hash(first, None, None) != weights_hash(same, None, None)


def test_a_model_changed_after_loading_or_loaded_otherwise_is_another_model(saved: Path) -> None:
    base = load(saved)
    hashes = {weights_hash(base, saved, None), weights_hash(load(saved, torch.bfloat16), saved, None)}
    base.quantization_method = "some"
    hashes.add(weights_hash(base, saved, None))
    del base.quantization_method
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(1)
    hashes.add(weights_hash(base, saved, None))
    assert len(hashes) == 4
