"""Evaluation sets: one registry, which a benchmark adds to, and which every table reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_results import write_cell, write_evaluation

from grun.config.options import DataConfig, EvaluateConfig, ReportConfig
from grun.data.corpus import BENCHMARKS, Corpus, benchmark, load_corpus
from grun.data.rows import Row
from grun.data.sets import SETS_OF_BENCHMARKS, EvaluationSet, evaluation_sets, in_order, set_label
from grun.errors import ConfigError
from grun.loading.checks import check
from grun.report.make import make_report


@pytest.fixture
def rivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark with an evaluation set of its own, as another package would add it."""
    for registry in (BENCHMARKS, SETS_OF_BENCHMARKS):
        registry.names()  # what is packaged has been read
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @benchmark("rivers", sets=(EvaluationSet("songs", "river songs", "songs about the river: must stay", "high"),))
    def load(config: DataConfig) -> Corpus:
        """Rivers to forget, lakes to keep, songs to ask about."""
        forget, retain, songs = ([Row(f"Where is {kind}?", "There.")] for kind in ("the Ri", "Lake Lo", "the song"))
        return Corpus("rivers", forget, retain, general={"songs": songs, **({"odes": songs} if config.path else {})})


@pytest.mark.usefixtures("rivers")
def test_a_set_of_a_new_benchmark_is_in_every_table(tmp_path: Path, capsys: Any) -> None:
    assert list(load_corpus(DataConfig(name="rivers")).sets()) == ["forget", "retain", "songs"]
    shares = {"forget": 0.0, "retain": 1.0, "songs": 0.75}
    for seed in (1, 2):
        write_cell(tmp_path / f"gd-grun-s{seed}", "gd", "grun", seed)
        write_evaluation(tmp_path / f"evaluation/gd-grun-s{seed}", shares, identity={"base": "b1"})
    write_evaluation(tmp_path / "evaluation/before", {**shares, "forget": 1.0}, identity={"base": "b1"})
    make_report(ReportConfig(results_dir=str(tmp_path)))
    tables = {name: (tmp_path / name).read_text() for name in ("table.md", "table.tex", "matrix.md")}
    assert [name for name, text in tables.items() if "river songs fact recall" not in text] == []
    assert "river songs" in (tmp_path / "report.html").read_text()
    assert "songs.fact_recall" in (tmp_path / "table.csv").read_text().splitlines()[0]
    assert "river songs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("rivers")
def test_a_set_is_asked_for_by_name_and_one_that_nobody_declared_is_refused() -> None:
    check(EvaluateConfig(sets=["songs"]))
    with pytest.raises(ConfigError, match="unknown evaluation set 'song': did you mean 'songs'"):
        check(EvaluateConfig(sets=["song"]))
    with pytest.raises(ConfigError, match="data.name=rivers has the set odes, which its @benchmark"):
        load_corpus(DataConfig(name="rivers", path="somewhere"))


def test_sets_stand_in_the_order_of_tables_and_unknown_ones_last() -> None:
    found = in_order(["unknown", "of_elsewhere", "world_facts", "forget"])
    assert [one.name for one in found] == ["forget", "world_facts", "unknown", "of_elsewhere"]
    assert set_label("of_elsewhere") == "of elsewhere" and "of_elsewhere" not in evaluation_sets()
