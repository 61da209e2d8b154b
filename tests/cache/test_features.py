"""What a pooled gate reads of prompts is computed once, and is the same to the bit when it is read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, random_rows, tiny
from torch import Tensor

from grun import GrunModel
from grun.cache import features
from grun.cache.features import kept_features, kept_fits
from grun.cli import main
from grun.config.options import CacheConfig, MethodConfig, UnlearnConfig
from grun.data.encoding import EncodedRow
from grun.training.gate_fit import TOKENS, GateFit, Prompts, fit_gate, padded, prompt_features

PROMPTS = [EncodedRow(tuple(row), ()) for row in random_rows([9, 3, 5, 9, 4, 12, 7, 3, 8, 6])]


def wrapped(base: Any = None, **options: Any) -> GrunModel:
    torch.manual_seed(0)
    base = tiny(dtype=torch.float32) if base is None else base
    given = {"gate_blocks": [0, 1], "gate_pool": "maxmin", "edit_write": "sticky", "blocks": [2, 3], **options}
    return GrunModel.wrap(base, rank=2, **given).eval()


def kept(model: GrunModel, folder: Path | None, prompts: Sequence[EncodedRow] = PROMPTS) -> Tensor:
    config = UnlearnConfig(cache=CacheConfig(dir=None if folder is None else str(folder)))
    return torch.stack(list(kept_features(model, config)(prompts)))


def computed(model: GrunModel) -> Tensor:
    return torch.stack(prompt_features(model, PROMPTS, 0))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of prompts that the model is run on, one for each pass; passes hold 20 tokens."""
    counts: list[int] = []

    def counted(model: GrunModel, rows: Sequence[EncodedRow], pad_id: int) -> list[Tensor]:
        counts.append(len(rows))
        return prompt_features(model, rows, pad_id)

    monkeypatch.setattr(features, "prompt_features", counted)
    monkeypatch.setitem(TOKENS, "cpu", 20)
    return counts


def test_features_are_those_of_the_model_and_the_same_to_the_bit_when_they_are_read_back(
    tmp_path: Path, read: list[int]
) -> None:
    wanted = computed(wrapped())
    for model in (wrapped(), wrapped(), wrapped(blocks=[1, 3])):  # other edits change nothing that is read
        assert torch.equal(kept(model, tmp_path), wanted)
    assert sum(read) == len(PROMPTS)
    assert torch.equal(kept(wrapped(), None), wanted) and sum(read) == 2 * len(PROMPTS)


def test_a_prompt_that_was_read_before_is_not_read_again(tmp_path: Path, read: list[int]) -> None:
    first, order = kept(wrapped(), tmp_path, PROMPTS[:4]), [5, 0, 9, 1, 3, 2, 0, 7]
    found = kept(wrapped(), tmp_path, [PROMPTS[number] for number in order])
    assert torch.equal(found[1], first[0]) and torch.equal(found[6], first[0]) and torch.equal(found[3], first[1])
    whole = computed(wrapped())
    torch.testing.assert_close(found, whole[order], atol=1e-5, rtol=1e-5)  # float32, in batches of other sizes
    assert sum(read) == 4 + 3


def test_who_goes_on_with_some_of_the_files_finds_the_same(
    tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_BYTES", 2**10)
    wanted = kept(wrapped(), tmp_path)
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(files) > 2
    for path in files[1:-1]:
        path.unlink()
    before = sum(read)
    assert torch.equal(kept(wrapped(), tmp_path), wanted) and 0 < sum(read) - before < len(PROMPTS)


def test_a_damaged_file_is_made_anew(tmp_path: Path, read: list[int], caplog: pytest.LogCaptureFixture) -> None:
    wanted = kept(wrapped(), tmp_path)
    (path,) = tmp_path.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    torch.testing.assert_close(kept(wrapped(), tmp_path), wanted, atol=1e-5, rtol=1e-5)
    assert "is damaged" in caplog.text and sum(read) == len(PROMPTS) + 1
    torch.testing.assert_close(kept(wrapped(), tmp_path), wanted, atol=1e-5, rtol=1e-5)
    assert sum(read) == len(PROMPTS) + 1


def test_of_each_prompt_all_windows_are_kept_and_padded_alike(tmp_path: Path, read: list[int]) -> None:
    model, config = wrapped(gate_pool="windows"), UnlearnConfig(cache=CacheConfig(dir=str(tmp_path)))
    alone = [prompt_features(model, [prompt], 0)[0] for prompt in PROMPTS]
    assert {len(one) for one in alone} == {max(1, -(-(len(prompt.prompt_ids) - 8) // 4)) for prompt in PROMPTS}
    for _ in range(2):  # computed, and read back
        found = kept_features(model, config)(PROMPTS)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)  # float32, in batches of other sizes
    assert sum(read) == len(PROMPTS)
    gate = model.pooled
    assert gate is not None
    each = torch.cat([gate(padded([one])) for one in alone])
    torch.testing.assert_close(gate(padded(alone)), each)


def test_a_gate_is_fitted_once_to_the_same_prompts(tmp_path: Path) -> None:
    made: list[int] = []

    def gate(model: GrunModel, *, forget: int = 5, folder: Path | None = tmp_path, **options: Any) -> GateFit:
        config = UnlearnConfig(cache=CacheConfig(dir=None if folder is None else str(folder)))
        sides = [Prompts(rows, [str(row) for row in rows]) for rows in (PROMPTS[:forget], PROMPTS[forget:])]
        features_of, keep = kept_features(model, config), kept_fits(model, config)
        method = MethodConfig(gate_fit="logistic", **options)

        def counted(told: Any, make: Any) -> dict[str, Any]:
            return keep(told, lambda: made.append(0) or make())

        return fit_gate(model, *sides, method, features_of, keep=counted)

    first, second = wrapped(gate_pool="windows"), wrapped(gate_pool="windows", blocks=[1, 3])
    fitted, again = (replace(gate(model), seconds=0) for model in (first, second))
    assert fitted == again and len(made) == 1
    assert first.pooled is not None and second.pooled is not None
    weights = first.pooled.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in second.pooled.state_dict().items())
    assert any(bool(value.any()) for value in weights.values())
    gate(second, forget=4)
    gate(second, false_positives=0.4)
    gate(wrapped())
    for _ in range(2):
        gate(second, folder=None)
    assert len(made) == 1 + 3 + 2


def test_whatever_decides_them_has_entries_of_its_own(tmp_path: Path, read: list[int]) -> None:
    changed = tiny(dtype=torch.float32)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    turn = PROMPTS[0].prompt_ids[3:5]
    models = [
        wrapped(),
        wrapped(gate_pool="mean"),
        wrapped(gate_blocks=[1]),
        wrapped(reset_ids=turn),
        wrapped(tiny(dtype=torch.float64)),
        wrapped(changed),
    ]
    for number, model in enumerate(models, start=1):
        assert torch.equal(kept(model, tmp_path), computed(model))
        assert sum(read) == number * len(PROMPTS)
    assert len(list(tmp_path.glob("*/identity.json"))) == len(models) and VOCABULARY == changed.config.vocab_size


def test_the_cache_command_lists_and_removes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept(wrapped(), tmp_path)
    assert main(["cache", "list", f"dir={tmp_path}"]) == 0
    assert "1 " in capsys.readouterr().out
    assert main(["cache", "remove", f"dir={tmp_path}", "all=true"]) == 0
    assert not list(tmp_path.glob("*/*"))
