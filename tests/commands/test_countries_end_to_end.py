"""Countries from asking to the report, on a tiny random model with a real tokenizer and chat template."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_model import WHOLE, save_chat_model
from known_countries import CONFIG, SMALL, answered

from grun.cli import main
from grun.commands.unlearn import _bare_starts
from grun.data.corpus import load_corpus
from grun.evaluation import probe
from grun.training.gate_prompts import collect

CHOSEN = replace(SMALL, forget=["Japan"], neighbors=2, heldout=2, unknown=1, count=10)
OPTIONS = [f"data.countries.{name}={value}" for name, value in vars(CHOSEN).items() if name != "forget"]
OPTIONS += ["data.name=countries", "data.countries.forget=[Japan]"]
TRAINING = ["train.epochs=1", "train.batch_size=16", "method.blocks=[1,2]", "method.rank=2", "objective=idk"]
ASKED = ["data.limit=2", "max_new_tokens=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a GRUN adapter and of full fine-tuning, evaluated."""
    folder = tmp_path_factory.mktemp("countries")
    save_chat_model(folder / "model", tokens=WHOLE)
    (folder / "known").mkdir()
    answered(folder / "known", replace(CONFIG, countries=CHOSEN))
    source = [f"model.path={folder / 'model'}", *OPTIONS, f"data.path={folder / 'known'}"]
    results = folder / "results"
    assert main(["unlearn", *source, *TRAINING, f"output_dir={results / 'idk'}", "cache.dir="]) == 0
    full = [f"output_dir={results / 'full'}", "method.parametrization=full", "cache.dir="]
    assert main(["unlearn", *source, *TRAINING, *full]) == 0
    adapters = [f"adapters=[{results / 'idk'}]", "with_base=before", f"output_dir={results / 'evaluation'}"]
    assert main(["evaluate", *source, *ASKED, *adapters]) == 0
    # the rows of a whole model are stored with it: it is not asked itself
    of_full = [f"model.path={results / 'full'}", f"output_dir={results / 'evaluation' / 'full'}"]
    assert main(["evaluate", *of_full, *ASKED]) == 0
    assert main(["report", f"results_dir={results}"]) == 0
    return results


def test_every_set_is_in_the_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["before", "full", "idk"]
    sets = ["forget", "forget_reworded", "forget_indirect", "retain", "neighbor", "general", "heldout", "unknown"]
    for row in summary["rows"]:
        assert {*sets, "sentences"} == row["metrics"].keys()
        assert all("fact_recall" in row["metrics"][name] for name in sets)
        assert row["metrics"]["sentences"]["perplexity"] > 1 and "fact_recall" not in row["metrics"]["sentences"]


def test_all_models_are_asked_the_same(folder: Path) -> None:
    found = [json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("*/evaluation.json"))]
    assert len(found) == 3 and found[0]["data"] == found[1]["data"] == found[2]["data"]


def test_the_page_begins_with_questions_and_answers(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.index('id="examples"') < page.index('id="verdicts"')
    assert "What is the capital of Japan?" in page and "guessing gives" in page


def test_the_model_of_an_adapter_is_asked_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kept answers are gone, that is an error, and not another corpus."""
    (folder.parent / "known" / "answers.jsonl").rename(folder.parent / "known" / "gone")
    try:
        assert main(["evaluate", f"adapter={folder / 'idk'}", *ASKED, f"output_dir={folder / 'again'}"]) == 1
    finally:
        (folder.parent / "known" / "gone").rename(folder.parent / "known" / "answers.jsonl")
    assert not (folder / "again").exists()


def test_corpora_asks_and_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "LONGEST", 1)
    options = ["countries.forget=[Japan]", "countries.count=8", f"model.path={folder.parent / 'model'}"]
    with caplog.at_level("INFO"):
        assert main(["corpora", "source=countries", *options, f"output_dir={tmp_path / 'known'}"]) == 0
    assert "capital       known of 0 of 8 countries" in caplog.text
    lines = (tmp_path / "known" / "answers.jsonl").read_text().splitlines()
    assert {"question", "answer", "fact", "right"} == json.loads(lines[0]).keys()
    command = shlex.split(caplog.text.split("then: python -m grun ")[1].splitlines()[0])
    assert main(command) == 1
    assert "knows nothing of Japan" in capsys.readouterr().err


def test_a_fitted_gate_knows_how_plain_text_begins(folder: Path) -> None:
    """The first word of each prompt, without a template, is a prompt that the gate is to stay shut on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "model")
    data = replace(CONFIG, countries=CHOSEN, path=str(folder.parent / "known"))
    corpus = load_corpus(data)
    run = SimpleNamespace(corpus=corpus, prompts=collect(corpus, data), tokenizer=tokenizer)
    starts = _bare_starts(run)  # type: ignore[arg-type]
    words = [tokenizer.decode(start.prompt_ids) for start in starts]
    assert {"What", "Which", "Tell", "How", "Hello"} <= {*words} and len({*words}) == len(words)
    assert all(len(start.prompt_ids) == 1 and not start.answer_ids for start in starts)
