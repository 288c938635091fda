"""Batches filled ahead of the consumer by threads, and handed over in groups, in order.

A hand-over costs as much as filling several small batches, so a group is about four megabytes. A thread needs the
interpreter only to take a group up and to put it down; what is left in Python the consumer's thread does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.collate.fill import END
from fastcollate.errors import InputError
from fastcollate.load.jobs import Job
from fastcollate.load.transfer import Arrival, Transfer

Int64Array = npt.NDArray[np.int64]

GROUP_CELLS = 1 << 19  # 4 MiB of int64, where threads hand over
ALONE_CELLS = 1 << 16  # where none does: what is filled and used at once should stay in a core's own cache
MAX_GROUP = 256  # batches
THREAD_NAME = "fastcollate-"


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
        batches: views of the buffer.
        report: the kernel's, int64, a line a batch: first the columns of `Counts`.
        arrival: the copy on the device; `None` where the views themselves are handed over.
    """

    window: int
    first: int
    batches: Sequence[Batch | PackedBatch]
    report: Int64Array
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
            group = _finish(transfer, task, task.fill)
            del task
            yield group
            del group  # before the next is filled, so that its buffer is used again
        return
    failures: list[Exception] = []
    with _Threads(1, "plan") as planner, _Threads(num_threads, "fill") as threads:
        ahead = _Ahead(transfer, threads)
        try:
            jobs = _planned_ahead(window_job, windows, planner, failures)
            for task in _tasks(jobs, position, transfer, GROUP_CELLS):
                ahead.add(task)
                del task
                while len(ahead) > prefetch:
                    yield ahead.take()
                    ahead.check_process()
            while len(ahead):
                yield ahead.take()
                ahead.check_process()
        finally:
            ahead.drop()
    for error in failures:
        raise error


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


def _finish(transfer: Transfer, task: Task, fill: Callable[[], Int64Array]) -> Group:
    """A task's group, once it is filled."""
    try:
        report = fill()
    except BaseException:
        transfer.drop(task.out)
        raise
    # The consumer may take the first of these batches for inference, and train on the others.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        arrival = transfer.send(task.out, int(report[-1, END]))
        return Group(task.window, task.first, task.job.batches(task.out, report), report, arrival)


class _Ahead:
    """The groups that were asked for, and not yet handed over."""

    def __init__(self, transfer: Transfer, threads: _Threads) -> None:
        self._transfer = transfer
        self._threads = threads
        self._groups: deque[Group] = deque()
        self._waiting: deque[tuple[Task, list[Task], Future[Int64Array]]] = deque()  # behind those
        self._process = os.getpid()
        self._is_first = True

    def __len__(self) -> int:
        return len(self._groups) + len(self._waiting)

    def add(self, task: Task) -> None:
        """Have a group filled."""
        if self._is_first:
            self._is_first = False
            self._groups.append(_finish(self._transfer, task, task.fill))
        else:
            box = [task]
            self._waiting.append((task, box, self._threads.submit(_fill, box)))

    def take(self) -> Group:
        """The oldest group."""
        if not self._groups:
            self._finish_next()
        group = self._groups.popleft()
        while self._transfer.copies and self._waiting and self._is_filled(self._waiting[0][2]):
            self._finish_next()  # their copies go on beside the work on this group
        return group

    @staticmethod
    def _is_filled(future: Future[Int64Array]) -> bool:
        return future.done() and future.exception() is None

    def _finish_next(self) -> None:
        task, box, future = self._waiting.popleft()
        if future.cancel():  # no thread has begun with it: this one need not wait for one to wake
            box.clear()
            self._groups.append(_finish(self._transfer, task, task.fill))
        else:
            self._groups.append(_finish(self._transfer, task, future.result))

    def check_process(self) -> None:
        """Raise in a fork."""
        if os.getpid() != self._process:
            raise InputError(
                f"this iterator belongs to process {self._process}, whose threads a fork does not copy; make one in "
                "this process with iter(loader), or give the loader prefetch=0"
            )

    def drop(self) -> None:
        """Give up what is not handed over yet; threads may still write to the buffers."""
        for task, _, _ in self._waiting:
            self._transfer.drop(task.out)


def _fill(box: list[Task]) -> Int64Array:
    """Fill on a thread, which lets go of the buffer before anybody hears that it is filled."""
    return box.pop().fill()


def _planned_ahead(
    window_job: Callable[[int], Job], windows: range, planner: ThreadPoolExecutor, failures: list[Exception]
) -> Iterator[Job]:
    """Each window's job; a window is planned while the one before it is filled.

    What goes wrong ends the windows and is kept in `failures`: it is told when its turn comes, since the batches before
    it are good.
    """
    following: Future[Job] | None = None
    for window in windows:
        try:
            job = window_job(window) if following is None else following.result()
        except Exception as error:
            failures.append(error)
            return
        following = planner.submit(window_job, window + 1) if window + 1 < windows.stop else None
        yield job


class _Threads(ThreadPoolExecutor):
    """Threads that end with the block, also when it is left early; what has not begun by then is dropped."""

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, thread_name_prefix=THREAD_NAME + name)
        self._process = os.getpid()
        self._thread = threading.get_ident()

    def __exit__(self, *_: Any, getpid: Any = os.getpid, is_finalizing: Any = sys.is_finalizing) -> None:
        # Defaults, since an interpreter that ends has taken the modules away.
        if is_finalizing() or getpid() != self._process:
            return  # a fork has no threads to end, and an interpreter that ends has ended them
        # The garbage collector may close an iterator on any thread: this one, which cannot wait for itself, or one that
        # is just starting, which holds a lock of `threading` that waiting needs.
        self.shutdown(wait=threading.get_ident() == self._thread, cancel_futures=True)
