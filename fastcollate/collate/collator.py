"""Rows of a store, named by their numbers, to batches: validate, size, call one kernel.

The loader and the data set adapters are built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastcollate.collate import fill as kernels
from fastcollate.collate import fill_packed as pack_kernels
from fastcollate.collate import settings as options
from fastcollate.collate.batch import Batch, ContextParallelBatch, PackedBatch, note_counts, note_sources
from fastcollate.collate.pairs import batch as pairs
from fastcollate.errors import LARGEST_CAPACITY, InputError, integer, shown
from fastcollate.store import layout

Int64Array = npt.NDArray[np.int64]
Take = Callable[[int], Int64Array]
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_NO_CELLS: Int64Array = np.array([], np.int64)


class Collator:
    """Collates rows of a store, named by their numbers; cheap to make, safe to share between threads.

    Args:
        shards: the store's shards (`TokenStore.shards`).
        pad_token_id: the padding.
        end_token_id: appended to each row as end-of-text; by default the padding, as in the chapter.
        end: `"append"`, or `"in_row"` for rows that hold their end: nothing is appended, a row of `n` ids takes `n - 1`
            columns, inputs are its ids but the last and targets its ids but the first; `mode` is positional.
            Or one of these for each shard.
        ignore_index: written over targets that are not trained.
        max_length: columns kept, at least 1; `None` keeps all.
        mask_prompt: train the responses only.
        mode: `"reference"` reproduces the chapter's collate bit for bit; `"positional"` does what the user means:
            padding is told by position, the end-of-text is always trained, a prompt length of 0 masks nothing,
            prompts are masked with `ignore_index`, an empty row trains nothing.
        truncation: `"right"` keeps a long row's first `max_length` columns, `"left"` its last.
        pad_to_multiple_of: padding is added to a padded batch, beyond `max_length` too, until its width is a multiple
            of this.
        cp_size: ranks of a context-parallel group: packed batches are `ContextParallelBatch`es, each row padded to a
            multiple of `2 * cp_size` cells.
        max_segments: the segments of each packed batch, the rest of them empty, so that `cu_seqlens` has one size; a
            batch of more is refused.
        mask_boundaries: whether each row of a pack sees itself alone; if not, positions and the segment go on over all
            rows of a pack, as most pretraining has it.
        stride: of parts of rows that begin so many tokens apart, only what no earlier part holds is a target.
        inputs_dtype: `torch.int64` or `torch.int32`; targets are always int64.
        name: what to call the store in messages.

    Raises:
        InputError: a setting is not one of these, or a shard's columns are not as `Columns` says.
    """

    def __init__(
        self,
        shards: Sequence[layout.Columns],
        *,
        pad_token_id: int = 50256,
        end_token_id: int | None = None,
        end: str | Sequence[str] = "append",
        ignore_index: int = -100,
        max_length: int | None = None,
        mask_prompt: bool = False,
        mode: str = "reference",
        truncation: str = "right",
        pad_to_multiple_of: int | None = None,
        cp_size: int | None = None,
        max_segments: int | None = None,
        mask_boundaries: bool = True,
        stride: int | None = None,
        inputs_dtype: torch.dtype = torch.int64,
        name: str = "the store",
    ) -> None:
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length={max_length}: give at least 1, or leave it out to keep whole rows")
        if inputs_dtype not in (torch.int64, torch.int32):
            raise InputError(f"inputs_dtype={inputs_dtype}: choose torch.int64 or torch.int32")
        self.table = layout.Table(shards, name=name)
        self._addresses = self.table.array
        ends = options.ends_of(end, len(self._addresses))
        self._addresses[:, layout.HOLDS_END] = [word == "in_row" for word in ends]
        self._inputs_dtype = _INT32 if inputs_dtype == torch.int32 else _INT64
        # The kernels are compiled for these.
        self._types = self.table.token, self._inputs_dtype.type(0), self.table.span if mask_prompt else None
        if not np.iinfo(self._inputs_dtype).min <= pad_token_id <= np.iinfo(self._inputs_dtype).max:
            raise InputError(f"pad_token_id={pad_token_id} does not fit inputs_dtype={inputs_dtype}")
        self.settings = options.make_settings(
            pad_token_id=pad_token_id,
            end_token_id=end_token_id,
            end="in_row" if "in_row" in ends else ends[0],
            ignore_index=ignore_index,
            limit=max_length,
            mask_prompt=mask_prompt,
            mode=mode,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            cp_size=cp_size,
            max_segments=max_segments,
            mask_boundaries=mask_boundaries,
            stride=stride,
        )
        self._cp_size, self._max_segments = self.settings[[options.CP_SIZE, options.MAX_SEGMENTS]].tolist()

    @staticmethod
    def of(shards: Sequence[layout.Columns], **settings: Any) -> Collator:
        """A collator of these shards, which has those that may be absent there while it reads them."""
        absent = any(isinstance(shard, layout.AbsentShard) for shard in shards)
        return (HoldingCollator if absent else Collator)(shards, **settings)

    def __call__(self, rows: npt.ArrayLike, take: Take | None = None) -> Batch:
        """Collate one batch.

        Args:
            rows: row numbers, one or more.
            take: gives int64 memory of at least so many cells to fill, such as `HostPool.take`; `None` allocates.

        Raises:
            InputError: no row, a row that does not exist or is no integer, or a row whose shard is damaged.
        """
        is_usual = getattr(rows, "dtype", None) is _INT64
        numbers = np.ascontiguousarray(rows) if is_usual else _as_integers(rows, "row numbers")
        if numbers.ndim != 1 or not len(numbers):
            raise InputError("a batch needs at least one row number")
        out = _NO_CELLS if take is None else take(0)
        width, middle, end = kernels.fill_padded(self._addresses, self.settings, numbers, out, *self._types)
        if end > len(out):
            out = (take or _allocate)(end)
            width, middle, end = kernels.fill_padded(self._addresses, self.settings, numbers, out, *self._types)
        if width < 0:
            raise self.table.explain(int(numbers[-1 - width]))
        return make_batch(out, self._inputs_dtype, len(numbers), width, 0, middle)

    note_sources = staticmethod(note_sources)

    def fill_group(self, rows: Int64Array, bounds: Int64Array, out: Int64Array, report: Int64Array) -> int:
        """Fill as many batches as `out` holds in one kernel call, or measure them; see `fill.fill_padded_group`.

        Returns:
            The number of batches filled; 0 where `out` is too small for the first, whose size is in `report[0]`.

        Raises:
            InputError: a row does not exist, or its shard is damaged; or the bounds are not of these rows.
        """
        _check_bounds(bounds, len(rows), "rows")
        _check_room(out, report, len(bounds) - 1)
        filled = kernels.fill_padded_group(self.table.array, self.settings, rows, bounds, out, report, *self._types)
        if filled < 0:
            raise self.table.explain(int(rows[-1 - filled]))
        return int(filled)

    def batches(self, out: Int64Array, lines: Iterable[list[int]]) -> Iterator[Batch]:
        """The tensors of the batches that a kernel has filled, a line of its report each; views, nothing is copied."""
        dtype, array, tensor, new = self._inputs_dtype, np.ndarray, torch.from_numpy, tuple.__new__
        for line in lines:  # `make_batch`, without a call for each
            shape = (line[kernels.ROWS], line[kernels.WIDTH])
            inputs = tensor(array(shape, dtype, out, 8 * line[kernels.START]))
            note_counts(inputs, line)
            yield new(Batch, (inputs, tensor(array(shape, _INT64, out, 8 * line[kernels.TARGETS]))))

    def pack(
        self,
        rows: npt.ArrayLike,
        bounds: npt.ArrayLike,
        *,
        capacity: int,
        starts: npt.ArrayLike = (),
        take: Take | None = None,
    ) -> PackedBatch | ContextParallelBatch:
        """Collate one packed batch.

        Each row is collated as in a batch of its own, and cut to `max_length` and the capacity.

        Args:
            rows: row numbers, pack after pack.
            bounds: `(num_packs + 1,)`: pack `p` is `rows[bounds[p]:bounds[p + 1]]`.
            capacity: cells a pack.
            starts: the part of each row here, for rows that are split: its first token, and perhaps how many, as
                `store.layout` says; by default rows are cut.
            take: see `__call__`.

        Raises:
            InputError: a row does not exist or its shard is damaged, a pack's rows do not fit it, the bounds are not
                of these rows, or a number is no integer or out of range.
        """
        integer("capacity", capacity, 1, LARGEST_CAPACITY)
        numbers, packs = _as_integers(rows, "row numbers"), _as_integers(bounds, "bounds")
        firsts = _as_integers(starts, "starts")
        if (
            packs.ndim != 1
            or len(packs) < 2
            or packs[0] != 0
            or packs[-1] != len(numbers)
            or (np.diff(packs) < 0).any()
        ):
            raise InputError(f"bounds={packs.tolist()} of {len(numbers)} rows: give 0, each pack's end, in order")
        report = np.empty((1, kernels.REPORT_COLUMNS), np.int64)
        batches = np.array([0, len(packs) - 1])
        out = (take or _allocate)(self.packed_cells(len(packs) - 1, capacity, len(numbers)))
        self.fill_packed_group(numbers, firsts, packs, batches, capacity, out, report)
        (batch,) = self.packed_batches(out, report.tolist())
        return batch

    def fill_packed_group(
        self,
        rows: Int64Array,
        starts: Int64Array,
        packs: Int64Array,
        batches: Int64Array,
        capacity: int,
        out: Int64Array,
        report: Int64Array,
    ) -> int:
        """Like `fill_group`, for packed batches; see `pack_kernels.fill_packed_group`."""
        integer("capacity", capacity, 1, LARGEST_CAPACITY)
        _check_bounds(packs, len(rows), "rows")
        _check_bounds(batches, len(packs) - 1, "packs")
        _check_room(out, report, len(batches) - 1)
        if len(starts) not in (0, len(rows)):
            raise InputError(f"{len(starts)} starts of {len(rows)} rows: give one a row, or none")
        if int(np.diff(batches).max(initial=0)) * capacity >= 1 << 31:
            raise InputError(f"capacity={capacity}: cu_seqlens is int32, so a batch of packs ends at 2**31 cells")
        filled = pack_kernels.fill_packed_group(
            self.table.array, self.settings, rows, starts, packs, batches, capacity, out, report, *self._types
        )
        if filled < 0:
            raise self.explain_pack(rows, starts, packs, capacity, -1 - int(filled))
        most, limit = int(report[:filled, kernels.SEGMENTS].max(initial=0)), self.settings[options.MAX_SEGMENTS]
        if most > limit > 0:
            raise InputError(
                f"a batch of packs has {most} segments, more than max_segments={limit}: raise max_segments (rows and "
                "unused ends of packs are segments), or give fewer packs a batch"
            )
        return int(filled)

    def packed_cells(self, num_packs: int, capacity: int, num_rows: int) -> int:
        """Int64 cells that a packed batch takes in a buffer."""
        if num_packs * capacity >= 1 << 31:
            raise InputError(f"{num_packs} packs of {capacity} cells: cu_seqlens is int32, so a batch ends at 2**31")
        itemsize = self._inputs_dtype.itemsize
        return int(pack_kernels.packed_cells_of(self.settings, num_packs, capacity, num_rows, itemsize)[3])

    def packed_batches(
        self, out: Int64Array, lines: Iterable[list[int]]
    ) -> Iterator[PackedBatch | ContextParallelBatch]:
        """Like `batches`, for packed ones."""
        return (self._packed_batch(out, line) for line in lines)

    def _packed_batch(self, out: Int64Array, line: list[int]) -> PackedBatch | ContextParallelBatch:
        capacity, start, num_segments = line[kernels.WIDTH], line[kernels.START], line[kernels.SEGMENTS]
        num_packs, num_bounds = line[kernels.CELLS] // capacity, (self._max_segments or num_segments) + 1
        targets, (size, _) = line[kernels.TARGETS], kernels.plain_cells_of(num_packs, capacity, 8)
        shape, positions = (num_packs, capacity), targets + size
        inputs: npt.NDArray[Any] = np.ndarray(shape, self._inputs_dtype, out, 8 * start)
        bounds = positions + size
        cells = (
            torch.from_numpy(inputs),
            torch.from_numpy(np.ndarray(shape, _INT64, out, 8 * targets)),
            torch.from_numpy(np.ndarray(shape, _INT64, out, 8 * positions)),
        )
        note_counts(cells[0], line)
        padded = torch.from_numpy(np.ndarray((num_bounds,), _INT32, out, 8 * bounds))
        if not self._cp_size:
            return PackedBatch(*cells, padded)
        middle = (bounds + line[kernels.END]) // 2
        return ContextParallelBatch(
            *cells, torch.from_numpy(np.ndarray((num_bounds,), _INT32, out, 8 * middle)), padded
        )

    padded_pairs, packed_pairs = staticmethod(pairs.padded_pairs), staticmethod(pairs.packed_pairs)
    padded_answers, packed_answers = staticmethod(pairs.padded_answers), staticmethod(pairs.packed_answers)
    rows_of_segments = staticmethod(pairs.rows_of_segments)

    def explain_pack(
        self, rows: Int64Array, starts: Int64Array, packs: Int64Array, capacity: int, place: int
    ) -> InputError:
        """Why `fill_packed_group`, whose arguments these are, refused `rows[place]`."""
        pack = int(np.searchsorted(packs, place, side="right")) - 1
        limit, multiple = min(int(self.settings[options.LIMIT]), capacity), max(2 * self._cp_size, 1)
        cells = 0
        for i in range(int(packs[pack]), place + 1):
            length = kernels.widest(self.table.array, rows[i : i + 1])
            first = int(starts[i]) & (layout.FIRST_TOKEN if starts[i] >= 0 else -1) if len(starts) else 0
            most = (int(starts[i]) >> layout.COUNT_AT & layout.MOST_TOKENS if len(starts) else 0) or limit
            if length >= 0 and not 0 <= first <= length:
                return InputError(f"row {rows[i]} fills {length} cells: a part of it cannot start at token {first}")
            cells += -(-min(length - first, limit, most) // multiple) * multiple
            if length >= 0 and cells > capacity:
                return InputError(
                    f"the rows of pack {pack} take {cells} cells up to row {rows[i]}, more than capacity={capacity}; "
                    "pack them by the lengths of this store"
                )
        return self.table.explain(int(rows[place]))


class HoldingCollator(Collator):
    """A collator that holds the shards of the rows that it is to read; see `layout.Table.hold`."""

    def __call__(self, rows: npt.ArrayLike, take: Take | None = None) -> Batch:
        """See `Collator`."""
        numbers = _as_integers(rows, "row numbers")
        held = self.table.hold(numbers.ravel())
        batch = super().__call__(numbers, take)
        del held
        return batch

    def fill_group(self, rows: Int64Array, bounds: Int64Array, out: Int64Array, report: Int64Array) -> int:
        """See `Collator`."""
        held = self.table.hold(rows[bounds[0] : bounds[-1]] if len(bounds) else rows[:0])
        filled = super().fill_group(rows, bounds, out, report)
        del held
        return filled

    def fill_packed_group(
        self, rows: Int64Array, starts: Int64Array, packs: Int64Array, batches: Int64Array, *more: Any
    ) -> int:
        """See `Collator`."""
        own = (
            slice(*packs[batches[[0, -1]]]) if len(batches) and len(packs) > max(batches[0], batches[-1]) else slice(0)
        )
        held = self.table.hold(rows[own])
        filled = super().fill_packed_group(rows, starts, packs, batches, *more)
        del held
        return filled


def make_batch(
    out: Int64Array, inputs_dtype: np.dtype[Any], num_rows: int, width: int, start: int, middle: int,
    array: Any = np.ndarray, tensor: Any = torch.from_numpy, new: Any = tuple.__new__,
) -> Batch:  # fmt: skip
    """Tensors over `out`, whose cells from `start` on are inputs, from `middle` on targets.

    A batch of eight rows takes a few microseconds in all: hence the defaults, and what `Batch(...)` does in half its
    time.
    """
    shape = (num_rows, width)
    pair = (tensor(array(shape, inputs_dtype, out, 8 * start)), tensor(array(shape, _INT64, out, 8 * middle)))
    return new(Batch, pair)  # type: ignore[no-any-return]


def _check_bounds(bounds: Int64Array, total: int, name: str) -> None:
    """A kernel follows them without a look: nothing outside of what was given may be read."""
    if bounds.ndim != 1 or not len(bounds) or bounds[0] < 0 or bounds[-1] > total or (bounds[1:] < bounds[:-1]).any():
        raise InputError(f"bounds={bounds.tolist()[:20]} of {total} {name}: give each batch's or pack's end, in order")


def _check_room(out: Int64Array, report: Int64Array, num_batches: int) -> None:
    """The same for what is written."""
    for array, shape in ((out, out.shape[:1]), (report, (max(num_batches, len(report)), kernels.REPORT_COLUMNS))):
        if array.dtype != np.int64 or array.shape != shape or not array.flags.c_contiguous or not array.flags.writeable:
            raise InputError(f"{array.dtype} {array.shape} to fill: give contiguous int64 memory, for a report {shape}")


def _as_integers(values: npt.ArrayLike, name: str) -> Int64Array:
    """Integers of any kind as int64; others are refused, since a cut fraction or a mask would name other rows."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{name} are not a sequence of integers: {error}") from error
    if array.size and not fits_int64(array):
        raise InputError(f"{name} are {array.dtype}, such as {shown(array.flat[0])}: give integers")
    return np.ascontiguousarray(array, np.int64)


def fits_int64(array: npt.NDArray[Any]) -> bool:
    """Whether items, one or more, are integers of at most 63 bits."""
    return array.dtype.kind in "iu" and not (array.dtype == np.uint64 and int(array.max()) >> 63)


def _allocate(num_cells: int) -> Int64Array:
    return np.empty(num_cells, np.int64)
