"""Where a store's rows lie in memory: the table that kernels read them by, and the loops that find a row in it.

A **table** describes the memory that rows are read from: int64 `(num_shards, TABLE_COLUMNS)`, a shard a line, its
columns named below. It holds addresses, so that one call reads from any number of shards; whoever builds it keeps
the arrays alive, and says in `HOLDS_END` (1 or 0) where rows have their end among their tokens. Shards may come from
files, so every row's offsets are checked before they are followed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.jit import part, view

if TYPE_CHECKING:
    from fastcollate.store.shards import ShardColumns

    Columns = ShardColumns  # of a shard in memory, ids and spans may also be int64

Int64Array = npt.NDArray[np.int64]

_TABLE = range(11)
FIRST_ROW, HOLDS_END, NUM_ROWS, TOKENS, NUM_TOKENS, TOKEN_SIZE, OFFSETS, *_SPANS = _TABLE
SPANS, NUM_SPANS, SPAN_SIZE, SPAN_OFFSETS = _SPANS
TABLE_COLUMNS = len(_TABLE)
# A part of a row in one int64: its first token, how many tokens at most (0: all that follow), and whether the rest of
# the row is left out.
COUNT_AT = 36
FIRST_TOKEN, MOST_TOKENS, LOST = (1 << COUNT_AT) - 1, (1 << 25) - 1, 1 << 61
READ_BEYOND = 8  # tokens that a fill may read behind a row, where its shard has them


@part
def shard_of(table: Any, row: int, guess: int) -> int:
    """The table's line that holds `row`, or -1; neighbours mostly share a shard, so `guess` is tried first."""
    first = np.int64(table[guess, FIRST_ROW])
    if first <= row < first + table[guess, NUM_ROWS]:
        return guess
    low, high = 0, len(table)
    while high - low > 1:
        middle = (low + high) >> 1
        if table[middle, FIRST_ROW] <= row:
            low = middle
        else:
            high = middle
    if row < table[low, FIRST_ROW] or row >= table[low, FIRST_ROW] + table[low, NUM_ROWS]:
        return -1
    return low


@part
def bounds_of(table: Any, shard: int, row: int, offsets: int = OFFSETS, total: int = NUM_TOKENS) -> tuple[int, int]:
    """First token (or span) and number of them in a row; number -1 where the offsets leave what the shard holds."""
    bounds = view(table[shard, offsets] + 8 * (row - table[shard, FIRST_ROW]), 2, np.int64)
    begin, end = bounds[0], bounds[1]
    if begin < 0 or end < begin or end > table[shard, total]:
        return 0, -1
    return begin, end - begin


class Holder(Protocol):
    """Whoever has shards come when their rows are needed, such as `remote.shards.RemoteShards`."""

    def watch(self, table: Table, first: int) -> None:
        """Put each shard into a table's lines, from `first` on, while it is there."""

    def hold(self, numbers: Int64Array, stop: threading.Event | None = None) -> object:
        """Have shards there until what this returns is let go."""


class AbsentShard:
    """A shard that is there only while it is held: its table's line has no row else, and kernels refuse what it has.

    Attributes:
        holder: whom to ask for it.
        number: its number there.
        num_rows: its rows.
        dtypes: of its columns `input_ids` and `spans`.
    """

    def __init__(self, holder: Holder, number: int, num_rows: int, token_dtype: np.dtype[Any]) -> None:
        self.holder, self.number, self.num_rows = holder, number, num_rows
        self.dtypes = {"input_ids": token_dtype, "spans": np.dtype(np.uint32)}

    columns: Any
    """All its columns, fetched where they are not there; they stay valid for whoever keeps them."""


class Table:
    """The addresses of shards' columns, as the kernels read them; keeps the columns alive.

    Attributes:
        array: int64 `(num_shards, TABLE_COLUMNS)`.
        num_rows: rows in all shards.
        token: 0 as a number of the tokens' dtype, which is the same in all shards.
        span: the same of the spans'.

    Raises:
        InputError: a column's dtype, shape or memory layout is not one that the kernels read.
    """

    def __init__(self, shards: Sequence[Columns], *, name: str = "the store") -> None:
        self.name = name
        self._shards = tuple(shards)
        self.array = np.zeros((max(len(self._shards), 1), TABLE_COLUMNS), np.int64)
        self.num_rows = 0
        self._holders: list[tuple[Holder, int]] = []  # and the line that their first shard has, or would have
        shard: Any
        for index, shard in enumerate(self._shards):
            self.array[index, FIRST_ROW] = self.num_rows
            if isinstance(shard, AbsentShard):
                self.num_rows += shard.num_rows
                if (place := (shard.holder, index - shard.number)) not in self._holders[-1:]:
                    self._holders.append(place)
            else:
                self._check(index, shard)
                self.put(index, shard)
                self.num_rows += len(shard.offsets) - 1
        self.token: Any = self._zero("input_ids")
        self.span: Any = self._zero("spans")
        for holder, first in self._holders:
            holder.watch(self, first)

    def put(self, index: int, shard: Columns | None) -> None:
        """Write where a shard lies, or that it is not there."""
        if shard is None:
            self.array[index, NUM_ROWS:] = 0
            return
        ids, offsets, spans = shard.input_ids, shard.offsets, shard.spans
        line = (  # in the order of the columns' names, from `TOKENS` on
            ids.ctypes.data, len(ids), ids.itemsize, offsets.ctypes.data,
            spans.ctypes.data, len(spans), spans.itemsize, shard.span_offsets.ctypes.data,
        )  # fmt: skip
        self.array[index, TOKENS:] = line
        self.array[index, NUM_ROWS] = len(offsets) - 1  # last: from now on kernels read it

    @property
    def is_whole(self) -> bool:
        """Whether all shards are always there, so that nobody needs to hold any."""
        return not self._holders

    def hold(self, rows: npt.NDArray[Any], stop: threading.Event | None = None) -> list[object]:
        """Have the shards of some rows there until what this returns is let go; waits for them, or until `stop`."""
        if not self._holders:
            return []
        known = rows[(rows >= 0) & (rows < self.num_rows)]
        lines = np.unique(np.searchsorted(self.array[:, FIRST_ROW], known, side="right") - 1)
        held = []
        for holder, first in self._holders:
            own = [n for n in lines.tolist() if getattr(self._shards[n], "holder", None) is holder]
            numbers = [self._shards[n].number for n in own if n - self._shards[n].number == first]
            if numbers:
                held.append(holder.hold(np.array(numbers, np.int64), stop))
        return held

    def _zero(self, column: str) -> Any:
        dtypes = {
            shard.dtypes[column] if isinstance(shard, AbsentShard) else getattr(shard, column).dtype
            for shard in self._shards
        }
        if len(dtypes) > 1:
            raise InputError(
                f"{self.name} has shards with {column} of {' and '.join(sorted(map(str, dtypes)))}: a collator reads "
                "one dtype; prepare them with one tokenizer, or make a loader of each"
            )
        return next(iter(dtypes), np.dtype(np.uint16)).type(0)

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
        index = int(np.searchsorted(self.array[:, FIRST_ROW], row, side="right")) - 1
        local = row - int(self.array[index, FIRST_ROW])
        shard = self._shards[index]
        if not self.array[index, NUM_ROWS]:
            return InputError(
                f"row {row} of {self.name} has not been fetched: read rows of a store behind a URL by a BatchLoader, a "
                "StoreDataset, or store[row]"
            )
        return InputError(
            f"{self.name}, shard {index}, row {local} (row {row} of the store) is damaged: tokens "
            f"{shard.offsets[local]}..{shard.offsets[local + 1]} of {len(shard.input_ids)}, spans "
            f"{shard.span_offsets[local]}..{shard.span_offsets[local + 1]} of {len(shard.spans)}; "
            "run `fastcollate verify --checksums` on it, then prepare the store again"
        )
