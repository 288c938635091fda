"""Filling by threads that stay in compiled code: a queue of tasks in memory, which they share without the interpreter.

A thread that needed the interpreter for each group would wait for it while the consumer runs, and make the consumer
wait in its turn.

A **job** is one window's batches: int64 `(JOB_COLUMNS,)`, addresses and sizes, which whoever makes it keeps alive. A
**task** is a run of a job's batches and the buffer that they go to.

A **queue** is int64, made by `new_queue`: a head, whose numbers lie a cache line apart, and a line for each task that
may be under way. Task `n` uses line `n % num_lines`, and only one thread, the consumer, posts tasks and waits for them.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.collate.fill import ALIGNMENT, NUM_TOTALS, REPORT_COLUMNS, fill_padded_group
from fastcollate.collate.fill_packed import fill_packed_group
from fastcollate.jit import kernel, part_of_kernel, view
from fastcollate.load import atomics
from fastcollate.load.atomics import acquire_lock, add, load, release_lock, store, swap

# Whether a job's batches are packed: values of two types, so that only the one that is used gets compiled.
PADDED, PACKED = None, True

# Columns of a job; those from `CAPACITY` on are of packed ones.
_JOB = range(9)
ROWS, NUM_ROWS, BOUNDS, NUM_BOUNDS, CAPACITY, STARTS, NUM_STARTS, PACKS, NUM_PACKS = _JOB
JOB_COLUMNS = len(_JOB)

# A task's line: whether it is done, how many batches it filled, its report's address, its buffer, its batches, its job.
_LINE = range(7)
DONE, FILLED, REPORT, OUT, NUM_CELLS, FIRST, STOP = _LINE
JOB = len(_LINE)
LINE_COLUMNS = -(-(JOB + JOB_COLUMNS) // ALIGNMENT) * ALIGNMENT

# The head, as offsets in bytes.
_HEAD = range(0, 64 * 9, 64)
POSTED, NEXT, ENDED, SLEEPERS, WAITING, WORK_LOCK, DONE_LOCK, NUM_LINES, WAKE_AT = _HEAD
HEAD_COLUMNS = len(_HEAD) * ALIGNMENT

NO_TASK, NOT_DONE = -1, -(2**62)
SPINS = 8000  # looks at a number before a thread goes to sleep: some thirty microseconds, about what waking takes
PATIENCE = 50_000  # microseconds that the consumer sleeps, before it looks whether the threads are still alive


def new_queue(reports: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """A queue with a line for each report, which the caller keeps alive."""
    queue = np.zeros(HEAD_COLUMNS + len(reports) * LINE_COLUMNS, np.int64)
    queue[NUM_LINES // 8] = len(reports)
    # To wake a thread takes as long as filling ten small batches, so it is not done for each task. Those that nobody
    # is woken for, the consumer does, where it comes to need them.
    queue[WAKE_AT // 8] = max(len(reports) // 2, 1)
    for place in (WORK_LOCK, DONE_LOCK):
        lock = queue[place // 8] = atomics.new_lock()
        # Whoever sleeps on it, or is to wake another, holds the queue.
        weakref.finalize(queue, atomics.free_lock, lock).atexit = False
    lines = queue[HEAD_COLUMNS:].reshape(len(reports), LINE_COLUMNS)
    lines[:, REPORT] = [report.ctypes.data for report in reports]
    return queue


@kernel
def fill(table: Any, settings: Any, job: Any, first: int, stop: int, out: Any, report: Any, packed: Any) -> int:
    """Fill some batches of a job, as many as `out` holds.

    Args:
        table: see `kernels.fill_padded`.
        settings: see `kernels.fill_padded`.
        job: int64 `(JOB_COLUMNS,)`.
        first: the first batch.
        stop: the batch behind the last.
        out: int64, any size.
        report: int64, at least `(stop - first + 1, REPORT_COLUMNS)`: a line a batch that was filled, and then one of
            their sums; see `kernels.fill_padded_group`.
        packed: `PADDED` or `PACKED`.

    Returns:
        The number of batches filled, or `-1 - i` where row `i` of the job is broken.
    """
    rows = view(job[ROWS], job[NUM_ROWS], np.int64)
    bounds = view(job[BOUNDS] + 8 * first, stop - first + 1, np.int64)
    if packed is None:
        filled = fill_padded_group(table, settings, rows, bounds, out, report)
    else:
        starts, packs = view(job[STARTS], job[NUM_STARTS], np.int64), view(job[PACKS], job[NUM_PACKS], np.int64)
        filled = fill_packed_group(table, settings, rows, starts, packs, bounds, job[CAPACITY], out, report)
    if filled > 0:
        sums = report[filled]
        sums[:] = 0
        for b in range(filled):
            for column in range(NUM_TOTALS):
                sums[column] += report[b, column]
    return int(filled)


@kernel
def _line_of(queue: int, number: int) -> int:
    """The address of a task's line."""
    return int(queue + 8 * (HEAD_COLUMNS + number % load(queue + NUM_LINES) * LINE_COLUMNS))


@kernel
def _claim(queue: int) -> int:
    """The oldest task that nobody has begun with, which is the caller's now; -1 where there is none."""
    while True:
        number = load(queue + NEXT)
        if number >= load(queue + POSTED):
            return -1
        if swap(queue + NEXT, number, number + 1):
            return int(number)


@part_of_kernel
def _do(queue: int, number: int, table: Any, settings: Any, packed: Any) -> None:
    """Do a task, and wake the consumer where it sleeps."""
    at = _line_of(queue, number)
    line = view(at, LINE_COLUMNS, np.int64)
    first, stop = line[FIRST], line[STOP]
    out = view(line[OUT], line[NUM_CELLS], np.int64)
    cells = view(line[REPORT], (stop - first + 1) * REPORT_COLUMNS, np.int64)
    report = cells.reshape((stop - first + 1, REPORT_COLUMNS))
    line[FILLED] = fill(table, settings, line[JOB : JOB + JOB_COLUMNS], first, stop, out, report, packed)
    store(at + 8 * DONE, 1)
    if swap(queue + WAITING, 1, 0):
        release_lock(load(queue + DONE_LOCK))


@kernel
def post(queue: Any, number: int, job: Any, first: int, stop: int, out: Any) -> None:
    """Add a task; the one that had its line before has been waited for.

    Args:
        queue: of `new_queue`.
        number: how many were posted before.
        job: int64 `(JOB_COLUMNS,)`; copied, but what it points to is kept alive by the caller, and so is `out`.
        first: the first batch.
        stop: the batch behind the last.
        out: int64, the buffer.
    """
    at = queue.ctypes.data
    line = view(_line_of(at, number), LINE_COLUMNS, np.int64)
    line[DONE], line[FIRST], line[STOP] = 0, first, stop
    line[OUT], line[NUM_CELLS] = out.ctypes.data, len(out)
    for column in range(JOB_COLUMNS):
        line[JOB + column] = job[column]
    store(at + POSTED, number + 1)
    _wake(at, load(at + WAKE_AT))


@kernel
def filled(queue: Any, number: int) -> int:
    """How many batches a task filled, see `fill`; `NOT_DONE` before it is done."""
    return _filled(_line_of(queue.ctypes.data, number))


@kernel
def _filled(line: int) -> int:
    """The same, of a task's line."""
    return int(load(line + 8 * FILLED)) if load(line + 8 * DONE) != 0 else NOT_DONE


@kernel
def _wake(queue: int, least: int) -> None:
    """Wake a thread where there are so many tasks that nobody has begun with."""
    if load(queue + SLEEPERS) > 0 and load(queue + POSTED) - load(queue + NEXT) >= least:
        release_lock(load(queue + WORK_LOCK))


@kernel
def serve(queue: Any, awaited: int, table: Any, settings: Any, packed: Any) -> int:
    """Do tasks: as a thread until the queue ends, or as the consumer until the task that it needs is done.

    One kernel for both, since each holds a copy of all that fills.

    Args:
        queue: of `new_queue`.
        awaited: the consumer's task; `NO_TASK` for a thread.
        table: see `kernels.fill_padded`.
        settings: see `kernels.fill_padded`.
        packed: `PADDED` or `PACKED`, the same for all tasks.

    Returns:
        See `filled`: `NOT_DONE` where the consumer's patience is at an end.
    """
    at = queue.ctypes.data
    line = _line_of(at, max(awaited, 0))
    flag = at + ENDED if awaited == NO_TASK else line + 8 * DONE
    idle = 0
    while load(flag) == 0:
        number = _claim(at)
        if number >= 0:
            _wake(at, 1)  # one wakes the next, since a lock does not count
            _do(at, number, table, settings, packed)
            idle = 0
            continue
        idle += 1
        if idle == SPINS:
            idle = 0
            if awaited == NO_TASK:
                _sleep_until_posted(at)
            elif not _sleep_until_done(at, flag):
                break
    if awaited == NO_TASK:
        release_lock(load(at + WORK_LOCK))  # for the next to end
    return _filled(line)


@kernel
def _sleep_until_posted(queue: int) -> None:
    """Sleep until there may be a task that nobody has begun with, or the queue ends."""
    add(queue + SLEEPERS, 1)
    if load(queue + NEXT) >= load(queue + POSTED) and load(queue + ENDED) == 0:
        acquire_lock(load(queue + WORK_LOCK), -1)
    add(queue + SLEEPERS, -1)


@kernel
def _sleep_until_done(queue: int, flag: int) -> bool:
    """Sleep until a task is done; returns whether it is the one whose flag this is."""
    store(queue + WAITING, 1)
    if load(flag) == 0:
        acquire_lock(load(queue + DONE_LOCK), PATIENCE)
    store(queue + WAITING, 0)
    return bool(load(flag) != 0)


@kernel
def end(queue: Any) -> None:
    """Let all threads end, once they have done what they have begun with."""
    at = queue.ctypes.data
    store(at + ENDED, 1)
    release_lock(load(at + WORK_LOCK))
