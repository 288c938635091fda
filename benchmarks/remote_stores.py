"""Stores of random rows for the benchmarks of object storage."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from benchmarks.slow_proxy import SlowProxy
from fastcollate import BatchLoader
from fastcollate.store import manifest as manifests
from fastcollate.store import remote, shards

OPTIONS: dict[str, Any] = {"batch_size": 64, "order": "shards", "mask_prompt": True}
TOKENIZER = {
    "name": "gpt2", "fingerprint": "00", "vocab_size": 50257, "pad_token_id": 50256, "end_token_id": 50256, "files": [],
}  # fmt: skip


def make_store(folder: Path, num_shards: int, rows: int) -> int:
    """Rows of 8 to 400 random ids; returns the bytes of the shards."""
    folder.mkdir()
    rng, infos = np.random.default_rng(0), []
    for number in range(num_shards):
        lengths = np.clip(rng.lognormal(4.4, 0.6, rows), 8, 400).astype(np.int64)
        prompts = (lengths * rng.random(rows)).astype(np.int64)
        columns = shards.ShardColumns(
            rng.integers(0, 50256, int(lengths.sum()), np.uint16),
            np.cumsum([0, *lengths]),
            np.stack([prompts, lengths - prompts], 1).ravel().astype(np.uint32),
            np.arange(rows + 1) * 2,
            np.arange(rows, dtype=np.uint64) + np.uint64(number * rows),
        )
        infos.append(shards.write_shard(folder, shards.shard_name(number), columns, sync=False))
    sources = manifests.sources_of([folder.name], num_shards * rows)
    manifests.write_manifest(folder, manifests.StoreIdentity(sources, TOKENIZER, {"name": "alpaca"}, {}), infos)
    return sum(info.num_bytes for info in infos)


def tiny(folder: Path) -> Path:
    if not folder.exists():
        make_store(folder, 2, 200)
    return folder


def local_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for batch in BatchLoader(folder, **OPTIONS):
        digest.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
    return digest.hexdigest()


def upload(folder: Path, proxy: SlowProxy) -> None:
    """Push a store, not slowed down."""
    with at_full_speed(proxy):
        remote.push(folder, f"s3://bucket/{folder.name}")


def upload_files(folder: Path, proxy: SlowProxy) -> int:
    """Put a folder's files beside them; returns their bytes."""
    with at_full_speed(proxy):
        fsspec.filesystem("s3").put(str(folder), f"bucket/{folder.name}", recursive=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def at_full_speed(proxy: SlowProxy) -> Iterator[None]:
    """Neither latency nor a limit of the rate."""
    slow = proxy.latency_s, proxy.bytes_per_s
    proxy.latency_s, proxy.bytes_per_s = 0.0, None
    yield
    proxy.latency_s, proxy.bytes_per_s = slow
