"""The store that the collate and loader benchmarks share: log-normal lengths, 16-bit ids, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastcollate.store.manifest import StoreIdentity, sources_of, write_manifest
from fastcollate.store.shards import ShardColumns, shard_name, token_dtype, write_shard
from fastcollate.store.store import TokenStore

NUM_ROWS = 200_000
PAD, IGNORE = 50256, -100
GPT2 = {"name": "gpt2", "fingerprint": "00", "vocab_size": 50257, "pad_token_id": PAD, "end_token_id": PAD, "files": []}
LENGTHS = {"distribution": "log-normal", "median": 80, "sigma": 0.7, "clipped_to": [8, 1024]}


def make_lengths(num_rows: int = NUM_ROWS, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Lengths in tokens, distributed as `LENGTHS` says."""
    drawn = np.random.default_rng(seed).lognormal(np.log(LENGTHS["median"]), LENGTHS["sigma"], num_rows)
    return np.clip(np.rint(drawn), *LENGTHS["clipped_to"]).astype(np.int64)


def make_store(path: Path, num_rows: int = NUM_ROWS, *, seed: int = 0) -> TokenStore:
    """A store of one shard of random ids, none of them the padding's; each row is one response."""
    lengths = make_lengths(num_rows, seed=seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(seed + 1).integers(0, PAD, offsets[-1]).astype(token_dtype(GPT2["vocab_size"]))
    spans = np.stack([np.zeros_like(lengths), lengths], 1).astype(np.uint32).ravel()
    columns = ShardColumns(
        ids, offsets, spans, np.arange(0, 2 * num_rows + 1, 2, dtype=np.int64), np.arange(num_rows, dtype=np.uint64)
    )
    path.mkdir(parents=True, exist_ok=True)
    identity = StoreIdentity(sources_of(["made by a benchmark"], num_rows), GPT2, {"name": "alpaca"}, {})
    write_manifest(path, identity, [write_shard(path, shard_name(0), columns)], summary={})
    return TokenStore(path)
