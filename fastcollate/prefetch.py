"""Batches filled ahead of the consumer by threads, and handed over in groups, in order.

A hand-over between threads costs as much as filling several small batches, so a group is about a megabyte. The
kernels run without the GIL; what is left of a thread's work in Python is a few calls a group.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastcollate import kernels
from fastcollate.collate import Batch, Collator, PackedBatch
from fastcollate.errors import InputError
from fastcollate.transfer import Arrival, Transfer

Int64Array = npt.NDArray[np.int64]
Lines = Sequence[Sequence[int]]

GROUP_CELLS = 5 << 15  # 1.25 MiB of int64, where threads hand over
ALONE_CELLS = 1 << 16  # where none does: what is filled and used at once should stay in a core's own cache
MAX_GROUP = 256  # batches
THREAD_NAME = "fastcollate-"


class Job(Protocol):
    """One window's batches, to be filled."""

    @property
    def num_batches(self) -> int:
        """Batches in the window."""

    def fill(self, first: int, stop: int, out: Int64Array, report: Int64Array) -> int:
        """Fill batches from `first` on, as many as `out` holds, and write a line of `report` each; their number."""

    def batches(self, out: Int64Array, lines: Lines) -> Sequence[Batch | PackedBatch]:
        """The filled batches that some lines of the report tell of, as views of `out`."""


class PaddedJob:
    """Padded batches.

    Args:
        collator: how.
        rows: int64, row numbers of the store, batch after batch.
        bounds: int64 `(num_batches + 1,)`: batch `b` is `rows[bounds[b]:bounds[b + 1]]`.
    """

    def __init__(self, collator: Collator, rows: Int64Array, bounds: Int64Array) -> None:
        self._collator = collator
        self._rows = rows
        self._bounds = bounds

    @property
    def num_batches(self) -> int:
        """Batches in the window."""
        return len(self._bounds) - 1

    def fill(self, first: int, stop: int, out: Int64Array, report: Int64Array) -> int:
        """See `Job`."""
        return self._collator.fill_group(self._rows, self._bounds[first : stop + 1], out, report)

    def batches(self, out: Int64Array, lines: Lines) -> list[Batch]:
        """See `Job`."""
        return self._collator.batches(out, lines)


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
        transfer: gives the buffers and takes them to the device.
        ahead: whether threads fill ahead of the consumer.
    """

    def __init__(self, transfer: Transfer, *, ahead: bool = True) -> None:
        self._transfer = transfer
        self._group_cells = GROUP_CELLS if ahead else ALONE_CELLS
        self.num_batches = 1
        """Batches that make a group; starts at one, so that the first batch comes at once."""
        self._mean_cells = 0.0  # of a batch
        self._usual_cells = 3 * self._group_cells // 2  # of a buffer: groups differ in size, and should fit one

    def __call__(self, job: Job, window: int, first: int, stop: int) -> list[Group]:
        """Fill some batches of a window; several groups where one buffer does not hold them."""
        groups = []
        while first < stop:
            groups.append(self.fill(job, window, first, stop))
            first += len(groups[-1].batches)
        return groups

    def fill(self, job: Job, window: int, first: int, stop: int) -> Group:
        """Fill as many of some batches as one buffer holds, and choose how many the next group should have.

        What was just filled has driven Python's own code and data out of the cache, so each step here is dear.
        """
        report = np.empty((stop - first, kernels.REPORT_COLUMNS), np.int64)
        usual = self._usual_cells
        out = self._transfer.take(usual if self._mean_cells <= usual else _power_of_two(self._mean_cells))
        count = job.fill(first, stop, out, report)
        if not count:
            self._transfer.send(out, 0)
            out = self._transfer.take(_power_of_two(report[0, kernels.END]))
            count = job.fill(first, stop, out, report)
        lines = report[:count].tolist()
        totals = lines[0] if count == 1 else np.add.reduce(report[:count]).tolist()
        used = lines[-1][kernels.END]
        arrival = self._transfer.send(out, used)
        # As many as fill a group by the mean of the last ones, since batches differ; twice as many at most.
        self._mean_cells += (used / count - self._mean_cells) / (8 if self._mean_cells else 1)
        self.num_batches = max(1, min(int(self._group_cells / max(self._mean_cells, 1)), 2 * count, MAX_GROUP))
        return Group(window, first, job.batches(out, lines), lines, totals, arrival)


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
    if not prefetch:
        for job, window, first, stop in _cut(map(window_job, range(position[0], num_windows)), position, filler):
            while first < stop:
                group = filler.fill(job, window, first, stop)
                first += len(group.batches)
                yield group
                del group  # before the next is filled, so that its buffer is used again
        return
    process = os.getpid()
    with _Threads(1, "plan") as planner, _Threads(num_threads, "fill") as fillers:
        windows = _planned_ahead(window_job, range(position[0], num_windows), planner)
        ahead: deque[Future[list[Group]]] = deque()
        for work in _cut(windows, position, filler):
            ahead.append(fillers.submit(filler, *work))
            if len(ahead) > prefetch:
                if not ahead[0].done():
                    _help(ahead, work, filler)
                yield from _take(ahead, process)
        while ahead:
            yield from _take(ahead, process)


def _help(ahead: deque[Future[list[Group]]], work: tuple[Job, int, int, int], filler: Filler) -> None:
    """Fill the newest groups in this thread, which has to wait anyway, where no other has begun with them."""
    if ahead[-1].cancel():
        ahead[-1] = Future()
        try:
            ahead[-1].set_result(filler(*work))
        except Exception as error:  # told when its turn comes: the groups before it are good
            ahead[-1].set_exception(error)


def _take(ahead: deque[Future[list[Group]]], process: int) -> Iterator[Group]:
    """The oldest groups; each is let go of before the next is waited for, so that its buffer is used again."""
    groups = deque(ahead.popleft().result())
    while groups:
        yield groups.popleft()
        if os.getpid() != process:
            raise InputError(
                f"this iterator belongs to process {process}, whose threads a fork does not copy; make one in this "
                "process with iter(loader), or give the loader prefetch=0"
            )


def _planned_ahead(window_job: Callable[[int], Job], windows: range, planner: ThreadPoolExecutor) -> Iterator[Job]:
    """Each window's job; a window is planned while the one before it is filled."""
    following: Future[Job] | None = None
    for window in windows:
        job = window_job(window) if following is None else following.result()
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
        # The garbage collector may close an iterator on any thread: one of these, which cannot wait for itself, or one
        # that is just starting, which holds a lock of `threading` that waiting needs.
        self.shutdown(wait=threading.get_ident() == self._thread, cancel_futures=True)
