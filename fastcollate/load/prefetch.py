"""Batches filled ahead of the consumer by threads, and handed over in groups, in order.

A hand-over costs as much as filling several small batches, so a group is about four megabytes. The threads need no
interpreter; what is left in Python, a few calls a group, the consumer's thread does.
"""

from __future__ import annotations

import contextlib
import math
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

from fastcollate.collate import fill as kernels
from fastcollate.collate.batch import Batch, PackedBatch
from fastcollate.collate.collator import Collator
from fastcollate.errors import InputError
from fastcollate.load import queue_kernels
from fastcollate.load.fill_threads import FillThreads
from fastcollate.load.jobs import Job, Lines
from fastcollate.load.transfer import Arrival, Transfer

Int64Array = npt.NDArray[np.int64]

GROUP_CELLS = 1 << 19  # 4 MiB of int64, where threads hand over
ALONE_CELLS = 1 << 16  # where none does: what is filled and used at once should stay in a core's own cache
MAX_GROUP = 256  # batches
THREAD_NAME = "fastcollate-"


class Task(NamedTuple):
    """A group that is to be filled: batches `first` to `stop` of window number `window`, and the buffer they go to."""

    job: Job
    window: int
    first: int
    stop: int
    out: Int64Array


class Group(NamedTuple):
    """Batches that lie in one buffer.

    Attributes:
        window: the number of their window.
        first: the first batch's number in the window.
        batches: views of the buffer.
        lines: the kernel's report, a line a batch.
        totals: its sums over the batches.
        arrival: the copy on the device; `None` where the views themselves are handed over.
    """

    window: int
    first: int
    batches: Sequence[Batch | PackedBatch]
    lines: Lines
    totals: Sequence[int]
    arrival: Arrival | None


class Filler:
    """Fills batches into groups.

    Args:
        collator: how, the same as the jobs'.
        transfer: gives the buffers and takes them to the device.
        packed: whether the jobs are of packed batches.
        ahead: whether threads fill ahead of the consumer.
    """

    def __init__(self, collator: Collator, transfer: Transfer, *, packed: bool, ahead: bool) -> None:
        self.collator = collator
        self.packed = packed
        self.transfer = transfer
        self._group_cells = GROUP_CELLS if ahead else ALONE_CELLS
        self.num_batches = 1
        """Batches that make a group; starts at one, so that the first batch comes at once."""
        self._mean_cells = 0.0  # of a batch
        self._usual_cells = 5 * self._group_cells // 4  # of a buffer: groups differ in size, and should fit one

    def task(self, job: Job, window: int, first: int, stop: int) -> Task:
        """Some batches, and a buffer that probably holds them."""
        usual, likely = self._usual_cells, 5 * self._mean_cells / 4
        return Task(job, window, first, stop, self.transfer.take(usual if likely <= usual else _power_of_two(likely)))

    def fill(self, task: Task) -> tuple[int, Int64Array]:
        """Fill as many of a task's batches as its buffer holds, here and now; returns what `FillThreads.wait` does."""
        job, _, first, stop, out = task
        report = np.empty((stop - first + 1, kernels.REPORT_COLUMNS), np.int64)
        table, settings = self.collator.table.array, self.collator.settings
        packed = queue_kernels.PACKED if self.packed else queue_kernels.PADDED
        return queue_kernels.fill(table, settings, job.line, first, stop, out, report, packed), report

    def finish(self, task: Task, count: int, report: Int64Array) -> Group:
        """The group of the first `count` batches of a task; chooses how many the next task should have.

        Where the buffer did not hold the first one, that is filled now, into one of its size.
        """
        if not count:
            self.transfer.drop(task.out)
            task = task._replace(out=self.transfer.take(_power_of_two(report[0, kernels.END])))
            count, report = self.fill(task)
        if count < 0:
            self.transfer.drop(task.out)
            raise task.job.explain(-1 - count)
        lines = report[: count + 1].tolist()
        totals = lines.pop()
        used = lines[-1][kernels.END]
        # As many as fill a group by the mean of the last ones, since batches differ; twice as many at most.
        self._mean_cells += (used / count - self._mean_cells) / (8 if self._mean_cells else 1)
        self.num_batches = max(1, min(int(self._group_cells / max(self._mean_cells, 1)), 2 * count, MAX_GROUP))
        # The consumer may take the first of these batches for inference, and train on the others.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            arrival = self.transfer.send(task.out, used)
            return Group(task.window, task.first, task.job.batches(task.out, lines), lines, totals, arrival)


def _power_of_two(num_cells: float) -> int:
    """A size that the next, wider batch does not outgrow: new memory costs more than filling it."""
    return 1 << (math.ceil(num_cells) - 1).bit_length()


def fill_groups(
    window_job: Callable[[int], Job],
    num_windows: int,
    position: tuple[int, int],
    filler: Filler,
    *,
    prefetch: int,
    num_threads: int,
) -> Generator[Group, None, None]:
    """The groups of an epoch, in order.

    Args:
        window_job: plans a window.
        num_windows: windows in the epoch.
        position: window, and batch within it, to start with.
        filler: fills.
        prefetch: groups filled ahead; 0 fills each when it is asked for, without threads.
        num_threads: threads that fill; another one plans the next window.
    """
    windows = range(position[0], num_windows)
    if not prefetch:
        for job, window, first, stop in _cut(map(window_job, windows), position, filler):
            while first < stop:
                task = filler.task(job, window, first, stop)
                group = filler.finish(task, *filler.fill(task))
                del task
                first += len(group.batches)
                yield group
                del group  # before the next is filled, so that its buffer is used again
        return
    with (
        _Planner() as planner,
        FillThreads(
            filler.collator, num_threads, prefetch + 1, MAX_GROUP, THREAD_NAME + "fill", packed=filler.packed
        ) as threads,
    ):
        ahead = _Ahead(filler, threads)
        failures: list[Exception] = []
        try:
            for work in _cut(_planned_ahead(window_job, windows, planner, failures), position, filler):
                ahead.post(filler.task(*work))
                while len(ahead) > prefetch:
                    yield from ahead.hand_over()
            while len(ahead):
                yield from ahead.hand_over()
        finally:
            ahead.drop()
        for error in failures:
            raise error


class _Ahead:
    """The groups that were asked for, and not yet handed over."""

    def __init__(self, filler: Filler, threads: FillThreads) -> None:
        self._filler = filler
        self._threads = threads
        self._copies = filler.transfer.copies
        self._tasks: deque[Task] = deque()
        self._groups: deque[Group] = deque()  # of the tasks before those
        self._rest: tuple[Job, int, int, int] | None = None  # what the buffer of the task before all did not hold
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._tasks) + len(self._groups) + (self._rest is not None)

    def post(self, task: Task) -> None:
        """Ask for a group."""
        self._tasks.append(task)
        self._threads.post(task.job, task.first, task.stop, task.out)

    def hand_over(self) -> Iterator[Group]:
        """The oldest group."""
        if self._rest is not None:
            task, self._rest = self._filler.task(*self._rest), None
            group = self._finish(task, *self._filler.fill(task))
        elif self._groups:
            group = self._groups.popleft()
        else:
            group = self._finish(self._tasks.popleft(), *self._threads.wait())
        while self._copies and self._threads.is_next_filled():  # their copies go on beside the work on this group
            self._groups.append(self._finish(self._tasks.popleft(), *self._threads.wait()))
        yield group
        if os.getpid() != self._process:
            raise InputError(
                f"this iterator belongs to process {self._process}, whose threads a fork does not copy; make one in "
                "this process with iter(loader), or give the loader prefetch=0"
            )

    def _finish(self, task: Task, count: int, report: Int64Array) -> Group:
        group = self._filler.finish(task, count, report)
        done = task.first + len(group.batches)
        if done < task.stop:
            self._rest = task.job, task.window, done, task.stop
        return group

    def drop(self) -> None:
        """Give up what is not handed over yet; threads may still write to the buffers."""
        for task in self._tasks:
            self._filler.transfer.drop(task.out)


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


def _cut(jobs: Iterator[Job], position: tuple[int, int], filler: Filler) -> Iterator[tuple[Job, int, int, int]]:
    """Windows in pieces of a group's size: job, window, first batch, the batch behind the last."""
    window, first = position
    for job in jobs:
        while first < job.num_batches:
            stop = min(first + filler.num_batches, job.num_batches)
            yield job, window, first, stop
            first = stop
        window, first = window + 1, 0


class _Planner(ThreadPoolExecutor):
    """A thread that ends with the block, also when it is left early; what has not begun by then is dropped."""

    def __init__(self) -> None:
        super().__init__(1, thread_name_prefix=THREAD_NAME + "plan")
        self._process = os.getpid()
        self._thread = threading.get_ident()

    def __exit__(self, *_: Any, getpid: Any = os.getpid, is_finalizing: Any = sys.is_finalizing) -> None:
        # Defaults, since an interpreter that ends has taken the modules away.
        if is_finalizing() or getpid() != self._process:
            return  # a fork has no threads to end, and an interpreter that ends has ended them
        # The garbage collector may close an iterator on any thread: this one, which cannot wait for itself, or one that
        # is just starting, which holds a lock of `threading` that waiting needs.
        self.shutdown(wait=threading.get_ident() == self._thread, cancel_futures=True)
