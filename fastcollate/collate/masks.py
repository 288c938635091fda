"""Kernels that ignore the targets of prompts, after a row was filled."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcollate.collate.settings import IGNORE, MASKED, NO_LIMIT, REFERENCE
from fastcollate.jit import part, view
from fastcollate.store import layout


@part
def ignore_columns(targets: Any, begin: int, end: int, value: int, ignore: int) -> int:
    """Write `value` over targets `begin..end`, cut to what is there; returns how many of them were trained."""
    first, stop = max(begin, 0), min(end, len(targets))
    trained = 0
    for j in range(first, stop):
        trained += targets[j] != ignore
        targets[j] = value
    return trained


@part
def mask_row(
    table: Any, shard: int, row: int, length: int, start: int, padded: int, settings: Any, targets: Any, span: Any
) -> tuple[int, int]:
    """Ignore the targets of a row's prompts; `targets[0]` is the row's column `start`.

    `padded` is the row's width before any cut: the reference's slice counts from its end when it is negative. Returns
    how many of them were trained, or -1 where the spans are broken, and the corners met.
    """
    first, count = layout.bounds_of(table, shard, row, layout.SPAN_OFFSETS, layout.NUM_SPANS)
    if count < 0:
        return -1, 0
    ignore, reference = settings[IGNORE], settings[REFERENCE] != 0
    value = MASKED if reference else ignore
    spans = view(table[shard, layout.SPANS] + first * table[shard, layout.SPAN_SIZE], count, span)
    if spans.itemsize == 4:  # those of a store end within the row and its end-of-text
        total = np.int64(0)
        for k in range(count):
            total += np.int64(spans[k])
            if total > length + 1:
                return -1, 0
    if count <= 2:
        prompt = np.int64(spans[0]) if count > 0 else np.int64(0)
        stop, corner = max(prompt, -NO_LIMIT) - 1, 0  # any integer is legal, also the least
        if reference and stop < 0 and count > 0:
            stop = max(padded + stop, 0)
            corner = np.int64(stop > 0)
        return ignore_columns(targets, -start, stop - start, value, ignore), corner
    masked, position = 0, np.int64(0)
    for k in range(0, count, 2):
        end = position + np.int64(spans[k])
        if k + 1 == count:
            end = max(end, length + 1)  # no response follows, so nothing trains the end-of-text
        masked += ignore_columns(targets, position - 1 - start, end - 1 - start, value, ignore)
        position = end + (np.int64(spans[k + 1]) if k + 1 < count else np.int64(0))
    return masked, 0
