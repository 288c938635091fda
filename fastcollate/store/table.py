"""What the kernels are told of a store: where its rows lie in memory; see `rows.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.store import rows

Int64Array = npt.NDArray[np.int64]


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


class Table:
    """The addresses of shards' columns, as the kernels read them; keeps the columns alive.

    Args:
        shards: one or more shards, in row order.
        name: what to call them in messages, such as the store's path.

    Attributes:
        array: int64 `(num_shards, rows.TABLE_COLUMNS)`.
        num_rows: rows in all shards.
        token: 0 as a number of the tokens' dtype, which is the same in all shards.

    Raises:
        InputError: a column's dtype, shape or memory layout is not what `Columns` says.
    """

    def __init__(self, shards: Sequence[Columns], *, name: str = "the store") -> None:
        self.name = name
        self._shards = tuple(shards)
        self.array = np.zeros((max(len(self._shards), 1), rows.TABLE_COLUMNS), np.int64)
        self.num_rows = 0
        for index, shard in enumerate(self._shards):
            self._check(index, shard)
            line = self.array[index]
            line[rows.FIRST_ROW] = self.num_rows
            line[rows.NUM_ROWS] = len(shard.offsets) - 1
            line[rows.TOKENS] = shard.input_ids.ctypes.data
            line[rows.NUM_TOKENS] = len(shard.input_ids)
            line[rows.TOKEN_SIZE] = shard.input_ids.itemsize
            line[rows.OFFSETS] = shard.offsets.ctypes.data
            line[rows.SPANS] = shard.spans.ctypes.data
            line[rows.NUM_SPANS] = len(shard.spans)
            line[rows.SPAN_SIZE] = shard.spans.itemsize
            line[rows.SPAN_OFFSETS] = shard.span_offsets.ctypes.data
            self.num_rows += len(shard.offsets) - 1
        dtypes = {shard.input_ids.dtype for shard in self._shards}
        if len(dtypes) > 1:
            raise InputError(
                f"{name} has shards of {' and '.join(sorted(map(str, dtypes)))}: a collator reads tokens of one dtype; "
                "prepare them with one tokenizer, or make a loader of each"
            )
        self.token: Any = next(iter(dtypes), np.dtype(np.uint16)).type(0)

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
        index = int(np.searchsorted(self.array[:, rows.FIRST_ROW], row, side="right")) - 1
        local = row - int(self.array[index, rows.FIRST_ROW])
        shard = self._shards[index]
        return InputError(
            f"{self.name}, shard {index}, row {local} (row {row} of the store) is damaged: tokens "
            f"{shard.offsets[local]}..{shard.offsets[local + 1]} of {len(shard.input_ids)}, spans "
            f"{shard.span_offsets[local]}..{shard.span_offsets[local + 1]} of {len(shard.spans)}; "
            "run `fastcollate verify --checksums` on it, then prepare the store again"
        )
