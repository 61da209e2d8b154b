"""`python -m grun requests`: requests are added, listed, verified and withdrawn; what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from demo import refused
from safetensors.torch import load_file, save_file
from tiny import PAD, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from grun import GrunModel, GrunStack
from grun.cli import main
from grun.data.corpus import load_corpus
from grun.data.rows import Row
from grun.errors import RunError
from grun.evaluation.evaluate import EVALUATION_FILE
from grun.loading.resolve import resolve
from grun.method.adapter import WEIGHTS_FILE
from grun.requests.adding import in_force_before, others
from grun.requests.store import RequestStore
from grun.requests.verify import gates_at_prompts
from grun.runtime.files import write_json

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
SECOND = "data.demo.seed=1"
"""Another corpus, with other people to forget."""


@pytest.fixture(scope="module")
def filled(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one request, not to be changed."""
    store = tmp_path_factory.mktemp("stores") / "store"
    assert main(["requests", "add", f"store={store}", "id=first", f"adapter={adapter}"]) == 0
    return store


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(filled, tmp_path / "store"))


def run(action: str, store: Path, *arguments: str) -> int:
    return main(["requests", action, f"store={store}", *arguments])


def trained(taught: Path, adapter: Path, *arguments: str) -> list[str]:
    """Options with which a request is trained, quickly."""
    return [*demo.DATA, *demo.TRAINING, f"model.path={taught}", f"cache.dir={adapter.parent / 'cache'}", *arguments]


def report_of(store: Path) -> dict[str, Any]:
    """The newest verification."""
    found: dict[str, Any] = json.loads(sorted((store / "reports").glob("*.json"))[-1].read_text())
    return found


# -- adding -----------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_in_with_the_options_and_the_data_of_its_run(adapter: Path, filled: Path) -> None:
    request = RequestStore.open(filled).manifest.request("first")
    run_json = json.loads((adapter / "run.json").read_text())
    assert request.config["train"] == run_json["config"]["train"]
    assert request.config["data"]["demo"]["forget"] == 2
    assert request.metrics == {"seconds": run_json["seconds"], "steps": 12}
    rows = load_corpus(resolve("unlearn", demo.DATA).data).forget
    assert request.data.rows == len(rows) == len(set(request.data.hashes))
    content = b"".join(path.read_bytes() for path in filled.rglob("*") if path.is_file())
    for row in rows:
        assert str(row.prompt).encode() not in content, "the store has become a copy of what was deleted"


def test_an_adapter_without_a_run_comes_in_with_the_data_that_are_named(
    adapter: Path, tmp_path: Path, capsys: Captured
) -> None:
    bare = shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("run*.json"))
    assert run("add", tmp_path / "new", "id=a", f"adapter={bare}", "store_text=true", *demo.DATA) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new/requests/a")
    request = RequestStore.open(tmp_path / "new").manifest.request("a")
    assert list(request.config) == ["data"]
    assert request.text_stored
    refused(capsys, ["requests", "add", f"store={tmp_path / 'new'}", "id=a", "replace=true"], 2, "run.json", "profile")


def test_a_request_is_trained_in_the_store_and_goes_on_where_it_was_cut_off(
    taught: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "new"
    command = ["requests", "add", f"store={folder}", "id=mine", "note=by letter", *trained(taught, adapter)]

    def full(*_: object, **__: object) -> None:
        raise RunError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(RequestStore, "add", full)
        assert main(command) == 1
    assert RequestStore.open(folder).manifest.ids() == []
    assert (folder / "training/mine/adapter_model.safetensors").exists()
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(folder / "requests/mine")
    assert "finished: nothing to do" in caplog.text, "trained anew"
    assert not (folder / "training/mine").exists()
    request = RequestStore.open(folder).manifest.request("mine")
    assert (request.beside, request.note) == ((), "by letter")
    assert "output_dir" not in request.config
    alone, here = (load_file(where / "adapter_model.safetensors") for where in (adapter, folder / "requests/mine"))
    assert all(torch.equal(alone[name], here[name]) for name in alone), "independent: as `unlearn` trains it"


def test_a_replaced_request_takes_its_options_from_the_store(
    taught: Path, adapter: Path, store: Path, capsys: Captured
) -> None:
    before = load_file(store / "requests/first/adapter_model.safetensors")
    assert run("add", store, "id=first", "replace=true", "train.lr=0.02") == 0
    opened = RequestStore.open(store)
    request = opened.manifest.request("first")
    after = load_file(opened.adapter_folder("first") / "adapter_model.safetensors")
    assert request.config["train"]["lr"] == 0.02
    assert request.config["objective"] == "gd"
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert opened.check() == []


def test_what_cannot_be_a_request_is_refused_before_anything_is_trained_or_written(
    taught: Path, adapter: Path, store: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "forget.jsonl").write_text(
        '{"question": "Who?", "answer": "A"}\n{"question": "What?", "answer": "B"}\n'
    )
    (tmp_path / "retain.jsonl").write_text('{"question": "What?", "answer": "C"}\n')
    files = ["data.name=jsonl", "data.retain=retain.jsonl"]
    before = (store / "stack.json").read_bytes()
    add = ["requests", "add", f"store={store}"]
    training = trained(taught, adapter)
    refused(capsys, [*add, "id=first", *training], 2, "'first' is there already", "replace=true")
    refused(capsys, [*add, "id=a/b", *training], 2, "cannot be a request's id")
    refused(capsys, [*add, "id=frist", "replace=true"], 2, "did you mean 'first'")
    refused(capsys, [*add, "id=x", *training, *files, "data.forget=empty.jsonl"], 1, "empty.jsonl")
    refused(capsys, [*add, "id=x", *training, *files, "data.forget=forget.jsonl"], 1, "1 of 2 forget rows", "row 2)")
    refused(capsys, [*add, "id=x", f"adapter={adapter}", SECOND], 1, "forget rows are not those", "data.*")
    refused(capsys, [*add, "id=x", f"adapter={adapter}", "train.lr=1"], 2, "train.lr=1", "data.*")
    refused(capsys, [*add, "id=x", f"adapter={taught}"], 1, "is not of a run of `python -m grun unlearn`")
    refused(capsys, [*add, "id=x", "method.parametrization=lora", *training], 2, "GRUN adapters")
    refused(capsys, [*add, "id=x", "output_dir=y", *training], 2, "output_dir")
    refused(capsys, [*add, "id=x", "rule=max_gate", *training], 2, "rule=max_gate", "has sum")
    assert (store / "stack.json").read_bytes() == before
    assert not (store / "training").exists()
    refused(capsys, ["requests", "add", "store=new", "id=x", "train.lrr=1"], 2, "did you mean 'train.lr'")
    assert not (tmp_path / "new").exists()


def test_a_request_on_another_base_is_refused_before_it_is_trained(
    taught: Path, adapter: Path, store: Path, tmp_path: Path, capsys: Captured
) -> None:
    other = changed_base(taught, tmp_path / "other")
    command = ["requests", "add", f"store={store}", "id=x", *trained(taught, adapter, f"model.path={other}")]
    refused(capsys, command, 1, "is another base than this store's")
    assert not (store / "training").exists()
    same = shutil.copytree(taught, tmp_path / "same")
    assert main([*command[:-1], f"model.path={same}"]) == 0, "the same weights in another folder"


def changed_base(taught: Path, folder: Path) -> Path:
    """The taught model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(taught)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(taught).save_pretrained(folder)
    return folder


# -- listing, taking out ----------------------------------------------------------------------------------------------


def test_list_and_history_say_what_is_there_and_how_it_came_about(store: Path, capsys: Captured) -> None:
    assert run("disable", store, "id=first") == 0
    capsys.readouterr()
    assert run("list", store, "format=json") == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert (line["id"], line["state"], line["rows"]) == ("first", "disabled", 10)
    assert (line["blocks"], line["rank"], line["gate"], line["beside"]) == ([1, 2, 3], 4, "linear", [])
    assert line["bytes"] == sum(file.stat().st_size for file in (store / "requests/first").iterdir())
    assert run("list", store) == 0
    printed = capsys.readouterr().out
    for text in ("first", "disabled", "1,2,3", "linear", "steps 12"):
        assert text in printed
    assert run("enable", store, "id=first") == 0
    assert run("history", store) == 0
    events = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in events] == ["create", "add", "disable", "enable"]
    assert run("history", store, "format=json") == 0
    assert [event["request"] for event in json.loads(capsys.readouterr().out)] == [None, *["first"] * 3]


def put_beside(store: Path, adapter: Path) -> None:
    """Put in a second request that says it was trained beside the first."""
    opened = RequestStore.open(store)
    first = opened.manifest.request("first")
    rows = load_corpus(resolve("unlearn", demo.DATA).data).forget
    opened.add("second", adapter, forget_rows=rows, config=first.config, beside=["first"], note="kept")


def test_remove_names_what_was_trained_beside_and_how_to_train_it_anew(
    store: Path, adapter: Path, capsys: Captured
) -> None:
    put_beside(store, adapter)
    capsys.readouterr()
    assert run("remove", store, "id=first") == 0
    printed = capsys.readouterr().out.splitlines()
    assert "second" in printed[0]
    assert printed[1].strip() == f"python -m grun requests add store={store} id=second replace=true"
    assert not (store / "requests/first").exists()
    assert main(printed[1].split()[3:]) == 0, "the command works as it is printed"
    assert RequestStore.open(store).manifest.request("second").beside == ()


def test_remove_trains_anew_what_was_trained_beside_if_asked(store: Path, adapter: Path, capsys: Captured) -> None:
    put_beside(store, adapter)
    assert run("disable", store, "id=second") == 0
    assert run("remove", store, "id=first", "retrain=true") == 0
    opened = RequestStore.open(store)
    (second,) = opened.manifest.requests
    assert (second.id, second.beside, second.note, second.state) == ("second", (), "kept", "disabled")
    assert [event.action for event in opened.manifest.history][-4:] == ["disable", "remove", "replace", "disable"]
    assert opened.check() == []


def test_what_is_trained_anew_has_the_earlier_requests_beside_it(store: Path, adapter: Path) -> None:
    put_beside(store, adapter)
    opened = RequestStore.open(store)
    opened.add("third", adapter, forget_rows=[Row("Who?", "A")], config={}, beside=["first", "second"])
    assert in_force_before(opened, "second") == ["first"]
    assert in_force_before(opened, "new") == ["first", "second", "third"]
    with others(opened, "new", ["first", "second", "third"]) as folder:
        assert folder == store
    with others(opened, "second", ["first"]) as folder:
        assert folder is not None
        part = RequestStore.open(folder)
        assert part.manifest.ids(active=True) == ["first"]
        assert part.check() == []
    assert not folder.exists()
    with others(opened, "first", []) as folder:
        assert folder is None


def test_beside_no_request_is_on_the_bare_base(taught: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("add", tmp_path / "new", "id=a", "independent=false", *trained(taught, adapter)) == 0
    assert RequestStore.open(tmp_path / "new").manifest.request("a").beside == ()


def test_a_request_trained_beside_others_says_so_and_is_trained_anew_when_they_go(
    taught: Path, adapter: Path, store: Path, capsys: Captured
) -> None:
    training = trained(taught, adapter, SECOND)
    assert run("add", store, "id=alone", *training) == 0
    assert run("disable", store, "id=alone") == 0
    assert run("add", store, "id=beside", "independent=false", *training) == 0
    opened = RequestStore.open(store)
    request = opened.manifest.request("beside")
    assert request.beside == ("first",), "those in force, and no other"
    assert "beside" not in request.config["method"], "ids are kept, not a folder that changes"
    alone, beside = (opened.adapter_folder(name) / "adapter_model.safetensors" for name in ("alone", "beside"))
    weights = load_file(beside)
    assert any(not torch.equal(weights[name], value) for name, value in load_file(alone).items())
    assert run("remove", store, "id=first", "retrain=true") == 0
    opened = RequestStore.open(store)
    assert opened.manifest.request("beside").beside == ()
    weights = load_file(opened.adapter_folder("beside") / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in load_file(alone).items())


def test_an_adapter_trained_beside_requests_comes_in_while_these_are_as_they_were(
    taught: Path, adapter: Path, store: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = trained(taught, adapter, SECOND, f"method.beside={store}", f"output_dir={tmp_path / 'run'}")
    assert main(["unlearn", *arguments]) == 0
    changed = shutil.copytree(store, tmp_path / "changed")
    assert run("disable", changed, "id=first") == 0
    refused(capsys, ["requests", "add", f"store={changed}", "id=b", "adapter=run"], 2, "independent=false")
    assert run("add", store, "id=b", "adapter=run") == 0
    assert RequestStore.open(store).manifest.request("b").beside == ("first",)


def test_nothing_is_removed_if_what_is_to_be_trained_anew_has_lost_its_data(
    store: Path, adapter: Path, capsys: Captured
) -> None:
    opened = RequestStore.open(store)
    config = opened.manifest.request("first").config
    opened.add("second", adapter, forget_rows=[Row("Who?", "A")], config=config, beside=["first"])
    refused(capsys, ["requests", "remove", f"store={store}", "id=first", "retrain=true"], 1, "no longer those")
    assert RequestStore.open(store).manifest.ids() == ["first", "second"]


def everything(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


@contextlib.contextmanager
def built_elsewhere(folder: Path) -> Iterator[None]:
    """As while another process builds a cache there."""
    (folder / ".grun").mkdir(exist_ok=True)
    with open(folder / ".grun" / "folder.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("how", ["purge", "command", "busy", "request", "adapter"])
def test_what_the_cache_keeps_of_a_removed_request_is_named_and_can_be_removed(
    how: str, taught: Path, adapter: Path, tmp_path: Path, capsys: Captured
) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "new"
    training = trained(taught, adapter, f"cache.dir={cache}")
    if how == "adapter":
        assert main(["unlearn", *training, f"output_dir={tmp_path / 'run'}"]) == 0
        assert run("add", folder, "id=mine", f"adapter={tmp_path / 'run'}") == 0
    else:
        assert run("add", folder, "id=mine", *training) == 0
    (key,) = [path for path in cache.iterdir() if path.is_dir()]
    strangers = [cache / "notes.txt", key / "notes.txt", cache / "0123456789abcdef" / "00000001-01234567.safetensors"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    capsys.readouterr()
    assert main(["cache", "list", f"dir={cache}", "format=json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]) for one in listed] == sorted(key.glob("*.safetensors")) != []
    for one in listed:
        (use,) = one["uses"]
        assert (use["request"], use["model"]) == (None if how == "adapter" else "mine", str(taught))
        assert use["data"] == json.loads((adapter / "run.json").read_text())["data"]
    refused(capsys, ["cache", "remove", f"dir={cache}"], 2, "needs request=ID, data=HASH or all=true")
    assert main(["cache", "remove", f"dir={cache}", "request=other"]) == 0
    if how == "request":
        assert main(["cache", "remove", f"dir={cache}", "request=mine"]) == 0
    capsys.readouterr()
    with built_elsewhere(key) if how == "busy" else contextlib.nullcontext():
        purge = ["purge=true"] * (how in ("purge", "adapter", "busy"))
        assert run("remove", folder, "id=mine", *purge) == (how == "busy")
    printed = capsys.readouterr().out.splitlines()
    assert RequestStore.open(folder).manifest.ids() == []
    if how in ("command", "busy"):
        assert "left of mine: 1 shard of" in printed[0]
        assert [one["path"] for one in listed] == [str(path) for path in key.glob("*.safetensors")]
        assert main(printed[1].split()[3:]) == 0
    assert (f"left of mine: {tmp_path / 'run'}, a run on its data" in "\n".join(printed)) == (how == "adapter")
    kept = [*(str(path.relative_to(cache)) for path in strangers), "weights.json", key.name, "0123456789abcdef"]
    assert everything(cache) == sorted(kept), "only what GRUN wrote is gone, and all of that"
    assert main(["cache", "remove", f"dir={cache}", "all=true"]) == 0
    assert [path.read_text() for path in strangers] == ["mine"] * 3


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_asks_what_was_forgotten_as_evaluate_does(
    taught: Path, adapter: Path, store: Path, tmp_path: Path, capsys: Captured
) -> None:
    capsys.readouterr()
    assert run("verify", store, "max_new_tokens=16") == 0
    printed = capsys.readouterr().out
    found = report_of(store)
    assert printed.splitlines()[-1] == str(sorted((store / "reports").glob("*.json"))[-1])
    assert "Nothing wrong was found" in printed
    assert found["fingerprint"] == found["expected_fingerprint"]
    (one,) = found["requests"]
    arguments = [f"model.path={taught}", f"adapter={adapter}", "sets=[forget]", "max_new_tokens=16"]
    assert main(["evaluate", *demo.DATA, *arguments, f"output_dir={tmp_path / 'evaluation'}"]) == 0
    expected = json.loads((tmp_path / "evaluation" / EVALUATION_FILE).read_text())
    figures = one["figures"]
    for name in ("fact_recall", "rouge_l"):
        assert figures[name] == pytest.approx(expected["sets"]["forget"][name], abs=1e-9)
    assert figures["gate_open"] == pytest.approx(expected["gate"]["open"]["forget"], abs=1e-9)
    reports = "".join(path.read_text() for path in (store / "reports").iterdir())
    for row in load_corpus(resolve("unlearn", demo.DATA).data).forget:
        assert str(row.prompt) not in reports


@pytest.mark.parametrize("wrong", ["adapter", "base"])
def test_verify_detects_a_changed_adapter_and_a_changed_base(
    wrong: str, taught: Path, store: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = []
    if wrong == "adapter":
        weights = store / "requests/first/adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        arguments = [f"model.path={changed_base(taught, tmp_path / 'other')}"]
    capsys.readouterr()
    assert run("verify", store, *arguments) == 1
    text = {
        "adapter": "request first: adapter_model.safetensors was changed",
        "base": "is not the base of this store",
    }[wrong]
    assert text in capsys.readouterr().out
    assert len(report_of(store)["problems"]) == 1


def test_verify_says_that_an_adapter_makes_the_model_give_no_numbers(
    adapter: Path, store: Path, tmp_path: Path, capsys: Captured
) -> None:
    huge = shutil.copytree(adapter, tmp_path / "huge")
    weights = {name: torch.full_like(part, 3e38) for name, part in load_file(huge / WEIGHTS_FILE).items()}
    save_file(weights, huge / WEIGHTS_FILE)
    assert run("add", store, "id=huge", f"adapter={huge}") == 0
    (store / "reports").write_text("mine")  # so that no report can be written
    capsys.readouterr()
    assert run("verify", store) == 1
    captured = capsys.readouterr()
    assert "request huge: its questions cannot be asked: the model gives log-prob" in captured.out
    assert captured.out.endswith("where the requests are loaded.\n\n")


def heads(printed: str) -> list[str]:
    return [line.removeprefix("head: ").partition(",")[0] for line in printed.splitlines() if line.startswith("head: ")]


def test_verify_prints_the_head_and_tells_a_store_that_was_rolled_back(store: Path, capsys: Captured) -> None:
    capsys.readouterr()
    assert run("verify", store, "files_only=true") == 0
    (first,) = heads(capsys.readouterr().out)
    older = (store / "stack.json").read_bytes()
    assert run("disable", store, "id=first") == 0
    assert run("verify", store, "files_only=true", f"head={first}") == 0
    printed = capsys.readouterr().out
    assert "Done after the head given: disable first" in printed
    (second,) = heads(printed)
    (store / "stack.json").write_bytes(older)
    assert run("verify", store, "files_only=true") == 0, "nothing in an older store says that it is older"
    assert run("verify", store, "files_only=true", f"head={second[:16]}") == 1
    assert "rolled back, or its history rewritten" in capsys.readouterr().out


def keys(folder: Path, name: str) -> list[str]:
    """Options of a new pair of keys, as openssl writes them."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return [f"key={private}", f"public_key={public}"]


def test_a_signed_head_is_checked_and_no_change_goes_unsigned(store: Path, tmp_path: Path, capsys: Captured) -> None:
    mine, my_public = keys(tmp_path, "mine")
    other, other_public = keys(tmp_path, "other")
    verify = ["verify", store, "files_only=true"]
    assert run(*verify, my_public) == 1
    assert "the head is not signed" in capsys.readouterr().out
    assert run("disable", store, "id=first", mine) == 0
    assert run(*verify, my_public) == run(*verify) == 0
    assert "signed by " in capsys.readouterr().out
    assert run(*verify, other_public) == 1
    assert "signed with another key" in capsys.readouterr().out
    refused(capsys, ["requests", "enable", f"store={store}", "id=first"], 2, "is signed at each change; set key=FILE")
    signature = RequestStore.open(store).manifest.signature
    assert run("enable", store, "id=first", other) == 0
    assert run(*verify, other_public) == 0
    opened = RequestStore.open(store)
    forged = dataclasses.replace(opened.manifest, signature=signature).sealed()
    write_json(store / "stack.json", forged.to_dict())
    assert run(*verify, my_public) == run(*verify) == 1
    assert capsys.readouterr().out.count("the signature is not one of this head") == 2


def test_keys_that_cannot_be_used_are_refused_in_one_line(
    store: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, public = keys(tmp_path, "mine")
    disable = ["requests", "disable", f"store={store}", "id=first"]
    verify = ["requests", "verify", f"store={store}", "files_only=true"]
    refused(capsys, [*disable, "key=nowhere.pem"], 2, "key=nowhere.pem cannot be read", "openssl genpkey")
    refused(capsys, [*disable, public.removeprefix("public_")], 2, "others may read it")
    refused(capsys, [*verify, f"public_{mine}"], 2, "is no public key")
    refused(capsys, [*verify, "head=xyz"], 2, "16 to 64 hex digits")
    (tmp_path / "mine.pem").chmod(0o640)
    refused(capsys, [*disable, mine], 2, "others may read it", "chmod 600")
    (tmp_path / "mine.pem").chmod(0o600)
    (tmp_path / "mine.pem").write_text("x")
    refused(capsys, [*disable, mine], 2, "is no private key")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    refused(capsys, [*disable, mine], 2, "pip install 'grun-unlearning[signing]'")


def test_verify_says_why_a_request_was_not_asked(store: Path, adapter: Path) -> None:
    opened = RequestStore.open(store)
    lost = {"data": {"name": "jsonl", "forget": "gone.jsonl", "retain": "gone.jsonl"}}
    other = resolve("unlearn", [*demo.DATA, SECOND]).data
    for name, config, rows in [
        ("lost", lost, [Row("Who?", "A")]),
        ("changed", opened.manifest.request("first").config, load_corpus(other).forget),
        ("unnamed", {}, [Row("Who?", "A")]),
        ("disabled", {}, [Row("Who?", "A")]),
    ]:
        opened.add(name, adapter, forget_rows=rows, config=config)
    opened.add("stored", adapter, forget_rows=[Row("Who?", "A")], config=lost, store_text=True)
    opened.set_state("disabled", "disabled")
    assert run("verify", store, "max_new_tokens=2") == 0
    found = {one["id"]: one for one in report_of(store)["requests"]}
    for name, text in [
        ("lost", "cannot be loaded"),
        ("changed", "salted hashes differ"),
        ("unnamed", "nothing says where"),
        ("disabled", "not in force"),
    ]:
        assert text in found[name]["not_asked"]
        assert found[name]["figures"] == {}
    assert found["stored"]["figures"]["rouge_l"] is not None
    assert found["stored"]["figures"]["fact_recall"] is None, "the row names no key fact"
    assert run("verify", store, "files_only=true") == 0
    assert {one["not_asked"] for one in report_of(store)["requests"]} == {"files only", "not in force"}


def test_verify_asks_for_a_base_that_the_store_cannot_name(tmp_path: Path, capsys: Captured) -> None:
    folder = demo.random_model(tmp_path)
    opened = RequestStore.create(tmp_path / "new")
    opened.add("a", folder / "adapter", forget_rows=[Row("Who?", "A")], config={})
    refused(capsys, ["requests", "verify", f"store={tmp_path / 'new'}"], 2, "set model.path, or files_only=true")
    assert run("verify", tmp_path / "new", f"model.path={folder / 'model'}") == 0


def test_verify_fails_where_more_is_recalled_than_may_be(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grun.requests import verify

    monkeypatch.setattr(verify, "evaluate_request", lambda *_, **__: {"fact_recall": 0.3})
    assert run("verify", store, "recall_at_most=0.3") == 0
    assert run("verify", store, "recall_at_most=0.2") == 1
    assert "fact recall on its own questions is 0.300" in report_of(store)["problems"][0]["text"]


def test_gates_are_read_at_the_last_prompt_token_whatever_a_design_reads_and_how_long_a_prompt_is() -> None:
    base = tiny()
    designs = {"published": "last_prompt", "robust": "every_token"}
    members = {}
    for seed, (name, place) in enumerate(designs.items()):
        torch.manual_seed(seed)
        model = GrunModel.wrap(base, blocks=(1,), rank=2, gate_read=place, edit_write=place)
        members[name] = (model.config, {key: value.clone() for key, value in model.state_dict().items()})
        model.unwrap()
    stack = GrunStack(base).eval()
    stack.add_weights(members)
    prompts = [[5, 9, 3, 7, 8, 4], [6, 3], [4, 8, 5, 9]]
    found = gates_at_prompts(stack, prompts, batch_size=2, pad_id=PAD)
    stack.unwrap()
    for name, (config, weights) in members.items():
        model = GrunModel(base, config)
        model.load_state_dict(weights)
        for place, prompt in enumerate(prompts):
            with torch.no_grad():
                model.eval()(torch.tensor([prompt]))
            # one prompt a pass, without padding: sums of float64 in another order
            assert found[name][place][1] == pytest.approx(float(model.last_gates[1][0, -1]), abs=1e-9)
        model.unwrap()


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["requests"], "needs an action: list, add"),
        (["requests", "store=x"], "needs an action"),
        (["requests", "ad", "store=x"], "did you mean 'add'"),
        (["requests", "list"], "needs store=DIR"),
        (["requests", "remove", "store=x"], "needs id=ID"),
        (["requests", "remove", "store=x", "id=y", "note=z"], "option note is for requests add"),
        (["requests", "list", "store=x", "formt=json"], "did you mean 'format'"),
        (["requests", "list", "store=x", "json"], "'json' is not key=value"),
        (["requests", "list", "store=x", "format=yaml"], "known: json, table"),
        (["requests", "list", "store=x", "objective=gd"], "unknown option 'objective'"),
    ],
)
def test_wrong_use_is_refused_in_one_line(arguments: list[str], named: str, capsys: Captured) -> None:
    refused(capsys, arguments, 2, named)


def test_a_store_that_is_not_there_is_not_made_by_looking(tmp_path: Path, capsys: Captured) -> None:
    for action in ("list", "history", "verify"):
        refused(capsys, ["requests", action, "store=nowhere"], 1, "no request store")
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_actions(capsys: Captured) -> None:
    assert main(["requests", "--help"]) == 0
    printed = capsys.readouterr().out
    for action in ("list", "add", "remove", "disable", "enable", "verify", "history"):
        assert f"\n  {action} " in printed
