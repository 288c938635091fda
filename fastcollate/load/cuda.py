"""Pinned buffers, and their copy to a CUDA device on a stream of its own.

A buffer is never refilled while its copy is under way, nor while anybody still refers to a tensor over it.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Int64Array = npt.NDArray[np.int64]


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
    """

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._num_buffers = max(num_buffers, 2)
        self._free: deque[_Slot] = deque()  # the least recently used first
        self._taken: dict[int, _Slot] = {}  # by the identity of its cells
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
            self._taken[id(slot.cells)] = slot
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

    def send(self, buffer: Int64Array, num_cells: int) -> OnCuda:
        """Start the copy; the buffer is handed out again once it has ended."""
        with self._lock:
            slot = self._taken.pop(id(buffer))
        with torch.cuda.stream(self._stream):
            copy = torch.empty(num_cells, dtype=torch.int64, device=self._device)
            copy.copy_(slot.host[:num_cells], non_blocking=True)
            slot.copied.record(self._stream)
            arrived = _new_event()  # not the slot's own: that one is recorded again for the next copy
            arrived.record(self._stream)
        with self._lock:
            self._free.append(slot)
        return OnCuda(copy, slot.host.data_ptr(), arrived)

    def drop(self, buffer: Int64Array) -> None:
        """Forget a buffer; its memory is free once nobody refers to it.

        Takes no lock: the garbage collector may get here while this thread holds it.
        """
        self._taken.pop(id(buffer), None)


class OnCuda:
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
