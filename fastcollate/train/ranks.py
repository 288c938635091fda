"""One process or many: ranks as `torchrun` starts them, sums over ranks, one model in all of them."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastcollate.errors import InputError

_STORE_KEY = "fastcollate/port of the first rank's store"
_JOIN_TIMEOUT = timedelta(minutes=10)
_CONNECT_TIMEOUT = timedelta(seconds=2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(slots=True)
class Ranks:
    """This process's place among those that train together.

    Counts are summed over the group `counters` (`None` if alone): on the CPU, without a wait for the GPU, and apart
    from the gradients' group so that `close` can end its threads.
    """

    rank: int
    world_size: int
    device: torch.device
    counters: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, exactly for counts below 2**53."""
        return [sum(column) for column in zip(*self.exchange(values), strict=True)]

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank, on every rank; exact for counts below 2**53."""
        if self.world_size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own, group=self.counters)
        return [part.tolist() for part in found]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank; empty on all but the first."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size if self.is_first else []
        dist.gather_object(value, gathered if self.is_first else None, group=self.counters)
        return gathered

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self.counters)

    def share(self, model: nn.Module) -> nn.Module:
        """`model`, with gradients summed over ranks during the backward pass."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def close(self) -> None:
        """Leave the group.

        The last reference to a group waits for its threads. One of them may still hold a tensor of the last sum, and
        ask an interpreter that has ended for leave to free it, which ends the process by a signal (pytorch issue
        190489). The gradients' group holds no tensor of Python's; PyTorch may keep it.
        """
        if self.counters is not None and dist.is_initialized():
            dist.destroy_process_group()
        self.counters = None


class Interrupts:
    """Turns the first Ctrl-C (or SIGTERM) into a wish, so that a step is never cut in half; the second one stops."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def join_ranks(device: str = "auto") -> Ranks:
    """Join the processes that `torchrun` started, or be alone.

    The device `auto` is a GPU (this process's own under `torchrun`) if there is one; one that is not there is refused.

    Example:
        >>> join_ranks("cpu").world_size  # 1 without torchrun
        1
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise InputError(f"--device {device}: all ranks would share that card; give cuda, each takes its own")
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Ranks(0, 1, chosen, None)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, store=_store_of_this_attempt(rank), rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend)
    return Ranks(rank, world_size, chosen, dist.new_group(backend="gloo"))


def _store_of_this_attempt(rank: int) -> Any:
    """A key-value store that only the ranks of this attempt of `torchrun` know, served by the first of them.

    `torchrun` lends its own store, the same one after each restart, so that a rank may find there the address of a
    peer that has died (pytorch issue 135712). It serves here for one address only: a rank that reads that of the
    attempt before is refused, and reads again.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connect = partial(dist.TCPStore, host)  # type: ignore[attr-defined]  # torch does not declare it public
    lent = connect(port, is_master=False)
    if rank == 0:
        own = connect(0, is_master=True, wait_for_workers=False)
        lent.set(_STORE_KEY, str(own.port))
        return own
    deadline = time.monotonic() + _JOIN_TIMEOUT.total_seconds()
    while True:
        port = int(lent.get(_STORE_KEY))
        try:
            connect(port, is_master=False, timeout=_CONNECT_TIMEOUT)
            break
        except dist.DistError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    return connect(port, is_master=False)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here; one that is not there is an `InputError`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9]\d{0,2}))?", device):
        raise InputError(f"--device {device!r}: choose auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {device}: this PyTorch sees no CUDA device; use --device cpu")
        if ":" not in device:
            if local_rank >= torch.cuda.device_count():
                raise InputError(
                    f"--device {device}: rank {local_rank} of this machine has no card of its own, there are "
                    f"{torch.cuda.device_count()}; start at most so many ranks here (--nproc-per-node)"
                )
            chosen = torch.device("cuda", local_rank)
    return chosen


def recycle_freed_memory() -> None:
    """Let the C library keep large blocks that a step frees for the next one (glibc; elsewhere nothing happens).

    Otherwise each logit chunk and each gradient comes as fresh pages, which cost a sixth of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def num_compilations() -> int:
    """Graphs that `torch.compile` has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
