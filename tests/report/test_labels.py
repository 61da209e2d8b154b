"""What readers call runs: objective, parametrization and design, as far as these differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_results import write_run, write_tofu

from grun.report.columns import columns_of, legend
from grun.report.labels import label_runs, order_of, run_label
from grun.report.matrix import cells_of
from grun.report.result import Result, design_of
from grun.report.results import find_results
from grun.report.tables import shown_columns

EVERY_TOKEN = {"gate_read": "every_token", "gate_accumulate": "running_max", "edit_write": "every_token"}
PUBLISHED = {"gate_read": "last_prompt", "gate_accumulate": "none", "edit_write": "last_prompt"}


def run(folder: Path, name: str, objective: str = "idk", kind: str = "grun", seed: int = 1, **method: Any) -> Result:
    """An evaluated run with these options of the method."""
    config = {"seed": seed, "method": {"parametrization": kind, **method}}
    write_run(folder / name, objective, kind, config=config)
    return Result(name, "after", objective, kind, folder, folder / name, {}, objective.upper())


def labels(results: list[Result]) -> list[str]:
    label_runs(results)
    return [result.label for result in results]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, ""),  # written before there were such options
        (PUBLISHED, ""),
        (EVERY_TOKEN, "every token"),
        ({**PUBLISHED, "edit_write": "sticky"}, "sticky"),
        ({**EVERY_TOKEN, "edit_write": "sticky"}, "sticky"),
        ({**EVERY_TOKEN, "edit_write": "last_prompt"}, "gate every token"),
        ({**PUBLISHED, "edit_write": "sticky", "gate_blocks": [5]}, "pooled"),
        ({**PUBLISHED, "gate_blocks": None}, ""),
    ],
)
def test_a_design_is_called_by_where_its_edit_writes_then_by_where_its_gate_reads(
    method: dict[str, Any], expected: str
) -> None:
    assert design_of(method) == expected


def test_designs_are_told_apart_where_they_differ(tmp_path: Path) -> None:
    results = [run(tmp_path, "old"), run(tmp_path, "every", **EVERY_TOKEN), run(tmp_path, "s", edit_write="sticky")]
    assert labels(results) == ["IDK GRUN", "IDK GRUN every token", "IDK GRUN sticky"]
    assert [result.name for result in sorted(reversed(results), key=order_of)] == ["old", "every", "s"]


@pytest.mark.parametrize("method", [PUBLISHED, EVERY_TOKEN])
def test_where_all_are_grun_of_one_design_the_objective_is_enough(tmp_path: Path, method: dict[str, str]) -> None:
    assert labels([run(tmp_path, "a", "gd", **method), run(tmp_path, "b", "npo", **method)]) == ["GD", "NPO"]


def test_the_design_stands_beside_other_parametrizations_which_have_none(tmp_path: Path) -> None:
    results = [run(tmp_path, "a", kind="lora", **EVERY_TOKEN), run(tmp_path, "b", **EVERY_TOKEN)]
    assert labels(results) == ["IDK LoRA", "IDK GRUN every token"]
    assert run_label("idk", "grun", "8bit", "every token") == "IDK GRUN every token 8bit"


def test_labels_do_not_depend_on_labels_given_before(tmp_path: Path) -> None:
    first, second = run(tmp_path, "a", seed=1), run(tmp_path, "b", seed=2)
    assert labels([first, second]) == ["IDK s1", "IDK s2"]
    assert labels([first]) == ["IDK"]


def test_cells_of_the_matrix_are_named_by_their_design(tmp_path: Path) -> None:
    results = [run(tmp_path, f"{n}{seed}", seed=seed, **m) for n, m in enumerate(({}, EVERY_TOKEN)) for seed in (1, 2)]
    assert [(cell.label, cell.seeds) for cell in cells_of(results)] == [
        ("IDK GRUN", (1, 2)),
        ("IDK GRUN every token", (1, 2)),
    ]


def test_every_number_and_set_that_is_shown_is_explained_once(tmp_path: Path) -> None:
    results = find_results(write_tofu(tmp_path))
    columns = shown_columns(columns_of(results))
    words = [word for word, _ in legend(results)]
    assert len(set(words)) == len(words) and {"before", "retain only", "the others", "held-out set"} <= set(words)
    for column in columns:
        label = column.header.removeprefix("real authors ").removeprefix("world facts ")
        assert any(label.endswith(word) for word in words), column.header
