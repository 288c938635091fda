"""Batches filled ahead: the same batches, and threads that end, fail and fork as they should."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcollate.collate.collator import Collator
from fastcollate.collate.reference import custom_collate_fn
from fastcollate.errors import InputError
from fastcollate.load import prefetch
from fastcollate.load.jobs import padded_job
from fastcollate.load.loader import BatchLoader
from fastcollate.load.transfer import make_transfer
from fastcollate.store.store import TokenStore
from tests.helpers import make_store, write_store

OPTIONS = {"batch_size": 8, "seed": 3, "window": 64}


def rows_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 50256, n).tolist() for n in np.clip(rng.lognormal(2, 0.7, count), 1, 60).astype(int)]


ROWS = rows_of(403)


def cloned(batches: Any) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(tensor.clone() for tensor in batch) for batch in batches]


def equal(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefetch.THREAD_NAME)]


@pytest.mark.parametrize("group_cells", [1, 500, 4000, 1 << 17])
@pytest.mark.parametrize(("ahead", "num_threads"), [(0, 1), (1, 1), (2, 1), (5, 3)])
@pytest.mark.parametrize("policy", ["shuffled", "bucketed", "packed"])
def test_the_same_batches_whatever_is_filled_ahead(
    policy: str, ahead: int, num_threads: int, group_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(ROWS, num_shards=3)
    options = {**OPTIONS, "policy": policy, "max_length": 50}
    expected = BatchLoader(store, prefetch=0, **options)
    wanted = cloned(expected)
    monkeypatch.setattr(prefetch, "GROUP_CELLS", group_cells)
    loader = BatchLoader(store, prefetch=ahead, num_threads=num_threads, **options)
    kept = list(loader)  # none is overwritten
    assert equal(kept, wanted)
    counts = [{**stats, "wait_s": 0} for stats in (loader.stats_dict(), expected.stats_dict())]
    assert counts[0] == counts[1]
    assert equal(list(loader), cloned(iter_epoch(store, options, 1)))
    assert not threads()


def iter_epoch(store: Any, options: dict[str, Any], epoch: int) -> Any:
    loader = BatchLoader(store, prefetch=0, **options)
    loader.set_epoch(epoch)
    return loader


def test_buffers_are_used_again() -> None:
    loader = BatchLoader(make_store(ROWS), policy="shuffled", batch_size=4)
    addresses = {batch.inputs.data_ptr() // 4096 for _ in range(20) for batch in loader}
    mapped = loader._own_transfer()
    assert mapped._pool.num_allocated <= 8  # type: ignore[attr-defined]
    assert len(addresses) < 8 * (1 << 20) // 4096


def test_one_wide_batch_does_not_widen_all_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "ALONE_CELLS", 1 << 10)
    rows = [[1] * 20] * 400 + [[1] * 3000] + [[1] * 20] * 400
    loader = BatchLoader(make_store(rows), policy="sequential", batch_size=1, prefetch=0)
    for batch in loader:
        del batch
    sizes = sorted(len(buffer) for buffer in loader._own_transfer()._pool._buffers)  # type: ignore[attr-defined]
    assert sizes == [1024, 8192]
    wide = BatchLoader(make_store([[1] * 3000] * 60), policy="sequential", batch_size=1, prefetch=0)
    kept = [batch.inputs.data_ptr() for batch in wide]
    assert len(set(kept)) <= 3
    assert wide._own_transfer()._pool.num_allocated <= 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", ["bucketed", "packed"])
def test_a_position_is_exact_while_batches_are_ahead(policy: str) -> None:
    store = make_store(ROWS)
    options = {**OPTIONS, "policy": policy, "max_length": 50, "prefetch": 4}
    whole = cloned(BatchLoader(store, **options))
    for step in range(0, len(whole), 5):
        loader = BatchLoader(store, **options)
        iterator = iter(loader)
        for _ in range(step):
            next(iterator)
        time.sleep(0.002)  # the threads get ahead
        state = json.loads(json.dumps(loader.state_dict()))
        other = BatchLoader(store, **options)
        other.load_state_dict(state)
        assert equal(list(other), whole[step:])
        assert equal(cloned(iterator), whole[step:])


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("group_cells", [1, 1 << 18])
def test_a_damaged_row_is_met_in_its_turn(ahead: int, group_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", group_cells)
    monkeypatch.setattr(prefetch, "ALONE_CELLS", group_cells)
    store = make_store(ROWS)
    store.shards[0].offsets[300] = -1
    loader = BatchLoader(store, policy="sequential", batch_size=8, prefetch=ahead)
    found: list[Any] = []
    with pytest.raises(InputError, match=r"row 299 .* is damaged"):
        found.extend(tuple(tensor.clone() for tensor in batch) for batch in loader)
    assert equal(found, [custom_collate_fn(ROWS[i : i + 8]) for i in range(0, 8 * len(found), 8)])
    assert len(found) == 37 if group_cells == 1 else len(found) < 38
    assert not threads()
    assert loader.stats.batches == len(found)
    assert loader.state_dict()["next_batch"] == len(found)


@pytest.mark.parametrize("ahead", [0, 3])
def test_an_error_of_the_planning_thread_reaches_the_consumer_with_its_traceback(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = BatchLoader._held

    def fails_later(self: BatchLoader, rows: Any, iteration: Any) -> object:
        if threading.current_thread() is not threading.main_thread() or not ahead:
            raise OSError("the disk is gone")
        return hold(self, rows, iteration)

    monkeypatch.setattr(BatchLoader, "_held", fails_later)
    loader = BatchLoader(make_store(ROWS), prefetch=ahead, **OPTIONS)
    with pytest.raises(OSError, match="disk is gone") as caught:
        list(loader)
    assert "fails_later" in "".join(traceback.format_exception(caught.value))
    assert loader.stats.batches == (8 if ahead else 0)  # the first window's
    assert not threads()


def test_leaving_early_ends_the_threads_and_frees_the_memory() -> None:
    store = make_store(ROWS)
    loader = BatchLoader(store, prefetch=3, num_threads=2, **OPTIONS)
    for _ in loader:
        assert threads()
        break
    assert not threads()
    iterator = iter(loader)
    batch = next(iterator)
    assert threads()
    gone = weakref.ref(loader)
    pool = weakref.ref(loader._own_transfer()._pool)  # type: ignore[attr-defined]
    del iterator, loader
    assert not threads()
    assert gone() is None
    assert pool() is None
    assert int(batch.inputs[0, 0]) >= 0  # a batch outlives its loader


def test_an_error_of_the_consumer_ends_the_threads() -> None:
    def train() -> None:
        for number, _ in enumerate(BatchLoader(make_store(ROWS), **OPTIONS)):
            if number == 3:
                raise RuntimeError("loss is NaN")

    with pytest.raises(RuntimeError, match="NaN"):
        train()
    assert not threads()


CONSUMER = """
import sys, threading, time
from fastcollate import BatchLoader, TokenStore
store = TokenStore(sys.argv[1])
loader = BatchLoader(store, batch_size=1, prefetch=2)
try:
    while True:
        for batch in loader:
            print("going", flush=True)
            time.sleep(0.01)
except KeyboardInterrupt:
    if sys.argv[2] == "caught":
        left = [t.name for t in threading.enumerate() if t.name.startswith("fastcollate-")]
        print("left:", left, flush=True)
    else:
        raise
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["caught", "raised"])
def test_ctrl_c_ends_the_threads(tmp_path: Path, how: str) -> None:
    write_store(tmp_path / "store", [([0, len(row)], row) for row in ROWS[:30]])
    process = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(tmp_path / "store"), how],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if how == "caught":
        assert "left: []" in out
        assert process.returncode == 0
    else:
        assert "KeyboardInterrupt" in err
        assert process.returncode != 0


@pytest.mark.slow
def test_an_iterator_held_to_the_end_of_the_program_leaves_quietly(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [([0, len(row)], row) for row in ROWS[:30]])
    script = """
import sys
from fastcollate import BatchLoader, TokenStore
batches = iter(BatchLoader(TokenStore(sys.argv[1]), batch_size=2))
print(next(batches).inputs.shape[0])
"""
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "2\n", "")


def in_child(work: Any, queue: Any) -> None:
    try:
        queue.put(work())
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def forked(work: Any) -> Any:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=in_child, args=(work, queue))
    process.start()
    answer = queue.get()
    process.join(30)
    assert process.exitcode == 0
    return answer


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_makes_an_iterator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 1)  # a group a batch
    loader = BatchLoader(make_store(ROWS), prefetch=2, **OPTIONS)
    iterator = iter(loader)
    next(iterator)
    refused = forked(lambda: [batch.inputs.sum().item() for batch in iterator])
    assert "InputError" in refused
    assert "iter(loader)" in refused
    sums = forked(lambda: [batch.inputs.sum().item() for batch in loader])
    assert sums == [batch.inputs.sum().item() for batch in BatchLoader(make_store(ROWS), **OPTIONS)]
    assert sums[1:] == [batch.inputs.sum().item() for batch in iterator]


@pytest.mark.filterwarnings("ignore:a row on which")
def test_a_pickled_loader_goes_on_where_it_was(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [([0, len(row)], row) for row in ROWS[:100]])
    loader = BatchLoader(store, batch_size=4, window=16, seed=2, mask_prompt=True)
    whole = cloned(loader)
    loader.set_epoch(0)
    iterator = iter(loader)
    cloned(itertools.islice(iterator, 6))
    state = loader.state_dict()
    copy = pickle.loads(pickle.dumps(loader))
    assert isinstance(copy._store, TokenStore)
    assert copy.state_dict() == state
    assert copy.stats == loader.stats
    copy.load_state_dict(state)
    assert equal(cloned(copy), whole[6:])
    fresh = pickle.loads(pickle.dumps(BatchLoader(store, batch_size=4, window=16, seed=2, mask_prompt=True)))
    assert equal(cloned(fresh), whole)
    with pytest.raises(TypeError, match="generator"):
        pickle.dumps(iterator)


def rows_given(loaders: list[BatchLoader], steps: int | None = None) -> list[int]:
    """The rows of some steps of all ranks, told by their first token."""
    return [
        int(token)
        for loader in loaders
        for batch in itertools.islice(loader, steps)
        for token in batch.inputs[:, 0].tolist()
    ]


@pytest.mark.parametrize("policy", ["sequential", "shuffled", "bucketed"])
@pytest.mark.parametrize("sizes", ["batch_size", "max_tokens"])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 4), (4, 1)])
def test_another_world_size_gives_exactly_the_rows_not_yet_given(
    policy: str, sizes: str, before: int, after: int
) -> None:
    store = make_store([[number, *row] for number, row in enumerate(ROWS)])
    total = {"batch_size": 16, "max_tokens": 400}[sizes]

    def ranks(world_size: int) -> list[BatchLoader]:
        shares = {"shares": 4} if sizes == "max_tokens" else {}
        options: dict[str, Any] = {sizes: total // world_size, "world_size": world_size, **shares}
        return [
            BatchLoader(store, policy=policy, seed=1, window=96, tail="uneven", rank=rank, **options)
            for rank in range(world_size)
        ]

    first = ranks(before)
    iterators = [iter(loader) for loader in first]
    given = [int(token) for it in iterators for b in itertools.islice(it, 7) for token in b.inputs[:, 0].tolist()]
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states)
    second = ranks(after)
    for loader in second:
        loader.load_state_dict(states[0])
    rest = rows_given(second)
    assert len(given) > 0
    assert len(rest) > 0
    assert sorted(given + rest) == list(range(len(ROWS)))


def test_another_global_batch_is_refused_with_the_remedy() -> None:
    store = make_store(ROWS)
    state = BatchLoader(store, batch_size=8, world_size=2).state_dict()
    with pytest.raises(InputError, match=r"batch_size \* world_size = 16"):
        BatchLoader(store, batch_size=8, world_size=1).load_state_dict(state)
    with pytest.raises(InputError, match=r"batch_size \* world_size = 16"):
        BatchLoader(store, max_tokens=800, world_size=2).load_state_dict(state)
    state = BatchLoader(store, max_tokens=400, world_size=2).state_dict()
    with pytest.raises(InputError, match=r"max_tokens=400 and world_size \* accumulation = 2"):
        BatchLoader(store, max_tokens=800, world_size=1).load_state_dict(state)
    BatchLoader(store, max_tokens=400, accumulation=2).load_state_dict(state)
    state = BatchLoader(store, max_tokens=400, world_size=2, balance=False).state_dict()
    with pytest.raises(InputError, match=r"max_tokens \* world_size = 800 and shares=2"):
        BatchLoader(store, max_tokens=800, world_size=1).load_state_dict(state)
    BatchLoader(store, max_tokens=800, world_size=1, shares=2).load_state_dict(state)


def test_wrong_options_are_named() -> None:
    for options in ({"prefetch": -1}, {"num_threads": 0}, {"prefetch": True}, {"num_threads": 1.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            BatchLoader(make_store(ROWS), batch_size=4, **options)


def test_batches_equal_the_reference_with_wide_rows_among_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 64)
    rows = [[number] * (500 if number % 7 == 0 else 3) for number in range(80)]
    loader = BatchLoader(make_store(rows), policy="sequential", batch_size=2, prefetch=3)
    expected = [custom_collate_fn(rows[i : i + 2]) for i in range(0, 80, 2)]
    assert equal(list(loader), expected)


def test_what_a_buffer_did_not_hold_is_handed_over_before_an_error_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 1000)
    rows = [[number] * (3 if number < 20 else 500) for number in range(80)]
    store = make_store(rows)
    store.shards[0].offsets[61] = -1
    loader = BatchLoader(store, policy="sequential", batch_size=1, prefetch=3)
    found: list[Any] = []
    with pytest.raises(InputError, match="row 60"):
        found.extend(tuple(tensor.clone() for tensor in batch) for batch in loader)
    assert len(found) >= 58
    assert equal(found, [custom_collate_fn([row]) for row in rows[: len(found)]])


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_batch_taken_for_inference_leaves_the_others_for_training(ahead: int) -> None:
    iterator = iter(BatchLoader(make_store(ROWS), prefetch=ahead, **OPTIONS))
    with torch.inference_mode():
        for _ in range(5):  # with the first of a group of several
            next(iterator)
    embedding = torch.nn.Embedding(50257, 2)
    for batch in iterator:
        assert not batch.inputs.is_inference()
        embedding(batch.inputs).sum().backward()


def test_addresses_are_not_pickled() -> None:
    loader = BatchLoader(make_store(ROWS), **OPTIONS)
    with pytest.raises(TypeError, match="addresses of this process"):
        pickle.dumps(loader._collator)
    with pytest.raises(TypeError, match="one process"):
        pickle.dumps(loader._own_transfer()._pool)  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_error_in_a_filling_thread_reaches_the_consumer_at_its_batch(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 1)  # a group a batch
    fill, filled_by = prefetch.Task.fill, []

    def fails_at_ten(task: prefetch.Task) -> Any:
        filled_by.append(threading.current_thread().name)
        if task.first == 10:
            raise MemoryError("no memory for the places of rows")
        return fill(task)

    monkeypatch.setattr(prefetch.Task, "fill", fails_at_ten)
    loader = BatchLoader(make_store(ROWS), policy="sequential", batch_size=8, num_threads=num_threads)
    found: list[Any] = []
    with pytest.raises(MemoryError, match="places"):
        found.extend((time.sleep(0.002), batch)[1] for batch in loader)  # the threads get ahead
    assert equal(found, [custom_collate_fn(ROWS[8 * i : 8 * i + 8]) for i in range(10)])
    assert any(name.startswith(prefetch.THREAD_NAME) for name in filled_by)
    assert not threads()


def test_what_no_thread_has_begun_with_the_consumer_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "GROUP_CELLS", 1)
    begin, fill, filled_by = threading.Event(), prefetch.Task.fill, set()

    def waits(task: prefetch.Task) -> Any:
        filled_by.add(threading.current_thread() is threading.main_thread())
        if threading.current_thread() is not threading.main_thread():
            assert begin.wait(20)
        return fill(task)

    monkeypatch.setattr(prefetch.Task, "fill", waits)
    batches = iter(BatchLoader(make_store(ROWS), policy="sequential", batch_size=8, prefetch=3))
    found = [next(batches)]  # the thread has begun with the next, and waits
    threading.Timer(0.1, begin.set).start()
    found.extend(batches)
    assert equal(found, [custom_collate_fn(ROWS[i : i + 8]) for i in range(0, len(ROWS), 8)])
    assert filled_by == {True, False}


def test_iterators_let_go_of_elsewhere_end_their_threads_too() -> None:
    held = [iter(BatchLoader(make_store(ROWS), num_threads=2, **OPTIONS)) for _ in range(3)]
    assert len([next(iterator) for iterator in held]) == 3
    assert threads()
    other = threading.Thread(target=held.clear)
    other.start()
    other.join()
    end = time.monotonic() + 20
    while threads() and time.monotonic() < end:
        time.sleep(0.002)
    assert not threads()


@pytest.mark.parametrize("position", [(0, -1), (0, 10**6), (0, -(10**8)), (3, 10**6)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_position_outside_of_the_epoch_is_refused_and_reads_nothing(position: tuple[int, int], ahead: int) -> None:
    store = make_store(ROWS)
    collator = Collator(store.shards)
    bounds = np.arange(0, 401, 8)
    groups = prefetch.fill_groups(
        lambda window: padded_job(collator, np.arange(400), bounds),
        4,
        position,
        make_transfer(torch.device("cpu"), 4),
        prefetch=ahead,
        num_threads=1,
    )
    with pytest.raises(InputError, match="batch"):
        list(groups)
