"""One process or many: ranks as `torchrun` starts them, sums over ranks, one model in all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastcollate.errors import InputError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that train together.

    Attributes:
        rank: from 0.
        world_size: how many.
        device: where this rank computes.
        counters: the group over which counts are summed on the CPU (no wait for the GPU); `None` if alone.
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
        if self.counters is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.counters)
        summed: list[float] = total.tolist()
        return summed

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank; empty on all but the first."""
        if self.counters is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size if self.is_first else []
        dist.gather_object(value, gathered if self.is_first else None, group=self.counters)
        return gathered

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.counters is not None:
            dist.barrier(group=self.counters)

    def share(self, model: nn.Module) -> nn.Module:
        """`model`, with gradients summed over ranks during the backward pass."""
        if self.counters is None:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def close(self) -> None:
        """Leave the group."""
        if self.counters is not None and dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(device: str = "auto") -> Ranks:
    """Join the processes that `torchrun` started, or be alone.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto`: a GPU (this process's own under `torchrun`) if there is one.

    Raises:
        InputError: the device is not there.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Ranks(0, 1, chosen, None)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    counters = dist.new_group(backend="gloo") if chosen.type == "cuda" else dist.group.WORLD
    return Ranks(rank, world_size, chosen, counters)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises:
        InputError: it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device!r}: choose auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {device}: this PyTorch sees no CUDA device; use --device cpu")
        if ":" not in device:
            chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
    elif chosen.type != "cpu":
        raise InputError(f"--device {device!r}: choose auto, cpu, cuda or cuda:N")
    return chosen
