"""Threads that fill in compiled code: what they share, how they sleep and wake, end and fail."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastcollate.collate import fill as kernels
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.jit import kernel
from fastcollate.load import atomics, queue_kernels
from fastcollate.load.fill_threads import FillThreads
from fastcollate.load.jobs import PackedJob, PaddedJob
from fastcollate.plan.packing import pack_rows
from tests.helpers import make_store

ROWS = [[number % 50256] * (1 + number * 7 % 40) for number in range(300)]
LENGTHS = np.array([len(row) for row in ROWS])
NAME = "fastcollate-test"


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


COLLATOR = Collator(make_store(ROWS, num_shards=3).shards, mode="positional")


def padded_job(collator: Collator = COLLATOR) -> PaddedJob:
    return PaddedJob(collator, np.random.default_rng(3).permutation(300), np.arange(0, 301, 5))


def packed_job(collator: Collator = COLLATOR) -> PackedJob:
    packs = pack_rows(np.arange(300), LENGTHS, 64, 64, "truncate")
    return PackedJob(collator, packs, np.arange(0, len(packs.bounds), 2), 64)


def alone(job: Any, first: int, stop: int, cells: int) -> tuple[int, np.ndarray, np.ndarray]:
    """What a task should come to."""
    out, report = np.zeros(cells, np.int64), np.zeros((stop - first + 1, kernels.REPORT_COLUMNS), np.int64)
    options = COLLATOR.table.array, COLLATOR.settings, job.line, first, stop, out, report
    packed = queue_kernels.PACKED if isinstance(job, PackedJob) else queue_kernels.PADDED
    return queue_kernels.fill(*options, packed), out, report


@pytest.mark.parametrize("make_job", [padded_job, packed_job])
@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_tasks_are_done_in_any_number_by_any_number_of_threads(make_job: Any, num_threads: int) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    job = make_job()
    packed = isinstance(job, PackedJob)
    posted: list[Any] = []
    with FillThreads(COLLATOR, num_threads, 5, job.num_batches, NAME, packed=packed) as threads:
        for _ in range(400):
            first = int(rng.integers(job.num_batches))
            stop = int(rng.integers(first + 1, min(first + 12, job.num_batches) + 1))
            posted.append((first, stop, np.zeros(int(rng.choice([100, 2000, 20_000])), np.int64)))
            threads.post(job, *posted[-1])
            if rng.random() < 0.02:
                time.sleep(0.002)  # threads fall asleep
            while len(posted) == 5 or (posted and rng.random() < 0.3):
                first, stop, out = posted.pop(0)
                count, report = threads.wait()
                expected, cells, lines = alone(job, first, stop, len(out))
                assert count == expected
                assert (report[: count + 1] == lines[: count + 1]).all() or count == 0
                used = lines[count - 1, kernels.END] if count else 0
                assert (out[used:] == 0).all()
                assert (out[:used] == cells[:used]).all()
    assert not alive()


def test_sums_stand_behind_the_lines() -> None:
    job = padded_job()
    count, _, report = alone(job, 3, 9, 20_000)
    assert count == 6
    assert (report[6, : kernels.NUM_TOTALS] == report[:6, : kernels.NUM_TOTALS].sum(0)).all()
    assert report[6, kernels.ROWS] == 30


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_damaged_row_is_told_by_its_place(num_threads: int) -> None:
    store = make_store(ROWS)
    store.shards[0].offsets[100] = -1
    collator = Collator(store.shards)
    job = PaddedJob(collator, np.arange(300), np.arange(0, 301, 5))
    with FillThreads(collator, num_threads, 2, 60, NAME, packed=False) as threads:
        threads.post(job, 10, 30, np.zeros(100_000, np.int64))
        count, _ = threads.wait()
    assert count == -1 - 99
    assert isinstance(job.explain(99), InputError)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_that_sleep_are_woken(num_threads: int) -> None:
    job = padded_job()
    with FillThreads(COLLATOR, num_threads, 4, 60, NAME, packed=False) as threads:
        for _ in range(5):
            assert eventually(lambda: threads._queue[queue_kernels.SLEEPERS // 8] == num_threads)
            before = time.process_time()
            time.sleep(0.05)
            assert time.process_time() - before < 0.04  # asleep, not looking on
            for first in range(4):
                threads.post(job, first, first + 1, np.zeros(1000, np.int64))
            for number in range(4):
                if number < 2:  # by them: nobody waits, who would do it himself; for one of these they were woken
                    assert eventually(threads.is_next_filled)
                assert threads.wait()[0] == 1
        assert not threads.is_next_filled()


def test_a_thread_is_not_woken_for_each_task_and_none_is_forgotten() -> None:
    job = padded_job()
    with FillThreads(COLLATOR, 1, 4, 60, NAME, packed=False) as threads:
        assert eventually(lambda: threads._queue[queue_kernels.SLEEPERS // 8] == 1)
        time.sleep(0.02)  # it looks once more, before it sleeps
        threads.post(job, 0, 1, np.zeros(1000, np.int64))
        time.sleep(0.05)
        assert not threads.is_next_filled()
        assert threads.wait()[0] == 1


def test_a_task_that_its_buffer_does_not_hold_is_not_filled() -> None:
    job = padded_job()
    with FillThreads(COLLATOR, 1, 4, 60, NAME, packed=False) as threads:
        for _ in range(4):
            threads.post(job, 0, 9, np.zeros(1000, np.int64))
        assert eventually(lambda: queue_kernels.filled(threads._queue, 0) != queue_kernels.NOT_DONE)
        assert not threads.is_next_filled()
        assert 0 < threads.wait()[0] < 9


def test_an_error_in_a_thread_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, calls = queue_kernels.serve, []

    def fails(queue: Any, awaited: int, *options: Any) -> int:
        calls.append(awaited)
        if awaited != queue_kernels.NO_TASK:
            return queue_kernels.NOT_DONE
        if len(calls) > 1:
            raise MemoryError("no memory for the places of rows")
        return int(serve(queue, awaited, *options))

    monkeypatch.setattr(queue_kernels, "serve", fails)
    job = padded_job()
    with pytest.raises(MemoryError, match="places"), FillThreads(COLLATOR, 1, 2, 60, NAME, packed=False) as threads:  # noqa: PT012
        threads.post(job, 0, 1, np.zeros(1000, np.int64))
        threads.wait()
    assert not alive()


def test_what_is_let_go_of_elsewhere_ends_too_and_memory_lasts_as_long_as_the_threads() -> None:
    job = padded_job()
    threads: Any = FillThreads(COLLATOR, 3, 4, 60, NAME, packed=False)
    out = np.zeros(100_000, np.int64)
    for first in (0, 20, 40):
        threads.post(job, first, first + 20, out)
    gone = [weakref.ref(out), weakref.ref(job)]
    del out, job
    assert len(alive()) == 3
    held = [threads]
    del threads

    def let_go() -> None:
        held.clear()
        gc.collect()

    other = threading.Thread(target=let_go)
    other.start()
    other.join()
    assert eventually(lambda: not alive())
    assert eventually(lambda: gc.collect() >= 0 and gone[0]() is None and gone[1]() is None)


@kernel
def count_up(at: int, times: int) -> None:
    for _ in range(times):
        atomics.add(at, 3)
        old = atomics.load(at + 8)
        while not atomics.swap(at + 8, old, old + 1):
            old = atomics.load(at + 8)


def test_steps_of_several_threads_do_not_get_lost() -> None:
    numbers = np.zeros(2, np.int64)
    count_up(numbers.ctypes.data, 0)
    crowd = [threading.Thread(target=count_up, args=(numbers.ctypes.data, 2000)) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert numbers.tolist() == [3 * 8000, 8000]


@kernel
def set_number(at: int, value: int) -> None:
    atomics.store(at, value)


@kernel
def wait_for(lock: int, microseconds: int) -> None:
    atomics.acquire_lock(lock, microseconds)


@kernel
def let_have(lock: int) -> None:
    atomics.release_lock(lock)


def test_a_lock_is_waited_for_without_the_interpreter() -> None:
    number = np.zeros(1, np.int64)
    set_number(number.ctypes.data, -5)
    assert number[0] == -5
    lock = atomics.new_lock()
    start = time.monotonic()
    wait_for(lock, 20_000)  # held: nobody lets go
    assert 0.015 < time.monotonic() - start < 10
    sleeper = threading.Thread(target=wait_for, args=(lock, -1))
    sleeper.start()
    time.sleep(0.02)
    assert sleeper.is_alive()  # and this thread goes on meanwhile
    let_have(lock)
    sleeper.join(20)
    assert not sleeper.is_alive()
    atomics.free_lock(lock)
