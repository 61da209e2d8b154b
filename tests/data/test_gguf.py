"""A GGUF file is a base model like any other, its weights unpacked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from demo import own_rows
from made_gguf import save_twin, write_gguf
from transformers import AutoModelForCausalLM

from grun.cache.weights import weight_files
from grun.cli import main
from grun.config.options import ModelConfig
from grun.errors import ConfigError, ModelError
from grun.loading.models import load_base
from grun.method.fingerprint import fingerprint


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_twin(tmp_path_factory.mktemp("twin") / "model")


@pytest.fixture(scope="module")
def file(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", twin)


def loaded(path: Path, **options: Any) -> tuple[Any, Any]:
    model, tokenizer, _ = load_base(ModelConfig(path=str(path), device="cpu", **options))
    return model, tokenizer


def test_a_file_is_its_twin_with_a_tokenizer_of_its_own_or_the_one_beside_it(
    twin: Path, file: Path, tmp_path: Path
) -> None:
    expected, of_twin = loaded(twin)
    ids = of_twin("What is the capital of Japan?", return_tensors="pt")["input_ids"]
    shutil.copy(file, tmp_path / "beside.gguf")
    shutil.copy(twin / "tokenizer.json", tmp_path)
    shutil.copy(twin / "tokenizer_config.json", tmp_path)
    for path in (file, file.parent, tmp_path / "beside.gguf"):
        model, tokenizer = loaded(path)
        assert fingerprint(model) == fingerprint(expected) and not hasattr(model.config, "quantization_config")
        assert torch.equal(model(ids).logits, expected(ids).logits)
        text = "<|im_start|>user\nWhere's  Añá?\n日本 12"
        assert tokenizer(text)["input_ids"] == of_twin(text)["input_ids"]
        assert model.config._name_or_path == str(path) and weight_files(model, path)[0].suffix == ".gguf"
        assert tokenizer.chat_template == of_twin.chat_template or path.parent == tmp_path


def test_packed_weights_are_unpacked(twin: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(twin)
    model, tokenizer = loaded(write_gguf(tmp_path / "q8.gguf", twin, gguf.GGMLQuantizationType.Q8_0))
    worst = max((a - b).abs().max() for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert 0 < worst < 0.01  # of weights up to 1.5: half a step of 255
    assert all(parameter.is_floating_point() and parameter.requires_grad for parameter in model.parameters())
    assert loaded(tmp_path / "q8.gguf", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_what_was_trained_on_the_twin_acts_on_the_file(twin: Path, file: Path, tmp_path: Path) -> None:
    names = ("forget", "retain")
    data = own_rows(tmp_path, *([{"question": f"{q}{n}?", "answer": f"A{n}."} for n in range(3)] for q in names))
    options = ["method.blocks=[1]", "train.epochs=1", "objective=idk", "cache.dir=null", "data.template=auto"]
    for name, path in (("of_twin", twin), ("of_file", file)):
        command = [*data, *options, f"model.path={path}", "model.device=cpu", f"output_dir={tmp_path / name}"]
        assert main(["unlearn", *command]) == 0
    both = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("of_twin", "of_file")]
    assert both[0] == both[1]
    command = [*data, "data.template=auto", f"adapter={tmp_path / 'of_twin'}", "model.device=cpu", "max_new_tokens=3"]
    for name, path in (("twin", twin), ("file", file)):
        assert main(["evaluate", *command, f"model.path={path}", f"output_dir={tmp_path / 'on' / name}"]) == 0
    tables = [(tmp_path / "on" / name / "scores.jsonl").read_text() for name in ("twin", "file")]
    assert tables[0] == tables[1]


def test_what_cannot_be_loaded_is_one_line(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF", b"not this", file.read_bytes()[:5000]):
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match="damaged.gguf' cannot be loaded") as caught:
            loaded(damaged)
        assert "\n" not in str(caught.value)
    shutil.copy(damaged, tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files \(damaged.gguf, other.gguf\); give one"):
        loaded(tmp_path)
    with pytest.raises(ModelError, match="absent.gguf: no such file"):
        loaded(tmp_path / "absent.gguf")
    with pytest.raises(ConfigError, match="model.quantization=8bit is not for GGUF"):
        loaded(file, quantization="8bit")
