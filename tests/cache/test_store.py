"""What is cached is what was computed: after damage, kills, full disks and in company; another model is told apart."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grun.cache import weights
from grun.cache.shard import FrozenRow, Shard
from grun.cache.store import PrefixStore, Use
from grun.cache.weights import weights_hash
from grun.cli import main as cli
from grun.data.encoding import EncodedRow
from grun.requests import cached_rows as cache
from grun.requests.store import RequestStore

IDENTITY = {"model": "a", "blocks": [3], "file": Path("relative")}
PROMPTS = [(1, 2, 3), (4,), (5, 6, 7, 8)]
ROWS = [EncodedRow(PROMPTS[number % 3], tuple(range(10, 11 + number))) for number in range(6)]
PLENTY = 1 << 30
WIDTH, HEADS, HEAD_SIZE = 16, 2, 4
FORK = multiprocessing.get_context("fork")

Sizes = tuple[int, torch.dtype]
"""Blocks above, and the type of states and prompts."""
USUAL: Sizes = (2, torch.float32)


def expected(row: EncodedRow, sizes: Sizes = USUAL) -> FrozenRow:
    """Random parts, the same for the same row; a prompt's the same for the same prompt."""
    above, dtype = sizes
    of_prompt = torch.Generator().manual_seed(sum(row.prompt_ids))
    of_row = torch.Generator().manual_seed(1000 * sum(row.prompt_ids) + sum(row.answer_ids))
    shape = (len(row.prompt_ids) - 1, above, 2, HEADS, HEAD_SIZE)
    return FrozenRow(
        torch.randn(1 + len(row.answer_ids), WIDTH, generator=of_row).to(dtype),
        torch.randn(shape, generator=of_prompt).to(dtype),
        torch.randn(len(row.answer_ids), generator=of_row),
    )


def shard_of(rows: Sequence[EncodedRow], sizes: Sizes = USUAL) -> Shard:
    parts = [expected(row, sizes) for row in rows]
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    first = {row.prompt_ids: part.prompt for row, part in zip(rows, parts, strict=True)}
    return Shard(
        rows=list(rows),
        states=torch.cat([part.states for part in parts]),
        prompts=torch.cat([first[prompt] for prompt in prompts]),
        reference=torch.cat([part.reference for part in parts]),
        columns=[len(part.states) for part in parts],
        prompt_of=[prompts.index(row.prompt_ids) for row in rows],
        prompt_tokens=[len(first[prompt]) for prompt in prompts],
    )


class Builder:
    """Builds shards of a few rows, and remembers what it was asked for."""

    def __init__(self, per_shard: int = 2, sizes: Sizes = USUAL) -> None:
        self.asked: list[list[EncodedRow]] = []
        self.per_shard, self.sizes = per_shard, sizes

    def __call__(self, rows: list[EncodedRow]) -> Iterator[Shard]:
        self.asked.append(rows)
        for start in range(0, len(rows), self.per_shard):
            yield shard_of(rows[start : start + self.per_shard], self.sizes)


def no_build(rows: list[EncodedRow]) -> Iterator[Shard]:
    raise AssertionError(f"{len(rows)} rows are built again")


def assert_right(store: PrefixStore, rows: Sequence[EncodedRow] = ROWS, sizes: Sizes = USUAL) -> None:
    for row in rows:
        found, wanted = store[row], expected(row, sizes)
        for name in ("states", "prompt", "reference"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs), name
            assert ours.is_contiguous()


def filled(folder: Path | None, rows: Sequence[EncodedRow] = ROWS, budget: int = PLENTY, **changes: Any) -> PrefixStore:
    """A store that built `rows` or found them."""
    store = PrefixStore(folder, {**IDENTITY, **changes}, memory_budget=budget)
    store.complete(rows, Builder())
    return store


def shards_in(store: PrefixStore) -> list[Path]:
    assert store.folder is not None
    return sorted(store.folder.glob("*.safetensors"))


def leftovers(store: PrefixStore) -> list[str]:
    """What lies in the folder besides shards and the identity, or half written."""
    assert store.folder is not None
    known = {"identity.json", ".grun", *(path.name for path in shards_in(store))}
    return sorted({*os.listdir(store.folder), *map(str, store.folder.glob(".grun/new-*"))} - known)


def position_of(tensor: Tensor, file: Path) -> int:
    """Offset of a tensor's first byte in a file."""
    place = file.read_bytes().find(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert place > 0
    return place


def index_of(name: str, file: Path) -> int:
    """Offset of the first number of a part of the index."""
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    return 8 + header + int(json.loads(data[8 : 8 + header])[name]["data_offsets"][0])


def flip(file: Path, position: int, bit: int = 0x10) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= bit
    file.write_bytes(data)


def is_mapped(path: Path) -> bool:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not show what is mapped")
    return str(path) in maps.read_text()


# Shards


def test_a_row_of_a_shard_is_a_view_and_rows_of_one_prompt_share_it() -> None:
    shard = shard_of(ROWS)
    first, fourth = shard.row(0), shard.row(3)
    assert first.states.untyped_storage().data_ptr() == shard.states.untyped_storage().data_ptr()
    assert first.reference.untyped_storage().data_ptr() == shard.reference.untyped_storage().data_ptr()
    assert ROWS[0].prompt_ids == ROWS[3].prompt_ids and first.prompt.data_ptr() == fourth.prompt.data_ptr()
    assert len(shard.prompts) == sum(len(prompt) - 1 for prompt in PROMPTS)


def test_a_selection_holds_its_rows_and_the_prompts_that_they_need() -> None:
    chosen = shard_of(ROWS).select([4, 1, 2])
    assert chosen.rows == [ROWS[4], ROWS[1], ROWS[2]]
    assert chosen.prompt_tokens == [len(ROWS[4].prompt_ids) - 1, len(ROWS[2].prompt_ids) - 1]
    for index, row in enumerate(chosen.rows):
        assert torch.equal(chosen.row(index).states, expected(row).states)
        assert torch.equal(chosen.row(index).prompt, expected(row).prompt)
        assert torch.equal(chosen.row(index).reference, expected(row).reference)
    assert chosen.bytes_of(range(3)) == sum(t.nbytes for t in (chosen.states, chosen.prompts, chosen.reference))


@pytest.mark.parametrize("change", [{"columns": [9] * 6}, {"prompt_tokens": [1, 2]}, {"prompt_of": [7] * 6}])
def test_a_shard_whose_lengths_and_tensors_do_not_agree_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of a shard"):
        Shard(**{**{name: value for name, value in vars(shard_of(ROWS)).items() if name[0] != "_"}, **change})


# What is there and what is built


@pytest.mark.parametrize("budget", [PLENTY, 0])
@pytest.mark.parametrize("sizes", [USUAL, (0, torch.bfloat16), (3, torch.bfloat16), (1, torch.float64)], ids=str)
def test_what_is_written_is_read_back_bit_for_bit(sizes: Sizes, budget: int, tmp_path: Path) -> None:
    for number, build in enumerate((Builder(4, sizes), no_build)):
        store = PrefixStore(tmp_path, IDENTITY, memory_budget=budget)
        done = store.complete(ROWS, build)
        assert (done.rows, done.found, done.built) == ((6, 0, 6) if number == 0 else (6, 6, 0))
        assert done.where == store.where == ("memory" if budget else "disk")
        assert store.rows == 6 and done.bytes == store.bytes_held > 0
        assert_right(store, sizes=sizes)
    assert not leftovers(store)


def test_only_missing_rows_are_built_each_once_in_the_order_asked(tmp_path: Path) -> None:
    build, told = Builder(), []
    store = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
    store.complete([ROWS[2], ROWS[0], ROWS[2]], build, told.append)
    again = store.complete(ROWS[:3], build, told.append)
    assert build.asked == [[ROWS[2], ROWS[0]], [ROWS[1]]]
    assert told == [2, 1] and (again.rows, again.found, again.built) == (3, 0, 1)

    told.clear()
    other = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
    done = other.complete(ROWS, build, told.append)
    assert build.asked[2:] == [ROWS[3:]]
    assert (done.rows, done.found, done.built) == (6, 3, 3) and sum(told) == 6
    assert_right(other)
    with pytest.raises(KeyError):
        other[EncodedRow((1,), (2,))]


def test_a_store_without_a_folder_keeps_what_was_built() -> None:
    store = filled(None)
    assert store.complete(ROWS, no_build).built == 0 and store.where == "memory" and store.folder is None
    assert_right(store)


def test_a_build_that_leaves_rows_out_is_an_error(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
    with pytest.raises(ValueError, match="left out 2 of 6 rows"):
        store.complete(ROWS, lambda rows: iter([shard_of(rows[:4])]))


def test_a_shard_may_be_cut_down_after_it_was_made(tmp_path: Path) -> None:
    shard = shard_of(ROWS)
    first = torch.tensor([0, *shard.columns]).cumsum(0)[:-1]
    shard.states, shard.columns = shard.states[first], [1] * len(ROWS)
    for build in (lambda rows: iter([shard]), no_build):
        store = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
        store.complete(ROWS, build)
        assert all(torch.equal(store[row].states, expected(row).states[:1]) for row in ROWS)


def test_files_hold_the_same_bytes_whenever_they_are_written_and_sort_as_they_were(tmp_path: Path) -> None:
    first, second = (shards_in(filled(tmp_path / name)) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.stat().st_mtime_ns for path in first] == sorted(path.stat().st_mtime_ns for path in first)
    assert not {path.name for path in first} & {path.name for path in second}


def test_a_row_is_counted_and_copied_alone_where_its_shard_holds_others(tmp_path: Path) -> None:
    filled(tmp_path)
    store = filled(tmp_path, ROWS[:1])
    parts = (store[ROWS[0]].states, store[ROWS[0]].prompt, store[ROWS[0]].reference)
    assert store.bytes_held == sum(part.nbytes for part in parts)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)


# Identity


def test_another_identity_has_a_folder_of_its_own(tmp_path: Path) -> None:
    first, other = filled(tmp_path), PrefixStore(tmp_path, {**IDENTITY, "model": "b"}, memory_budget=PLENTY)
    done = other.complete(ROWS, Builder())
    assert (done.found, done.built) == (0, 6) and other.folder != first.folder
    assert first.folder and json.loads((first.folder / "identity.json").read_text())["model"] == "a"


def test_a_file_of_another_identity_is_removed_and_not_used(tmp_path: Path) -> None:
    first, other = filled(tmp_path), PrefixStore(tmp_path, {**IDENTITY, "model": "b"}, memory_budget=PLENTY)
    assert first.folder and other.folder
    shutil.copytree(first.folder, other.folder)
    foreign = shards_in(other)
    build = Builder()
    other.complete(ROWS, build)
    assert build.asked == [ROWS] and not set(foreign) & set(shards_in(other))
    assert json.loads((other.folder / "identity.json").read_text())["model"] == "b"


# Damage


@pytest.mark.parametrize("budget", [PLENTY, 0])
@pytest.mark.parametrize("part", ["states", "prompt", "reference"])
def test_a_row_with_a_changed_byte_is_built_again_and_the_rest_of_its_file_is_kept(
    part: str, budget: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
    first.complete(ROWS, Builder(per_shard=6))
    (file,) = shards_in(first)
    flip(file, position_of(getattr(expected(ROWS[2]), part), file) + 5)
    lost = [ROWS[2], ROWS[5]] if part == "prompt" else [ROWS[2]]

    build = Builder()
    store = PrefixStore(tmp_path, IDENTITY, memory_budget=budget)
    done = store.complete(ROWS, build)
    assert build.asked == [lost] and (done.found, done.built) == (6 - len(lost), len(lost))
    assert_right(store)
    assert not file.exists() and not leftovers(store)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "damaged" in caplog.text
    assert PrefixStore(tmp_path, IDENTITY, memory_budget=budget).complete(ROWS, no_build).found == 6


def test_an_index_that_names_another_row_or_prompt_is_not_believed(tmp_path: Path) -> None:
    row, other = ROWS[0], EncodedRow((1 ^ 0x10, *ROWS[0].prompt_ids[1:]), ROWS[0].answer_ids)
    for number, (name, bit) in enumerate((("ids", 0x10), ("prompt_of", 0x01))):
        (file,) = shards_in(filled(tmp_path / str(number), [row, ROWS[1]]))
        flip(file, index_of(name, file), bit)
        store, build = PrefixStore(tmp_path / str(number), IDENTITY, memory_budget=PLENTY), Builder()
        store.complete([row, other], build)
        assert build.asked == [[row, other]]
        assert_right(store, [row, other])


@pytest.mark.parametrize(("true", "false"), [(b'"F32","shape":[5,16]', b'"I32","shape":[5,16]'), (b",2,4]", b",4,2]")])
def test_a_header_with_another_type_or_shape_of_as_many_bytes_is_not_believed(
    true: bytes, false: bytes, tmp_path: Path
) -> None:
    (file,) = shards_in(filled(tmp_path, ROWS[:2]))
    data = file.read_bytes()
    assert data.count(true) == 1
    file.write_bytes(data.replace(true, false))
    store, build = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY), Builder()
    store.complete(ROWS[:2], build)
    assert build.asked == [ROWS[:2]]
    assert_right(store, ROWS[:2])


def test_wherever_a_byte_is_changed_values_are_right(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    store = PrefixStore(sound, IDENTITY, memory_budget=PLENTY)
    store.complete(ROWS[:3], Builder(per_shard=3))
    (file,) = shards_in(store)
    rebuilt = 0
    for position in range(0, file.stat().st_size, 29):
        shutil.copytree(sound, tmp_path / "damaged")
        flip(tmp_path / "damaged" / file.relative_to(sound), position)
        store = PrefixStore(tmp_path / "damaged", IDENTITY, memory_budget=PLENTY)
        rebuilt += store.complete(ROWS[:3], Builder()).built > 0
        assert_right(store, ROWS[:3])
        shutil.rmtree(tmp_path / "damaged")
    assert rebuilt > 20


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_truncated_file_is_built_again(kept: int, tmp_path: Path) -> None:
    file = shards_in(filled(tmp_path))[1]
    file.write_bytes(file.read_bytes()[:kept])
    build = Builder()
    store = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
    store.complete(ROWS, build)
    assert build.asked == [ROWS[2:4]] and not file.exists()
    assert_right(store)


def test_a_file_that_vanishes_while_files_are_read_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards_in(filled(tmp_path))[0].unlink()
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: [*listed(folder), "00000000-01234567.safetensors"])
    store, build = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY), Builder()
    store.complete(ROWS, build)
    assert build.asked == [ROWS[:2]] and not caplog.records
    assert_right(store)


# Memory


def test_above_the_budget_files_are_mapped_and_below_it_they_are_not(tmp_path: Path) -> None:
    for _ in range(2):  # built, then found
        mapped = filled(tmp_path, budget=0)
        assert mapped.where == "disk" and all(map(is_mapped, shards_in(mapped)))
        assert_right(mapped)
        del mapped
    exact = filled(tmp_path).bytes_held
    store = filled(tmp_path, budget=exact)
    assert store.where == "memory" and not any(map(is_mapped, shards_in(store)))
    assert filled(tmp_path, budget=exact - 1).where == "disk"


def test_a_build_above_the_budget_gives_up_the_memory_of_each_shard_as_it_goes(tmp_path: Path) -> None:
    store, seen = PrefixStore(tmp_path, IDENTITY, memory_budget=0), []

    def build(rows: list[EncodedRow]) -> Iterator[Shard]:
        for shard in Builder()(rows):
            yield shard
            seen.append([is_mapped(path) for path in shards_in(store)])

    store.complete(ROWS, build)
    assert seen == [[True], [True, True], [True, True, True]]


def test_rows_in_memory_are_mapped_once_more_rows_exceed_the_budget(tmp_path: Path) -> None:
    filled(tmp_path)
    store = filled(tmp_path, ROWS[:3], budget=filled(tmp_path, ROWS[:3]).bytes_held)
    assert store.where == "memory"
    store.complete(ROWS, no_build)
    assert store.where == "disk" and all(map(is_mapped, shards_in(store)))
    assert_right(store)


def test_what_is_mapped_stays_usable_when_its_file_is_removed(tmp_path: Path) -> None:
    store = filled(tmp_path, budget=0)
    assert store.folder
    shutil.rmtree(store.folder)
    assert_right(store)


def test_above_the_budget_without_a_disk_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    store = filled(None, ROWS[:2], budget=10)
    store.complete(ROWS, Builder())
    assert store.where == "memory" and len(caplog.records) == 1 and "budget" in caplog.text
    assert_right(store)


# Folders that take no more


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to write files of more bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_half_way_costs_no_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = EncodedRow((1, 2), tuple(range(2000)))
    rows = [*ROWS[:2], long, *ROWS[2:]]
    store = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY)
    with files_limited_to(50_000):
        done = store.complete(rows, Builder())
    assert (done.built, store.where) == (7, "memory")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "File too large" in caplog.text and "in memory for this run" in caplog.text
    assert len(shards_in(store)) == 1 and not leftovers(store)
    assert_right(store, rows)
    assert store.complete(rows, no_build).rows == 7

    later, build = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY), Builder()
    later.complete(rows, build)
    assert build.asked == [rows[2:]] and len(shards_in(later)) == 4


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "caches").write_text("a file is in the way")
    store = filled(tmp_path / "caches", ROWS[:3])
    store.complete(ROWS, Builder())
    assert len(caplog.records) == 1 and "in memory for this run" in caplog.text
    assert_right(store)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder_is_read_and_what_is_missing_stays_in_memory(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = shards_in(filled(tmp_path, ROWS[:2]))
    real = os.open  # permissions would not hold root back

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    store, build = PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY), Builder()
    assert store.complete(ROWS[:2], build).found == 2 and not caplog.records
    store.complete(ROWS, build)
    assert build.asked == [ROWS[2:]] and shards_in(store) == before
    assert len(caplog.records) == 1 and os.strerror(number) in caplog.text
    assert_right(store)


# Other processes


def in_fork(run: Callable[..., None], *arguments: Any) -> Any:
    process = FORK.Process(target=run, args=arguments)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.005)


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
    wait_for(flag.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store, build = PrefixStore(folder, IDENTITY, memory_budget=PLENTY), Builder()
    assert len(shards_in(store)) == 2
    assert leftovers(store), "the kill came too late"

    done = store.complete(ROWS, build)
    assert build.asked == [ROWS[4:]] and (done.found, done.built) == (4, 2)
    assert not leftovers(store) and len(shards_in(store)) == 3
    assert_right(store)


def build_in_company(folder: Path, builds: Path, output: Path, barrier: Any) -> None:
    """Complete a store as another process does; each build of shards leaves a line in `builds`."""
    logging.basicConfig(filename=output, level=logging.INFO, force=True)

    def slow(rows: list[EncodedRow]) -> Iterator[Shard]:
        with open(builds, "a") as file:
            file.write(f"{len(rows)}\n")
        for shard in Builder()(rows):
            time.sleep(0.2)
            yield shard

    store = PrefixStore(folder, IDENTITY, memory_budget=PLENTY)
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
    store = PrefixStore(folder, IDENTITY, memory_budget=PLENTY)
    assert len(shards_in(store)) == 3 and not leftovers(store)


# Weights


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder of a small model."""
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed whole."""
    names: list[str] = []
    real = weights.file_hash

    def counting(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(weights, "file_hash", counting)
    return names


def test_two_loads_of_one_folder_have_one_hash_and_its_files_are_read_whole_once(
    saved: Path, tmp_path: Path, hashed: list[str]
) -> None:
    first = weights_hash(load(saved), saved, tmp_path / "memory")
    assert weights_hash(load(saved), str(saved), tmp_path / "memory") == first
    assert hashed == ["model.safetensors"]
    assert weights_hash(load(saved), saved, None) == first
    shutil.copytree(saved, tmp_path / "moved")
    assert weights_hash(load(saved), tmp_path / "moved", tmp_path / "memory") == first
    assert len(hashed) == 3


@pytest.mark.parametrize("put_back", [False, True])
def test_a_file_changed_under_the_same_name_has_another_hash(
    put_back: bool, saved: Path, tmp_path: Path, hashed: list[str]
) -> None:
    base, file = load(saved), saved / "model.safetensors"
    before, status = weights_hash(base, saved, tmp_path / "memory"), file.stat()
    flip(file, status.st_size - 1)
    if put_back:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert weights_hash(base, saved, tmp_path / "memory") != before
    assert len(hashed) == 2
    flip(file, status.st_size - 1)
    assert weights_hash(base, saved, tmp_path / "memory") == before


def test_a_memory_that_is_damaged_or_cannot_be_written_costs_time_alone(
    saved: Path, tmp_path: Path, hashed: list[str]
) -> None:
    base = load(saved)
    right = weights_hash(base, saved, tmp_path)
    for text in ("no JSON", "[]", json.dumps({str(saved / "model.safetensors"): {"sha256": "0"}})):
        (tmp_path / "weights.json").write_text(text)
        assert weights_hash(base, saved, tmp_path) == right
    (tmp_path / "file").touch()
    assert weights_hash(base, saved, tmp_path / "file") == right
    assert len(hashed) == 5


def test_files_of_a_hub_id_are_those_of_its_snapshot_in_the_local_cache(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    repository = tmp_path / "hub" / "models--someone--small"
    shutil.copytree(saved, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load(saved)
    of_folder = weights_hash(base, saved, None)
    assert weights_hash(base, "someone/small", None) == of_folder
    base.config._commit_hash = "a" * 40
    (repository / "refs" / "main").unlink()
    assert weights_hash(base, "someone/small", None) == of_folder
    assert len(hashed) == 3
    assert weights_hash(base, "someone/else", None) == weights_hash(base, None, None) != of_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_in_memory_is_known_by_every_value(dtype: torch.dtype) -> None:
    first, same = tiny(dtype=dtype), tiny(dtype=dtype)
    assert weights_hash(first, None, None) == weights_hash(same, None, None)
    flat = same.get_input_embeddings().weight.data.reshape(-1)
    assert flat.numel() // weights.PIECES > 1
    flat[1] += 1  # between the values that the fingerprint samples
    assert weights.fingerprint(first) == weights.fingerprint(same)
    assert weights_hash(first, None, None) != weights_hash(same, None, None)


def test_a_model_changed_after_loading_or_loaded_otherwise_is_another_model(saved: Path) -> None:
    base = load(saved)
    hashes = {weights_hash(base, saved, None), weights_hash(load(saved, torch.bfloat16), saved, None)}
    base.quantization_method = "some"
    hashes.add(weights_hash(base, saved, None))
    del base.quantization_method
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(1)
    hashes.add(weights_hash(base, saved, None))
    assert len(hashes) == 4


# Whose it is


USE = Use("results/run", "model", {"forget": "ab" * 32}, None, None)


def users_in(folder: Path) -> dict[str, set[str]]:
    """By shard the runs that `cache list` names."""
    return {shard.path.name: {use.run for use in shard.uses} for shard in cache.shards_in(folder)}


def test_a_shard_is_somebodys_before_it_is_there_and_stays_it_when_it_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def complete(use: Use | None, build: Any) -> None:
        PrefixStore(tmp_path, IDENTITY, memory_budget=PLENTY, use=use).complete(ROWS, build)

    with monkeypatch.context() as patched:
        patched.setattr("grun.cache.store.write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            complete(USE, Builder())
    (note,) = tmp_path.glob("*/use-*.json")
    assert len(json.loads(note.read_text())["shards"]) == 1
    complete(USE, Builder(per_shard=6))
    complete(dataclasses.replace(USE, run="results/other"), no_build)
    complete(None, no_build)
    (before,) = users_in(tmp_path).items()
    assert before[1] == {"results/run", "results/other"}
    (file,) = tmp_path.glob("*/*.safetensors")
    flip(file, position_of(expected(ROWS[2]).states, file))
    complete(None, Builder())
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
            store = PrefixStore(folder, {**IDENTITY, "of": name}, memory_budget=PLENTY, use=use)
            store.complete(ROWS[place : place + 1], Builder())
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
