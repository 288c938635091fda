"""Host buffers that are recycled, and their copy to the device on a stream of its own.

A buffer is never refilled while its copy is under way, nor while anybody still refers to a tensor over it.
"""

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
    views of them, in any library) keep its array alive, which shows in the array's reference count.

    Args:
        num_buffers: buffers kept. Where all are in use, `take` allocates a new one in the place of the oldest, which
            then belongs to whoever still holds it.
    """

    def __init__(self, num_buffers: int = 4) -> None:
        self._num_buffers = num_buffers
        self._buffers: list[Int64Array] = []
        self._lock = threading.Lock()
        self.num_allocated = 0
        """Buffers allocated so far; constant once a loop runs smoothly."""

    def take(self, num_cells: int = 0) -> Int64Array:
        """A buffer of at least `num_cells` cells that nobody else refers to; its contents are arbitrary."""
        with self._lock:
            for index in range(len(self._buffers)):
                if _references(self._buffers, index) <= _IDLE and len(self._buffers[index]) >= num_cells:
                    buffer = self._buffers.pop(index)
                    self._buffers.append(buffer)  # the most recently used goes last
                    return buffer
            return self._allocate(num_cells)

    def _allocate(self, num_cells: int) -> Int64Array:
        buffer = np.empty(num_cells, np.int64)
        if len(self._buffers) >= self._num_buffers:
            del self._buffers[0]
        self._buffers.append(buffer)
        self.num_allocated += 1
        return buffer

    def __getstate__(self) -> Any:
        raise TypeError("a pool of host buffers belongs to one process and cannot be pickled")
