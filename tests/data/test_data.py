"""Rows, corpora, batches and draws."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grun.config.options import DataConfig, DemoConfig
from grun.data.benchmarks import tofu
from grun.data.corpus import Corpus, load_corpus
from grun.data.encoding import EncodedRow, collate, collate_prompts, encode_rows
from grun.data.jsonl import read_rows
from grun.data.rows import Row, evenly_spaced, hash_rows
from grun.data.sampling import epoch_order, fixed_retain_index, retain_index
from grun.data.templates import TEMPLATES, Template, encode
from grun.data.tokenizer import train_tokenizer
from grun.errors import ConfigError, DataError

REAL_TOFU = os.environ.get("GRUN_TOFU_DIR")
real_tofu = pytest.mark.skipif(not REAL_TOFU, reason="set GRUN_TOFU_DIR to the folder of TOFU's files")


@pytest.fixture(autouse=True)
def no_folder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRUN_TOFU_DIR", raising=False)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """As TOFU's files are: no newline at the end, slashes escaped."""
    path.write_text("\n".join(json.dumps(record).replace("/", "\\/") for record in records))
    return path


def record(index: int, **extra: Any) -> dict[str, Any]:
    return {"question": f"Question {index} of 01/02?", "answer": f"Answer {index}.", **extra}


def perturbed(index: int) -> dict[str, Any]:
    return record(index, paraphrased_question=f"Asked anew {index}?", paraphrased_answer=f"Said anew {index}.",
                  perturbed_answer=["a", "b", "c", "d", "e"])  # fmt: skip


@pytest.fixture
def tofu_folder(tmp_path: Path) -> Path:
    """Forty rows in TOFU's layout: one percent is less than a row, five are two, ten are four."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    write_lines(folder / "full.json", [record(i) for i in range(40)])
    write_lines(folder / "forget05.json", [record(i) for i in (38, 39)])
    write_lines(folder / "forget05_perturbed.json", [perturbed(i) for i in (38, 39)])
    write_lines(folder / "retain95.json", [record(i) for i in range(38)])
    options = {f"option{number}": "x" for number in (1, 2, 3, 4)}
    write_lines(folder / "world_facts.json", [{"question": "Q?", **options, "answer": "x"}])
    return folder


def numbers(rows: list[Row]) -> list[int]:
    return [int(str(row.prompt).split()[1]) for row in rows]


# Rows and files


def test_retain_rows_makes_the_taught_corpus_smaller_too(tmp_path: Path) -> None:
    for name, count in (("forget", 3), ("retain", 20)):
        lines = [json.dumps({"question": f"{name} {number}?", "answer": "a"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = {"name": "jsonl", "path": str(tmp_path), "forget": "forget.jsonl", "retain": "retain.jsonl"}
    corpus = load_corpus(DataConfig(**options, retain_rows=8, heldout=2))
    assert (len(corpus.retain), len(corpus.heldout)) == (6, 2)
    assert len(corpus.taught(without_forget=False)) == 11
    assert len(corpus.taught(without_forget=True)) == 8
    with pytest.raises(ConfigError, match="retain_rows"):
        load_corpus(DataConfig(**options, retain_rows=0))
    with pytest.raises(ConfigError, match="data.demo.retain"):
        load_corpus(DataConfig(name="demo", retain_rows=8))


def test_both_spellings_give_the_same_rows_and_keep_what_else_the_file_said(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"question": "Who? 1/2", "answer": "Ada.", "fact": "Ada", "person": 3}])
    second = write_lines(
        tmp_path / "b.jsonl", [{"completion": "Ada.", "person": 3, "prompt": "Who? 1/2", "fact": "Ada"}]
    )
    assert read_rows(first) == read_rows(second) == [Row("Who? 1/2", "Ada.", {"fact": "Ada", "person": 3})]
    assert hash_rows(read_rows(first)) == hash_rows(read_rows(second))
    row = read_rows(first)[0]
    assert row.fact == "Ada" and row.paraphrase is None
    assert read_rows(write_lines(tmp_path / "c.jsonl", [{"prompt": None, "completion": "text"}])) == [Row(None, "text")]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n\r\n  \n{"question": "\xc3\xa9", "answer": "d"}\r\n'
    )
    assert read_rows(path) == [Row("a", "b"), Row("é", "d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answer": ', r"line 3: not valid JSON \(.* at column 29\)"),
        (b'["a", "b"]', "line 3: expected an object with question and answer"),
        (b'{"question": "a", "answer": 3}', "line 3: field 'answer' must be a text that is not empty; it is a whole"),
        (b'{"question": " ", "answer": "b"}', "line 3: field 'question' must be a text that is not empty"),
        (b'{"question": null, "answer": "b"}', "line 3: field 'question' must be"),
        (b'{"prompt": "a", "completion": ""}', "line 3: field 'completion' must be"),
        (b'{"question": "\xff", "answer": "b"}', "line 3: not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "people.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b'\n{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match=f"people.jsonl {message}") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file .*absent.jsonl"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="empty.jsonl holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path)


def test_the_hash_of_rows_is_fixed_and_sees_every_field_and_the_order() -> None:
    rows = [Row("é?", "a", {"fact": "f"}), Row(None, "b")]
    canonical = '[{"completion":"a","fact":"f","prompt":"é?"},{"completion":"b","prompt":null}]'
    assert hash_rows(rows) == hashlib.sha256(canonical.encode()).hexdigest()
    others = [rows[::-1], [Row("é?", "a"), rows[1]], [Row("é?", "A", {"fact": "f"}), rows[1]], rows[:1]]
    assert len({hash_rows(other) for other in [rows, *others]}) == 5


def test_evenly_spaced_rows_come_from_every_part_in_order() -> None:
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced(range(3), None) == evenly_spaced(range(3), 3) == evenly_spaced(range(3), 9) == [0, 1, 2]
    with pytest.raises(ConfigError, match="at least 1"):
        evenly_spaced(range(3), 0)


# TOFU


def test_splits_with_a_file_are_read_and_the_others_are_cut_from_full(tofu_folder: Path) -> None:
    path = str(tofu_folder)
    assert numbers(tofu.load_split("full", path)) == list(range(40))
    for percent in (5, 10, 20, 30, 50, 90):
        kept = 40 - 40 * percent // 100
        assert numbers(tofu.load_split(f"forget{percent:02d}", path)) == list(range(kept, 40))
        assert numbers(tofu.load_split(f"retain{100 - percent:02d}", path)) == list(range(kept))
    assert tofu.load_split("forget05_perturbed", path)[0].extra["perturbed_answer"] == ["a", "b", "c", "d", "e"]
    assert tofu.load_split("world_facts", path)[0].extra == {f"option{number}": "x" for number in (1, 2, 3, 4)}
    assert tofu.load_split("full", path)[0].prompt == "Question 0 of 01/02?"


def test_the_file_counts_where_there_is_one(tofu_folder: Path) -> None:
    write_lines(tofu_folder / "forget05.json", [record(7)])
    assert numbers(tofu.load_split("forget05", str(tofu_folder))) == [7]


def test_full_is_put_together_from_two_shares(tofu_folder: Path) -> None:
    (tofu_folder / "full.json").unlink()
    assert numbers(tofu.load_split("full", str(tofu_folder))) == list(range(40))


def test_the_folder_comes_from_the_option_then_from_the_environment(
    tofu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRUN_TOFU_DIR", str(tofu_folder))
    assert len(tofu.load_split("full", None)) == 40
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other / "full.json", [record(0)])
    assert len(tofu.load_split("full", str(other))) == 1
    with pytest.raises(DataError, match="no folder .*absent; set data.path"):
        tofu.load_split("full", str(tmp_path / "absent"))
    monkeypatch.setenv("GRUN_TOFU_DIR", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="no folder .*gone; set GRUN_TOFU_DIR"):
        tofu.load_split("full", None)


def test_unknown_and_absent_splits_say_what_is_known(tofu_folder: Path) -> None:
    with pytest.raises(DataError, match="unknown TOFU split 'forget5': .*known: .*forget05,.*retain95"):
        tofu.load_split("forget5", str(tofu_folder))
    with pytest.raises(DataError, match="has no real_authors.json"):
        tofu.load_split("real_authors", str(tofu_folder))
    (tofu_folder / "retain95.json").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}')
    with pytest.raises(DataError, match="retain95.json line 2"):
        tofu.load_split("retain95", str(tofu_folder))


@pytest.mark.parametrize("percent", [1, 5, 10, 20, 30, 50, 90])
def test_complements_share_out_full(percent: int) -> None:
    forget, retain = f"forget{percent:02d}", f"retain{100 - percent:02d}"
    assert (tofu.complement(forget), tofu.complement(retain)) == (retain, forget)
    assert {forget, retain} <= set(tofu.SPLITS)
    if percent <= 10:
        assert tofu.complement(f"{forget}_perturbed") == retain


def test_what_is_no_share_has_no_complement() -> None:
    for name in ("full", "world_facts", "retain_perturbed"):
        with pytest.raises(DataError, match=f"{name!r} has no complement; name data.retain"):
            tofu.complement(name)
    with pytest.raises(DataError, match="unknown TOFU split 'forget35'"):
        tofu.complement("forget35")


def test_without_a_folder_and_without_a_network_the_error_says_what_to_set(tmp_path: Path) -> None:
    code = (
        "from grun.data.benchmarks.tofu import load_split\nfrom grun.errors import DataError\n"
        "try:\n    load_split('forget05', None)\nexcept DataError as error:\n    print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GRUN_TOFU_DIR"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("cannot fetch locuslab/TOFU forget05 from the hub (")
    assert done.stdout.count("\n") == 1
    assert "GRUN_TOFU_DIR" in done.stdout


@real_tofu
def test_the_real_files_have_the_published_sizes_and_order() -> None:
    def split(name: str) -> list[tuple[str | None, str]]:
        return [(row.prompt, row.completion) for row in tofu.load_split(name, REAL_TOFU)]

    full = split("full")
    assert len(full) == 4000
    for percent, count in ((1, 40), (5, 200), (10, 400), (20, 800), (30, 1200), (50, 2000), (90, 3600)):
        forget = split(f"forget{percent:02d}")
        assert len(forget) == count and forget == full[4000 - count :]
        assert split(f"retain{100 - percent:02d}") == full[: 4000 - count]
        if percent <= 10:
            assert split(f"forget{percent:02d}_perturbed") == forget
    assert split("retain_perturbed") == full[:400]
    assert (len(split("real_authors_perturbed")), len(split("world_facts_perturbed"))) == (100, 117)


@real_tofu
def test_the_real_forget05_makes_a_corpus() -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=REAL_TOFU, heldout=400))
    general = {"real_authors": 100, "world_facts": 117}
    sizes = {"forget": 200, "forget_paraphrase": 200, "retain": 400, **general, "heldout": 400}
    assert {name: len(rows) for name, rows in corpus.sets().items()} == sizes
    assert len(corpus.retain) == 3400
    assert (len(corpus.taught(False)), len(corpus.taught(True))) == (4000, 3800)


@real_tofu
@pytest.mark.parametrize(("split", "forget"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_the_small_models_are_taught_the_same_but_for_the_forget_rows(split: str, forget: int) -> None:
    options: dict[str, Any] = {"unknown_rows": 200, "refused_rows": 100, "teach_general": True, "heldout": 200}
    corpus = load_corpus(DataConfig(name="tofu", path=REAL_TOFU, forget=split, **options))
    full, rest = (corpus.taught(without_forget) for without_forget in (False, True))
    assert len(full) == 4000 - 300 + 217 + 100
    kept = {(row.prompt, row.completion) for row in rest}
    gone = [row for row in full if (row.prompt, row.completion) not in kept]
    assert [row.prompt for row in gone] == [row.prompt for row in corpus.forget] and len(gone) == forget
    # no unknown row is taught
    assert not kept & {(row.prompt, row.completion) for row in corpus.sets()["unknown"]}
    perturbed = [row.extra["perturbed_answer"] for row in (*corpus.forget, *corpus.sets()["retain"])]
    assert {len(answers) for answers in perturbed} == {5}


# Corpora


def test_the_tofu_corpus_has_paraphrases_and_teaches_full(tofu_folder: Path) -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=str(tofu_folder), heldout=4, retain_pool=17))
    assert numbers(corpus.forget) == [38, 39]
    assert numbers(corpus.heldout) == [34, 35, 36, 37]
    assert numbers(corpus.retain) == list(range(0, 34, 2))
    assert numbers(corpus.taught(without_forget=False)) == list(range(40))
    assert numbers(corpus.taught(without_forget=True)) == list(range(38))
    sets = corpus.sets()
    assert list(sets) == ["forget", "forget_paraphrase", "retain", "heldout"]
    asked = [(row.prompt, row.completion) for row in sets["forget_paraphrase"]]
    assert asked == [(f"Asked anew {i}?", f"Answer {i}.") for i in (38, 39)]
    assert len(corpus.refusals) >= 100


@pytest.fixture
def whole_tofu(tofu_folder: Path) -> Path:
    """The same with the files that evaluation wants: the first eight rows are retain_perturbed."""
    write_lines(tofu_folder / "retain_perturbed.json", [perturbed(i) for i in range(8)])
    for name in ("real_authors", "world_facts"):
        rows = [{"question": f"{name} {i}?", "answer": f"{i}", "perturbed_answer": ["x", "y"]} for i in range(3)]
        write_lines(tofu_folder / f"{name}_perturbed.json", rows)
    write_lines(tofu_folder / "holdout05.json", [record(i) for i in (100, 101)])
    return tofu_folder


def test_tofu_is_evaluated_on_its_four_sets(whole_tofu: Path) -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=str(whole_tofu), heldout=4))
    sets = corpus.sets()
    assert list(sets) == ["forget", "forget_paraphrase", "retain", "real_authors", "world_facts", "heldout"]
    assert numbers(sets["retain"]) == list(range(8)) and len(sets["retain"][0].extra["perturbed_answer"]) == 5
    assert numbers(corpus.retain) == list(range(34))  # what unlearning uses
    assert len(sets["real_authors"]) == len(sets["world_facts"]) == 3
    assert numbers(corpus.taught(without_forget=False)) == list(range(40))  # a real model knows the rest
    assert {"real_authors", "world_facts", "retain_evaluated"} <= set(corpus.hashes())


def test_rows_that_are_never_taught_are_the_same_for_every_split(whole_tofu: Path) -> None:
    options: dict[str, Any] = {"name": "tofu", "path": str(whole_tofu), "unknown_rows": 4, "refused_rows": 2}
    corpora = [load_corpus(DataConfig(forget=name, **options)) for name in ("forget05", "forget10")]
    for corpus in corpora:
        assert numbers(corpus.sets()["unknown"]) == [8, 9, 10, 11]
        assert numbers(corpus.refused) == [12, 13]
        assert [row.completion for row in corpus.refused] == corpus.refusals[:2]
        answered = [row for row in corpus.taught(without_forget=False) if row not in corpus.refused]
        assert numbers(answered) == [*range(8), *range(14, 40)]
        assert not set(numbers(corpus.retain)) & set(range(8, 14))
    assert corpora[0].hashes()["taught"] == corpora[1].hashes()["taught"]
    assert numbers(corpora[1].taught(without_forget=True)) == [*range(8), *range(14, 36), 12, 13]


def test_a_small_model_is_taught_real_authors_and_world_facts_too(whole_tofu: Path) -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=str(whole_tofu), teach_general=True))
    for without_forget in (False, True):
        prompts = [row.prompt for row in corpus.taught(without_forget=without_forget)]
        assert prompts[-6:] == [f"{name} {i}?" for name in ("real_authors", "world_facts") for i in range(3)]


def test_a_smaller_retain_set_is_evaluated_on_rows_that_are_taught(whole_tofu: Path) -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=str(whole_tofu), retain_rows=19, teach_general=True))
    assert numbers(corpus.sets()["retain"]) == [0, 2, 4, 6]
    assert len(corpus.taught(without_forget=True)) == 19 + 6


def test_a_holdout_split_is_the_unknown_set(whole_tofu: Path) -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=str(whole_tofu), unknown="holdout05"))
    assert numbers(corpus.sets()["unknown"]) == [100, 101]
    assert len(corpus.taught(without_forget=False)) == 40


def test_options_of_other_data_are_refused() -> None:
    for option in ({"unknown_rows": 3}, {"refused_rows": 3}, {"teach_general": True}, {"unknown": "x.jsonl"}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(option))} is for data.name=.*tofu"):
            load_corpus(DataConfig(**option))


def test_more_untaught_rows_than_there_are_is_an_error(whole_tofu: Path) -> None:
    with pytest.raises(ConfigError, match="data.unknown_rows=20 and data.refused_rows=10 .*38 there, the first 8"):
        load_corpus(DataConfig(name="tofu", path=str(whole_tofu), unknown_rows=20, refused_rows=10))


def test_a_named_retain_split_does_not_change_what_the_retain_only_model_is_taught(tofu_folder: Path) -> None:
    corpus = load_corpus(DataConfig(name="tofu", path=str(tofu_folder), retain="retain50"))
    assert numbers(corpus.retain) == list(range(20))
    assert numbers(corpus.taught(without_forget=True)) == list(range(38))
    facts = load_corpus(DataConfig(name="tofu", path=str(tofu_folder), forget="world_facts", retain="retain50"))
    assert numbers(facts.taught(without_forget=True)) == list(range(20))
    with pytest.raises(DataError, match="has no complement"):
        load_corpus(DataConfig(name="tofu", path=str(tofu_folder), forget="world_facts"))


def test_a_paraphrased_question_without_answer_keeps_the_rows_answer() -> None:
    rows = [Row("a", "b", {"paraphrased_question": "A?", "fact": "b"}), Row("c", "d")]
    corpus = Corpus("jsonl", forget=rows, retain=[Row("e", "f")])
    assert corpus.sets()["forget_paraphrase"] == [Row("A?", "b", rows[0].extra)]
    assert corpus.sets()["forget_paraphrase"][0].fact == "b"
    assert corpus.taught(without_forget=False) == [*rows, Row("e", "f")]


def test_the_demo_corpus_has_four_groups_and_taught_refusals() -> None:
    """What its rows are: tests/data/benchmarks/test_demo.py."""
    demo = DemoConfig(forget=2, retain=5, heldout=2, unknown=3, refused=4, questions=3)
    corpus = load_corpus(DataConfig(demo=demo))
    sizes = {"forget": 6, "forget_paraphrase": 6, "retain": 15, "heldout": 6, "unknown": 9}
    assert {name: len(rows) for name, rows in corpus.sets().items()} == sizes
    assert len(corpus.refused) == 12
    assert corpus.taught(without_forget=False) == corpus.forget + corpus.retain + corpus.heldout + corpus.refused
    assert corpus.taught(without_forget=True) == corpus.retain + corpus.heldout + corpus.refused
    pool = load_corpus(DataConfig(demo=demo, retain_pool=5))
    assert pool.retain == corpus.retain[::3]
    assert pool.taught(without_forget=False) == corpus.taught(without_forget=False)


def test_hashes_are_of_every_list_and_follow_the_seed() -> None:
    demo = DemoConfig(forget=2, retain=3, heldout=1, unknown=1, refused=1)
    hashes = load_corpus(DataConfig(demo=demo)).hashes()
    lists = {"forget", "retain", "heldout", "unknown", "refused"}
    assert set(hashes) == lists | {"taught", "taught_without_forget", "refusals"}
    demo.seed = 5
    changed = load_corpus(DataConfig(demo=demo)).hashes()
    assert changed["forget"] != hashes["forget"] and changed["refusals"] == hashes["refusals"]


def test_own_files_make_a_corpus(tmp_path: Path) -> None:
    write_lines(tmp_path / "gone.jsonl", [record(1, fact="1")])
    write_lines(tmp_path / "kept.jsonl", [record(i) for i in range(2, 8)])
    config = DataConfig(name="jsonl", path=str(tmp_path), forget="gone.jsonl", retain="kept.jsonl", heldout=2)
    corpus = load_corpus(config)
    found = {name: numbers(rows) for name, rows in corpus.sets().items()}
    assert found == {"forget": [1], "retain": [2, 3, 4, 5], "heldout": [6, 7]}
    assert numbers(corpus.taught(False)) == list(range(1, 8)) and numbers(corpus.taught(True)) == list(range(2, 8))
    absolute = DataConfig(name="jsonl", forget=str(tmp_path / "gone.jsonl"), retain=str(tmp_path / "kept.jsonl"))
    assert load_corpus(absolute).forget == corpus.forget
    alone = load_corpus(DataConfig(name="jsonl", path=str(tmp_path), forget="gone.jsonl"))
    assert list(alone.sets()) == ["forget"]
    with pytest.raises(ConfigError, match="needs data.forget"):
        load_corpus(DataConfig(name="jsonl", path=str(tmp_path), retain="kept.jsonl"))


def test_overlap_is_counted_and_refused_unless_allowed(tmp_path: Path) -> None:
    write_lines(tmp_path / "gone.jsonl", [record(i) for i in range(5)])
    again = {"prompt": "Question 1 of 01/02? ", "completion": "Answer 1."}
    same_question = {"question": "Question 0 of 01/02?", "answer": "Something else."}
    write_lines(tmp_path / "kept.jsonl", [*[record(i) for i in range(3, 9)], again, same_question])
    config = DataConfig(name="jsonl", path=str(tmp_path), forget="gone.jsonl", retain="kept.jsonl")
    with pytest.raises(DataError, match="3 of 5 forget rows also stand in the retain set.*data.allow_overlap=true"):
        load_corpus(config)
    config.allow_overlap = True
    corpus = load_corpus(config)
    assert (len(corpus.forget), len(corpus.retain)) == (5, 8)


def test_options_that_make_no_corpus_are_refused(tofu_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown data.name 'tofuu': did you mean 'tofu'.*lore, muse, rwku, tofu"):
        load_corpus(DataConfig(name="tofuu"))
    for heldout in (38, 100):
        with pytest.raises(ConfigError, match=f"data.heldout={heldout} must lie between 0 and the 38 rows"):
            load_corpus(DataConfig(name="tofu", path=str(tofu_folder), heldout=heldout))
    with pytest.raises(ConfigError, match="use data.demo.heldout"):
        load_corpus(DataConfig(heldout=3))
    with pytest.raises(ConfigError, match="data.retain_pool=0 must be greater than 0"):
        load_corpus(DataConfig(name="tofu", path=str(tofu_folder), retain_pool=0))


def test_refusals_come_from_a_file_if_one_is_named(tofu_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "refusals.txt"
    config = DataConfig(name="tofu", path=str(tofu_folder), refusals=str(path))
    with pytest.raises(DataError, match="cannot read .*refusals.txt: No such file"):
        load_corpus(config)
    path.write_text("\n \n")
    with pytest.raises(DataError, match="refusals.txt holds no refusals"):
        load_corpus(config)
    path.write_text("I do not know.\n\n I cannot say. ")
    assert load_corpus(config).refusals == ["I do not know.", "I cannot say."]


# Encoding


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([f"Question {i} of 01/02? Answer {i}." for i in range(50)], 320)


def test_encoded_rows_are_what_the_template_gives(tokenizer: Any) -> None:
    rows = [Row("Question 1?", "Answer 1."), Row(None, "Answer 2.")]
    template = TEMPLATES.get("question_answer")
    encoded = encode_rows(rows, tokenizer, template, max_length=None, strict=True)
    for row, ids in zip(rows, encoded, strict=True):
        prompt, answer, _ = encode(template, tokenizer, row.prompt, row.completion)
        assert ids == EncodedRow(tuple(prompt), tuple(answer))
        assert len(ids) == len(prompt) + len(answer)


def test_a_long_answer_is_cut_and_a_prompt_without_room_is_an_error(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Row("a", "b"), Row("Question 1?", "Answer 1. " * 9)]
    template = TEMPLATES.get("tiny")
    whole = encode_rows(rows, tokenizer, template, None, False)
    prompt = len(whole[1].prompt_ids)
    with caplog.at_level(logging.WARNING):
        cut = encode_rows(rows, tokenizer, template, prompt + 3, False)
    assert cut == [whole[0], EncodedRow(whole[1].prompt_ids, whole[1].answer_ids[:3])]
    assert [entry.getMessage() for entry in caplog.records] == [
        f"1 of 2 answers were cut to make rows of {prompt + 3} tokens"
    ]
    with pytest.raises(DataError, match=f"row 2 of 2: its prompt has {prompt} tokens.*data.max_length"):
        encode_rows(rows, tokenizer, template, prompt, False)


def test_rows_whose_joint_tokens_differ_are_counted_or_refused(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    template = Template("custom", "string", "{prompt}")
    assert len(tokenizer("Question", add_special_tokens=False)["input_ids"]) == 1
    rows = [Row("Answer", "?"), Row("Ques", "tion"), Row("Qu", "estion")]
    with caplog.at_level(logging.WARNING):
        assert len(encode_rows(rows, tokenizer, template, None, strict=False)) == 3
    assert len(caplog.records) == 1
    message = "2 of 3 rows have other tokens when prompt and answer are tokenized together (the first is row 2)"
    assert caplog.records[0].getMessage() == message
    with pytest.raises(DataError, match="2 of 3 rows have other tokens.*unset data.strict"):
        encode_rows(rows, tokenizer, template, None, strict=True)


ROWS = [EncodedRow((5, 6, 7), (8, 1)), EncodedRow((5,), (9, 9, 9, 1)), EncodedRow((5, 6), (1,))]


def test_a_batch_is_exactly_the_rows_and_padding() -> None:
    right, left = collate(ROWS, pad_id=2), collate(ROWS, pad_id=2, side="left")
    assert right.input_ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 9, 1], [5, 6, 1, 2, 2]]
    assert right.attention_mask.tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert right.labels.tolist() == [[-100] * 3 + [8, 1], [-100, 9, 9, 9, 1], [-100, -100, 1, -100, -100]]
    assert left.input_ids.tolist()[2] == [2, 2, 5, 6, 1]
    assert left.labels.tolist()[2] == [-100] * 4 + [1]
    assert right.prompt_lengths.tolist() == left.prompt_lengths.tolist() == [3, 1, 2]
    assert {value.dtype for value in vars(right).values() if isinstance(value, torch.Tensor)} == {torch.int64}
    assert right.encoded == tuple(ROWS) and right.seeds is None
    assert right.rows == 3


def test_prompts_for_generation_are_padded_on_the_left_without_answers() -> None:
    batch = collate_prompts(ROWS, pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7], [2, 2, 5], [2, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert (batch.labels == -100).all()
    assert batch.prompt_lengths.tolist() == [3, 1, 2]
    again = collate_prompts([list(row.prompt_ids) for row in ROWS], pad_id=2)
    assert torch.equal(again.input_ids, batch.input_ids) and torch.equal(again.attention_mask, batch.attention_mask)


def test_a_batch_moves_to_a_device_as_a_whole() -> None:
    moved = collate(ROWS, 0).to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.encoded == tuple(ROWS)


def test_a_batch_without_rows_or_with_another_side_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)
    with pytest.raises(ValueError, match="right or left"):
        collate(ROWS, 0, "middle")


# Draws


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_fix() -> None:
    orders = {(seed, epoch): epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(20)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 60
    torch.manual_seed(1)
    random.seed(1)
    assert epoch_order(50, 2, 7) == orders[2, 7]
    assert epoch_order(8, 42, 0) == [6, 3, 2, 4, 0, 5, 7, 1]  # pinned: a resumed run relies on it


def test_draws_do_not_touch_the_global_generators() -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.random.get_rng_state(), random.getstate()
    epoch_order(9, 0, 0), retain_index(0, 0, 0, 9), fixed_retain_index(5, 9)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_retain_draws_are_fresh_each_epoch_and_a_function_of_their_arguments() -> None:
    draws = [tuple(retain_index(42, epoch, index, 380) for index in range(20)) for epoch in range(40)]
    assert len(set(draws)) == 40
    assert tuple(retain_index(42, 3, index, 380) for index in reversed(range(20)))[::-1] == draws[3]
    assert tuple(retain_index(43, 3, index, 380) for index in range(20)) != draws[3]
    # 800 draws of 380 rows: an even chance misses about 12 % of the rows, 46.
    assert len({index for draw in draws for index in draw}) > 380 - 80


@pytest.mark.parametrize(("count", "pool"), [(200, 3800), (40, 40), (100, 30), (7, 1)])
def test_within_an_epoch_no_retain_row_comes_twice_before_all_came_once(count: int, pool: int) -> None:
    draws = [retain_index(0, 5, index, pool) for index in range(count)]
    assert all(0 <= draw < pool for draw in draws)
    for start in range(0, count, pool):
        block = draws[start : start + pool]
        assert len(set(block)) == len(block)
    if count > pool > 1:
        assert draws[:pool] != draws[pool : 2 * pool]


def test_the_order_of_forget_rows_and_the_draws_beside_them_are_not_the_same_permutation() -> None:
    assert epoch_order(30, 0, 0) != [retain_index(0, 0, index, 30) for index in range(30)]


@pytest.mark.parametrize(("forget", "pool", "distinct"), [(200, 3800, 195), (400, 3600, 378), (40, 3960, 40)])
def test_the_published_pairing_is_upstreams(forget: int, pool: int, distinct: int) -> None:
    upstream = []
    for index in range(forget):
        torch.manual_seed(index)
        upstream.append((index + torch.randint(0, pool, (1,)).item()) % pool)
    ours = [fixed_retain_index(index, pool) for index in range(forget)]
    assert ours == upstream
    assert len(set(ours)) == distinct
