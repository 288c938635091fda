"""Store, plan, collate and transfer put together: an iterator of batches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastcollate import kernels
from fastcollate.collate import Batch, Collator, Columns
from fastcollate.errors import InputError
from fastcollate.plan import EpochPlan, plan_epoch
from fastcollate.transfer import HostPool

STATE_VERSION = 1


class Store(Protocol):
    """What a loader needs of a store; `TokenStore` is one."""

    @property
    def shards(self) -> Sequence[Columns]:
        """The shards' columns, in row order."""

    @property
    def lengths(self) -> npt.NDArray[Any]:
        """Each row's length in tokens."""


@dataclass(slots=True)
class Stats:
    """What the consumer of a loader has received so far.

    Attributes:
        batches: batches.
        rows: rows.
        real_cells: input cells that hold a row's token.
        padded_cells: input cells that hold padding.
        trained_tokens: targets that are not ignored.
        corner_rows: rows on which `mode="reference"` differs from `mode="positional"`.
        wait_s: seconds that the consumer has spent in the loader, waiting for a batch.
        h2d_bytes: bytes copied to the device.
    """

    batches: int = 0
    rows: int = 0
    real_cells: int = 0
    padded_cells: int = 0
    trained_tokens: int = 0
    corner_rows: int = 0
    wait_s: float = 0.0
    h2d_bytes: int = 0


class BatchLoader:
    """Batches of a store, epoch after epoch.

    Args:
        store: a `TokenStore`.
        policy: see `plan_epoch`.
        batch_size: see `plan_epoch`.
        max_tokens: see `plan_epoch`.
        max_length: columns kept of a row.
        mask_prompt: train the responses only.
        mode: `"reference"` or `"positional"`, see `Collator`.
        seed: see `plan_epoch`.
        rank: see `plan_epoch`.
        world_size: see `plan_epoch`.
        device: where the batches go.
        window: see `plan_epoch`.
        drop_last: see `plan_epoch`.
        tail: see `plan_epoch`.
        rows: the store's rows to use, such as `range(0, 935)`; all of them by default.
        truncation: `"right"` or `"left"`, see `Collator`.
        pad_token_id: see `Collator`; by default the store's.
        ignore_index: see `Collator`.
        inputs_dtype: see `Collator`.

    Raises:
        InputError: an option is wrong, or the options leave no batch.
    """

    def __init__(
        self,
        store: Store,
        *,
        policy: str = "bucketed",
        batch_size: int | None = None,
        max_tokens: int | None = None,
        max_length: int | None = None,
        mask_prompt: bool = False,
        mode: str = "reference",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        window: int | None = None,
        drop_last: bool = False,
        tail: str = "repeat",
        rows: range | None = None,
        truncation: str = "right",
        pad_token_id: int | None = None,
        ignore_index: int = -100,
        inputs_dtype: torch.dtype = torch.int64,
    ) -> None:
        lengths = store.lengths
        self._first_row = 0
        if rows is not None:
            if rows.step != 1 or not 0 <= rows.start <= rows.stop <= len(lengths):
                raise InputError(f"rows={rows}: give a range of step 1 within the store's {len(lengths)} rows")
            lengths = lengths[rows.start : rows.stop]
            self._first_row = rows.start
        self._plan_options = {
            "policy": policy,
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "window": window,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "max_length": max_length,
            "drop_last": drop_last,
            "tail": tail,
        }
        self._lengths = lengths
        self._mode = mode
        self._fingerprint = str(getattr(store, "fingerprint", ""))
        self.device = torch.device(device)
        self._collator = Collator(
            store.shards,
            pad_token_id=getattr(store, "pad_token_id", 50256) if pad_token_id is None else pad_token_id,
            ignore_index=ignore_index,
            max_length=max_length,
            mask_prompt=mask_prompt,
            mode=mode,
            truncation=truncation,
            inputs_dtype=inputs_dtype,
            name=str(getattr(store, "path", "the store")),
        )
        self.stats = Stats()
        self.epoch = 0
        self._position = (0, 0)  # window, batch within it: the next to hand over
        self._resume = False
        self._pool = HostPool()
        if len(lengths) == 0:
            raise InputError("no rows to load: the store, or the range of rows, is empty")
        self._plan()

    def _plan(self) -> EpochPlan:
        return plan_epoch(self._lengths, epoch=self.epoch, **self._plan_options)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Batches in the current epoch, exactly; with `max_tokens` this plans the epoch once."""
        return len(self._plan())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs; setting the current one keeps a loaded position."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._position = (0, 0)
            self._resume = False

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the current epoch; from a loaded position on, once. The end advances the epoch by one."""
        if not self._resume:
            self._position = (0, 0)
        self._resume = False
        plan = self._plan()
        first_window, first_batch = self._position
        start = time.perf_counter()
        for window in range(first_window, plan.num_windows):
            planned = plan.window(window)
            rows = planned.rows + self._first_row
            for number in range(first_batch, planned.num_batches):
                batch = self._fill(rows[planned.bounds[number] : planned.bounds[number + 1]])
                self._position = (window, number + 1)
                self.stats.wait_s += time.perf_counter() - start
                yield batch
                del batch
                start = time.perf_counter()
            first_batch = 0
        self.epoch += 1
        self._position = (0, 0)

    def _fill(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Fill one batch into a recycled buffer, count it, and put it on the device."""
        report = np.empty((1, kernels.REPORT_COLUMNS), np.int64)
        bounds = np.array([0, len(rows)])
        out = self._pool.take()
        while not self._collator.fill_group(rows, bounds, out, report):
            cells = kernels.cells_of(len(rows), report[0, kernels.WIDTH], self._collator.narrow)[1]
            out = self._pool.take(int(cells))
        batch = self._collator.batch_at(out, 0, len(rows), int(report[0, kernels.WIDTH]))
        self._count(batch, report[0])
        if self.device.type == "cpu":
            return batch
        self.stats.h2d_bytes += sum(tensor.numel() * tensor.element_size() for tensor in batch)
        return Batch(*(tensor.to(self.device) for tensor in batch))

    def _count(self, batch: Batch, report: npt.NDArray[np.int64]) -> None:
        stats, real, corners = self.stats, int(report[kernels.REAL]), int(report[kernels.CORNERS])
        stats.batches += 1
        stats.rows += batch.inputs.shape[0]
        stats.real_cells += real
        stats.padded_cells += batch.inputs.numel() - real
        stats.trained_tokens += int(report[kernels.TRAINED])
        if corners and not stats.corner_rows and self._mode == "reference":
            warnings.warn(
                "a row on which mode='reference' gives other targets than mode='positional' (an end-of-text inside the "
                "text, an empty row, or a prompt of length 0); this is said once, loader.stats.corner_rows counts on",
                stacklevel=4,
            )
        stats.corner_rows += corners

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, in plain numbers and strings; exact to the batch."""
        window, batch = self._position
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "next_window": window,
            "next_batch": batch,
            "num_rows": len(self._lengths),
            "first_row": self._first_row,
            "store": self._fingerprint,
            **self._plan_options,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position: the next iteration starts there.

        Raises:
            InputError: the state is of another version, store or order of rows.
        """
        own = self.state_dict()
        for name in own.keys() - {"epoch", "next_window", "next_batch", "rank"}:
            if name not in state or state[name] != own[name]:
                raise InputError(
                    f"the saved loader state has {name}={state.get(name)!r}, this loader {own[name]!r}; "
                    "make the loader with the saved value, or start afresh"
                )
        self.epoch = state["epoch"]
        self._position = (state["next_window"], state["next_batch"])
        self._resume = True

    def stats_dict(self) -> dict[str, Any]:
        """The statistics as plain numbers."""
        return asdict(self.stats)
