"""Host buffers that are recycled: never while anybody still refers to a tensor over one."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


def _references(buffers: list[Int64Array], index: int) -> int:
    return sys.getrefcount(buffers[index])


# Measured, not counted: how many references the call itself holds differs between versions of Python.
_IDLE = _references([np.empty(0, np.int64)], 0)


class HostPool:
    """Recycled int64 host memory.

    A buffer goes back by itself: `take` hands out one that nobody refers to any more. Tensors over a buffer (and
    views of them, in any library) keep its array alive, which shows in the array's reference count. Where none will do,
    `take` allocates a new one; of the `num_buffers` kept it then replaces the largest idle one, or the oldest, which
    belongs to whoever still holds it.
    """

    def __init__(self, num_buffers: int = 4) -> None:
        self._num_buffers = num_buffers
        self._buffers: list[Int64Array] = []
        self._lock = threading.Lock()
        self.num_allocated = 0
        """Buffers allocated so far; constant once a loop runs smoothly."""

    def take(self, num_cells: int = 0) -> Int64Array:
        """A buffer of at least `num_cells` cells that nobody else refers to; its contents are arbitrary."""
        buffers = self._buffers
        with self._lock:
            if not num_cells and buffers and _references(buffers, -1) <= _IDLE:
                return buffers[-1]  # what was used last is still in the cache
            found = -1
            for index in range(len(buffers) - 1, -1, -1):
                size = len(buffers[index])
                # A large one is left for what needs it.
                if size >= num_cells and (found < 0 or size < len(buffers[found])) and self._is_idle(index):
                    found = index
                    if size == num_cells:
                        break
            if found < 0:
                return self._allocate(num_cells)
            if found < len(buffers) - 1:
                buffers.append(buffers.pop(found))  # the most recently used goes last
            return buffers[-1]

    def _allocate(self, num_cells: int) -> Int64Array:
        if len(self._buffers) >= self._num_buffers:
            idle = filter(self._is_idle, range(len(self._buffers)))
            # All of them are too small: the new one serves wherever the largest of them would.
            del self._buffers[max(idle, key=lambda index: len(self._buffers[index]), default=0)]
        self._buffers.append(np.empty(num_cells, np.int64))
        self.num_allocated += 1
        return self._buffers[-1]

    def _is_idle(self, index: int) -> bool:
        return _references(self._buffers, index) <= _IDLE

    def __getstate__(self) -> Any:
        raise TypeError("a pool of host buffers belongs to one process and cannot be pickled")
