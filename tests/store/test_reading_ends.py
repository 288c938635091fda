"""Reading within a limit ends: in the local store's batches, or in one error, at once where it can never fit."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from fastcollate import BatchLoader
from fastcollate.errors import InputError
from fastcollate.plan.sharded import order
from fastcollate.store.remote import cache as module
from fastcollate.store.store import TokenStore
from tests.helpers import numbered_store

ROWS, MOST_S = 2000, 60.0  # twenty shards; a case that waits takes longer

OPTIONS: list[dict[str, Any]] = [
    {"batch_size": 8, "window": 64, "prefetch": 0},
    {"batch_size": 8, "window": 500, "num_threads": 3},
    {"max_tokens": 300, "window": 300, "num_threads": 2, "balance": True},
    {"batch_size": 2, "policy": "packed", "max_length": 64, "window": 200, "prefetch": 1, "balance": True},
    {"batch_size": 8, "policy": "sequential", "window": 300, "num_threads": 2},
]


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    """Twenty shards of 100 rows, eight of which an order by shards mixes; waiting for room would take too long."""
    monkeypatch.setattr(order, "MIXED_ROWS", 1)
    monkeypatch.setattr(module, "MOST_WAIT_S", 2 * MOST_S)
    return numbered_store(tmp_path / "store", ROWS)


def room_for(store: TokenStore, shards: int) -> int:
    return shards * max(entry["num_bytes"] for entry in store.manifest["shards"])


def outcome(store: TokenStore, options: dict[str, Any]) -> list[Any] | InputError:
    try:
        return list(BatchLoader(store, **options))
    except InputError as error:
        return error


def outcomes(stores: list[TokenStore], options: dict[str, Any]) -> list[Any]:
    """What ranks at work at once get, within the time limit."""
    found: list[Any] = [None] * len(stores)

    def run(rank: int) -> None:
        found[rank] = outcome(stores[rank], {**options, "rank": rank, "world_size": len(stores)})

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + MOST_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert None not in found, "has not ended"
    return found


@pytest.mark.parametrize("order", ["shards", "rows"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_batches_or_an_error_at_once(local: TokenStore, tmp_path: Path, options: dict[str, Any], order: str) -> None:
    """Of every limit, also one that a window takes alone, so that the next one must wait until it is let go."""
    options = {**options, "order": order}
    wanted, have_fit = list(BatchLoader(local, **options)), []
    for shards in (3, 4, 8, 9, 12, 16, 17, 20):
        store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache", cache_limit=room_for(local, shards))
        (got,) = outcomes([store], options)
        have_fit.append(not isinstance(got, InputError))
        if isinstance(got, InputError):
            assert "rows that are needed at once" in str(got)
            continue
        assert len(got) == len(wanted)
        assert all(
            torch.equal(a, b) for one, other in zip(got, wanted, strict=True) for a, b in zip(one, other, strict=True)
        )
    assert have_fit == sorted(have_fit)
    assert have_fit[-1]
    assert have_fit[-3] or order == "rows"  # sixteen fit any window


@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda options: "-".join(map(str, options.values())))
def test_ranks_that_share_a_limit(local: TokenStore, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "order": "shards"}
    limit = room_for(local, 16)
    stores = [TokenStore(f"file://{local.path}", cache=tmp_path / "cache", cache_limit=limit) for _ in range(2)]
    for rank, got in enumerate(outcomes(stores, options)):
        wanted = list(BatchLoader(local, **options, rank=rank, world_size=2))
        assert not isinstance(got, InputError), got
        assert len(got) == len(wanted)
        assert all(torch.equal(one[0], other[0]) for one, other in zip(got, wanted, strict=True))


def test_a_window_that_takes_long_is_waited_for(
    local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one has no room ahead of time; it is asked for again in its turn."""
    monkeypatch.setattr(module, "MOST_WAIT_S", 0.3)
    options: dict[str, Any] = {"batch_size": 10, "policy": "sequential", "window": 100, "prefetch": 1}
    limit = room_for(local, 1)
    batches = iter(BatchLoader(TokenStore(f"file://{local.path}", cache=tmp_path, cache_limit=limit), **options))
    got = [next(batches)]
    time.sleep(1.0)
    got += batches
    assert [one.inputs.tolist() for one in got] == [one.inputs.tolist() for one in BatchLoader(local, **options)]


def test_a_file_that_arrives_whole_while_room_is_made(
    local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache", cache_limit=room_for(local, 2))
    part, scan, seen = store._remote.cache.folder / "shard-00005.arrow.part", os.scandir, []  # type: ignore[union-attr]
    part.touch()

    @contextlib.contextmanager
    def renamed_meanwhile(folder: Path) -> Iterator[list[Any]]:
        with scan(folder) as entries:
            found = [entry for entry in entries if ".arrow" in entry.name or folder != part.parent]
        if folder == part.parent:
            seen.extend(found)
            part.unlink(missing_ok=True)
        yield found

    monkeypatch.setattr(module.os, "scandir", renamed_meanwhile)
    assert store[0].input_ids.tolist() == local[0].input_ids.tolist()
    assert [entry.name for entry in seen] == [part.name]


def test_room_that_another_iteration_keeps_is_one_error_in_time(
    local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAIT_S", 0.3)
    store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache", cache_limit=room_for(local, 1))
    options: dict[str, Any] = {"batch_size": 10, "policy": "sequential", "window": 100}
    first = iter(BatchLoader(store, **options, prefetch=0))
    next(first)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"there was no room for .* beside the shards in use"):
        list(BatchLoader(store, **options, rows=range(500, 1500)))
    assert time.monotonic() - started < 10
    assert len(list(first)) == ROWS // 10 - 1


@pytest.mark.parametrize("name", [".lock", ".locks/shard-00000.arrow"])
def test_another_process_that_is_stopped_is_one_error_in_time(
    local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(module, "MOST_SILENCE_S", 0.3)
    store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache", cache_limit="1MB")
    (folder,) = (tmp_path / "cache").iterdir()
    with (
        filelock.FileLock(folder / name, thread_local=False),
        pytest.raises(InputError, match=f"{name}: another process has kept this lock for 0 s"),
    ):
        store[0]
    assert store[0].input_ids.tolist() == local[0].input_ids.tolist()


def test_another_process_that_is_slow_is_waited_for(
    local: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SILENCE_S", 0.5)
    store = TokenStore(f"file://{local.path}", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    lock = filelock.FileLock(folder / ".locks" / "shard-00000.arrow", thread_local=False)
    lock.acquire()
    reader = threading.Thread(target=lambda: found.append(store[0].input_ids.tolist()))
    found: list[list[int]] = []
    reader.start()
    with open(folder / "shard-00000.arrow.part", "ab", buffering=0) as part:
        for _ in range(15):
            part.write(b"x")
            time.sleep(0.1)
    lock.release()
    reader.join(MOST_S)
    assert found == [local[0].input_ids.tolist()]
