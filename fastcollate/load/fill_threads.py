"""Threads that fill groups of batches in compiled code; see `queue_kernels.py`."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.collate import fill as kernels
from fastcollate.collate.collator import Collator
from fastcollate.load import queue_kernels
from fastcollate.load.jobs import Job

Int64Array = npt.NDArray[np.int64]

PATIENCE_S = 10  # far longer than the filling of a group takes


class FillThreads:
    """Threads that fill what is posted, in order; used by the thread that made it, as a context manager.

    Args:
        collator: reads the store.
        num_threads: threads.
        num_tasks: tasks under way, at most.
        max_batches: batches a task, at most.
        name: the threads' name.
        packed: whether the jobs are of packed batches.
    """

    def __init__(
        self, collator: Collator, num_threads: int, num_tasks: int, max_batches: int, name: str, *, packed: bool
    ) -> None:
        self._how = collator.table.array, collator.settings, queue_kernels.PACKED if packed else queue_kernels.PADDED
        self._reports = [np.empty((max_batches + 1, kernels.REPORT_COLUMNS), np.int64) for _ in range(num_tasks)]
        self._queue = queue_kernels.new_queue(self._reports)
        self._posted = self._waited = 0
        self._failures: list[BaseException] = []
        # What tasks read and write. The threads hold it too: it outlives them, whoever lets go of what, and when.
        self._tasks: list[Any] = [None] * num_tasks
        kept = collator, self._reports, self._tasks
        options = self._queue, self._how, self._failures, kept
        threads = [
            threading.Thread(target=_work, args=options, name=f"{name}_{number}", daemon=True)
            for number in range(num_threads)
        ]
        # At the end of the program too: a daemon is not waited for otherwise.
        self._end = weakref.finalize(self, _end, self._queue, threads, os.getpid(), threading.get_ident())
        _load_kernels(self._queue, self._how)
        for thread in threads:
            thread.start()

    def post(self, job: Job, first: int, stop: int, out: Int64Array) -> None:
        """Have some batches of a job filled, as many as `out` holds."""
        self._tasks[self._posted % len(self._tasks)] = job, first, stop, out
        queue_kernels.post(self._queue, self._posted, job.line, first, stop, out)
        self._posted += 1

    def is_next_filled(self) -> bool:
        """Whether the oldest task that was not waited for is done, with all of its batches."""
        if self._waited == self._posted:
            return False
        _, first, stop, _ = self._tasks[self._waited % len(self._tasks)]
        return bool(queue_kernels.filled(self._queue, self._waited) == stop - first)

    def wait(self) -> tuple[int, Int64Array]:
        """Wait for the oldest task that was not waited for; this thread fills too meanwhile.

        Returns:
            How many batches were filled, or `-1 - i` where row `i` of the job is broken; and the report, which is
            written again once the next task is posted.
        """
        serve, options = queue_kernels.serve, (self._queue, self._waited, *self._how)
        while (filled := serve(*options)) == queue_kernels.NOT_DONE:
            if self._failures:
                raise self._failures[0]
        index = self._waited % len(self._tasks)
        self._tasks[index] = None  # its buffer is used again once the batches in it are gone
        self._waited += 1
        return filled, self._reports[index]

    def __enter__(self) -> FillThreads:
        return self

    def __exit__(self, *_: Any, is_finalizing: Any = sys.is_finalizing) -> None:
        # A default, since an interpreter that ends has taken the modules away; and it has ended the threads.
        if not is_finalizing():
            self._end()


def _load_kernels(queue: Int64Array, how: Any) -> None:
    """Compile what the threads run here: a process that is forked while a thread compiles could never compile again."""
    queue_kernels.end(queue)
    queue_kernels.serve(queue, queue_kernels.NO_TASK, *how)
    queue[queue_kernels.ENDED // 8] = 0


def _work(queue: Int64Array, how: Any, failures: list[BaseException], kept: Any) -> None:
    try:
        queue_kernels.serve(queue, queue_kernels.NO_TASK, *how)
    except BaseException as error:  # such as no memory: told to the consumer, who would wait for ever
        failures.append(error)


def _end(queue: Int64Array, threads: list[threading.Thread], process: int, owner: int) -> None:
    if os.getpid() != process:
        return  # a fork has none of them
    queue_kernels.end(queue)
    # The garbage collector may get here on any thread: also on one that is just starting, which holds a lock of
    # `threading` that waiting needs. And on this one it may come from where that lock is held: hence not for ever.
    if threading.get_ident() == owner:
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(PATIENCE_S)
