"""A real chat model forgets two countries that it really knows, and nothing else (`bash cmd_test.sh --slow`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grun.cli import main
from grun.errors import ModelError
from grun.loading.fetching import folder_of

CHOSEN = ["forget=[Japan,Egypt]", "neighbors=3", "heldout=4", "unknown=2", "count=32"]


@pytest.mark.slow
def test_a_real_model_forgets_what_it_knows_of_two_countries(tmp_path: Path) -> None:
    """The model is the user's, so that it is downloaded once; answers are kept there too."""
    try:
        folder_of("smollm2")
    except ModelError as error:
        pytest.skip(str(error))
    options = ["profile=smollm2", *(f"data.countries.{one}" for one in CHOSEN)]
    adapter, evaluation = tmp_path / "idk", tmp_path / "evaluation"
    assert main(["unlearn", *options, "objective=idk", f"output_dir={adapter}", "cache.dir="]) == 0
    asked = ["data.limit=20", "with_base=before", f"adapters=[{adapter}]", f"output_dir={evaluation}"]
    assert main(["evaluate", *options, *asked]) == 0
    before, after = (json.loads((evaluation / name / "evaluation.json").read_text()) for name in ("before", "idk"))
    recall = {name: metrics.get("fact_recall") for name, metrics in after["sets"].items()}
    assert all(before["sets"][name]["fact_recall"] == 1 for name in recall if name not in ("sentences", "unknown"))
    assert recall["forget"] <= 0.05
    assert min(recall[name] for name in ("retain", "general")) >= 0.95
    assert after["sets"]["sentences"] == before["sets"]["sentences"]
