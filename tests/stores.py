"""Shards in memory, small stores on disk, and the command line, for tests."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastcollate.store import (
    ShardColumns,
    ShardInfo,
    StoreIdentity,
    TokenStore,
    shard_name,
    token_dtype,
    write_manifest,
    write_shard,
)

GPT2 = {"name": "gpt2", "fingerprint": "00", "vocab_size": 50257, "pad_token_id": 50256}
Row = tuple[Sequence[int], Sequence[int]]


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


def write_store(
    path: Path,
    rows: Sequence[Row],
    *,
    shard_rows: int = 3,
    tokenizer: Mapping[str, Any] = GPT2,
    summary: Mapping[str, Any] | None = None,
) -> TokenStore:
    """A store of `(spans, ids)` rows, a few rows a shard; a row's `source_row` is ten times its number."""
    path.mkdir(parents=True, exist_ok=True)
    identity = StoreIdentity([{"name": "made by a test"}], tokenizer, {"name": "alpaca"}, {})
    dtype = token_dtype(tokenizer["vocab_size"])
    infos: list[ShardInfo] = []
    for first in range(0, len(rows), shard_rows):
        part = rows[first : first + shard_rows]
        columns = ShardColumns(
            np.array([token for _, ids in part for token in ids], dtype),
            np.cumsum([0, *(len(ids) for _, ids in part)]).astype(np.int64),
            np.array([count for spans, _ in part for count in spans], np.uint32),
            np.cumsum([0, *(len(spans) for spans, _ in part)]).astype(np.int64),
            np.arange(first, first + len(part), dtype=np.uint64) * np.uint64(10),
        )
        infos.append(write_shard(path, shard_name(len(infos)), columns))
    write_manifest(path, identity, infos, summary=summary or {})
    return TokenStore(path)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; returns its exit status."""
    from fastcollate.cli import main

    monkeypatch.setattr(sys, "argv", ["fastcollate", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
