"""What the kernels are told: where the rows lie in memory, and how to fill them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastcollate.collate import fill as kernels
from fastcollate.errors import InputError

Int64Array = npt.NDArray[np.int64]

MODES = ("reference", "positional")
TRUNCATIONS = ("right", "left")


class Columns(Protocol):
    """What collating needs of a shard; `store.ShardColumns` is one."""

    @property
    def input_ids(self) -> npt.NDArray[Any]:
        """uint16, uint32 or int64 `(num_tokens,)`."""

    @property
    def offsets(self) -> Int64Array:
        """int64 `(num_rows + 1,)`."""

    @property
    def spans(self) -> npt.NDArray[np.uint32]:
        """uint32 `(num_spans,)`."""

    @property
    def span_offsets(self) -> Int64Array:
        """int64 `(num_rows + 1,)`."""


def clamped(number: int) -> int:
    """A length as a Python slice takes it: what lies beyond any row is all the same."""
    return min(max(number, -kernels.NO_LIMIT), kernels.NO_LIMIT)


@functools.lru_cache(maxsize=64)
def make_settings(
    *,
    pad_token_id: int,
    ignore_index: int,
    limit: int | None,
    mask_prompt: bool,
    mode: str,
    truncation: str,
    narrow: bool,
) -> Int64Array:
    """The settings that the kernels read.

    Raises:
        InputError: an unknown `mode` or `truncation`, or a number beyond 64 bits.
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r}: choose one of {', '.join(map(repr, MODES))}")
    if truncation not in TRUNCATIONS:
        raise InputError(f"truncation={truncation!r}: choose one of {', '.join(map(repr, TRUNCATIONS))}")
    settings = np.zeros(kernels.NUM_SETTINGS, np.int64)
    for name, column, value in (
        ("pad_token_id", kernels.PAD, pad_token_id),
        ("ignore_index", kernels.IGNORE, ignore_index),
        ("the limit", kernels.LIMIT, kernels.NO_LIMIT if limit is None else limit),
    ):
        try:
            number = operator.index(value)
            settings[column] = clamped(number) if column == kernels.LIMIT else number
        except (OverflowError, TypeError, ValueError) as error:
            raise InputError(f"{name} is {value!r}: give an integer of at most 64 bits") from error
    settings[kernels.MASK] = mask_prompt
    settings[kernels.REFERENCE] = mode == "reference"
    settings[kernels.LEFT] = truncation == "left"
    settings[kernels.NARROW] = narrow
    settings.flags.writeable = False
    return settings


class Table:
    """The addresses of shards' columns, as the kernels read them; keeps the columns alive.

    Args:
        shards: one or more shards, in row order.
        name: what to call them in messages, such as the store's path.

    Attributes:
        array: int64 `(num_shards, kernels.TABLE_COLUMNS)`.
        num_rows: rows in all shards.

    Raises:
        InputError: a column's dtype, shape or memory layout is not what `Columns` says.
    """

    def __init__(self, shards: Sequence[Columns], *, name: str = "the store") -> None:
        self.name = name
        self._shards = tuple(shards)
        self.array = np.zeros((max(len(self._shards), 1), kernels.TABLE_COLUMNS), np.int64)
        self.num_rows = 0
        for index, shard in enumerate(self._shards):
            self._check(index, shard)
            line = self.array[index]
            line[kernels.FIRST_ROW] = self.num_rows
            line[kernels.NUM_ROWS] = len(shard.offsets) - 1
            line[kernels.TOKENS] = shard.input_ids.ctypes.data
            line[kernels.NUM_TOKENS] = len(shard.input_ids)
            line[kernels.TOKEN_SIZE] = shard.input_ids.itemsize
            line[kernels.OFFSETS] = shard.offsets.ctypes.data
            line[kernels.SPANS] = shard.spans.ctypes.data
            line[kernels.NUM_SPANS] = len(shard.spans)
            line[kernels.SPAN_SIZE] = shard.spans.itemsize
            line[kernels.SPAN_OFFSETS] = shard.span_offsets.ctypes.data
            self.num_rows += len(shard.offsets) - 1

    def _check(self, index: int, shard: Columns) -> None:
        for column, dtypes in (
            ("input_ids", (np.uint16, np.uint32, np.int64)),
            ("offsets", (np.int64,)),
            ("spans", (np.uint32, np.int64)),
            ("span_offsets", (np.int64,)),
        ):
            array = getattr(shard, column)
            if array.ndim != 1 or array.dtype not in dtypes or not array.flags.c_contiguous:
                raise InputError(
                    f"{self.name}, shard {index}: {column} must be contiguous, one-dimensional and of dtype "
                    f"{' or '.join(np.dtype(d).name for d in dtypes)}, not {array.dtype} {array.shape}"
                )
        if len(shard.offsets) < 1 or len(shard.span_offsets) != len(shard.offsets):
            raise InputError(f"{self.name}, shard {index}: offsets and span_offsets must both have num_rows + 1 items")

    def __getstate__(self) -> Any:
        raise TypeError("addresses of this process cannot be pickled; pickle the store, the loader or the data set")

    def explain(self, row: int) -> InputError:
        """What is wrong with a row that a kernel has refused."""
        if not 0 <= row < self.num_rows:
            return InputError(f"row {row} of {self.name}, which has {self.num_rows:,} rows")
        index = int(np.searchsorted(self.array[:, kernels.FIRST_ROW], row, side="right")) - 1
        local = row - int(self.array[index, kernels.FIRST_ROW])
        shard = self._shards[index]
        return InputError(
            f"{self.name}, shard {index}, row {local} (row {row} of the store) is damaged: tokens "
            f"{shard.offsets[local]}..{shard.offsets[local + 1]} of {len(shard.input_ids)}, spans "
            f"{shard.span_offsets[local]}..{shard.span_offsets[local + 1]} of {len(shard.spans)}; "
            "run `fastcollate verify --checksums` on it, then prepare the store again"
        )
