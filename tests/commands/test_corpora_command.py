"""`python -m grun corpora`: the files it writes, what reads them, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from demo import read_lines, refused
from test_safe_rlhf import PRIVACY, with_shared_prompts

from grun.cli import main
from grun.data.benchmarks.safe_rlhf import build
from grun.data.corpus import ROLES, load_corpus, load_knowledge
from grun.data.texts import load_texts
from grun.loading.resolve import resolve

FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the data set's two files; output folders are relative to one above."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "preferences"
    folder.mkdir()
    rows = [json.dumps(row) + "\n" for row in with_shared_prompts()]
    (folder / "train.jsonl").write_text("".join(rows[:200]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(rows[200:]), encoding="utf-8")
    return folder


def write(source: Path, folder: str, *more: str) -> int:
    return main(["corpora", "source=safe_rlhf", f"path={source}", f"output_dir={folder}", *more])


def test_the_folder_is_the_last_line_and_holds_what_is_documented(
    source: Path, capsys: Captured, log: pytest.LogCaptureFixture
) -> None:
    assert write(source, "made") == 0
    assert capsys.readouterr().out == "made\n"
    names = {path.name for path in Path("made").iterdir()}
    parts = {"forget.jsonl", "forget_test.jsonl", "retain.jsonl", "retain_pool.jsonl", "retain_test.jsonl"}
    assert names == parts | {"run.json", "run_identity.json"}
    run = json.loads(Path("made/run.json").read_text(encoding="utf-8"))
    assert set(run) == {"command", "config", "files", "leaks", "versions"}
    assert not [name for name in (*run, *parts, *run["leaks"]) if f"`{name}`" not in FORMATS]
    assert run["files"] == {name: len(read_lines(Path("made") / name)) for name in parts}
    assert run["leaks"]["forget_test_rows_with_forget_prompts"] == 0
    for name, count in run["leaks"].items():
        assert any(name in message and message.endswith(str(count)) for message in log.messages)


def test_rows_are_read_by_own_data(source: Path) -> None:
    assert write(source, "made") == 0
    made = build(with_shared_prompts(), PRIVACY, "by_prompt")
    options = ["data.name=jsonl", "data.path=made", "data.forget=forget.jsonl", "data.retain=retain.jsonl"]
    corpus = load_corpus(resolve("unlearn", options).data)
    assert [(row.prompt, row.completion) for row in corpus.forget] == made.forget
    assert [(row.prompt, row.completion) for row in corpus.retain] == made.retain


def test_the_published_form_has_the_published_names_and_lines(source: Path) -> None:
    folder = "data/SafeRLHF-corpora"
    assert write(source, folder, "split=published", "format=published") == 0
    made = build(with_shared_prompts(), PRIVACY, "published")
    texts = load_texts("SafeRLHF-corpora/Privacy_Violation_train")
    assert texts == [f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT: {text}" for prompt, text in made.forget]
    raw = load_texts("SafeRLHF-corpora/safe_train_sampled", jsonl="raw")
    assert len(raw) == len(made.retain)
    assert raw[0] == (
        f'"BEGINNING OF CONVERSATION: USER: {made.retain[0].prompt} ASSISTANT: {made.retain[0].response}"\n'
    )
    for name, rows in (
        ("Privacy_Violation_test", made.forget_test),
        ("safe_train", made.retain_pool),
        ("safe_test", made.retain_test),
    ):
        assert len(read_lines(Path(folder) / f"{name}.jsonl")) == len(rows)
        assert f"`{name.replace('Privacy_Violation', 'CATEGORY')}.jsonl`" in FORMATS


def test_the_same_command_finds_its_corpora_and_another_one_needs_overwrite(
    source: Path, capsys: Captured, log: pytest.LogCaptureFixture
) -> None:
    assert write(source, "made") == 0
    before = Path("made/forget.jsonl").stat().st_mtime_ns
    assert write(source, "made") == 0
    assert Path("made/forget.jsonl").stat().st_mtime_ns == before
    assert "nothing to do" in log.text
    capsys.readouterr()
    assert write(source, "made", "split=published") == 1
    assert "split: by_prompt there, published asked for" in capsys.readouterr().err
    assert write(source, "made", "split=published", "overwrite=true") == 0
    assert json.loads(Path("made/run.json").read_text(encoding="utf-8"))["config"]["split"] == "published"


def test_other_preferences_are_other_corpora(source: Path, capsys: Captured) -> None:
    assert write(source, "made") == 0
    path = source / "test.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("fine", "well"), encoding="utf-8")
    assert write(source, "made") == 1
    assert "made holds another run (rows: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["output_dir=made"], "source is not set"),
        (["source=safe_rlhf"], "output_dir is not set"),
        (
            ["source=wikitext", "output_dir=made"],
            "unknown source 'wikitext': known: countries, elements, kjv, lore, safe_rlhf, subject",
        ),
        (["source=safe_rlhf", "output_dir=made", "split=rows"], "known: by_prompt, published"),
        (["source=safe_rlhf", "output_dir=made", "format=text"], "known: published, rows, rwku"),
        (["source=lore", "output_dir=made", "format=rwku"], "format=rwku is for source=countries"),
        (["source=safe_rlhf", "output_dir=made", "path=preferences", "category=Drug"], "did you mean 'Drugs'?"),
        (["sauce=lore"], "did you mean 'source'?"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    options: list[str], message: str, source: Path, capsys: Captured
) -> None:
    refused(capsys, ["corpora", *options], 2, message)
    assert not Path("made").exists()


def test_generated_lore_on_disk_is_the_lore_that_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"forget": 6, "neighbor": 5, "retain": 8, "general": 7}
    assert main(["corpora", "source=lore", "output_dir=made", *(f"lore.{k}={v}" for k, v in sizes.items())]) == 0
    lore = resolve("evaluate", ["data.name=lore", *(f"data.lore.{k}={v}" for k, v in sizes.items())]).data
    files = resolve(
        "evaluate",
        [
            *("data.name=corpora", "data.path=made", "data.forget=forget", "data.retain=retain"),
            *(f"data.questions.{role}=[{role}_questions.jsonl]" for role in ROLES),
            *(f"data.questions.cloze_{role}=[{role}_cloze.jsonl]" for role in ROLES),
        ],
    ).data
    generated, read = load_corpus(lore), load_corpus(files)
    for texts, rows in ((read.forget, generated.forget), (read.retain, generated.retain)):
        assert [row.completion for row in texts] == [f"{row.prompt} {row.completion}" for row in rows]
    assert load_knowledge(files) == load_knowledge(lore)
    names = {path.name for path in Path("made").glob("*.jsonl")}
    assert json.loads(Path("made/run.json").read_text(encoding="utf-8"))["files"].keys() == names
    documented = {re.sub(r"^\w+?_", "ROLE_", name) for name in names}
    assert not [name for name in documented if f"`{name}`" not in FORMATS]
