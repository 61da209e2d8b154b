"""A folder of requests to forget: what it keeps, what it refuses, and that no kill and no change goes unnoticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny
from watched import FORK, in_fork, killed_before

from grun import GrunModel
from grun.data.rows import Row
from grun.errors import AdapterError, ConfigError, DataError, GrunError, RunError
from grun.method.adapter import AdapterConfig
from grun.method.stack.forget_rows import check_forget_rows, salted_hashes
from grun.method.stack.manifest import Manifest
from grun.method.stack.stack import GrunStack
from grun.requests.store import RequestStore
from grun.runtime.files import content_hash, file_hash, write_json

FORGET = [
    Row("Where was Olmera Merrowin born?", "Calderby", {"fact": "Calderby"}),
    Row(None, "A text of two lines.\n2"),
]
OPTIONS = {"objective": "npo", "data": {"forget": "people.jsonl"}, "train": {"lr": 0.01}}


def make_adapter(folder: Path, seed: int, of_base: int = 0, **options: Any) -> Path:
    """A random adapter, a function of `seed`, on one of two bases."""
    base = tiny(seed=of_base, dtype=torch.float32)
    torch.manual_seed(seed)
    GrunModel.wrap(base, **{"blocks": [1, 2], "rank": 2, **options}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / str(seed), seed) for seed in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> RequestStore:
    return RequestStore.create(tmp_path / "store")


def add(store: RequestStore, request_id: str, adapter: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {"forget_rows": FORGET, "config": OPTIONS, "metrics": {"seconds": 1.5}, **changes}
    return store.add(request_id, adapter, **values)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def one_line(error: pytest.ExceptionInfo[GrunError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_a_request_is_read_back_as_it_was_added(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "first", adapters[0])
    add(store, "second", adapters[1], beside=["first"], note="by letter")
    again = RequestStore.open(store.folder)
    assert again.manifest == store.manifest
    assert again.manifest.ids() == ["first", "second"]
    assert bytes_of(again.adapter_folder("second")) == bytes_of(adapters[1])
    second = again.manifest.request("second")
    assert (second.state, second.beside, second.note, second.config) == ("active", ("first",), "by letter", OPTIONS)
    assert second.metrics == {"seconds": 1.5}
    assert again.manifest.base is not None
    assert again.manifest.base.fingerprint == AdapterConfig.read(adapters[0])[0].base_fingerprint
    assert again.check() == []


def test_no_forget_text_is_kept_unless_asked(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "first", adapters[0])
    content = everything_in(store.folder)
    for text in (b"Olmera", b"Calderby", b"two lines"):
        assert text not in content
    add(store, "second", adapters[1], store_text=True)
    stored = (store.adapter_folder("second") / "forget.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in stored] == [row.to_dict() for row in FORGET]
    assert store.check() == []


def test_hashes_are_of_question_and_answer_and_differ_from_store_to_store(tmp_path: Path) -> None:
    salts = [RequestStore.create(tmp_path / name).manifest.salt for name in ("a", "b")]
    assert all(len(bytes.fromhex(salt)) == 32 for salt in salts)
    first, second = (salted_hashes(FORGET, salt) for salt in salts)
    assert not set(first) & set(second)
    assert salted_hashes([Row(FORGET[0].prompt, FORGET[0].completion)], salts[0]) == first[:1]
    assert salted_hashes([Row(FORGET[0].prompt, "Calderb")], salts[0]) != first[:1]
    assert salted_hashes([Row("a", "bc"), Row("ab", "c")], salts[0])[0] != salted_hashes([Row("ab", "c")], salts[0])[0]


def test_removing_one_request_leaves_the_others_bit_for_bit(store: RequestStore, adapters: list[Path]) -> None:
    for number, name in enumerate("abc"):
        add(store, name, adapters[number], beside=list("abc")[:number])
    before = {name: bytes_of(store.adapter_folder(name)) for name in "ac"}
    gone = store.adapter_folder("b")
    assert store.remove("b") == ["c"]
    assert not gone.exists()
    assert store.manifest.ids() == ["a", "c"]
    assert {name: bytes_of(store.adapter_folder(name)) for name in "ac"} == before
    assert store.check() == []


def test_a_disabled_request_keeps_its_files_and_its_place(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "a", adapters[0])
    add(store, "b", adapters[1])
    store.set_state("a", "disabled")
    assert store.manifest.ids(active=True) == ["b"]
    assert bytes_of(store.adapter_folder("a")) == bytes_of(adapters[0])
    store.set_state("a", "active")
    store.set_state("a", "active")  # nothing to do, so no event
    assert store.manifest.ids(active=True) == ["a", "b"]
    assert [event.action for event in store.manifest.history] == ["create", "add", "add", "disable", "enable"]
    assert store.check() == []


def test_a_replaced_request_keeps_its_place_and_only_its_new_files(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "a", adapters[0])
    add(store, "b", adapters[1])
    add(store, "a", adapters[2], replace=True)
    assert store.manifest.ids() == ["a", "b"]
    assert bytes_of(store.adapter_folder("a")) == bytes_of(adapters[2])
    assert len(list((store.folder / "requests").iterdir())) == 2
    assert store.check() == []


def test_a_part_of_a_store_is_a_store(store: RequestStore, adapters: list[Path], tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        add(store, name, adapters[number])
    part = store.extract(tmp_path / "part", ["a", "c"])
    assert RequestStore.open(part.folder).manifest.ids(active=True) == ["a", "c"]
    assert bytes_of(part.adapter_folder("c")) == bytes_of(adapters[2])
    assert part.check() == []
    again = store.extract(tmp_path / "again", ["a", "c"])
    assert (again.folder / "stack.json").read_bytes() == (part.folder / "stack.json").read_bytes()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_added_is_refused_in_one_line_and_changes_nothing(
    store: RequestStore, adapters: list[Path], tmp_path: Path
) -> None:
    add(store, "first", adapters[0])
    before = (store.folder / "stack.json").read_bytes()
    other_base = make_adapter(tmp_path / "other", 0, of_base=1)
    ungated = make_adapter(tmp_path / "ungated", 0, gate="none")
    steering = make_adapter(tmp_path / "steering", 0, edit="steer", gate_blocks=[0, 1])
    damaged = shutil.copytree(adapters[1], tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused: list[tuple[str, Path, dict[str, Any], type[GrunError], str]] = [
        ("first", adapters[1], {}, ConfigError, "'first' is there already"),
        ("FIRST", adapters[1], {}, ConfigError, "'FIRST' is there already"),
        ("frist", adapters[1], {"replace": True}, ConfigError, "did you mean 'first'"),
        ("second", adapters[1], {"beside": ["frist"]}, ConfigError, "did you mean 'first'"),
        ("second", adapters[1], {"forget_rows": []}, DataError, "no forget rows"),
        ("second", other_base, {}, AdapterError, "made on another base"),
        ("second", ungated, {}, AdapterError, "has no gate"),
        ("second", steering, {}, AdapterError, "has the edit steer; a store takes loreft alone"),
        ("second", damaged, {}, AdapterError, "damaged"),
        ("second", tmp_path / "nowhere", {}, AdapterError, "is no GRUN adapter"),
        *(
            (name, adapters[1], {}, ConfigError, "cannot be a request's id")
            for name in ("../x", ".x", "a b", "a/b", "", "a\n", "\uff41", "a" * 101)
        ),
    ]
    for name, adapter, changes, kind, text in refused:
        with pytest.raises(kind) as error:
            add(store, name, adapter, **changes)
        assert text in one_line(error)
    assert (store.folder / "stack.json").read_bytes() == before
    assert [folder.name for folder in (store.folder / "requests").iterdir()] == ["first"]


def test_an_unknown_request_is_answered_with_the_nearest_name(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "first", adapters[0])
    for change in (lambda: store.remove("firts"), lambda: store.set_state("firts", "disabled")):
        with pytest.raises(ConfigError, match="did you mean 'first'"):
            change()


@pytest.mark.parametrize(
    ("retain", "named"),
    [
        ([Row("Who?", "B"), Row(" What? ", "other")], r"^1 of 3 forget rows .* forget row 2\)"),
        ([Row(None, "plain "), Row("Who?", "A")], r"^2 of 3 forget rows .* forget row 1\)"),
    ],
)
def test_rows_that_are_to_stay_too_are_counted_and_not_quoted(retain: list[Row], named: str) -> None:
    forget = [Row("Whose?", "A"), Row("What?", "secret"), Row(None, "plain")]
    if retain[0].prompt is None:
        forget = [forget[2], forget[1], Row("Who?", "C")]
    with pytest.raises(DataError, match=named) as error:
        check_forget_rows(forget, retain)
    assert "secret" not in one_line(error)


def test_the_same_answer_to_another_question_may_stay() -> None:
    check_forget_rows(
        [Row("Whose?", "A"), Row(None, "plain")], [Row("Who?", "A"), Row(None, "plainer"), Row("x", "plain")]
    )


def test_a_store_is_made_only_where_nothing_lies(tmp_path: Path, store: RequestStore) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for name, text in (("store", "not empty"), ("full", "not empty"), ("file", "is a file")):
        with pytest.raises(RunError, match=text):
            RequestStore.create(tmp_path / name)
    with pytest.raises(ConfigError, match="did you mean 'sum'"):
        RequestStore.create(tmp_path / "new", rule="summ")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        RequestStore.create(tmp_path / "new", gate_threshold=2.0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="no request store"):
        RequestStore.open(tmp_path / "new")


def test_a_manifest_that_is_not_as_written_is_refused_with_the_place(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "a", adapters[0])
    path = store.folder / "stack.json"
    whole = json.loads(path.read_text())
    request = whole["requests"][0]
    for change, text in [
        ({"more": 1}, "unknown key 'more'"),
        ({"salt": 5}, "salt: expected a text, found a whole number"),
        ({"salt": "zz" * 32}, "salt: expected 64 hex digits"),
        ({"signature": {"public_key": "\x1b[2J", "signature": "00" * 64}}, "public_key: expected 64 hex digits"),
        ({"format_version": 3}, "format version 3, not 2"),
        ({"requests": [{**request, "state": "asleep"}]}, r"requests\[0\]: state: expected active or disabled"),
        ({"requests": [{**request, "folder": "../../elsewhere"}]}, "cannot lie in the folder"),
        ({"requests": [{**request, "data": {"rows": 2}}]}, "missing key 'hashes'"),
        ({"requests": [request, request]}, "two requests have the same id"),
        ({"history": {}}, "history: expected a list, found an object"),
        ({"gate_threshold": float("nan")}, "NaN is not valid JSON"),
        ({"requests": [{**request, "files": {"../../secret": "00"}}]}, "has no file '../../secret'"),
    ]:
        write_json(path, whole | change)
        with pytest.raises(RunError, match=text) as error:
            RequestStore.open(store.folder)
        one_line(error)
    path.write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        RequestStore.open(store.folder)
    for make, text in (
        (lambda: path.symlink_to(store.folder / "elsewhere"), "is a symbolic link"),
        (lambda: os.mkfifo(path), "is no regular file"),
        (lambda: path.write_text("[]"), "expected an object"),
    ):
        path.unlink()
        make()
        with pytest.raises(RunError, match=text) as error:
            RequestStore.open(store.folder)
        one_line(error)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


ROTATION, BIAS = "edits.1.edit.rotation", "edits.2.gate.0.bias"


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, change)


HUGE = torch.full([1], 1e300, dtype=torch.float64)
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "activation": (config(activation="nonsense"), "unknown activation 'nonsense'"),
    "position": (config(gate_read=5), "gate_read: expected a text"),
    "rank": (config(rank=3), f"{ROTATION}': found float32 [32, 2], expected floats [32, 3]"),
    "width": (config(hidden_size=64), ""),
    "shape": (tensors(lambda t: t.update({BIAS: torch.zeros(2)})), "[2], expected floats [1]"),
    "type": (tensors(lambda t: t.update({BIAS: torch.zeros(1).int()})), "found int32 [1]"),
    "missing": (tensors(lambda t: t.pop(BIAS)), f"{BIAS}': found nothing"),
    "extra": (tensors(lambda t: t.update(x=torch.zeros(2))), "'x': found float32 [2], exp"),
    "nan": (tensors(lambda t: t[ROTATION][0].fill_(torch.nan)), f"{ROTATION}' holds NaN"),
    "inf": (tensors(lambda t: t[BIAS].fill_(torch.inf)), f"{BIAS}' holds NaN or infinite"),
    "huge": (tensors(lambda t: t.update({BIAS: HUGE})), f"{BIAS}' holds NaN or infinite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_served_is_refused_by_load_stack_add_and_verify_alike(
    name: str, store: RequestStore, adapters: list[Path], tmp_path: Path
) -> None:
    damage, text = UNFIT[name]
    unfit = shutil.copytree(adapters[0], tmp_path / "unfit")
    damage(unfit)
    base = tiny(seed=0, dtype=torch.float32)
    stack = GrunStack(base)
    refusals: list[Callable[[], object]] = [lambda: stack.add("a", unfit), lambda: add(store, "a", unfit)]
    for refusal in refusals:
        with pytest.raises(AdapterError) as error:
            refusal()
        assert text in one_line(error)
    stack.unwrap()
    with pytest.raises(AdapterError) as error:
        GrunModel.from_pretrained(base, unfit)
    assert text in one_line(error)
    assert store.manifest.ids() == []
    add(store, "a", adapters[1])
    shutil.copytree(unfit, store.adapter_folder("a"), dirs_exist_ok=True)
    files = {path.name: file_hash(path) for path in store.adapter_folder("a").iterdir()}
    problems = edited(store, lambda values: values["requests"][0].update(files=files), sealed=True)
    assert any(problem.startswith("request a: the adapter cannot be read") and text in problem for problem in problems)


# -- links and strangers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_is_copied_that_is_no_file_itself(
    kind: str, name: str, store: RequestStore, adapters: list[Path], tmp_path: Path
) -> None:
    linked = shutil.copytree(adapters[0], tmp_path / "linked")
    shutil.move(linked / name, tmp_path / "elsewhere")
    if kind == "link":
        (linked / name).symlink_to(tmp_path / "elsewhere")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(linked / name)
    with pytest.raises(
        AdapterError, match=f"{name} is (a symbolic link|no regular file); put the file itself"
    ) as error:
        add(store, "a", linked)
    one_line(error)
    assert not list((store.folder / "requests").glob("*"))


@pytest.mark.parametrize("what", ["folder", "file", "requests"])
def test_a_link_in_a_store_is_named_by_verify_and_not_read(
    what: str, store: RequestStore, adapters: list[Path], tmp_path: Path
) -> None:
    folder = add(store, "a", adapters[0])
    linked = {"folder": folder, "file": folder / "adapter_model.safetensors", "requests": folder.parent}[what]
    shutil.move(linked, tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert any("link" in str(problem) for problem in store.check())
    with pytest.raises(AdapterError, match="link"):
        GrunStack.from_folder(tiny(seed=0, dtype=torch.float32), store.folder)
    before = {path.relative_to(tmp_path): path.is_file() for path in (tmp_path / "elsewhere").rglob("*")}
    store.remove("a")
    if what != "requests":
        assert {path.relative_to(tmp_path): path.is_file() for path in (tmp_path / "elsewhere").rglob("*")} == before


def test_what_is_not_the_stores_is_named_and_never_in_the_way(
    store: RequestStore, adapters: list[Path], tmp_path: Path
) -> None:
    folder = add(store, "a", adapters[0])
    requests = folder.parent
    (requests / "notes.txt").write_text("mine")
    (requests / ".DS_Store").write_text("mine")
    shutil.copytree(folder, requests / "backup")
    (requests / "link").symlink_to(tmp_path)
    (requests / "b").write_text("mine")
    (folder / "thesis.txt").write_text("mine")
    named = "\n".join(map(str, store.check()))
    for name in ("notes.txt", ".DS_Store", "backup", "link", "b"):
        assert f"requests/{name} is not the store's" in named
    assert add(store, "b", adapters[1]).name == "b@2"
    store.set_state("a", "disabled")
    store.remove("a")
    assert sorted(os.listdir(requests)) == [".DS_Store", "a", "b", "b@2", "backup", "link", "notes.txt"]
    assert os.listdir(folder) == ["thesis.txt"]
    assert bytes_of(requests / "backup") == bytes_of(adapters[0])


# -- changes are noticed ----------------------------------------------------------------------------------------------


def edited(store: RequestStore, change: Callable[[dict[str, Any]], object], *, sealed: bool = False) -> list[str]:
    """What `check` says after stack.json was edited; `sealed`: with a digest that fits again."""
    path = store.folder / "stack.json"
    values = json.loads(path.read_text())
    change(values)
    if sealed:
        values["digest"] = content_hash({key: value for key, value in values.items() if key != "digest"})
    write_json(path, values)
    return [str(problem) for problem in store.check()]


def test_a_changed_manifest_is_noticed_and_not_written_over(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "a", adapters[0])
    problems = edited(store, lambda values: values["requests"][0].update(note="something else"))
    assert len(problems) == 1
    assert "stack.json was changed" in problems[0]
    with pytest.raises(RunError, match="restore stack.json from a copy"):
        store.set_state("a", "disabled")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda values: values["history"][1].update(time="2020-01-01T00:00:00+00:00"), "event 2 does not follow"),
        (lambda values: values["history"].pop(1), "event 2 does not follow"),
        (lambda values: values["history"].insert(1, values["history"].pop(2)), "event 2 does not follow"),
        (lambda values: values["history"].pop(), "does not lead to the requests"),
        (lambda values: values["requests"][0].update(state="disabled"), "does not lead to the requests"),
        (lambda values: values["requests"].pop(), "does not lead to the requests"),
    ],
)
def test_a_history_that_was_changed_cut_or_reordered_is_noticed(
    store: RequestStore, adapters: list[Path], change: Callable[[dict[str, Any]], object], text: str
) -> None:
    add(store, "a", adapters[0])
    add(store, "b", adapters[1])
    assert any(text in problem for problem in edited(store, change, sealed=True))


def test_missing_changed_and_further_files_are_noticed(store: RequestStore, adapters: list[Path]) -> None:
    for number, name in enumerate("abc"):
        add(store, name, adapters[number])
    shutil.copyfile(adapters[2] / "adapter_model.safetensors", store.adapter_folder("a") / "adapter_model.safetensors")
    (store.adapter_folder("b") / "README.md").unlink()
    (store.adapter_folder("b") / "forget.jsonl").write_text("{}")
    (store.adapter_folder("c") / "adapter_model.safetensors").write_bytes(b"")
    problems = [str(problem) for problem in store.check()]
    for text in (
        "request a: adapter_model.safetensors was changed",
        "request b: README.md is missing",
        "request b: forget.jsonl is not a file of the manifest",
        "request c: adapter_model.safetensors was changed",
        "request c: the adapter cannot be read",
    ):
        assert any(problem.startswith(text) for problem in problems), text
    assert len(problems) == 5


CHANGES: dict[str, Callable[[RequestStore], object]] = {
    "zeroed": lambda store: change_tensors(store.adapter_folder("a"), lambda t: [v.zero_() for v in t.values()]),
    "swapped": lambda store: shutil.copytree(store.adapter_folder("b"), store.adapter_folder("a"), dirs_exist_ok=True),
    "card": lambda store: (store.adapter_folder("a") / "README.md").write_text("x"),
    "gone": lambda store: (store.adapter_folder("a") / "adapter_model.safetensors").unlink(),
    "state": lambda store: edited(store, lambda values: values["requests"][0].update(state="disabled")),
    "rule": lambda store: edited(store, lambda values: values.update(rule="max_gate"), sealed=True),
    "old version": lambda store: edited(store, lambda v: v.update(rule="max_gate", format_version=1), sealed=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_store_that_was_changed_is_not_loaded(name: str, store: RequestStore, adapters: list[Path]) -> None:
    for number, request_id in enumerate("ab"):
        add(store, request_id, adapters[number])
    base = tiny(seed=0, dtype=torch.float32)
    GrunStack.from_folder(base, store.folder).unwrap()
    CHANGES[name](store)
    with pytest.raises(AdapterError) as error:
        GrunStack.from_folder(base, store.folder)
    assert str(store.folder) in one_line(error)
    assert "generate" not in base.__dict__
    assert store.check() != []


def test_an_adapter_of_another_base_is_noticed(store: RequestStore, adapters: list[Path], tmp_path: Path) -> None:
    add(store, "a", adapters[0])
    other = make_adapter(tmp_path / "other", 0, of_base=1)
    shutil.copyfile(other / "adapter_config.json", store.adapter_folder("a") / "adapter_config.json")
    assert any("request a: made on another base" in str(problem) for problem in store.check())


def test_a_store_of_version_1_is_read_and_bound_to_its_content_by_the_next_change(
    store: RequestStore, adapters: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As the version before wrote it: events without state, rows without a hash of all, the same chain and digest."""
    add(store, "a", adapters[0])

    def downgrade(values: dict[str, Any]) -> None:
        values["format_version"] = 1
        values["requests"][0]["data"].pop("whole")
        before = values["salt"]
        for event in values["history"]:
            event.pop("state")
            event["digest"] = content_hash([before, {key: event[key] for key in event if key != "digest"}])
            before = event["digest"]

    assert edited(store, downgrade, sealed=True) == []
    old = Manifest.read(store.folder)
    with caplog.at_level("INFO", "grun"):
        RequestStore.open(store.folder).set_state("a", "disabled")
    assert [record.message for record in caplog.records if "format 2" in record.message] != []
    new = Manifest.read(store.folder)
    assert (old.format_version, new.format_version) == (1, 2)
    assert (new.history[:2], new.problems()) == (old.history, [])
    assert old.head is not None and [event.action for event in new.since(old.head) or ()] == ["disable"]
    assert edited(store, lambda values: values["requests"][0].update(note="mine"), sealed=True) != []


def test_a_head_stands_for_all_before_it_and_for_the_content(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "a", adapters[0])
    noted, older = store.manifest.head, store.manifest
    assert noted is not None
    store.set_state("a", "disabled")
    store.set_state("a", "active")
    assert [event.action for event in store.manifest.since(noted[:16]) or ()] == ["disable", "enable"]
    newest = store.manifest.head
    assert newest is not None
    assert older.since(newest) is None, "rolled back"
    rewritten = RequestStore.create(store.folder.with_name("other"))
    add(rewritten, "a", adapters[0])
    assert rewritten.manifest.since(noted) is None
    assert store.manifest.since(noted[:8]) is None, "too short to tell"


# -- several processes, and kills -------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["add", "replace", "remove", "disable"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_state(
    action: str, adapters: list[Path], tmp_path: Path
) -> None:
    start = RequestStore.create(tmp_path / "start")
    add(start, "kept", adapters[0])
    add(start, "other", adapters[1])

    def change(store: RequestStore) -> None:
        if action == "add":
            add(store, "new", adapters[2], store_text=True)
        elif action == "replace":
            add(store, "other", adapters[2], replace=True)
        elif action == "remove":
            store.remove("other")
        else:
            store.set_state("other", "disabled")

    def looks(store: RequestStore) -> dict[str, tuple[str, bytes]]:
        return {
            one.id: (one.state, (store.adapter_folder(one.id) / "adapter_model.safetensors").read_bytes())
            for one in store.manifest.requests
        }

    old = looks(start)
    done = RequestStore.open(shutil.copytree(start.folder, tmp_path / "done"))
    change(done)
    new = looks(done)
    seen = []
    for step in range(1, 100):
        store = RequestStore.open(shutil.copytree(start.folder, tmp_path / f"killed{step}"))
        child = in_fork(killed_before, step, lambda store=store: change(store))
        child.join()
        after = RequestStore.open(store.folder)
        assert after.check() == []
        seen.append(looks(after))
        assert seen[-1] in (old, new)
        after.set_state("kept", "disabled")  # the next writer is not held up, and clears away what was left
        names = {request.folder for request in after.manifest.requests}
        assert {entry.name for entry in (after.folder / "requests").iterdir()} == names
        assert not list(after.folder.glob("*.tmp"))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert seen[0] == old
    assert seen[-1] == new
    assert len(seen) > 3, "the child was killed at several moments"
    assert seen.index(new) == seen.count(old), "once new, always new"


def test_what_is_left_of_trainings_that_are_done_is_cleared_and_the_rest_is_kept(
    store: RequestStore, adapters: list[Path]
) -> None:
    add(store, "a", adapters[0])
    training = store.folder / "training"
    shutil.copytree(adapters[0], training / "a")  # killed before it was deleted
    write_json(training / "a" / "run.json", {"files": sorted(os.listdir(adapters[0]))})
    shutil.copytree(adapters[1], training / "b")  # to be gone on with
    store.extract(training / ".b.beside", ["a"])
    store.set_state("a", "disabled")
    assert [entry.name for entry in training.iterdir()] == ["b"]


def test_a_second_writer_is_refused_at_once(store: RequestStore, adapters: list[Path]) -> None:
    add(store, "a", adapters[0])
    waiting, going_on = FORK.Event(), FORK.Event()

    def write() -> None:
        with RequestStore.open(store.folder).writing():
            waiting.set()
            going_on.wait(60)

    child = in_fork(write)
    assert waiting.wait(60)
    try:
        assert RequestStore.open(store.folder).check() == []  # reading goes on
        with pytest.raises(RunError, match="another process is writing to .*; try again when it is done") as error:
            add(store, "b", adapters[1])
        one_line(error)
    finally:
        going_on.set()
        child.join()
    add(store, "b", adapters[1])
    assert Manifest.read(store.folder).ids() == ["a", "b"]


def test_whoever_reads_while_another_process_writes_finds_nothing_wrong(
    store: RequestStore, adapters: list[Path]
) -> None:
    add(store, "a", adapters[0])
    written = FORK.Value("i", 0)

    def write() -> None:
        writer = RequestStore.open(store.folder)
        for number in range(40):
            add(writer, "a", adapters[number % 3], replace=True)
            written.value = number

    reader, looks = RequestStore.open(store.folder), 0
    base = tiny(seed=0, dtype=torch.float32)
    child = in_fork(write)
    while child.is_alive():
        looks += 1
        assert reader.check() == []
        GrunStack.from_folder(base, store.folder).unwrap()
    assert (child.exitcode, written.value) == (0, 39) and looks > 5


def test_a_writer_builds_on_what_another_one_wrote_meanwhile(store: RequestStore, adapters: list[Path]) -> None:
    other = RequestStore.open(store.folder)
    add(store, "a", adapters[0])
    add(other, "b", adapters[1])
    assert other.manifest.ids() == ["a", "b"]
    assert other.check() == []
