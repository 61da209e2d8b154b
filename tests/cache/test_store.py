"""What is cached is what was computed: after damage, kills, full disks and with other processes at work."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from made_shards import (
    PROMPTS,
    ROWS,
    USUAL,
    Builder,
    Sizes,
    assert_right,
    expected,
    flip,
    parts_of,
    position_of,
    shard_of,
    shards_in,
)
from watched import FORK, files_limited_to, in_fork

from grun.cache.folder import Use
from grun.cache.shard import Shard
from grun.cache.store import Completed, PrefixStore, Share
from grun.cli import main as cli
from grun.commands import cache
from grun.data.encoding import EncodedRow
from grun.requests.store import RequestStore

IDENTITY = {"model": "a", "blocks": [3], "file": Path("relative")}
PLENTY = 1 << 30


class Filled(NamedTuple):
    """A store that built its rows or found them, and how."""

    store: PrefixStore
    done: Completed
    asked: list[list[EncodedRow]]
    """Rows of each build."""


def store_in(folder: Path | None, budget: int = PLENTY, use: Use | None = None, **changes: Any) -> PrefixStore:
    return PrefixStore(folder, {**IDENTITY, **changes}, memory_budget=budget, use=use)


def filled(
    folder: Path | None, rows: Sequence[EncodedRow] = ROWS, build: Builder | None = None, **options: Any
) -> Filled:
    store, build = store_in(folder, **options), build or Builder()
    return Filled(store, store.complete(rows, build), build.asked)


def no_build(rows: list[EncodedRow], share: Share) -> Iterator[Shard]:
    raise AssertionError(f"{len(rows)} rows are built again")


def leftovers(store: PrefixStore) -> list[str]:
    """What lies in the folder besides shards and the identity, or half written."""
    assert store.folder is not None
    known = {"identity.json", ".grun", *(path.name for path in shards_in(store))}
    return sorted({*os.listdir(store.folder), *map(str, store.folder.glob(".grun/new-*"))} - known)


def index_of(name: str, file: Path) -> int:
    """Offset of the first number of a part of the index."""
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    return 8 + header + int(json.loads(data[8 : 8 + header])[name]["data_offsets"][0])


def is_mapped(path: Path) -> bool:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not show what is mapped")
    return str(path) in maps.read_text()


# -- shards -----------------------------------------------------------------------------------------------------------


def test_a_row_of_a_shard_is_a_view_and_rows_of_one_prompt_share_it() -> None:
    shard = shard_of(ROWS)
    first, fourth = shard.row(0), shard.row(3)
    for name in ("states", "reference"):
        storages = [getattr(of, name).untyped_storage().data_ptr() for of in (first, shard)]
        assert storages[0] == storages[1]
    assert ROWS[0].prompt_ids == ROWS[3].prompt_ids and first.prompt.data_ptr() == fourth.prompt.data_ptr()
    assert len(shard.prompts) == sum(len(prompt) - 1 for prompt in PROMPTS)


def test_a_selection_holds_its_rows_and_the_prompts_that_they_need() -> None:
    chosen = shard_of(ROWS).select([4, 1, 2])
    assert chosen.rows == [ROWS[4], ROWS[1], ROWS[2]]
    assert chosen.prompt_tokens == [len(ROWS[4].prompt_ids) - 1, len(ROWS[2].prompt_ids) - 1]
    for index, row in enumerate(chosen.rows):
        for name, part in parts_of(chosen.row(index)).items():
            assert torch.equal(part, parts_of(expected(row))[name])
    assert chosen.bytes_of(range(3)) == sum(t.nbytes for t in (chosen.states, chosen.prompts, chosen.reference))


@pytest.mark.parametrize("change", [{"columns": [9] * 6}, {"prompt_tokens": [1, 2]}, {"prompt_of": [7] * 6}])
def test_a_shard_whose_lengths_and_tensors_do_not_agree_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of a shard"):
        dataclasses.replace(shard_of(ROWS), **change)


# -- what is there and what is built ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PLENTY, 0])
@pytest.mark.parametrize("sizes", [USUAL, (0, torch.bfloat16), (3, torch.bfloat16), (1, torch.float64)], ids=str)
def test_what_is_written_is_read_back_bit_for_bit(sizes: Sizes, budget: int, tmp_path: Path) -> None:
    for numbers in ((6, 0, 6), (6, 6, 0)):
        store, done, _ = filled(tmp_path, build=Builder(4, sizes), budget=budget)
        assert (done.rows, done.found, done.built) == numbers
        assert done.where == store.where == ("memory" if budget else "disk")
        assert done.bytes == store.bytes_held > 0
        assert_right(store, sizes=sizes)
    assert not leftovers(store)


def test_only_missing_rows_are_built_each_once_in_the_order_asked(tmp_path: Path) -> None:
    build, counts = Builder(), []
    store = store_in(tmp_path)
    store.complete([ROWS[2], ROWS[0], ROWS[2]], build, counts.append)
    again = store.complete(ROWS[:3], build, counts.append)
    assert build.asked == [[ROWS[2], ROWS[0]], [ROWS[1]]]
    assert counts == [2, 1] and (again.rows, again.found, again.built) == (3, 0, 1)

    counts.clear()
    other = store_in(tmp_path)
    done = other.complete(ROWS, build, counts.append)
    assert build.asked[2:] == [ROWS[3:]]
    assert (done.rows, done.found, done.built) == (6, 3, 3) and sum(counts) == 6
    assert_right(other)
    with pytest.raises(KeyError):
        other[EncodedRow((1,), (2,))]


def test_a_store_without_a_folder_keeps_what_was_built() -> None:
    store = filled(None).store
    assert store.complete(ROWS, no_build).built == 0 and store.where == "memory" and store.folder is None
    assert_right(store)


def test_a_build_that_leaves_rows_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="left out 2 of 6 rows"):
        store_in(tmp_path).complete(ROWS, lambda rows, _: iter([shard_of(rows[:4])]))


def test_files_hold_the_same_bytes_whenever_they_are_written_and_sort_as_they_were(tmp_path: Path) -> None:
    first, second = (shards_in(filled(tmp_path / name).store) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.stat().st_mtime_ns for path in first] == sorted(path.stat().st_mtime_ns for path in first)
    assert not {path.name for path in first} & {path.name for path in second}


def test_a_row_is_counted_and_copied_alone_where_its_shard_holds_others(tmp_path: Path) -> None:
    filled(tmp_path)
    store = filled(tmp_path, ROWS[:1]).store
    parts = parts_of(store[ROWS[0]]).values()
    assert store.bytes_held == sum(part.nbytes for part in parts)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)


def test_another_identity_has_a_folder_of_its_own_and_a_file_that_strays_into_it_is_not_used(tmp_path: Path) -> None:
    first, other = filled(tmp_path).store, store_in(tmp_path, model="b")
    assert first.folder and other.folder and other.folder != first.folder
    shutil.copytree(first.folder, other.folder)
    strayed, build = shards_in(other), Builder()
    other.complete(ROWS, build)
    assert build.asked == [ROWS] and not set(strayed) & set(shards_in(other))
    for store, model in ((first, "a"), (other, "b")):
        assert store.folder and json.loads((store.folder / "identity.json").read_text())["model"] == model


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PLENTY, 0])
@pytest.mark.parametrize("part", ["states", "prompt", "reference"])
def test_a_row_with_a_changed_byte_is_built_again_and_the_rest_of_its_file_is_kept(
    part: str, budget: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = shards_in(filled(tmp_path, build=Builder(per_shard=6)).store)
    flip(file, position_of(parts_of(expected(ROWS[2]))[part], file) + 5)
    lost = [ROWS[2], ROWS[5]] if part == "prompt" else [ROWS[2]]
    store, done, asked = filled(tmp_path, budget=budget)
    assert asked == [lost] and (done.found, done.built) == (6 - len(lost), len(lost))
    assert_right(store)
    assert not file.exists() and not leftovers(store)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "damaged" in caplog.text
    assert filled(tmp_path, budget=budget).done.found == 6


def swapped(file: Path, true: bytes, false: bytes) -> None:
    data = file.read_bytes()
    assert data.count(true) == 1
    file.write_bytes(data.replace(true, false))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: flip(file, index_of("ids", file)),
        lambda file: flip(file, index_of("prompt_of", file), 0x01),
        lambda file: swapped(file, b'"F32","shape":[5,16]', b'"I32","shape":[5,16]'),
        lambda file: swapped(file, b",2,4]", b",4,2]"),
        *(lambda file, kept=kept: file.write_bytes(file.read_bytes()[:kept]) for kept in (0, 4, 200, -1)),
    ],
    ids=["another row", "another prompt", "another type", "another shape", "empty", "4 bytes", "200 bytes", "1 less"],
)
def test_a_file_whose_index_or_size_is_wrong_is_not_believed(damage: Callable[[Path], None], tmp_path: Path) -> None:
    (file,) = shards_in(filled(tmp_path, ROWS[:2]).store)
    damage(file)
    rows = [ROWS[0], EncodedRow((1 ^ 0x10, *ROWS[0].prompt_ids[1:]), ROWS[0].answer_ids)]  # as the index then names it
    store, _, asked = filled(tmp_path, rows)
    assert asked == [rows] and not file.exists()
    assert_right(store, rows)


def test_wherever_a_byte_is_changed_values_are_right(tmp_path: Path) -> None:
    sound, damaged = tmp_path / "sound", tmp_path / "damaged"
    (file,) = shards_in(filled(sound, ROWS[:3], Builder(per_shard=3)).store)
    rebuilt = 0
    for position in range(0, file.stat().st_size, 29):
        shutil.copytree(sound, damaged)
        flip(damaged / file.relative_to(sound), position)
        store, done, _ = filled(damaged, ROWS[:3])
        rebuilt += done.built > 0
        assert_right(store, ROWS[:3])
        shutil.rmtree(damaged)
    assert rebuilt > 20


def test_a_file_that_vanishes_while_files_are_read_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards_in(filled(tmp_path).store)[0].unlink()
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: [*listed(folder), "00000000-01234567.safetensors"])
    store, _, asked = filled(tmp_path)
    assert asked == [ROWS[:2]] and not caplog.records
    assert_right(store)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_above_the_budget_files_are_mapped_and_below_it_they_are_not(tmp_path: Path) -> None:
    for _ in range(2):  # built, then found
        mapped = filled(tmp_path, budget=0).store
        assert mapped.where == "disk" and all(map(is_mapped, shards_in(mapped)))
        assert_right(mapped)
        del mapped
    exact = filled(tmp_path).store.bytes_held
    store = filled(tmp_path, budget=exact).store
    assert store.where == "memory" and not any(map(is_mapped, shards_in(store)))
    mapped = filled(tmp_path, budget=exact - 1).store
    assert mapped.where == "disk" and mapped.folder
    shutil.rmtree(mapped.folder)
    assert_right(mapped)  # what is mapped stays usable when its file is removed


def test_a_build_above_the_budget_gives_up_the_memory_of_each_shard_as_it_goes(tmp_path: Path) -> None:
    store, seen = store_in(tmp_path, budget=0), []

    def build(rows: list[EncodedRow], share: Share) -> Iterator[Shard]:
        for shard in Builder()(rows, share):
            yield shard
            seen.append([is_mapped(path) for path in shards_in(store)])

    store.complete(ROWS, build)
    assert seen == [[True], [True, True], [True, True, True]]


def test_rows_in_memory_are_mapped_once_more_rows_exceed_the_budget(tmp_path: Path) -> None:
    filled(tmp_path)
    store = filled(tmp_path, ROWS[:3], budget=filled(tmp_path, ROWS[:3]).store.bytes_held).store
    assert store.where == "memory"
    store.complete(ROWS, no_build)
    assert store.where == "disk" and all(map(is_mapped, shards_in(store)))
    assert_right(store)


def test_above_the_budget_without_a_disk_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    store = filled(None, ROWS[:2], budget=10).store
    store.complete(ROWS, Builder())
    assert store.where == "memory" and len(caplog.records) == 1 and "budget" in caplog.text
    assert_right(store)


# -- folders that take no more ----------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_half_way_costs_no_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS[:2], EncodedRow((1, 2), tuple(range(2000))), *ROWS[2:]]
    with files_limited_to(50_000):
        store, done, _ = filled(tmp_path, rows)
    assert (done.built, store.where) == (7, "memory")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "File too large" in caplog.text and "in memory for this run" in caplog.text
    assert len(shards_in(store)) == 1 and not leftovers(store)
    assert_right(store, rows)
    assert store.complete(rows, no_build).rows == 7
    later = filled(tmp_path, rows)
    assert later.asked == [rows[2:]] and len(shards_in(later.store)) == 4


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "caches").write_text("a file is in the way")
    store = filled(tmp_path / "caches", ROWS[:3]).store
    store.complete(ROWS, Builder())
    assert len(caplog.records) == 1 and "in memory for this run" in caplog.text
    assert_right(store)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder_is_read_and_what_is_missing_stays_in_memory(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = shards_in(filled(tmp_path, ROWS[:2]).store)
    real = os.open  # permissions would not hold root back

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    store, build = store_in(tmp_path), Builder()
    assert store.complete(ROWS[:2], build).found == 2 and not caplog.records
    store.complete(ROWS, build)
    assert build.asked == [ROWS[2:]] and shards_in(store) == before
    assert len(caplog.records) == 1 and os.strerror(number) in caplog.text
    assert_right(store)


# -- other processes --------------------------------------------------------------------------------------------------


def stall_in_third_shard(folder: Path, flag: Path) -> None:
    """Build, but hang when the third shard is written and not renamed."""
    calls, real = 0, os.fsync

    def fsync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the identity was the first
            flag.touch()
            time.sleep(60)
        real(file)

    os.fsync = fsync  # type: ignore[assignment]
    filled(folder)


def test_a_killed_build_keeps_its_finished_shards_and_nothing_half_written(tmp_path: Path) -> None:
    folder, flag = tmp_path / "caches", tmp_path / "flag"
    process = in_fork(stall_in_third_shard, folder, flag)
    deadline = time.monotonic() + 60
    while not flag.exists():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(shards_in(store_in(folder))) == 2
    assert leftovers(store_in(folder)), "the kill came too late"
    store, done, asked = filled(folder)
    assert asked == [ROWS[4:]] and (done.found, done.built) == (4, 2)
    assert not leftovers(store) and len(shards_in(store)) == 3
    assert_right(store)


def build_in_company(folder: Path, builds: Path, output: Path, barrier: Any) -> None:
    """Complete a store as another process does; each build of shards leaves a line in `builds`."""
    logging.basicConfig(filename=output, level=logging.INFO, force=True)

    def slow(rows: list[EncodedRow], share: Share) -> Iterator[Shard]:
        with open(builds, "a") as file:
            file.write(f"{len(rows)}\n")
        for shard in Builder()(rows, share):
            time.sleep(0.2)
            yield shard

    store = store_in(folder)
    barrier.wait()
    done = store.complete(ROWS, slow)
    assert_right(store)
    logging.info(f"found {done.found}, built {done.built}")


def test_of_two_processes_at_once_one_builds_and_the_other_waits_for_it(tmp_path: Path) -> None:
    folder, builds, barrier = tmp_path / "caches", tmp_path / "builds", FORK.Barrier(2)
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = [in_fork(build_in_company, folder, builds, output, barrier) for output in outputs]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert builds.read_text() == "6\n"
    said = sorted((output.read_text() for output in outputs), key=lambda text: "another process builds" in text)
    assert "found 0, built 6" in said[0] and "waiting" not in said[0]
    assert "found 6, built 0" in said[1] and said[1].count("another process builds this cache; waiting for it") == 1
    store = store_in(folder)
    assert len(shards_in(store)) == 3 and not leftovers(store)


# -- whose it is ------------------------------------------------------------------------------------------------------

USE = Use("results/run", "model", {"forget": "ab" * 32}, None, None)


def users_in(folder: Path) -> dict[str, set[str]]:
    """By shard the runs that `cache list` names."""
    return {shard.path.name: {use.run for use in shard.uses} for shard in cache.shards_in(folder)}


def test_a_shard_is_somebodys_before_it_is_there_and_stays_it_when_it_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("grun.cache.folder.write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, use=USE)
    (note,) = tmp_path.glob("*/use-*.json")
    assert len(json.loads(note.read_text())["shards"]) == 1
    filled(tmp_path, build=Builder(per_shard=6), use=USE)
    for use in (dataclasses.replace(USE, run="results/other"), None):
        assert filled(tmp_path, use=use).done.built == 0
    (before,) = users_in(tmp_path).items()
    assert before[1] == {"results/run", "results/other"}
    (file,) = tmp_path.glob("*/*.safetensors")
    flip(file, position_of(expected(ROWS[2]).states, file))
    filled(tmp_path)
    after = users_in(tmp_path)
    assert before[0] not in after and len(after) == 2
    assert sorted(after.values(), key=len) == [set(), before[1]], "what was kept of it is still theirs"


@pytest.mark.parametrize(
    ("arguments", "status", "left", "said"),
    [
        (["list"], 0, "ABC", "3 shards"),
        (["list", "request=mine"], 0, "ABC", "used by: request mine"),
        (["list", "data=bbbbbbbb"], 0, "ABC", "used by: results/\ufffd[31mrun"),
        (["remove", "request=mine"], 0, "BC", "removed 1 shard, "),
        (["remove", "request=mine", "store=STORE"], 0, "BC", "removed 1 shard, "),
        (["remove", "request=mine", "store=OTHER"], 0, "ABC", "removed 0 shards"),
        (["remove", "data=BBBBBBBBBB"], 0, "AC", "left: 1 shard, "),
        (["remove", "request=other"], 0, "ABC", "all=true removes them too"),
        (["remove", "all=true"], 0, "", "removed 3 shards"),
        (["remove", "data=bb"], 2, "ABC", "must be 8 hex digits or more"),
        (["remove"], 2, "ABC", "needs request=ID, data=HASH or all=true"),
        (["remov"], 2, "ABC", "did you mean 'remove'"),
        ([], 2, "ABC", "needs an action: list, remove"),
        (["list", "all"], 2, "ABC", "'all' is not key=value"),
    ],
)
def test_the_cache_command_shows_and_removes_what_is_named_and_no_more(
    arguments: list[str], status: int, left: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uses: dict[str, Use | None] = {
        "A": Use("training", "model", {"forget": "a" * 64}, "mine", str(tmp_path / "STORE")),
        "B": Use("results/\x1b[31mrun", None, {"forget": "b" * 64, "retain": "c" * 64}, None, None),
        "C": None,
    }
    before, folder, folders = os.umask(0), tmp_path / "cache", {}
    try:
        for place, (name, use) in enumerate(uses.items()):
            store = filled(folder, ROWS[place : place + 1], use=use, of=name).store
            assert store.folder is not None
            folders[name] = store.folder
            (store.folder / "use-0123456789abcdef.json").write_text('{"shards": 5}')  # damaged
        paths = [path for path in folder.rglob("*") if path.name != "use-0123456789abcdef.json"]
        assert {path.stat().st_mode & 0o777 for path in (folder, *paths)} == {0o600, 0o700}
        for name in ("STORE", "OTHER"):
            RequestStore.create(tmp_path / name)
    finally:
        os.umask(before)
    given = [argument.replace("store=", f"store={tmp_path}/") for argument in arguments]
    assert cli(["cache", *given, *([f"dir={folder}"] if given else [])]) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err and "Traceback" not in captured.err
    assert "".join(name for name, of in folders.items() if list(of.glob("*.safetensors"))) == left
