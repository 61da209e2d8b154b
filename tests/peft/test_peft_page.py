"""The code of docs/use_with_peft.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save_chat_model
from edited_models import strong
from transformers import AutoModelForCausalLM

from grun import GrunModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use_with_peft.md"


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_chat_model(Path("MODEL"), blocks=6)
    for seed, name in enumerate(("mine", "other")):
        torch.manual_seed(seed)
        model = strong(GrunModel.wrap(AutoModelForCausalLM.from_pretrained("MODEL"), blocks=[3, 5], gate_bias=9.0))
        model.save_pretrained(Path("results") / name)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert not torch.equal(names["answer"], names["of_base"])
    assert [*names["edited"].last_gates] == [3, 5]
    for folder in ("both", "both/other", "trained", "trained/checkpoint-5"):
        GrunModel.from_pretrained(AutoModelForCausalLM.from_pretrained("MODEL"), Path("results") / folder)
