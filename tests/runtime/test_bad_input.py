"""What users hand in and earlier runs wrote, damaged: one line on what is wrong where, and never a traceback."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import demo
import pytest
from demo import refused
from tqdm.auto import tqdm

from baselines.rmu.options import RmuOptions
from grun.cli import main
from grun.data.jsonl import read_rows
from grun.errors import ConfigError, DataError
from grun.loading.resolve import resolve
from grun.report.tables import csv_text
from grun.runtime.reading import parse_yaml

Captured = pytest.CaptureFixture[str]
SECRET = "the vault opens with 4711"


# -- the last resort --------------------------------------------------------------------------------------------------


def test_a_bug_is_one_line_that_names_a_private_file_with_the_traceback(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr("grun.commands.unlearn.unlearn", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    line = refused(capsys, ["unlearn"], 70)
    (file,) = tmp_path.iterdir()
    assert "a bug in GRUN (KeyError)" in line and str(file) in line and SECRET not in line
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "in broken" in file.read_text() and SECRET in file.read_text()


def test_an_error_stands_on_a_line_of_its_own_below_open_bars(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    def refused(_: object) -> None:
        bars.extend(tqdm(total=5, position=place, disable=False) for place in (0, 1))
        raise DataError("no such rows")

    monkeypatch.setattr("grun.commands.unlearn.unlearn", refused)
    assert main(["unlearn"]) == 1
    assert capsys.readouterr().err.endswith("\nerror: no such rows\n")
    assert all(bar.disable for bar in bars)


def test_answers_that_the_terminal_has_no_letters_for_are_printed() -> None:
    program = (
        "from grun import cli; from grun.commands import listing; listing.info = lambda arguments: print('Σ'); "
        "raise SystemExit(cli.main(['info']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "WORLD_SIZE": "many", "RANK": "x"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "\\u03a3\n"


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["unlearn", "output_dir=\ud800"], "argument 2"),
        (["requests", "add", "store=s", "id=a", "note=\ud800"], "argument 5"),
        (["unlearn", "output_dir=a\0b"], "argument 2"),
        (["unlearn", "output_dir=${"], "output_dir: ${...} is not read in options"),
        (["unlearn", "output_dir=${oc.env:HOME}"], "output_dir: ${...} is not read in options"),
        (["unlearn", "profile=${oc.env:HOME}"], "profile: ${...} is not read in options"),
        (["unlearn", 'quirks=["\\x24{oc.env:HOME}"]'], "${...} is not read in options"),
        (["report", "runs={prompt}"], "runs: "),
        (["unlearn", "method.blocks=[{a: 1}]"], "method.blocks: expected plain values, found an object"),
        (["unlearn", f"loss.ascent_cap={'9' * 400}"], "loss.ascent_cap: "),
        (["unlearn", f"train.epochs={'9' * 5000}"], "cannot read train.epochs=999"),
        (["unlearn", "method.gate_bias=1e308"], "method.gate_bias=1e+308 must lie between"),
        (["unlearn", "train.lr=inf"], "train.lr=inf must"),
        (["unlearn", "loss.control_seed=-1"], "loss.control_seed=-1 must lie between 0 and 4294967295"),
        (["finetune", "model.tiny.context=1"], "model.tiny.context=1 must lie between 2"),
        (["sweep", "seeds=[-3]"], "seeds=-3 must lie between 0"),
        (["evaluate", "gate_threshold=nan", "data.name=demo"], "gate_threshold=nan must lie between 0 and 1"),
        (["unlearn", "cache.dir=~nouser/x"], "cache.dir=~nouser/x: there is no user 'nouser'"),
        (["unlearn", "cache.memory_budget=" + "9" * 400], "larger than any disk"),
        (["unlearn", "quirks=" + "[" * 30_000], "nested more than 60 deep"),
        (["info", "foo=bar"], "info takes no arguments; leave 'foo=bar' out"),
        (["--version", "x"], "--version takes no arguments"),
        (["generate", "adaptor=x", "Who?"], "unknown option 'adaptor'"),
        (["generate", "data.x=3", "Who?"], "unknown option 'data.x'"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(arguments: list[str], named: str, capsys: Captured) -> None:
    line = refused(capsys, arguments, 2, named)
    assert os.environ["HOME"] not in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("unlearn: {output_dir: '${oc.env:HOME}'}", "is not read in options"),
        ("model: {path: !!python/name:os.getcwd }", "tags such as"),
        ("&a [*a]", r"alias \*a"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*{b}'] * 10)}]\n" for n, b in
         enumerate(["a", *(f"b{n}" for n in range(8))])), "more than 100,000 values"),
        ("[" * 100_000, "nested more than 60 deep"),
        ("seed: " + "1" * 5000, "Exceeds the limit|integer string"),
        ("a: \x07", "special characters"),
    ],
)  # fmt: skip
def test_a_yaml_text_is_read_without_looking_anything_up(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_yaml(text, "profile mine.yaml")


def test_yaml_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"seed: 1 # \xff")
    with pytest.raises(ConfigError, match=r"p.yaml: not UTF-8 \(.* at byte 10\)"):
        resolve("unlearn", [f"profile={tmp_path / 'p.yaml'}"])


def test_aliases_that_stand_for_little_are_read() -> None:
    assert parse_yaml("a: &x {b: 1e-3}\nc: *x", "mine") == {"a": {"b": 0.001}, "c": {"b": 0.001}}


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["2+2=?"], ["2+2=?"]),
        (["what is x=3", "x=3"], ["what is x=3", "x=3"]),
        (["max_new_tokens=3", "-5 + 3 = ?"], ["-5 + 3 = ?"]),
        (["--", "max_new_tokens=3", "--help"], ["max_new_tokens=3", "--help"]),
    ],
)
def test_a_question_may_hold_an_equals_sign(
    arguments: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Any] = []
    monkeypatch.setattr("grun.commands.generate.ask", lambda config, questions: got.append(questions))
    assert main(["generate", "model.path=m", *arguments]) == 0
    assert got == [asked]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lr", "inf"], "--lr inf is too large"),
        (["--alpha", "nan,1"], "--alpha nan is too large"),
        (["--output_dir", "~nouser/x"], "there is no user 'nouser'"),
        (["--output_dir", "a\ud800"], "no Unicode text"),
    ],
)
def test_flags_of_the_published_tools_are_checked_alike(flags: list[str], named: str, capsys: Captured) -> None:
    assert RmuOptions.main([*flags, "--print_config"]) == 2
    assert named in capsys.readouterr().err


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"question": "a", "question": "b", "answer": "c"}', "a key stands twice"),
        ('{"question": "\\ud800", "answer": "c"}', "half a surrogate pair"),
        ('{"question": "a", "answer": "c", "n": ' + "1" * 6000 + "}", "an integer of 6000 digits"),
        ('{"question": "a", "answer": "c", "n": NaN}', "NaN is not valid JSON"),
        ("[" * 100_000, "nested more than 60 deep"),
        ('{"question": "a", "answer": "c", "n": ' + "[" * 200 + "]" * 200 + "}", "nested more than 60 deep"),
        ('{"question": "a", "answer": "\\ud83d\\ude00", "n": 1.12345678901234567890}', None),
    ],
)
def test_json_that_readers_disagree_on_is_refused_with_its_line(line: str, named: str | None, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\ufeff" + '{"question": "q", "answer": "a"}\n' + line, encoding="utf-8")
    if named is None:
        assert read_rows(tmp_path / "rows.jsonl")[1].completion == "😀"
        return
    with pytest.raises(DataError, match=rf"rows.jsonl line 2: .*{named}"):
        read_rows(tmp_path / "rows.jsonl")


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.random_model(tmp_path_factory.mktemp("random")) / "model"


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"].values())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": last + 1, "content": "<new>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Path}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "tokenizer.json").write_text('{"model": 5}'), "cannot be loaded: "),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded: "),
        (lambda f: (f / "model.safetensors").unlink(), r"holds no weights \(\*.safetensors, \*.bin\); copy the whole"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded: "),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("[5]"), "cannot be loaded: "),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "cannot be loaded: "),
        (lambda f: edit_json(f / "config.json", num_attention_heads="two"), "cannot be loaded: "),
        (lambda f: edit_json(f / "config.json", vocab_size=[1]), "cannot be loaded: "),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "would be random; copy the whole model"),
        (lambda f: edit_json(f / "generation_config.json", eos_token_id=["x"]), "eos_token_id in the model's"),
        (lambda f: edit_json(f / "tokenizer_config.json", model_max_length=[]), "cannot be loaded: "),
        (pickled, "save it again as safetensors"),
        (add_tokens, "tokens were added to the tokenizer alone; save the model after"),
    ],
)
def test_a_damaged_model_is_one_whole_line(
    damage: Any, named: str, random_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = shutil.copytree(random_model, tmp_path / "model")
    damage(folder)
    line = refused(capsys, ["generate", f"model.path={folder}", "Who?"], 1)
    assert re.search(named, line) and not line.endswith(":")


# -- what is written and shown ----------------------------------------------------------------------------------------


def test_a_csv_cell_is_never_a_formula() -> None:
    cells = ["=1+1", "+x", "-x", "@x", "\tx", "\r=x", " =x", "-5", -5.25, 1e-7, None, "a=b", 3]
    assert csv_text([cells]).rstrip("\n") == "'=1+1,'+x,'-x,'@x,'\tx,' =x,' =x,-5,-5.25,1e-07,,a=b,3"


def test_a_stores_name_is_no_markup(tmp_path: Path, random_model: Path, capsys: Captured) -> None:
    store = str(tmp_path / "[red]s[/x]")
    adapter = random_model.parent / "adapter"
    assert main(["requests", "add", f"store={store}", "id=a", f"adapter={adapter}", "data.name=demo"]) == 0
    capsys.readouterr()
    assert main(["requests", "list", f"store={store}"]) == 0
    assert "[red]s[/x]" in capsys.readouterr().out.replace("\n", "")
