"""Which share of the rows a process takes: one rule for loaders and samplers."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from fastcollate.errors import InputError


def own_share(rank: int | None, world_size: int | None, cp_size: int | None = None) -> tuple[int, int] | None:
    """The rank and the number of ranks of this process: those given, else the process group's of `torch.distributed`.

    `None` where one is not given, and there is no process group to ask.

    Raises:
        InputError: only `world_size` is given, and it is not the process group's; or neither, and `cp_size` says that
            some of the group's ranks want the same rows.

    Example:
        >>> from fastcollate.ranks import own_share
        >>> own_share(1, 4)
        (1, 4)
        >>> own_share(None, None)  # without a process group
    """
    if rank is not None and world_size is not None:
        return rank, world_size
    group = sys.modules.get("torch.distributed")  # whoever has a process group has imported it
    if group is None or not group.is_available() or not group.is_initialized():
        return None
    size = group.get_world_size()
    if rank is None and world_size not in (None, 1, size):
        raise InputError(f"world_size={world_size} without rank, and the process group has {size} ranks: give rank too")
    world_size = size if world_size is None else world_size
    if world_size > 1 and cp_size not in (None, 1):
        raise InputError(
            f"cp_size={cp_size}: ranks that share rows by context parallelism want the same batches, and the process "
            'group does not say which do: give rank=mesh["dp"].get_local_rank() and world_size=mesh["dp"].size(), of '
            "the device mesh's dimension of data parallelism"
        )
    return (0 if world_size == 1 else group.get_rank()) if rank is None else rank, world_size


def warn_of_a_missing_group(rank: int | None, world_size: int | None) -> None:
    """Warn where this process was started as one of several and takes all rows, since none of them has a group."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1" and own_share(rank, world_size) is None:
        warnings.warn(
            f"this process was started as one of WORLD_SIZE={started}, and there is no process group: it takes all "
            "rows. Call torch.distributed.init_process_group before, or give rank and world_size",
            stacklevel=4,
        )


def times_dealt(world_size: int, what: str, *, can_repeat: bool) -> int:
    """How often each batch of this rank's share is to be given, so that the rank gets it once; mostly 1.

    `Accelerator.prepare` wraps a batch sampler, takes it for one of all rows, and gives each rank every so many-th of
    its batches. A sampler that `can_repeat` gives each of its own once for each rank.

    Raises:
        InputError: it divides in another way what is a share already.
    """
    dealer = _dealer() if world_size > 1 else None
    if dealer is None:
        return 1
    in_turn = getattr(dealer, "split_batches", True) is False and getattr(dealer, "num_processes", 1) == world_size
    if can_repeat and in_turn and type(dealer).__name__ == "BatchSamplerShard":
        return world_size
    raise InputError(
        f"accelerate ({type(dealer).__name__}) divides what is one of world_size={world_size} shares of the rows "
        f"already, and most of it would be lost. Leave the {what}'s batches out of accelerator.prepare, or give the "
        f"{what} rank=0 and world_size=1, so that accelerate alone divides"
    )


def _dealer() -> Any:
    """What of `accelerate` led here and hands a part of what it gets to each rank; `None` where nothing does.

    It tells nobody that it wraps them: only the calls that led here show it.
    """
    frame: Any = sys._getframe(1) if "accelerate" in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == "accelerate.data_loader":
            caller = frame.f_locals.get("self")
            if type(caller).__name__ in ("BatchSamplerShard", "DataLoaderDispatcher", "IterableDatasetShard"):
                return caller
        frame = frame.f_back
    return None
