"""Corpora from PKU-SafeRLHF: the published split to the row, the split without leaks, and what the report counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from grun.data.benchmarks.safe_rlhf import Pair, build, leaks, read_preferences, sample, train_test_split
from grun.errors import ConfigError, DataError

PRIVACY = "Privacy Violation"
CATEGORIES = (PRIVACY, "Drugs", "White-Collar Crime")


def record(prompt: str, *responses: tuple[str, str | None]) -> dict[str, Any]:
    """A row of the data set: each response with the category in which it is unsafe, or None."""
    fields: dict[str, Any] = {"prompt": prompt}
    for i, (text, category) in enumerate(responses):
        fields |= {
            f"response_{i}": text,
            f"is_response_{i}_safe": category is None,
            f"response_{i}_harm_category": {name: name == category for name in CATEGORIES},
        }
    return fields


def published_size() -> list[dict[str, Any]]:
    """As many rows of each kind as the published data has, prompts in pairs."""
    kinds = [(PRIVACY, PRIVACY)] * 3000 + [(PRIVACY, None)] * 476 + [(None, PRIVACY)] * 539 + [(None, None)] * 13718
    return [
        record(f"prompt {number // 2}", (f"a{number}", first), (f"b{number}", second))
        for number, (first, second) in enumerate(kinds)
    ]


def with_shared_prompts() -> list[dict[str, Any]]:
    """Rows in which a prompt comes up to four times, with safe and unsafe responses, and some rows twice."""
    rows = [
        record(
            f"prompt {number % 40}",
            (f"a{number % 80}", PRIVACY if number % 3 else None),
            (f"b{number}", PRIVACY if number % 20 == 1 else None),
        )
        for number in range(160)
    ]
    return rows + [record(f"harmless {number % 30}", (f"c{number}", None), ("fine", None)) for number in range(90)]


# -- the published split ----------------------------------------------------------------------------------------------


def test_the_published_counts_come_out_of_as_many_rows() -> None:
    records = published_size()
    unsafe = [sum(not row[f"is_response_{i}_safe"] for row in records) for i in (0, 1)]
    safe = sum(row[f"is_response_{i}_safe"] for row in records for i in (0, 1))
    assert (unsafe, safe) == ([3476, 3539], 28451)
    made = build(records, PRIVACY, "published")
    assert (len(made.forget), len(made.forget_test)) == (5611, 1404)
    assert (len(made.retain_pool), len(made.retain_test), len(made.retain)) == (22760, 5691, 5611)


def test_unsafe_rows_are_split_for_each_response_and_safe_ones_at_once() -> None:
    records = published_size()
    made = build(records, PRIVACY, "published")
    assert [pair.response[0] for pair in made.forget] == ["a"] * 2780 + ["b"] * 2831
    assert [pair.response[0] for pair in made.forget_test] == ["a"] * 696 + ["b"] * 708
    safe = [
        Pair(row["prompt"], row[f"response_{i}"]) for i in (0, 1) for row in records if row[f"is_response_{i}_safe"]
    ]
    # Places that sklearn 1.9's train_test_split(range(28451), test_size=0.2, random_state=42) gives.
    assert made.retain_pool[:3] == [safe[place] for place in (2512, 11018, 18836)]
    assert made.retain_pool[-2:] == [safe[place] for place in (15795, 23654)]
    assert made.retain_test[:3] == [safe[place] for place in (25700, 12277, 10802)]


def test_splitting_gives_the_rows_of_sklearn_in_its_order() -> None:
    train, test = train_test_split(range(11))  # sklearn 1.9: train_test_split(..., test_size=0.2, random_state=42)
    assert train == [10, 2, 1, 8, 4, 7, 3, 6]
    assert test == [5, 0, 9]


@pytest.mark.parametrize(("rows", "count"), [(11, 4), (22760, 5611)])
def test_sampling_gives_the_rows_of_pandas_in_its_order(rows: int, count: int) -> None:
    assert sample(range(rows), count) == pandas.Series(range(rows)).sample(n=count, random_state=42).tolist()


def test_a_text_that_a_csv_file_loses_is_no_row_of_the_published_split() -> None:
    lost = [record(f"lost {number}", (text, PRIVACY), (text, None)) for number, text in enumerate(["", "None", "n/a"])]
    kept = [record(f"kept {number}", (text, PRIVACY), (text, None)) for number, text in enumerate(["none", " ", "-"])]
    made = build(lost + kept, PRIVACY, "published")
    for part in (made.forget + made.forget_test, made.retain_pool + made.retain_test):
        assert sorted(pair.prompt for pair in part) == ["kept 0", "kept 1", "kept 2"]
    harmless = [record(f"harmless {number}", ("fine", None), ("good", None)) for number in range(2)]
    by_prompt = build(lost + kept + harmless, PRIVACY, "by_prompt").forget
    assert not [pair for pair in by_prompt if not pair.response.strip()]


# -- the split by prompt ----------------------------------------------------------------------------------------------


def test_no_prompt_stands_on_both_sides_of_the_split_by_prompt() -> None:
    made = build(with_shared_prompts(), PRIVACY, "by_prompt")
    prompts = {name: {pair.prompt for pair in getattr(made, name)} for name in vars(made)}
    assert all(prompts.values())
    assert not prompts["forget"] & prompts["forget_test"]
    assert not (prompts["forget"] | prompts["forget_test"]) & (prompts["retain_pool"] | prompts["retain_test"])
    assert not prompts["retain_pool"] & prompts["retain_test"]
    assert set(made.retain) <= set(made.retain_pool)
    assert len(made.forget_test) / len(made.forget + made.forget_test) == pytest.approx(0.2, abs=0.1)
    counts = leaks(made)
    sizes = ("forget_test_rows", "forget_test_prompts")
    assert {name: count for name, count in counts.items() if name not in sizes} == dict.fromkeys(
        [name for name in counts if name not in sizes], 0
    )


def test_prompts_that_differ_in_outer_blanks_are_one() -> None:
    records = [record(f"{' ' * (number % 2)}p{number // 2}", ("bad", PRIVACY), ("ok", None)) for number in range(20)]
    records += [record(f"q{number}", ("fine", None), ("good", None)) for number in range(9)] + [
        record("p0 ", ("fine", None), ("fine", None))
    ]
    counts = leaks(build(records, PRIVACY, "by_prompt"))
    assert counts["forget_test_rows_with_forget_prompts"] == counts["retain_rows_with_forget_prompts"] == 0
    assert leaks(build(records, PRIVACY, "published"))["forget_test_rows_with_forget_prompts"] > 0


# -- the report -------------------------------------------------------------------------------------------------------


def test_leaks_are_counted_as_a_loop_counts_them() -> None:
    made = build(with_shared_prompts(), PRIVACY, "published")
    counts = leaks(made)
    forget = [pair.prompt for pair in made.forget]
    assert counts["forget_test_rows"] == len(made.forget_test)
    assert counts["forget_test_rows_with_forget_prompts"] == sum(pair.prompt in forget for pair in made.forget_test) > 0
    assert counts["forget_test_prompts"] == len({pair.prompt for pair in made.forget_test})
    assert counts["forget_test_prompts_in_forget"] == len({pair.prompt for pair in made.forget_test} & set(forget)) > 0
    assert counts["retain_rows_with_forget_prompts"] == sum(pair.prompt in forget for pair in made.retain) > 0
    pool = [pair.prompt for pair in made.retain_pool]
    assert counts["retain_test_rows_with_retain_prompts"] == sum(pair.prompt in pool for pair in made.retain_test) > 0
    repeated = sum(pair in made.forget[:place] for place, pair in enumerate(made.forget))
    assert counts["duplicate_forget_pairs"] == repeated > 0


# -- reading and refusing ---------------------------------------------------------------------------------------------


def test_rows_come_from_both_files_in_order(tmp_path: Path) -> None:
    for part in ("test", "train"):
        row = record(part, ("bad", PRIVACY), ("ok", None))
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert [row["prompt"] for row in read_preferences(str(tmp_path))] == ["train", "test"]


def test_without_a_folder_the_hub_is_asked_for_both_parts(hub: Any) -> None:
    hub.rows = [record("p", ("bad", PRIVACY), ("ok", None))]
    assert [row["prompt"] for row in read_preferences(None)] == ["p", "p"]
    assert hub.asked == [("PKU-Alignment/PKU-SafeRLHF", "alpaca-7b", part) for part in ("train", "test")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.pop("is_response_1_safe"), "line 1: field 'is_response_1_safe' is missing"),
        (lambda row: row.update(prompt=None), "line 1: field 'prompt' must be a text; it is null"),
        (lambda row: row.update(response_0_harm_category=[]), "'response_0_harm_category' must be an object; it is a"),
    ],
)
def test_a_malformed_row_is_named(spoil: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    row = record("p", ("bad", PRIVACY), ("ok", None))
    spoil(row)
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_preferences(str(tmp_path))


def test_a_missing_file_says_which_and_where_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*train.jsonl; give path, a folder .* leave path out"):
        read_preferences(str(tmp_path))


def test_unknown_names_and_too_few_rows_are_refused() -> None:
    records = [record("p", ("bad", PRIVACY), ("ok", None))]
    with pytest.raises(ConfigError) as refusal:
        build(records, "Privacy Violations", "published")
    assert "did you mean 'Privacy Violation'" in str(refusal.value)
    assert all(category in str(refusal.value) for category in CATEGORIES)
    with pytest.raises(ConfigError, match="known: by_prompt, published"):
        build(records, PRIVACY, "by_row")
    with pytest.raises(DataError, match="0 rows of Privacy Violation and 0 safe rows are too few"):
        build(records, PRIVACY, "by_prompt")
