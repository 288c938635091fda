"""Shards in memory, for tests that need no file."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastcollate.store import ShardColumns


def make_shards(
    rows: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]] | None = None,
    *,
    num_shards: int = 1,
    dtype: Any = np.uint16,
) -> list[ShardColumns]:
    """The rows as `num_shards` shards; without `spans` each row is one response."""
    spans = [[0, len(row)] for row in rows] if spans is None else spans
    shards = []
    for part in np.array_split(np.arange(len(rows)), num_shards):
        shards.append(
            ShardColumns(
                np.array([token for i in part for token in rows[i]], dtype),
                np.cumsum([0, *(len(rows[i]) for i in part)], dtype=np.int64),
                np.array([count for i in part for count in spans[i]], np.uint32),
                np.cumsum([0, *(len(spans[i]) for i in part)], dtype=np.int64),
                part.astype(np.uint64),
            )
        )
    return shards


def make_store(rows: Sequence[Sequence[int]], spans: Sequence[Sequence[int]] | None = None, **options: Any) -> Any:
    """What a loader needs of a store, in memory."""
    return SimpleNamespace(
        shards=make_shards(rows, spans, **options), lengths=np.array([len(row) for row in rows], np.uint16)
    )
