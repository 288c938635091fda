"""Host buffers, and copies to a device with streams that a test runs by hand; real ones: test_loader_on_card."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate.collate.reference import custom_collate_fn
from fastcollate.errors import InputError
from fastcollate.load import cuda as cuda_room
from fastcollate.load import prefetch
from fastcollate.load.buffers import HostPool
from fastcollate.load.cuda import ToCuda
from fastcollate.load.loader import BatchLoader
from fastcollate.plan.plan import plan_epoch
from tests.helpers import make_store

POISON = -77


def rows_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, 50256, n).tolist() for n in np.clip(rng.lognormal(3, 0.7, count), 1, 200).astype(int)]


ROWS = rows_of(600)
OPTIONS: dict[str, Any] = {"batch_size": 8, "policy": "shuffled", "seed": 4}


def expected_batches(**options: Any) -> list[Any]:
    plan = plan_epoch([len(row) for row in ROWS], **options)
    return [custom_collate_fn([ROWS[row] for row in rows]) for rows in plan]


def same(found: Any, expected: Any) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


# -------------------------------------------------------------------------------------------------------- the pool


def test_a_buffer_is_taken_again_only_when_nobody_refers_to_it() -> None:
    pool = HostPool(2)
    first = pool.take(100)
    address = first.ctypes.data
    view = torch.from_numpy(first)[3:5]
    del first
    assert pool.take(10).ctypes.data != address
    del view
    taken = [pool.take(10), pool.take(10)]
    assert address in {buffer.ctypes.data for buffer in taken}
    assert pool.num_allocated == 2


def test_a_pool_makes_room_for_wider_batches() -> None:
    pool = HostPool(2)
    held = [pool.take(size) for size in (1, 50, 2, 100)]
    assert [len(buffer) for buffer in held] == [1, 50, 2, 100]
    assert len({buffer.ctypes.data for buffer in held}) == 4


def test_a_large_buffer_is_kept_for_what_needs_it() -> None:
    pool = HostPool(4)
    small, large = pool.take(10), pool.take(1000)
    places = small.ctypes.data, large.ctypes.data
    del small, large  # the large one was used last
    small = pool.take(10)
    large = pool.take(1000)
    assert (small.ctypes.data, large.ctypes.data) == places
    assert pool.take(8).ctypes.data not in places
    assert pool.num_allocated == 3


def test_an_idle_buffer_makes_room_first() -> None:
    pool = HostPool(2)
    held = pool.take(10)
    pool.take(20)
    pool.take(30)  # nothing idle is large enough
    place = held.ctypes.data
    del held
    assert pool.take(10).ctypes.data == place
    assert pool.num_allocated == 3


def test_of_idle_buffers_the_largest_makes_room() -> None:
    pool = HostPool(3)
    sizes = (20, 10, 10)
    taken = [pool.take(size) for size in sizes]
    places = [buffer.ctypes.data for buffer in taken]
    del taken
    wide = pool.take(30)
    assert wide.ctypes.data not in places[1:]
    small = [pool.take(10), pool.take(5)]
    assert {buffer.ctypes.data for buffer in small} == set(places[1:])
    assert pool.num_allocated == 4


def test_of_equal_buffers_the_one_used_last_is_taken() -> None:
    pool = HostPool(3)
    taken = [pool.take(10) for _ in range(3)]
    places = [buffer.ctypes.data for buffer in taken]
    del taken
    for place in (places[2], places[2], places[2]):
        assert pool.take(5).ctypes.data == place
    held = pool.take(5)
    assert held.ctypes.data == places[2]
    assert pool.take(5).ctypes.data == places[1]


def test_the_oldest_buffer_is_found_where_it_alone_is_idle() -> None:
    pool = HostPool(3)
    first, *others = (pool.take(10) for _ in range(3))
    place = first.ctypes.data
    del first
    for num_cells in (0, 5, 10):
        assert pool.take(num_cells).ctypes.data == place
        others.append(others.pop(0))
    assert pool.num_allocated == 3


def test_a_pool_that_is_all_in_use_lets_go_of_the_oldest() -> None:
    pool = HostPool(2)
    held = [pool.take(10) for _ in range(5)]
    assert [buffer.ctypes.data for buffer in pool._buffers] == [buffer.ctypes.data for buffer in held[3:]]


# ---------------------------------------------------------------------------------- streams that the test runs by hand


class FakeStream:
    """Work that waits until somebody needs it done: as late as a stream may be."""

    def __init__(self, *_: Any) -> None:
        self.work: list[Callable[[], None]] = []
        self.lock = threading.RLock()  # threads may wait for the same work, which a stream does once

    def run(self, until: int) -> None:
        with self.lock:
            for index in range(until):
                self.work[index]()
                self.work[index] = lambda: None

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()


class FakeEvent:
    def __init__(self) -> None:
        self.stream: FakeStream | None = None
        self.place = 0

    def record(self, stream: FakeStream) -> None:
        self.stream, self.place = stream, len(stream.work)

    def query(self) -> bool:
        return self.stream is None or not any(w.__name__ == "copy" for w in self.stream.work[: self.place])

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.place)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """`ToCuda` over the processor's memory, with copies that run as late as events allow."""
    log = types.SimpleNamespace(copies=0, recorded=0, current=[])

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        log.current.append(stream)
        yield
        log.current.pop()

    class Device(torch.Tensor):
        """Memory of the device: a copy to it is work of the stream that is current."""

        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Device:  # type: ignore[override]
            assert non_blocking

            def copy() -> None:
                torch.Tensor.copy_(self, source)

            log.copies += 1
            log.current[-1].work.append(copy)
            return self

        def record_stream(self, stream: Any) -> None:
            log.recorded += 1

    def empty(*sizes: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> torch.Tensor:
        made = torch.full((sizes[0],) if isinstance(sizes[0], int) else sizes[0], POISON, **options)
        return made if device == "cpu" else made.as_subclass(Device)

    cuda = types.SimpleNamespace(
        Stream=FakeStream, Event=FakeEvent, stream=on, current_device=lambda: 0,
        current_stream=lambda device: FakeStream(),
    )  # fmt: skip
    names = {name: getattr(torch, name) for name in ("int64", "Tensor", "device")}
    monkeypatch.setattr(cuda_room, "torch", types.SimpleNamespace(cuda=cuda, empty=empty, **names))
    return log


@pytest.mark.parametrize(("ahead", "num_threads"), [(0, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("policy", ["shuffled", "packed"])
def test_copies_as_late_as_events_allow(
    policy: str, ahead: int, num_threads: int, by_hand: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS" if ahead else "ALONE_CELLS", 3000)
    taken = ToCuda.take

    def take_poisoned(self: ToCuda, num_cells: int) -> Any:
        buffer = taken(self, num_cells)
        buffer.fill(POISON)  # a copy that is still to come would now copy this
        return buffer

    monkeypatch.setattr(ToCuda, "take", take_poisoned)
    options = {**OPTIONS, "policy": policy, "max_length": 200}
    plain = [[tensor.clone() for tensor in batch] for batch in BatchLoader(make_store(ROWS), prefetch=0, **options)]
    loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=ahead, num_threads=num_threads, **options)
    found = [[torch.Tensor(t).to(t.dtype).clone() for t in batch] for batch in loader]
    assert len(found) == len(plain)
    assert all(same(a, b) for a, b in zip(found, plain, strict=True))
    assert by_hand.copies >= 10
    assert by_hand.recorded >= len(plain)
    assert loader.stats.h2d_bytes == sum(tensor.nbytes for batch in plain for tensor in batch)


@pytest.mark.slow
def test_leaving_early_strands_no_buffer(by_hand: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 500)
    loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=3, **OPTIONS)
    for steps in (1, 2, 5, 9):
        for _ in itertools.islice(loader, steps):
            pass
        gc.collect()
        own = loader._own_transfer()
        assert isinstance(own, ToCuda)
        assert not own._taken
    damaged = make_store(ROWS)
    damaged.shards[0].offsets[60] = -1
    loader = BatchLoader(damaged, device="cuda", prefetch=3, **{**OPTIONS, "policy": "sequential"})
    with pytest.raises(InputError, match="row 59"):
        list(loader)
    assert not loader._own_transfer()._taken  # type: ignore[attr-defined]


def test_host_memory_is_the_hosts_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
        loader = BatchLoader(make_store(ROWS), prefetch=2, **OPTIONS)
        assert {tensor.device.type for batch in loader for tensor in batch} == {"cpu"}
        assert ToCuda._pageable(3).device.type == "cpu"


def test_a_refill_without_waiting_would_be_seen(
    by_hand: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams above do catch what they are for."""
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 500)
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None)
    monkeypatch.setattr(FakeEvent, "query", lambda self: True)
    monkeypatch.setattr(FakeStream, "wait_event", lambda self, event: event.stream.run(event.place))
    loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=3, **OPTIONS)
    found = []
    for batch in loader:
        time.sleep(0.002)  # the threads get ahead, so that copies wait while other buffers are filled
        found.append([torch.Tensor(t).to(t.dtype).clone() for t in batch])
    wrong = [not same(a, b) for a, b in zip(found, expected_batches(**OPTIONS), strict=True)]
    assert any(wrong)


def test_so_many_buffers_are_pinned_and_no_more(
    by_hand: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, pinned = cuda_room.torch.empty, []

    def count(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.extend([sizes[0]] * pin_memory)
        return empty(*sizes, pin_memory=pin_memory, **options)

    monkeypatch.setattr(cuda_room.torch, "empty", count)
    to_cuda = ToCuda(torch.device("cuda"), 3)
    for _ in range(9):
        to_cuda.send(to_cuda.take(10), 10)
    assert pinned == [10, 10, 10]
    to_cuda.send(to_cuda.take(20), 20)  # in the place of the oldest
    for _ in range(4):
        to_cuda.send(to_cuda.take(10), 10)
    assert pinned == [10, 10, 10, 20]
    assert len(to_cuda._free) == 3


def test_memory_that_cannot_be_pinned_is_told_with_the_remedy(
    by_hand: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = cuda_room.torch.empty

    def full(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(cuda_room.torch, "empty", full)
    loader = BatchLoader(make_store(ROWS), device="cuda", prefetch=2, **OPTIONS)
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error: out of memory\).*ulimit -l") as told:
        found = [[torch.Tensor(t).to(t.dtype).clone() for t in batch] for batch in loader]
    assert len([warning for warning in told if "pinned" in str(warning.message)]) == 1
    assert all(same(a, b) for a, b in zip(found, expected_batches(**OPTIONS), strict=True))
