"""Which pages are asked for, that they come, and that a loader asks for those of its rows."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastcollate import BatchLoader
from fastcollate.plan import plan
from fastcollate.store import layout as rows_room
from fastcollate.store import pages as read_ahead
from fastcollate.store.layout import READ_BEYOND, Table
from tests.helpers import make_shards

PAGE = 64  # bytes, so that small shards have many
DAMAGED = [[0, 9, 3, 12], [0, -2, 4, 12], [0, 4, 4, 2**62]]
NO_ROWS = np.array([-1, 0, 1, 2, 3, 2**40])  # of three


def plain(kernel: Any) -> Any:
    """The Python function behind a kernel."""
    return getattr(kernel, "py_func", kernel)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Each ask's pages, in the order of the asks."""
    asks: list[list[int]] = []

    def record(address: int, size: int) -> None:
        assert address % PAGE == 0
        assert size % PAGE == 0
        asks.append(list(range(address // PAGE, (address + size) // PAGE)))

    def view(address: int, count: int, dtype: Any) -> Any:
        return np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(int(address)))

    monkeypatch.setattr(read_ahead, "ask_for", record)
    monkeypatch.setattr(rows_room, "view", view)
    for name in ("_ask_for_pages", "_add_stretch", "_ask_for_column"):
        monkeypatch.setattr(read_ahead, name, plain(getattr(read_ahead, name)))
    for name in ("shard_of", "bounds_of"):
        monkeypatch.setattr(rows_room, name, plain(getattr(rows_room, name)))
    return asks


def pages(array: npt.NDArray[Any], start: int, stop: int) -> set[int]:
    """The pages of some items of an array."""
    begin = array.ctypes.data + array.itemsize * start
    return {byte // PAGE for byte in range(begin, begin + array.itemsize * (stop - start))}


@pytest.mark.parametrize("with_spans", [False, True])
def test_asks_for_the_pages_of_the_rows_and_no_others(asked: list[list[int]], with_spans: bool) -> None:
    seed = 20_261
    print(f"seed {seed}")
    rng = random.Random(seed)
    rows = [list(range(rng.choice([0, 1, 9, 300]))) for _ in range(300)]
    shards = make_shards(rows, [[0, len(row)] for row in rows], num_shards=3)
    for _ in range(20):
        asked.clear()
        chosen = np.array(sorted(rng.sample(range(300), rng.choice([1, 5, 100]))))
        count = plain(read_ahead.ask_for_row_pages)(Table(shards).array, chosen, with_spans, PAGE)
        expected: set[int] = set()
        for row in chosen.tolist():
            shard, local = shards[row // 100], row % 100
            begin, end = shard.offsets[local : local + 2].tolist()
            expected |= pages(shard.offsets, local, local + 2)
            if end > begin:
                expected |= pages(shard.input_ids, begin, min(end + READ_BEYOND, len(shard.input_ids)))
            if with_spans:
                first, last = shard.span_offsets[local : local + 2].tolist()
                expected |= pages(shard.span_offsets, local, local + 2)
                expected |= pages(shard.spans, first, min(last + READ_BEYOND, len(shard.spans)))
        assert {page for ask in asked for page in ask} == expected
        assert count == len(asked)


def test_neighbours_share_an_ask(asked: list[list[int]]) -> None:
    lengths = np.zeros(4096, np.uint16)
    count = plain(read_ahead.ask_for_item_pages)(lengths.ctypes.data, 2, np.arange(100, 1500), PAGE)
    assert count == len(asked) == 1
    assert set(asked[0]) == pages(lengths, 100, 1500)
    asked.clear()
    far = np.array([0, 1000, 1001, 1064, 3000])  # of these, 1000 to 1064 lie on pages side by side
    assert plain(read_ahead.ask_for_item_pages)(lengths.ctypes.data, 2, far, PAGE) == len(asked) == 4
    assert {page for ask in asked for page in ask} == set().union(*(pages(lengths, i, i + 1) for i in far.tolist()))


@pytest.mark.parametrize("offsets", DAMAGED)
def test_what_is_damaged_is_passed_over(asked: list[list[int]], offsets: list[int]) -> None:
    (shard,) = make_shards([[1] * 4] * 3)
    damaged = SimpleNamespace(**{**shard._asdict(), "offsets": np.array(offsets)})
    plain(read_ahead.ask_for_row_pages)(Table([damaged]).array, NO_ROWS, False, PAGE)
    allowed = pages(damaged.offsets, 0, 4) | pages(shard.input_ids, 0, len(shard.input_ids))
    assert {page for ask in asked for page in ask} <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("offsets", DAMAGED)
def test_compiled_too(offsets: list[int]) -> None:
    (shard,) = make_shards([[1] * 4] * 3)
    table = Table([SimpleNamespace(**{**shard._asdict(), "offsets": np.array(offsets)})]).array
    assert read_ahead.ask_for_row_pages(table, NO_ROWS[1:4], False, mmap.PAGESIZE) >= 1
    assert read_ahead.ask_for_row_pages(table, NO_ROWS[4:], False, mmap.PAGESIZE) == 0


def resident(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which pages of a memory map are in memory."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        pytest.skip("this system has no madvise")
    size = -(-array.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * size)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), found):
        pytest.skip(f"mincore does not tell: {os.strerror(ctypes.get_errno())}")
    return np.frombuffer(found, np.uint8) & 1 == 1


@pytest.mark.slow
def test_pages_come_into_memory_without_being_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "numbers"
    items = mmap.PAGESIZE // 8
    np.arange(1000 * items, dtype=np.int64).tofile(path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    numbers = np.memmap(path, np.int64, mode="r")
    if resident(numbers).any():
        pytest.skip("this file system keeps its files in memory")
    wanted = np.arange(5, 1000, 25)
    monkeypatch.setattr(read_ahead, "FEW", 40)
    read_ahead.ask_for_items(numbers, np.random.default_rng(0).permutation(wanted * items))
    end = time.monotonic() + 20
    while not resident(numbers)[wanted].all():
        assert time.monotonic() < end, "what was asked for did not come"
        time.sleep(0.01)
    assert not resident(numbers).all()


def test_where_pages_are_in_memory_only_a_few_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).permutation(10_000)
    asks: list[Any] = []
    clock = [100.0]
    monkeypatch.setattr(read_ahead.time, "perf_counter", lambda: clock[0])

    def ask(some: Any, seconds: float) -> int:
        asks.append(some)
        assert (np.diff(some) > 0).all()
        clock[0] += seconds * len(some)
        return len(some)

    read_ahead._ask(lambda some: ask(some, 1e-6), rows)
    assert [len(some) for some in asks] == [33]
    asks.clear()
    read_ahead._ask(lambda some: ask(some, 6e-6), rows)
    assert [len(some) for some in asks] == [33, 10_000]
    asks.clear()
    read_ahead._ask(lambda some: ask(some, 6e-6), rows[:4095])
    assert not asks
    read_ahead._ask(lambda some: ask(some, 6e-6), rows[:4096])
    assert [len(some) for some in asks] == [32, 4096]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"policy": "packed", "batch_size": 1, "capacity": 32}])
def test_a_loader_asks_for_the_rows_of_each_window(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    rows = [[token] * (token % 7 + 1) for token in range(400)]
    shards = make_shards(rows, num_shards=2)
    store = SimpleNamespace(shards=shards, lengths=np.array([len(row) for row in rows], np.uint16))
    asked: list[Any] = []
    monkeypatch.setattr(read_ahead, "ask_for_rows", lambda table, some, with_spans: asked.append((some, with_spans)))
    options = {"window": 64, "rows": range(100, 400), "prefetch": 0, "mode": "positional", **options}
    for policy, mask, blocks_from in (("bucketed", True, 100), ("shuffled", False, 1000)):
        monkeypatch.setattr(plan, "BLOCK_FROM", blocks_from)
        asked.clear()
        own = {"policy": policy, **options}
        list(BatchLoader(store, mask_prompt=mask, **own))
        assert len(asked) == -(-300 // 64)
        assert {with_spans for _, with_spans in asked} == {mask}
        assert sorted(set(np.concatenate([some for some, _ in asked]).tolist())) == list(range(100, 400))
    asked.clear()
    if "policy" not in options:
        list(BatchLoader(store, policy="sequential", **options))
        assert not asked
