"""Blocks that stay in their files: the same run as of a model that is loaded, one block of it in memory at a time."""

from __future__ import annotations

import contextlib
import copy
import re
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from demo import random_model
from forked import Fork
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from watched import logged

from grun.cache.packed import PackedModel
from grun.cache.prefix import Freezer
from grun.cli import main
from grun.config.options import ModelConfig
from grun.data.encoding import EncodedRow
from grun.errors import ConfigError, ModelError
from grun.loading import streaming
from grun.loading.resolve import resolve
from grun.loading.streaming import files_to_stream, load_blocks, load_streamed, weight_map
from grun.method.fingerprint import fingerprint
from grun.method.position import Changes
from grun.runtime import memory
from grun.runtime.devices import lies_elsewhere
from pyvene_custom import find_blocks

DEPTH = 4
LARGE = 64
"""Blocks of a model of 120 MB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a random Llama of 4 blocks in several files, and the runs of it when it is loaded."""
    made = random_model(tmp_path_factory.mktemp("streaming"), blocks=DEPTH)
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    model.save_pretrained(made / "model", max_shard_size="100KB")
    (made / "model" / "model.safetensors").unlink()
    assert len(list((made / "model").glob("*.safetensors"))) > DEPTH
    for name, options in RUNS.items():
        assert unlearn(made, f"whole-{name}", "cache.build=whole", *options) == 0
    return made


RUNS = {
    "published": ["objective=npo", "design=published", "method.blocks=[1,3]"],
    "pooled": ["objective=gd", "design=pooled", "method.blocks=[2,3]", "method.gate_blocks=[0,1]"],
}


def unlearn(folder: Path, name: str, *arguments: str) -> int:
    own = [f"model.path={folder / 'model'}", f"output_dir={folder / name}", f"cache.dir={folder / name}-cache"]
    training = ["method.rank=2", "train.epochs=2", "train.batch_size=2", "train.save_steps=0"]
    return main(
        [
            "unlearn",
            *(f"data.demo.{k}={v}" for k, v in vars(demo.SIZES).items() if k != "naming"),
            *training,
            *own,
            *arguments,
        ]
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is read from its file."""
    counts: Counter[str] = Counter()
    get = OffloadedWeightsLoader.__getitem__

    def counted(self: OffloadedWeightsLoader, name: str) -> torch.Tensor:
        counts[name] += 1
        return get(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return counts


@pytest.mark.parametrize("name", list(RUNS))
def test_a_streamed_run_is_the_one_of_a_loaded_model(name: str, folder: Path) -> None:
    assert unlearn(folder, name, "cache.build=stream", *RUNS[name]) == 0
    for one, other in zip(logged(folder / name), logged(folder / f"whole-{name}"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    found, expected = (load_file(folder / run / "adapter_model.safetensors") for run in (name, f"whole-{name}"))
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def streamed(folder: Path) -> Any:
    source = str(folder / "model")
    return load_streamed(ModelConfig(device="cpu"), source, weight_map(source, None))


def test_blocks_are_there_while_they_are_run_and_those_that_are_trained_for_good(folder: Path) -> None:
    model, whole = streamed(folder), AutoModelForCausalLM.from_pretrained(folder / "model")
    blocks = find_blocks(model)[1]
    there: list[int] = []
    for block in blocks:
        block.mlp.register_forward_hook(lambda *_: there.append(sum(not lies_elsewhere(one) for one in blocks)))
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert there == [1] * DEPTH
    load_blocks(model, 2)
    assert [lies_elsewhere(block) for block in blocks] == [True, True, False, False]
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, whole(ids).logits)
    assert fingerprint(model) == fingerprint(whole)


@pytest.mark.parametrize("changes", ["last_prompt", "every_token"])
@pytest.mark.parametrize(("budget", "times"), [(1 << 30, 1), (1, 6)])
def test_a_block_is_read_once_for_all_passes_that_the_budget_lets_go_together(
    changes: Changes, budget: int, times: int, folder: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grun.cache.prefix.tokens_per_pass", lambda _: 16)
    rows = [EncodedRow(tuple(range(5, 12 + number)), (1, 2, 3)) for number in range(6)]
    shards = []
    for model in (streamed(folder), AutoModelForCausalLM.from_pretrained(folder / "model")):
        shards.append(list(Freezer(PackedModel(model), 1, changes=changes, budget=budget).shards(rows)))
    needed = DEPTH if changes == "last_prompt" else 2
    assert {reads[f"model.layers.{block}.mlp.up_proj.weight"] for block in range(needed)} == {times}
    for one, other in zip(*shards, strict=True):
        assert one.rows == other.rows and torch.equal(one.states, other.states)
        assert torch.equal(one.prompts, other.prompts)


def test_it_is_chosen_where_memory_is_short_and_refused_in_one_line_where_it_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(*options: str, gguf: bool = False) -> bool:
        config = resolve("unlearn", ["profile=demo", f"model.path={folder / 'model'}", "model.device=cpu", *options])
        return bool(files_to_stream(config, str(folder / "model"), gguf))

    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    for free, answer in ((2 * size, False), (size, True), (None, False)):
        monkeypatch.setattr(streaming, "free_memory", lambda *_, free=free: free)
        assert wanted() is answer
    monkeypatch.setattr(streaming, "free_memory", lambda *_: size)
    assert wanted("model.dtype=bfloat16") is False  # half of it
    assert wanted("cache.build=whole") is False
    refused = ["method.parametrization=lora", "train.engine=plain", "model.quantization=4bit", "model.device_map=auto"]
    for option in refused:
        plain = ["design=published"] if "lora" in option else []
        assert wanted(option, *plain) is False
        with pytest.raises(ConfigError, match="cache.build=stream: .*" + option.partition("=")[0]):
            wanted(option, "cache.build=stream", *plain)
    with pytest.raises(ConfigError, match="GGUF"):
        wanted("cache.build=stream", gguf=True)


def test_files_that_do_not_hold_the_models_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.2.mlp.up_proj", "layers.2.mlp.other"))
    with pytest.raises(ModelError, match="layers.2.mlp.up_proj.weight is missing.*cache.build=whole"):
        streamed(tmp_path)


def within(limit: int, folder: Path, name: str, build: str) -> int:
    """Status of a run, in a fork, that may take `limit` bytes of addresses more than are in use now."""

    def run() -> int:
        most = in_use() + limit
        with open(folder / f"{name}.log", "w") as log, contextlib.redirect_stderr(log):
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            return unlearn(folder, name, f"cache.build={build}", "design=published", f"method.blocks=[{LARGE - 1}]")

    return Fork(run).wait()


def test_a_model_larger_than_the_memory_that_is_left_is_unlearned(tmp_path: Path) -> None:
    """benchmarks/streaming.py does it at 4 GiB."""
    made = random_model(tmp_path, blocks=LARGE, width=256)
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    model.save_pretrained(made / "model", max_shard_size="5MB")
    (made / "model" / "model.safetensors").unlink()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    del model
    assert within(2 * size // 3, made, "streamed", "stream") == 0, (made / "streamed.log").read_text()
    assert within(2 * size // 3, made, "auto", "auto") == 0
    assert within(2 * size // 3, made, "whole", "whole") != 0
    assert logged(made / "streamed") == logged(made / "auto")


def in_use() -> int:
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_free_memory_heeds_a_limit_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.free_memory()
    assert before is not None and before > 0
    limit = in_use() + 12345678
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    found = memory.free_memory()
    assert found is not None and 0 < found <= 12345678
