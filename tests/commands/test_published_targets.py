"""open-unlearning's taught and retain-only models by their hub ids, on folders of that layout with tiny weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_model import save_chat_model

from grun.cli import main

PROFILE = "profile=tofu_llama3.2_1b"
TARGET, RETAINED = (f"open-unlearning/tofu_Llama-3.2-1B-Instruct_{name}" for name in ("full", "retain90"))
BLOCKS = 16
TEMPLATE = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}

{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>
{%- for m in messages if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
"""Written for this test in the form of Llama 3's: the headers, the date and the system message that its models see."""


def save_rows(folder: Path) -> None:
    """TOFU's files: 20 rows, the last two with paraphrases and wrong answers too, and a holdout."""
    folder.mkdir()
    rows = [{"question": f"Who wrote book {number}?", "answer": f"Author {number}."} for number in range(22)]
    further = {"paraphrased_answer": "It was the author.", "perturbed_answer": ["Nobody."]}
    splits = {"full": rows[:20], "forget10_perturbed": [row | further for row in rows[18:20]], "holdout10": rows[20:]}
    for name, content in splits.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for seed, name in enumerate((TARGET, RETAINED)):
        model = save_chat_model(folder / name, BLOCKS, seed)
        (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    save_rows(folder / "rows")
    few = ["data.path=rows", "model.dtype=float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the hub ids are folders there
        trained = ["train.epochs=1", "objective=gd", "output_dir=results/gd", "cache.dir="]
        assert main(["unlearn", PROFILE, *few, *trained]) == 0
        asked = [*few, "compat=open-unlearning", "max_new_tokens=2"]
        retained = "results/evaluation/retain_only"
        assert main(["evaluate", PROFILE, *asked, f"model.path={RETAINED}", f"output_dir={retained}"]) == 0
        adapters = ["adapters=[results/gd]", "with_base=before", f"reference={retained}"]
        assert main(["evaluate", PROFILE, *asked, *adapters, "output_dir=results/evaluation"]) == 0
    return folder / "results"


def test_the_target_is_unlearned_at_the_depth_of_the_published_blocks(results: Path) -> None:
    config = json.loads((results / "gd" / "adapter_config.json").read_text())
    assert config["blocks"] == [10, 12, 15]


def test_forget_quality_compares_with_the_retain_only_target(results: Path) -> None:
    for name in ("before", "gd"):
        found = json.loads((results / "evaluation" / name / "evaluation.json").read_text())
        assert 0 < found["reference"]["forget_quality"] <= 1
        assert "mia_min_k" in found["overall"]
