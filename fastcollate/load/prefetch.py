"""Batches filled ahead of the consumer by threads, and handed over in groups, in order.

A hand-over costs as much as filling several small batches, so a group is about four megabytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate import AnyBatch
from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError
from fastcollate.load.jobs import Job
from fastcollate.load.transfer import Arrival, Transfer

Int64Array = npt.NDArray[np.int64]

GROUP_CELLS = 1 << 19  # 4 MiB of int64, where threads hand over
ALONE_CELLS = 1 << 16  # where none does: what is filled and used at once should stay in a core's own cache
MAX_GROUP = 256  # batches
THREAD_NAME = "fastcollate-fill"


class Task(NamedTuple):
    """A group to be filled: batches `first` to `stop` of window number `window`, and the buffer they go to."""

    job: Job
    window: int
    first: int
    stop: int
    out: Int64Array

    def fill(self) -> Int64Array:
        """Fill the buffer; returns the kernel's report, a line a batch."""
        return self.job.fill(self.first, self.stop, self.out)


class Group(NamedTuple):
    """Batches that lie in one buffer.

    Attributes:
        window: the number of their window.
        first: the first batch's number in the window.
        batches: views of the buffer, each made when it is handed over: what a thread makes here in Python would keep
            the consumer from the interpreter.
        report: the kernel's, int64, a line a batch: first the columns of `Counts`.
        totals: its sums over the batches.
        arrival: the copy on the device; `None` where the views themselves are handed over.
    """

    window: int
    first: int
    batches: Iterator[AnyBatch]
    report: Int64Array
    totals: list[int]
    arrival: Arrival | None


def fill_groups(
    window_job: Callable[[int], Job],
    num_windows: int,
    position: tuple[int, int],
    transfer: Transfer,
    *,
    prefetch: int,
    num_threads: int,
) -> Generator[Group, None, None]:
    """The groups of an epoch, in order.

    The first one has one batch, so that it comes at once, and is filled by the caller's thread: what is compiled on
    the way is compiled there, since a process that is forked while another thread compiles could never compile again.

    Args:
        window_job: plans a window.
        num_windows: windows in the epoch.
        position: window, and batch within it, to start with.
        transfer: gives the buffers and takes them to the device.
        prefetch: groups filled ahead; 0 fills each when it is asked for, without threads.
        num_threads: threads that fill; another one plans the next window.
    """
    windows = range(position[0], num_windows)
    if not prefetch:
        for task in _tasks(map(window_job, windows), position, transfer, ALONE_CELLS):
            group = _finish(transfer, task)
            del task
            yield group
            del group  # before the next is filled, so that its buffer is used again
        return
    with _Threads(num_threads + 1) as threads:
        tasks = _tasks(_planned_ahead(window_job, windows, threads), position, transfer, GROUP_CELLS)
        with _Ahead(tasks, transfer, threads, prefetch, num_threads) as ahead:
            while (group := ahead.take()) is not None:  # type: ignore[assignment]
                yield group
                del group
                ahead.check_process()


def _tasks(jobs: Iterator[Job], position: tuple[int, int], transfer: Transfer, group_cells: int) -> Iterator[Task]:
    """Windows in pieces that fit a buffer, of one batch at least."""
    window, first = position
    most = 1  # batches
    for job in jobs:
        ends = job.ends
        if not 0 <= first <= len(ends):
            raise InputError(f"batch {first} of window {window}, which has {len(ends)}: the position is of other data")
        while first < len(ends):
            start = int(ends[first - 1]) if first else 0
            fit = int(np.searchsorted(ends, start + group_cells, side="right"))
            stop = max(min(fit, first + most), first + 1)
            num_cells = int(ends[stop - 1]) - start
            # Of a larger batch a power of two: the next, wider one fits too, and new memory costs more than filling it.
            room = group_cells if num_cells <= group_cells else 1 << (num_cells - 1).bit_length()
            yield Task(job, window, first, stop, transfer.take(room))
            first, most = stop, MAX_GROUP
        window, first = window + 1, 0
        del job  # before the next is waited for, so that what it holds can make room


def _finish(transfer: Transfer, task: Task) -> Group:
    """Fill a task's group, and start its copy."""
    try:
        report = task.fill()
    except BaseException:
        transfer.drop(task.out)
        raise
    # The consumer may take the first of these batches for inference, and train on the others.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        arrival = transfer.send(task.out, int(report[-1, kernels.END]))
    batches = task.job.batches(task.out, report)
    return Group(task.window, task.first, batches, report, report.sum(0).tolist(), arrival)


class _Ahead:
    """Groups that are filled before they are asked for, on threads, and by the consumer where it had to wait.

    Whoever fills takes the next task by itself: the less the consumer's thread does beside a step that computes, the
    better. Only the tensors are left to it, as `Group` says.

    Args:
        tasks: in order.
        transfer: see `fill_groups`.
        threads: at least `num_threads`.
        prefetch: groups filled, or being filled, at most.
        num_threads: threads that fill.
    """

    def __init__(
        self, tasks: Iterator[Task], transfer: Transfer, threads: _Threads, prefetch: int, num_threads: int
    ) -> None:
        self._tasks, self._transfer, self._threads, self._prefetch = tasks, transfer, threads, prefetch
        self._slots: deque[Future[Group | None]] = deque()  # of the groups that are being filled or filled, in order
        self._lock = threading.Lock()  # whoever holds it takes a task
        self._idle = deque(range(num_threads))  # threads that do not fill
        self._process = os.getpid()
        self._has_ended = False  # there is no task left, or nobody wants one

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._has_ended = True
        self._slots.clear()  # what nobody will hear: an error would keep all of this

    def take(self) -> Group | None:
        """The oldest group; `None` behind the last.

        Raises:
            InputError: its window could not be planned, or its batches not be filled.
        """
        while not (self._slots and self._slots[0].done()) and self._fill_next():
            pass
        group = self._slots.popleft().result()
        room = self._prefetch - len(self._slots)
        if 2 * room > self._prefetch and not self._has_ended:  # to wake a thread takes as long as filling small batches
            for _ in range(min(room, len(self._idle))):
                self._idle.pop()
                self._threads.submit(self._work)
        return group

    def _work(self) -> None:
        while self._fill_next():
            pass
        self._idle.append(0)

    def _fill_next(self) -> bool:
        """Fill the next group; returns whether there was one, and room for it."""
        slot: Future[Group | None] = Future()
        task = None
        try:
            with self._lock:
                if self._has_ended or len(self._slots) >= self._prefetch:
                    return False
                self._slots.append(slot)
                task = next(self._tasks, None)
                if task is None:
                    self._has_ended = True  # and never back: it may have been set meanwhile
            slot.set_result(None if task is None else _finish(self._transfer, task))
        except BaseException as error:  # told in its turn: the batches before it are good
            self._has_ended = True
            slot.set_exception(error)
        finally:
            del slot, task  # an error holds this frame
        return True

    def check_process(self) -> None:
        """Raise in a fork."""
        if os.getpid() != self._process:
            raise InputError(
                f"this iterator belongs to process {self._process}, whose threads a fork does not copy; make one in "
                "this process with iter(loader), or give the loader prefetch=0"
            )


def _planned_ahead(window_job: Callable[[int], Job], windows: range, threads: ThreadPoolExecutor) -> Iterator[Job]:
    """Each window's job; a window is planned while the one before it is filled.

    What could not be had ahead of time, such as room that the window before takes, is asked for again in its turn.
    """
    following: Future[Job] | None = None
    for window in windows:
        try:
            job = window_job(window) if following is None else following.result()
        except InputError:
            if following is None:
                raise
            job = window_job(window)
        following = threads.submit(window_job, window + 1) if window + 1 < windows.stop else None
        yield job
        del job  # see `_tasks`


class _Threads(ThreadPoolExecutor):
    """Threads that end with the block, also when it is left early; what has not begun by then is dropped."""

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads, thread_name_prefix=THREAD_NAME)
        self._process = os.getpid()
        self._thread = threading.get_ident()

    def __exit__(self, *_: Any, getpid: Any = os.getpid, is_finalizing: Any = sys.is_finalizing) -> None:
        # Defaults, since an interpreter that ends has taken the modules away.
        if is_finalizing() or getpid() != self._process:
            return  # a fork has no threads to end, and an interpreter that ends has ended them
        # The garbage collector may close an iterator on any thread: this one, which cannot wait for itself, or one that
        # is just starting, which holds a lock of `threading` that waiting needs.
        self.shutdown(wait=threading.get_ident() == self._thread, cancel_futures=True)
