"""Attacks grouped by what the attacker has, and the curves of those who ask again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_suites import BEFORE, FLOOR, LEAKY, leak, searched, write_seeds
from made_suites import write_attacked as write

from grun.evaluation.attacks.base import ATTACKS
from grun.report import figures
from grun.report.attack_groups import GROUPS, attack_groups, group_of
from grun.report.attack_pictures import draw_curves
from grun.report.attack_results import find_attacked

AT_K = {way: {str(k): leak(k / 8 * most) for k in (1, 2, 4)} for way, most in (("temperature 0.7", 1), ("hot", 2))}
MORE = {
    "linear_probe": {"access": "read_out", **leak(0.7), "worst": 0.7},
    "logit_lens": {"access": "read_out", **leak(0.6), "worst": 0.6},
    "adaptive": searched(0.0, 0.2, 0.5),
    "leak_at_k": {"access": "search", **leak(0.55), "worst": 0.55, "at_k": AT_K, "floor": leak(0.1)},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A method that leaks; of the probe the floor is high."""
    folder = tmp_path / "results"
    write(folder, "before", BEFORE, more=MORE)
    floors = {"linear_probe": {**MORE["linear_probe"], "leak": 0.65}, "logit_lens": {**MORE["logit_lens"], "leak": 0.1}}
    write(folder, "retain_only", FLOOR, more=floors)
    write(folder, "published", LEAKY, more=MORE)
    return folder


def groups_of(folder: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    ((_, groups),) = attack_groups(find_attacked(folder))
    opened = [[[inner.label, *inner.cells] for inner in table.lines] for table in groups.inside]
    return [(line.label, line.cells, inner) for line, inner in zip(groups.lines, opened, strict=True)]


def test_the_worst_attack_of_a_group_is_the_furthest_above_its_floor_and_the_worst_group_is_first(
    results: Path,
) -> None:
    assert [(group, cells) for group, cells, _ in groups_of(results)] == [
        ("who begins the answer", ["prefill 1", "0.98 (0.87 to 1.00)", "0.02", "-", "0.90"]),
        ("who reads scores or hidden states", ["logit lens", "0.60 (0.45 to 0.74)", "0.10", "-", "0.60"]),
        ("who asks again and again", ["leak at k", "0.55 (0.40 to 0.69)", "-", "0.10", "0.55"]),
        ("who writes the prompt", ["few shot", "0.43 (0.29 to 0.58)", "0.02", "-", "0.90"]),
        ("who draws many answers", ["samples", "0.02 (0.00 to 0.12)", "0.02", "-", "0.90"]),
    ]


def test_a_line_opens_into_every_attack_of_its_group_with_all_intervals(results: Path) -> None:
    opened = {group: lines for group, _, lines in groups_of(results)}
    assert opened["who reads scores or hidden states"] == [
        ["logit lens", "0.60 (0.45 to 0.74)", "0.10 (0.45 to 0.74)", "-", "0.60 (0.45 to 0.74)"],
        ["linear probe", "0.70 (0.55 to 0.82)", "0.65 (0.55 to 0.82)", "-", "0.70 (0.55 to 0.82)"],
    ]
    assert opened["who asks again and again"][1] == [
        *("adaptive", "0.50 (0.35 to 0.65)", "-", "0.10 (0.04 to 0.23)", "0.50 (0.35 to 0.65)")
    ]
    names = [line[0] for lines in opened.values() for line in lines]
    assert sorted(names) == sorted(name.replace("_", " ") for name in [*MORE, *LEAKY] if not name.startswith("worst"))


def test_every_attack_on_forget_rows_is_in_a_group_that_has_words() -> None:
    groups = {name: group_of(name, ATTACKS.get(name).access) for name in ATTACKS.names()}
    missing = {name: group for name, group in groups.items() if group not in GROUPS.values()}
    assert all(ATTACKS.get(name).retention for name in missing), missing
    assert set(GROUPS.values()) <= set(groups.values())
    begun = {name for name, group in groups.items() if group == "who begins the answer"}
    assert begun == {name for name in groups if name.startswith("prefill_")}


# -- curves -----------------------------------------------------------------------------------------------------------


def lines_of(axes: Any) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Points by color and style; the empty lines of the legend are left out."""
    drawn = [(line, list(zip(*line.get_data(), strict=True))) for line in axes.get_lines()]
    return {(line.get_color(), line.get_linestyle()): points for line, points in drawn if points}


def test_a_curve_has_a_line_a_model_and_its_floor_dashed(results: Path) -> None:
    loaded = find_attacked(results)
    figure = draw_curves(loaded)
    assert figure is not None
    adaptive, cool, hot = figure.axes
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["adaptive", "leak at k, temperature 0.7", "leak at k, hot"]
    colors = figures.colors_of(loaded)
    before, published = colors["before"], colors["published"]
    curve, floor = [(0, 0.0), (10, 0.2), (200, 0.5)], [(0, 0.1), (10, 0.1), (200, 0.1)]
    assert lines_of(adaptive) == {
        (color, style): points for color in (before, published) for style, points in (("-", curve), ("--", floor))
    }
    assert lines_of(cool)[published, "-"] == [(1, 0.125), (2, 0.25), (4, 0.5)]
    assert lines_of(hot)[published, "-"] == [(1, 0.25), (2, 0.5), (4, 1.0)]
    assert [label.get_text() for label in adaptive.get_xticklabels()] == ["0", "10", "200"]
    band = adaptive.collections[0].get_paths()[0].vertices  # of the method alone
    assert len(adaptive.collections) == 1 and band[:, 1].max() == pytest.approx(leak(0.5)["interval"][1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("before", "rows never taught, in each model's color", "published")
    ]


def test_a_curve_over_seeds_is_the_mean_where_all_seeds_have_it(tmp_path: Path) -> None:
    write(tmp_path, "before", BEFORE)
    write_seeds(tmp_path, "idk", FLOOR, more={"adaptive": searched(0.0, 0.2, 0.3)})
    write(tmp_path, "retain_only", FLOOR, more={"adaptive": searched(0.0, 0.0, 0.1)})
    write_seeds(tmp_path, "idk", FLOOR, FLOOR, more={"adaptive": searched(0.0, 0.4, steps=(0, 10))})
    write_seeds(tmp_path, "idk", FLOOR, more={"adaptive": searched(0.0, 0.2, 0.3)})
    loaded = find_attacked(tmp_path)
    figure = draw_curves(loaded)
    assert figure is not None
    lines = lines_of(figure.axes[0])
    assert lines[figures.PALETTE[0], "-"] == [(0, 0.0), (10, pytest.approx(0.3))]
    assert ("#000000", "--") in lines and ("#000000", "-") not in lines
