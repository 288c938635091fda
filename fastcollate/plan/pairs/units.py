"""Pairs of neighbouring rows as what a plan orders, so that none is parted: each by the number of its first row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcollate.errors import InputError
from fastcollate.plan.options import Int64Array, PlanOptions
from fastcollate.plan.packing import Packs, Window

KIND = "pairs"  # of a store


def first_rows(rows: range | Int64Array, name: str = "rows") -> Int64Array:
    """The first row of each pair; refuses rows that are not both of each pair, the first one first."""
    numbers = np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
    whole = numbers[: len(numbers) // 2 * 2].reshape(-1, 2)
    parted = (whole[:, 0] % 2 != 0) | (whole[:, 1] != whole[:, 0] + 1)
    if parted.any() or len(numbers) % 2:
        row = int(whole[parted][0, 0]) if parted.any() else int(numbers[-1])
        raise InputError(f"{name} part a pair at row {row}: give both rows of each pair, the chosen one first")
    return whole[:, 0]


def cells_of(cells: npt.NDArray[Any], firsts: Int64Array, options: PlanOptions) -> Int64Array:
    """The cells that each pair takes in a batch, int64: packed what both rows take, padded twice the longer one.

    With `long_rows="drop"` a pair of which a row is too long takes more than any pack has, and is left out.
    """
    limit = options.max_length if options.capacity is None else min(options.max_length or LONGEST, options.capacity)
    multiple = options.row_multiple if options.capacity is not None else options.pad_to_multiple_of or 1
    both = np.stack([cells[firsts], cells[firsts + 1]]).astype(np.int64)
    longest = both.max(0)
    both = -(-np.minimum(both, LONGEST if limit is None else limit) // multiple) * multiple
    if options.capacity is None:
        return 2 * both.max(0)  # type: ignore[no-any-return]
    is_left_out = (options.long_rows == "drop") & (longest > limit)
    return np.where(is_left_out, options.capacity + 1, both.sum(0))


LONGEST = (1 << 30) - 1  # of a row: a plan counts a pair's cells in 31 bits


def refuse_parts(options: PlanOptions, kind: str) -> None:
    """Refuse options that lay parts of rows into packs."""
    if options.long_rows == "split" or options.packing != "best_fit":
        raise InputError(
            f"long_rows={options.long_rows!r}, packing={options.packing!r} with {kind}: a part of a row is no answer; "
            "use 'truncate' or 'drop', and 'best_fit'"
        )


def refuse_what_parts(firsts: Int64Array, cells: Int64Array, options: PlanOptions) -> None:
    """Refuse options under which a pair stands in no batch, or would be cut to fit."""
    refuse_parts(options, KIND)
    room, name = (options.capacity, "capacity") if options.capacity is not None else (options.widest, "max_tokens")
    place = int(np.argmax(cells)) if len(cells) else 0
    if room is None or options.long_rows == "drop" or not len(cells) or int(cells[place]) <= room:
        return
    out = "long_rows='drop' leaves such pairs out, a " if options.capacity is not None else "a "
    raise InputError(
        f"the pair of rows {firsts[place]} and {firsts[place] + 1} takes {cells[place]} cells, more than {name}={room} "
        f"has room for: raise {name}; {out}max_length of at most {room // 2} cuts rows so that any two fit"
    )


def both_rows(window: Window) -> Window:
    """Batches of pairs as batches of rows: the chosen ones, then the rejected ones in the same order."""
    rows, bounds = window
    sizes = np.diff(bounds)
    place = np.arange(len(rows)) + np.repeat(bounds[:-1], sizes)
    both = np.empty(2 * len(rows), np.int64)
    both[place], both[place + np.repeat(sizes, sizes)] = rows, rows + 1
    return Window(both, 2 * bounds)


def both_rows_of_packs(packs: Packs) -> Packs:
    """Packs of pairs as packs of rows, each chosen one before its rejected one."""
    return Packs((packs.rows[:, None] + np.arange(2)).reshape(-1), packs.starts, 2 * packs.bounds)
