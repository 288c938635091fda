"""A store behind a URL: the batches are the local store's, each shard comes once, and nothing is read before it is."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastcollate import BatchLoader, BucketBatchSampler, MixedStore, StoreDataset
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.sources import remote
from fastcollate.store import layout
from fastcollate.store.remote import cache as module
from fastcollate.store.remote.cache import bytes_of
from fastcollate.store.remote.objects import Objects
from fastcollate.store.store import TokenStore
from tests.helpers import numbered_store, store_of_rows

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 8, "policy": "sequential", "window": 64},
    {"batch_size": 8, "policy": "shuffled", "window": 64},
    {"batch_size": 8, "policy": "bucketed", "mask_prompt": True, "window": 128, "rank": 1, "world_size": 2},
    {"max_tokens": 200, "policy": "bucketed", "window": 128, "prefetch": 0},
    {"batch_size": 2, "policy": "packed", "max_length": 64, "window": 200, "num_threads": 2},
]


@pytest.fixture
def local(tmp_path: Path) -> TokenStore:
    """Ten shards of 100 rows."""
    return numbered_store(tmp_path / "store", 1000)


@pytest.fixture
def url(local: TokenStore, tmp_path: Path) -> str:
    """The same in a storage that only this process sees."""
    files = fsspec.filesystem("memory")
    files.put(f"{tmp_path}/store", f"{tmp_path}/bucket", recursive=True)
    return f"memory://{tmp_path}/bucket"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The ranges that were read, in order."""
    found: list[tuple[str, int, int]] = []
    read = Objects.read

    def notes(self: Objects, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        found.append((name, start or 0, stop or 0))
        return read(self, name, start, stop)

    monkeypatch.setattr(Objects, "read", notes)
    return found


def same_batches(one: Any, other: Any) -> int:
    """How many batches both give, bit for bit."""
    count = 0
    for got, wanted in zip(one, other, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        count += 1
    return count


def names(reads: list[tuple[str, int, int]]) -> list[str]:
    return [name for name, _, _ in reads]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options["policy"]))
@pytest.mark.parametrize("limit", [None, "20kB"])
def test_batches_are_those_of_the_local_store(
    local: TokenStore, url: str, tmp_path: Path, options: dict[str, Any], limit: str | None
) -> None:
    store = TokenStore(url, cache=tmp_path / "cache", cache_limit=limit)
    if limit is not None and options["policy"] != "sequential":
        with pytest.raises(InputError, match=r"more than cache_limit=20,000: raise it"):
            list(BatchLoader(store, **options))
        store = TokenStore(url, cache=tmp_path / "cache", cache_limit=200_000)
    for epoch in range(2):
        loaders = [BatchLoader(one, **options) for one in (store, local)]
        for loader in loaders:
            loader.set_epoch(epoch)
        assert same_batches(*loaders) > 10


def test_opening_fetches_the_manifest_and_the_lengths_alone(
    local: TokenStore, url: str, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    assert names(reads) == ["lengths.npy"]
    assert len(store) == 1000
    assert repr(store) == f"TokenStore('{url}'): 1,000 rows, {local.num_tokens:,} tokens"
    assert np.array_equal(store.shard_starts, local.shard_starts)
    for row in (0, 999, -1, 123):
        got, wanted = store[row], local[row]
        assert got.source_row == wanted.source_row
        for a, b in ((got.input_ids, wanted.input_ids), (got.spans, wanted.spans)):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
    assert names(reads) == ["lengths.npy", *(f"shard-0000{n}.arrow" for n in (0, 9, 1))]
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again[123].input_ids, local[123].input_ids)
    assert len(reads) == 4  # what lies in the cache is not fetched again
    for one, other in zip(store.shards, local.shards, strict=True):
        for name in ("input_ids", "offsets", "spans", "span_offsets", "source_row"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_window_fetches_only_the_shards_of_its_rows(
    url: str, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    loader = BatchLoader(store, batch_size=10, policy="sequential", window=100, prefetch=0)
    batches = iter(loader)
    next(batches)
    assert names(reads) == ["lengths.npy", "shard-00000.arrow"]
    del batches
    list(BatchLoader(store, rows=range(420, 480), batch_size=10))
    assert names(reads)[2:] == ["shard-00004.arrow"]


def test_the_next_window_comes_ahead_of_time(url: str, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    batches = iter(BatchLoader(store, batch_size=10, policy="sequential", window=100))
    next(batches)
    deadline = time.monotonic() + 20
    while "shard-00001.arrow" not in names(reads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "shard-00001.arrow" in names(reads)


def test_a_row_that_has_not_arrived_is_refused_by_the_kernel(url: str, local: TokenStore, tmp_path: Path) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    unguarded = Collator(store.shards)
    with pytest.raises(InputError, match=r"row 250 of the store has not been fetched"):
        unguarded([250])
    held = unguarded.table.hold(np.array([250, 260]))
    assert torch.equal(unguarded([250])[0], Collator(local.shards)([250])[0])
    with pytest.raises(InputError, match=r"row 350 of the store has not been fetched"):
        unguarded([250, 350])
    del held


def test_what_was_removed_is_refused_again_and_what_the_user_keeps_stays(
    url: str, local: TokenStore, tmp_path: Path
) -> None:
    size = local.manifest["shards"][0]["num_bytes"]
    store = TokenStore(url, cache=tmp_path / "cache", cache_limit=int(2.5 * size))
    kept = store[0]
    unguarded = Collator(store.shards)
    assert unguarded.table.array[0, layout.NUM_ROWS] == 100
    for row in (150, 250, 350):
        assert np.array_equal(store[row].input_ids, local[row].input_ids)
    with pytest.raises(InputError, match=r"row 5 of the store has not been fetched"):
        unguarded([5])
    assert np.array_equal(kept.input_ids, local[0].input_ids)


def size_on_disk(folder: Path) -> int:
    total = 0
    for path in folder.rglob("shard-*.arrow*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed, or removed, just now
            total += path.stat().st_size
    return total


def test_the_cache_stays_below_its_limit(url: str, local: TokenStore, tmp_path: Path) -> None:
    sizes = [shard["num_bytes"] for shard in local.manifest["shards"]]
    limit, most = int(3.5 * max(sizes)), [0]
    store = TokenStore(url, cache=tmp_path / "cache", cache_limit=limit)
    options: dict[str, Any] = {"batch_size": 10, "policy": "sequential", "window": 100}
    for _ in range(2):
        got = []
        for batch in BatchLoader(store, **options):
            got.append(batch)
            most.append(size_on_disk(tmp_path / "cache"))
        same_batches(got, BatchLoader(local, **options))
    assert 2 * min(sizes) < max(most) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(local: TokenStore, tmp_path: Path, method: str) -> None:
    store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache")
    dataset = StoreDataset(store)
    assert len(dataset.collate(dataset.__getitems__([1, 2]))) == 2  # there are threads and maps to fork
    sampler = BucketBatchSampler(dataset, batch_size=16, seed=3)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=2, multiprocessing_context=method
    )
    assert same_batches(loader, BatchLoader(local, batch_size=16, seed=3)) == 63


def test_a_mix_of_local_and_remote_stores(local: TokenStore, url: str, tmp_path: Path) -> None:
    other = numbered_store(tmp_path / "other", 300, longest=20)
    behind = TokenStore(url, cache=tmp_path / "cache", cache_limit="1MB")
    mixes = [MixedStore({"a": other, "b": one, "c": one}, num_rows=900) for one in (behind, local)]
    assert same_batches(*(BatchLoader(mix, batch_size=9, mask_prompt=True) for mix in mixes)) == 100
    again = pickle.loads(pickle.dumps(mixes[0]))
    assert same_batches(*(BatchLoader(mix, batch_size=9) for mix in (again, mixes[1]))) == 100


def test_leaving_early_ends_the_fetching(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    read, hangs = Objects.read, threading.Event()
    monkeypatch.setattr(module, "CHUNK", 100)

    def slow(self: Objects, name: str, *bounds: int) -> bytes:
        if name == "shard-00001.arrow":
            hangs.set()
            time.sleep(0.05)
        return read(self, name, *bounds)

    monkeypatch.setattr(Objects, "read", slow)
    batches = iter(BatchLoader(store, batch_size=10, policy="sequential", window=100))
    next(batches)
    assert hangs.wait(20)
    start = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 2
    monkeypatch.undo()
    assert len(store[150].input_ids) == len(TokenStore(url, cache=tmp_path / "other")[150].input_ids)


READER = """
import sys, time
from fastcollate.store.remote.objects import Objects
from fastcollate import BatchLoader, TokenStore
read, name = Objects.read, sys.argv[4]
def notes(self, file, *bounds):
    time.sleep(0.01)
    with open(name, "a") as log:
        print(file, file=log)
    return read(self, file, *bounds)
Objects.read = notes
store = TokenStore(sys.argv[1], cache=sys.argv[2], cache_limit=sys.argv[3] or None)
total = 0
for batch in BatchLoader(store, batch_size=10, policy="sequential", window=100):
    total += int(batch.inputs.sum()) * 31 % 1000003
print(total)
"""


def start_reader(url: str, cache: Path, log: Path, limit: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, url, str(cache), limit, str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def total_of(store: TokenStore) -> str:
    batches = BatchLoader(store, batch_size=10, policy="sequential", window=100)
    return f"{sum(int(batch.inputs.sum()) * 31 % 1000003 for batch in batches)}\n"


@pytest.mark.slow
def test_processes_share_one_download(local: TokenStore, tmp_path: Path) -> None:
    readers = [start_reader(f"file://{local.path}", tmp_path / "cache", tmp_path / f"log{n}") for n in range(3)]
    assert [reader.communicate(timeout=100)[0] for reader in readers] == [total_of(local)] * 3
    fetched = [
        line for n in range(3) if (tmp_path / f"log{n}").exists() for line in (tmp_path / f"log{n}").read_text().split()
    ]
    assert sorted(fetched) == ["lengths.npy", *(shard["name"] for shard in local.manifest["shards"])]


@pytest.mark.slow
def test_processes_share_one_limit(local: TokenStore, tmp_path: Path) -> None:
    largest = max(shard["num_bytes"] for shard in local.manifest["shards"])
    limit, most = 5 * largest, 0
    readers = [
        start_reader(f"file://{local.path}", tmp_path / "cache", tmp_path / f"log{n}", str(limit)) for n in range(2)
    ]
    while any(reader.poll() is None for reader in readers):
        most = max(most, size_on_disk(tmp_path / "cache"))
        time.sleep(0.002)
    assert [reader.communicate()[0] for reader in readers] == [total_of(local)] * 2
    assert largest < most <= limit


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_wrong(local: TokenStore, tmp_path: Path) -> None:
    for wait in (0.0, 0.02, 0.05, 0.08):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        log = tmp_path / f"log{wait}"
        reader = start_reader(f"file://{local.path}", tmp_path / "cache", log, "40kB")
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(wait)
        reader.kill()
        reader.communicate()
        store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache", cache_limit="40kB")
        assert total_of(store) == total_of(local)
        assert size_on_disk(tmp_path / "cache") <= 40_000


def test_a_download_goes_on_where_it_was_cut_off(
    local: TokenStore, url: str, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    whole = (tmp_path / "store" / "shard-00002.arrow").read_bytes()
    (folder / "shard-00002.arrow.part").write_bytes(whole[:1000])
    (folder / "shard-00003.arrow.part").write_bytes(b"x" * 1000)  # of a machine that lost its power
    (folder / "shard-00004.arrow.part").write_bytes(bytes(len(whole) + 9999))
    for row in (250, 350, 450):
        assert np.array_equal(store[row].input_ids, local[row].input_ids)
    assert [(name, start) for name, start, _ in reads[1:]] == [
        ("shard-00002.arrow", 1000), ("shard-00003.arrow", 1000), ("shard-00003.arrow", 0), ("shard-00004.arrow", 0),
    ]  # fmt: skip


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def test_damaged_twice_is_fetched_again_damaged_for_good_is_one_error(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = fsspec.filesystem("memory"), f"{tmp_path}/bucket/shard-00001.arrow"
    read, damages = Objects.read, [1, 1]

    def damaging(self: Objects, name: str, *bounds: int) -> bytes:
        data = read(self, name, *bounds)
        return flipped(data, 77) if damages and damages.pop() else data

    store = TokenStore(url, cache=tmp_path / "cache")
    monkeypatch.setattr(Objects, "read", damaging)
    assert np.array_equal(store[0].input_ids, local[0].input_ids)
    files.pipe(path, flipped(files.cat(path), 900))
    with pytest.raises(
        InputError, match=r"shard-00001\.arrow: its SHA-256 is not .* 3 tries: .* prepare the store again"
    ):
        store[150]
    with pytest.raises(InputError, match=r"shard-00001\.arrow: its SHA-256 is not"):
        list(BatchLoader(store, batch_size=8))
    with pytest.raises(InputError, match=r"shard-00001\.arrow: its SHA-256 is not"):  # ahead of the consumer
        list(BatchLoader(store, batch_size=10, policy="sequential", window=100))


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:.*try . of 5:RuntimeWarning")
def test_a_store_that_was_changed_meanwhile(local: TokenStore, url: str, tmp_path: Path) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    store_of_rows(tmp_path / "new", [[1, 2, 3]] * 50, num_shards=2)
    files = fsspec.filesystem("memory")
    files.rm(f"{tmp_path}/bucket", recursive=True)
    files.put(f"{tmp_path}/new", f"{tmp_path}/bucket", recursive=True)
    with pytest.raises(InputError, match=r"shard-00000\.arrow: the store was changed there while it was read; open"):
        store[0]
    assert len(TokenStore(url, cache=tmp_path / "cache")) == 50


def test_a_cached_file_that_was_cut_is_fetched_again(local: TokenStore, url: str, tmp_path: Path) -> None:
    assert len(TokenStore(url, cache=tmp_path / "cache")[0].input_ids)
    (path,) = (path for path in (tmp_path / "cache").rglob("shard-00000.arrow") if ".locks" not in path.parts)
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(TokenStore(url, cache=tmp_path / "cache")[0].input_ids, local[0].input_ids)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-100], lambda raw: b"", lambda raw: raw + b"x"])
def test_cached_lengths_that_were_cut_are_fetched_again(
    local: TokenStore, url: str, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    TokenStore(url, cache=tmp_path / "cache")
    (path,) = (path for path in (tmp_path / "cache").rglob("lengths.npy") if ".locks" not in path.parts)
    path.write_bytes(damage(path.read_bytes()))
    assert np.array_equal(TokenStore(url, cache=tmp_path / "cache").lengths, local.lengths)


def test_cached_lengths_with_a_flipped_bit_are_named(local: TokenStore, url: str, tmp_path: Path) -> None:
    TokenStore(url, cache=tmp_path / "cache")
    (path,) = (path for path in (tmp_path / "cache").rglob("lengths.npy") if ".locks" not in path.parts)
    path.write_bytes(flipped(raw := path.read_bytes(), len(raw) - 1))
    with pytest.raises(InputError, match=f"other lengths than {path} says; remove that file and open the store again"):
        TokenStore(url, cache=tmp_path / "cache")[999]
    path.unlink()
    assert TokenStore(url, cache=tmp_path / "cache")[999].input_ids.tolist() == local[999].input_ids.tolist()


@pytest.mark.parametrize("cache", ["s3://bucket/cache", "memory:/cache", Path("s3://bucket/cache"), ""])
def test_what_is_no_cache_folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str | Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    with pytest.raises(InputError, match=r"a URL .* cannot stand here: give a path|cache='': name a folder"):
        TokenStore(url, cache=cache)
    if cache:
        monkeypatch.setenv("FASTCOLLATE_CACHE", str(cache))
        with pytest.raises(InputError, match=r"a URL .* cannot stand here: give a path"):
            TokenStore(url)
    assert sorted(os.listdir()) == before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0, 0.0))


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:.*try . of 5:RuntimeWarning")
def test_lost_connections_and_short_answers_are_asked_again(
    local: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    memory, rng = type(fsspec.filesystem("memory")), np.random.default_rng(0)
    cat, faults = memory.cat_file, [0]

    def failing(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        data: bytes = cat(self, path, start=start, end=end, **options)
        if rng.random() < 0.3:
            faults[0] += 1
            kind = rng.integers(3)
            if kind == 0:
                raise ConnectionResetError("reset by peer")
            return data[: len(data) // 2] if kind == 1 else flipped(data, int(rng.integers(len(data))))
        return data

    monkeypatch.setattr(memory, "cat_file", failing)
    for _ in range(20):
        try:
            assert same_batches(BatchLoader(store, batch_size=8), BatchLoader(local, batch_size=8)) == 125
            break
        except InputError as error:
            if "its SHA-256 is not" not in str(error) and "the connection broke" not in str(error):
                raise
    assert faults[0] > 3


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:.*try . of 5:RuntimeWarning")
def test_a_connection_that_is_lost_for_good(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")

    def fails(*_: Any, **__: Any) -> bytes:
        raise ConnectionResetError("reset by peer at https://me:secret@host")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fails)
    with pytest.raises(
        InputError, match=r"shard-0000\d\.arrow: the connection broke; try again later \(tried"
    ) as error:
        list(BatchLoader(store, batch_size=8, policy="sequential"))
    assert "secret" not in str(error.value)


def test_a_full_disk(url: str, local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore(url, cache=tmp_path / "cache")
    sync = module.os.fdatasync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fdatasync", full)
    with pytest.raises(InputError, match=r"shard-00000\.arrow: cannot be written \(No space left.*give a cache_limit"):
        store[0]
    monkeypatch.setattr(module.os, "fdatasync", sync)
    assert np.array_equal(store[0].input_ids, local[0].input_ids)


@pytest.mark.slow
def test_an_s3_server(local: TokenStore, s3: Any, tmp_path: Path) -> None:
    s3.put(f"{local.path}", "bucket/data/store", recursive=True)
    store = TokenStore("s3://bucket/data/store", cache=tmp_path / "cache", cache_limit="1MB")
    for options in OPTIONS:
        assert same_batches(BatchLoader(store, **options), BatchLoader(local, **options)) > 10
    with pytest.raises(InputError, match=r"s3://bucket/none: no finished token store here"):
        TokenStore("s3://bucket/none", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("size", "number"), [("20GB", 20 * 10**9), ("1.5 GiB", 3 << 29), ("7", 7), ("2kb", 2000), (5, 5), (None, None)]
)
def test_sizes(size: Any, number: int | None) -> None:
    assert bytes_of(size) == number


@pytest.mark.parametrize("size", ["", "GB", "-1GB", "0", 0, -5, 1.5, True, "20 apples", "1e9"])
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(InputError, match=r"cache_limit=.*: give bytes, or a size such as '20GB'"):
        bytes_of(size)


def test_a_cache_of_a_local_store_is_refused(local: TokenStore) -> None:
    with pytest.raises(InputError, match="are for a store behind a URL"):
        TokenStore(local.path, cache_limit="1GB")
