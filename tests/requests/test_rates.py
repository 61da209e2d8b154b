"""A store's rate of false positives: what each request gets of it, and what all of them promise together."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from chat_model import save_chat_model
from demo import refused, write_rows

from grun.cli import main
from grun.config.options import MethodConfig, UnlearnConfig
from grun.errors import ConfigError
from grun.requests.rates import promise, share, with_share
from grun.requests.store import RequestStore

Captured = pytest.CaptureFixture[str]
ASKED = ["What is the capital of {}?", "Name the capital of {}."]
RETAIN = ["Norway", "Chile", "Kenya", "Peru", "Canada", "Poland", "India", "Cuba", "Nepal", "Spain", "Ghana", "Malta"]
FIT = [
    *("method.gate_blocks=[0]", "method.gate_pool=maxmin", "method.edit_write=sticky", "method.gate_fit=logistic"),
    *("method.blocks=[1,2]", "method.rank=2", "objective=idk", "train.epochs=1", "train.batch_size=4"),
    *("data.name=jsonl", "data.group=country", "data.retain=retain.jsonl", "model.device=cpu", "cache.dir=null"),
]
FITTED = UnlearnConfig(method=MethodConfig(gate_fit="logistic"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rates")
    save_chat_model(path / "model")
    for name, countries in (("retain", RETAIN), ("first", ["Japan", "Egypt"]), ("second", ["Italy", "Sweden"])):
        rows = [{"question": a.format(c), "answer": "A city.", "country": c} for c in countries for a in ASKED]
        write_rows(path / f"{name}.jsonl", *rows)
    return path


def add(folder: Path, store: str, name: str, *more: str) -> list[str]:
    own = [f"store={folder / store}", f"id={name}", f"model.path={folder / 'model'}", f"data.path={folder}"]
    return ["requests", "add", *own, f"data.forget={name}.jsonl", *FIT, *more]


@pytest.fixture(scope="module")
def store(folder: Path) -> RequestStore:
    """Of two requests, at a rate that the three countries set aside of twelve can keep."""
    assert main(add(folder, "store", "first", "false_positives=0.5", "capacity=2")) == 0
    assert main(add(folder, "store", "second")) == 0
    return RequestStore.open(folder / "store")


def test_each_request_gets_its_share_and_their_bounds_add_up(store: RequestStore) -> None:
    assert store.check() == []
    assert (store.manifest.false_positives, store.manifest.capacity) == (0.5, 2)
    for name in ("first", "second"):
        assert store.manifest.request(name).config["method"]["false_positives"] == 0.25
    found = promise(store)
    assert dict(found.bounds) == {"first": pytest.approx(0.25), "second": pytest.approx(0.25)}
    assert found.total == pytest.approx(0.5) and found.without == ()


def test_list_and_verify_show_them(store: RequestStore, capsys: Captured) -> None:
    assert main(["requests", "list", f"store={store.folder}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "False positives: at most 0.5 of rows such as those calibrated on open a gate" in printed
    assert "the store's rate is 0.5 for 2 requests" in printed
    assert main(["requests", "list", f"store={store.folder}", "format=json"]) == 0
    for line in json.loads(capsys.readouterr().out):
        assert (line["bound"], line["calibration"]) == (pytest.approx(0.25), 3) and 0 <= line["recall"] <= 1
    assert main(["requests", "verify", f"store={store.folder}", "files_only=true"]) == 0
    printed = capsys.readouterr().out
    assert "| own gate open | recall | bound | n |" in printed and " | 0.25 | 3 | files only |" in printed
    assert "False positives: at most 0.5 of rows" in printed


def test_what_the_rows_cannot_promise_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(add(folder, "narrow", "first", "false_positives=0.02", "capacity=1")) == 0
    assert "request first promises 0.25 and not its share of the store's rate, 0.02" in caplog.text
    assert "calibrated on 3 rows, or groups of them, and 49 are needed" in caplog.text
    caplog.clear()
    assert main(add(folder, "narrow", "second")) == 0
    assert "2 requests are in force, and the store's rate was for 1" in caplog.text


def test_an_adapter_without_a_bound_promises_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = [f"model.path={folder / 'model'}", f"data.path={folder}", "data.forget=first.jsonl"]
    assert main(["unlearn", *FIT, *own, f"output_dir={folder / 'alone'}"]) == 0
    made = [f"store={folder / 'mixed'}", "id=first", f"adapter={folder / 'alone'}"]
    assert main(["requests", "add", *made, "false_positives=0.1", "capacity=3"]) == 0
    assert "request first promises nothing of false positives" in caplog.text
    assert str(promise(RequestStore.open(folder / "mixed"))).endswith("; nothing is promised of first")


def test_a_store_without_a_rate_has_no_word_of_it(folder: Path) -> None:
    assert main(add(folder, "plain", "first", "method.false_positives=0.4")) == 0
    manifest = json.loads((folder / "plain" / "stack.json").read_text())
    assert not {"false_positives", "capacity"} & manifest.keys()
    assert RequestStore.open(folder / "plain").check() == []
    assert 0.25 <= promise(RequestStore.open(folder / "plain")).total <= 0.4


def test_a_rate_that_is_changed_in_the_file_is_noticed(store: RequestStore, tmp_path: Path) -> None:
    path = store.folder / "stack.json"
    before = path.read_text()
    try:
        path.write_text(before.replace('"capacity": 2', '"capacity": 3'))
        assert any("digest" in str(problem) for problem in RequestStore.open(store.folder).check())
        sealed = RequestStore.open(store.folder).manifest.sealed()
        path.write_text(json.dumps(sealed.to_dict()))
        assert any("content is not what it was" in str(one) for one in RequestStore.open(store.folder).check())
    finally:
        path.write_text(before)


def test_a_share_is_the_same_for_each_of_the_capacity() -> None:
    assert sum(share(0.01, 20) for _ in range(20)) == pytest.approx(0.01)
    assert with_share(FITTED, 0.01, 20).method.false_positives == 0.0005
    assert with_share(FITTED, None, None) == FITTED
    less = dataclasses.replace(FITTED, method=MethodConfig(gate_fit="logistic", false_positives=0.0001))
    assert with_share(less, 0.01, 20).method.false_positives == 0.0001


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MethodConfig(), "which a gate that is fitted can keep: set method.gate_fit=logistic"),
        (MethodConfig(gate_fit="logistic", false_positives=0.01), "is more than a request's share of the store's rate"),
    ],
)
def test_a_gate_that_cannot_keep_its_share_is_refused(method: MethodConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_share(UnlearnConfig(method=method), 0.01, 20)


def test_a_rate_without_a_capacity_is_refused_and_so_is_another_rate(
    folder: Path, store: RequestStore, capsys: Captured
) -> None:
    refused(capsys, add(folder, "none", "first", "false_positives=0.1"), 2, "needs capacity")
    refused(capsys, add(folder, "store", "third", "capacity=7"), 2, "capacity=7", "has 2, set when it was made")
