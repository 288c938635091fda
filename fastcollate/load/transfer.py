"""Where buffers to fill come from, and how what is in them gets to a device."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.load.buffers import HostPool
from fastcollate.load.cuda import ToCuda

Int64Array = npt.NDArray[np.int64]


class Arrival(Protocol):
    """A buffer that is on its way to a device."""

    def receive(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Tensors over the host buffer as tensors on the device, safe to use on the caller's current stream."""


class Transfer(Protocol):
    """Where buffers to fill come from, and how what is in them gets to the device; used by one process."""

    def take(self, num_cells: int) -> Int64Array:
        """A buffer of at least `num_cells` cells to fill; nobody else refills it until it is sent."""

    def send(self, buffer: Int64Array, num_cells: int) -> Arrival | None:
        """Start the copy of a buffer's first `num_cells`; `None` where tensors over the buffer are used as they are."""

    def drop(self, buffer: Int64Array) -> None:
        """Forget a buffer that will not be sent; somebody may still be writing to it."""


def make_transfer(device: torch.device, num_buffers: int) -> Transfer:
    """How batches get to a device, by way of so many host buffers."""
    if device.type == "cpu":
        return _ToCpu(num_buffers)
    if device.type == "cuda":
        return ToCuda(device, num_buffers)
    return _ToOther(device, num_buffers)


class _ToCpu:
    """Tensors over recycled buffers; nothing is copied."""

    def __init__(self, num_buffers: int) -> None:
        self._pool = HostPool(num_buffers)
        self.take = self._pool.take

    def send(self, buffer: Int64Array, num_cells: int) -> Arrival | None:
        """Nothing to do: the reference count tells when the buffer is free again."""
        return None

    def drop(self, buffer: Int64Array) -> None:
        """Nothing to do."""


class _ToOther(_ToCpu):
    """A plain copy, made when a batch is handed over, for devices without pinned memory of their own."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        super().__init__(num_buffers)
        self._device = device

    def send(self, buffer: Int64Array, num_cells: int) -> Arrival:
        """Nothing to do yet."""
        return self

    def receive(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Copies."""
        return tuple(tensor.to(self._device) for tensor in tensors)
