"""Stores on disk from ready token ids, for tests that need a real one and no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastcollate.store import (
    ShardColumns,
    StoreIdentity,
    TokenStore,
    shard_name,
    token_dtype,
    write_manifest,
    write_shard,
)


def write_store(
    path: Path,
    rows: Sequence[Sequence[int]],
    spans: Sequence[Sequence[int]] | None = None,
    *,
    vocab_size: int = 50257,
    num_shards: int = 2,
) -> TokenStore:
    """A finished store of the rows; the last id of the vocabulary is the end-of-text."""
    path.mkdir(parents=True)
    spans = [[0, len(row)] for row in rows] if spans is None else spans
    written = []
    for part in np.array_split(np.arange(len(rows)), num_shards):
        columns = ShardColumns(
            np.array([token for i in part for token in rows[i]], token_dtype(vocab_size)),
            np.cumsum([0, *(len(rows[i]) for i in part)], dtype=np.int64),
            np.array([count for i in part for count in spans[i]], np.uint32),
            np.cumsum([0, *(len(spans[i]) for i in part)], dtype=np.int64),
            part.astype(np.uint64),
        )
        written.append(write_shard(path, shard_name(len(written)), columns))
    tokenizer = {
        "name": f"test{vocab_size}", "fingerprint": f"test{vocab_size}", "vocab_size": vocab_size,
        "pad_token_id": vocab_size - 1,
    }  # fmt: skip
    identity = StoreIdentity([{"name": path.name}], tokenizer, {"name": "none"}, {})
    write_manifest(path, identity, written)
    return TokenStore(path)


def random_rows(count: int, seed: int = 0, *, vocab_size: int = 50257) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of 3 to 60 tokens with a prompt of at least two tokens each: ids, spans."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.5, 0.7, count), 3, 60).astype(int)
    rows = [rng.integers(0, vocab_size - 1, n).tolist() for n in lengths]
    prompts = [int(rng.integers(2, n)) for n in lengths]
    return rows, [[prompt, len(row) - prompt] for prompt, row in zip(prompts, rows, strict=True)]
