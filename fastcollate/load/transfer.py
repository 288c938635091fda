"""Host buffers that are recycled, and their copy to the device on a stream of its own.

A buffer is never refilled while its copy is under way, nor while anybody still refers to a tensor over it.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

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
        num_buffers: buffers kept. Where none will do, `take` allocates a new one in the place of the largest idle one,
            or of the oldest, which then belongs to whoever still holds it.
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


class Arrival(Protocol):
    """A buffer that is on its way to a device."""

    def receive(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Tensors over the host buffer as tensors on the device, safe to use on the caller's current stream."""


class Transfer(Protocol):
    """Where buffers to fill come from, and how what is in them gets to the device; used by one process.

    Attributes:
        copies: whether `send` starts a copy, which goes on beside other work: the sooner it is called the better.
    """

    copies: bool

    def take(self, num_cells: int) -> Int64Array:
        """A buffer of at least `num_cells` cells to fill; nobody else refills it until it is sent."""

    def send(self, buffer: Int64Array, num_cells: int) -> Arrival | None:
        """Start the copy of a buffer's first `num_cells`; `None` where tensors over the buffer are used as they are."""

    def drop(self, buffer: Int64Array) -> None:
        """Forget a buffer that will not be sent; somebody may still be writing to it."""


def make_transfer(device: torch.device, num_buffers: int) -> Transfer:
    """How batches get to a device.

    Args:
        device: where to.
        num_buffers: host buffers kept.
    """
    if device.type == "cpu":
        return _ToCpu(num_buffers)
    if device.type == "cuda":
        return ToCuda(device, num_buffers)
    return _ToOther(device, num_buffers)


class _ToCpu:
    """Tensors over recycled buffers; nothing is copied."""

    copies = False

    def __init__(self, num_buffers: int) -> None:
        self._pool = HostPool(num_buffers)
        self.take = self._pool.take

    def send(self, buffer: Int64Array, num_cells: int) -> None:
        """Nothing to do: the reference count tells when the buffer is free again."""

    def drop(self, buffer: Int64Array) -> None:
        """Nothing to do."""


class _ToOther:
    """A plain copy, made when a batch is handed over, for devices without pinned memory of their own."""

    copies = False

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self._device = device
        self._pool = HostPool(num_buffers)
        self.take = self._pool.take

    def send(self, buffer: Int64Array, num_cells: int) -> Arrival:
        """Nothing to do yet."""
        return self

    def drop(self, buffer: Int64Array) -> None:
        """Nothing to do."""

    def receive(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Copies."""
        return tuple(tensor.to(self._device) for tensor in tensors)


def _new_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """A pinned buffer and the end of its last copy."""

    host: torch.Tensor
    cells: Int64Array
    copied: torch.cuda.Event


class ToCuda:
    """Pinned buffers, copied on a stream of their own.

    A buffer is refilled only after its copy has ended. The device's memory comes from PyTorch's caching allocator:
    each copy gets its own, which lives as long as a batch in it.

    Args:
        device: a CUDA device.
        num_buffers: pinned buffers kept.
    """

    copies = True

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._num_buffers = max(num_buffers, 2)
        self._free: deque[_Slot] = deque()  # the least recently used first
        self._taken: dict[int, _Slot] = {}  # by address
        self._lock = threading.Lock()
        self._pins = True

    def take(self, num_cells: int) -> Int64Array:
        """A buffer whose last copy has ended; waits for the oldest where all copies are under way."""
        with self._lock:
            fit = (slot for slot in self._free if len(slot.cells) >= num_cells and _is_over(slot.copied))
            slot = min(fit, key=lambda slot: len(slot.cells), default=None)  # a large one may be needed next
            if slot is not None:
                self._free.remove(slot)
            elif len(self._free) >= self._num_buffers:
                slot = self._free.popleft()
        if slot is not None:
            slot.copied.synchronize()
        if slot is None or len(slot.cells) < num_cells:
            slot = self._allocate(num_cells)
        with self._lock:
            self._taken[slot.host.data_ptr()] = slot
        return slot.cells

    def _allocate(self, num_cells: int) -> _Slot:
        host = self._pinned(num_cells) if self._pins else self._pageable(num_cells)
        return _Slot(host, host.numpy(), _new_event())

    def _pinned(self, num_cells: int) -> torch.Tensor:
        try:
            return torch.empty(num_cells, dtype=torch.int64, device="cpu", pin_memory=True)
        except RuntimeError as error:
            self._pins = False
            warnings.warn(
                f"{8 * num_cells:,} bytes of host memory could not be pinned ({error}): batches are copied from "
                "pageable memory, which is slower and does not overlap with computing; raise the limit on locked "
                "memory (ulimit -l, or --ulimit memlock=-1 for a container), or free memory",
                stacklevel=2,
            )
            return self._pageable(num_cells)

    @staticmethod
    def _pageable(num_cells: int) -> torch.Tensor:
        return torch.empty(num_cells, dtype=torch.int64, device="cpu")  # whatever the caller's default device is

    def send(self, buffer: Int64Array, num_cells: int) -> Arrival:
        """Start the copy; the buffer is handed out again once it has ended."""
        with self._lock:
            slot = self._taken.pop(buffer.ctypes.data)
        with torch.cuda.stream(self._stream):
            copy = torch.empty(num_cells, dtype=torch.int64, device=self._device)
            copy.copy_(slot.host[:num_cells], non_blocking=True)
            slot.copied.record(self._stream)
            arrived = _new_event()  # not the slot's own: that one is recorded again for the next copy
            arrived.record(self._stream)
        with self._lock:
            self._free.append(slot)
        return _OnCuda(copy, slot.host.data_ptr(), arrived)

    def drop(self, buffer: Int64Array) -> None:
        """Forget a buffer; its memory is free once nobody refers to it.

        Takes no lock: the garbage collector may get here while this thread holds it.
        """
        self._taken.pop(buffer.ctypes.data, None)


class _OnCuda:
    """A copy on the device."""

    def __init__(self, copy: torch.Tensor, host: int, arrived: torch.cuda.Event) -> None:
        self._copy = copy
        self._host = host
        self._arrived = arrived

    def receive(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Views of the copy, at the places of the host's tensors; work on the current stream waits for the copy."""
        stream = torch.cuda.current_stream(self._copy.device)
        stream.wait_event(self._arrived)
        self._copy.record_stream(stream)  # so that its memory is used again only behind this stream's work on it
        return tuple(self._at(tensor) for tensor in tensors)

    def _at(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 0:  # an empty tensor has no address
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._copy.device)
        place = (tensor.data_ptr() - self._host) // tensor.element_size()
        return self._copy.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), place)
